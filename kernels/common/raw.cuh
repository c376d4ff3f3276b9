// raw.cuh: embeddings as the caller has them, of any type and any row stride.
#pragma once
#include "problem.cuh"

constexpr u32 TYPE_F32 = 0, TYPE_F16 = 1, TYPE_BF16 = 2;

// The raw embeddings of one tower.
ABI_STRUCT(Raw, {
    const unsigned char* data;
    u64 row_bytes;
    u32 dim, dtype;
});
SAMTONE_DEVICE float low_half(u32 pair, u32 type) {
    return type == TYPE_BF16 ? float_of(pair << 16) : cvt_f32(f16{static_cast<u16>(pair & 0xffff)});
}
SAMTONE_DEVICE float high_half(u32 pair, u32 type) {
    return type == TYPE_BF16 ? float_of(pair & 0xffff0000u) : cvt_f32(f16{static_cast<u16>(pair >> 16)});
}

// Elements column … column + 7 of a raw row, with zeros beyond its end. `aligned` says that rows start and end at multiples of 16 bytes.
SAMTONE_DEVICE void load_eight(float (&v)[8], const Raw& raw, const unsigned char* row, u32 column, bool aligned) {
    UNROLL
    for (u32 i = 0; i < 8; ++i) v[i] = 0;
    if (column >= raw.dim) return;
    if (raw.dtype == TYPE_F32) {
        if (aligned) {
            UNROLL
            for (u32 half = 0; half < 2; ++half) {
                f32x4 four{0, 0, 0, 0};
                if (column + 4 * half < raw.dim) four = ld_global_nc_f32x4(row + 4 * (column + 4 * half));
                v[4 * half] = four.x;
                v[4 * half + 1] = four.y;
                v[4 * half + 2] = four.z;
                v[4 * half + 3] = four.w;
            }
            return;
        }
        UNROLL
        for (u32 i = 0; i < 8; ++i)
            if (column + i < raw.dim) v[i] = ld_global_nc_f32(row + 4 * (column + i));
        return;
    }
    if (aligned) {
        const u32x4 pairs = ld_global_nc_u32x4(row + 2 * column);
        v[0] = low_half(pairs.x, raw.dtype);
        v[1] = high_half(pairs.x, raw.dtype);
        v[2] = low_half(pairs.y, raw.dtype);
        v[3] = high_half(pairs.y, raw.dtype);
        v[4] = low_half(pairs.z, raw.dtype);
        v[5] = high_half(pairs.z, raw.dtype);
        v[6] = low_half(pairs.w, raw.dtype);
        v[7] = high_half(pairs.w, raw.dtype);
        return;
    }
    UNROLL
    for (u32 i = 0; i < 8; ++i)
        if (column + i < raw.dim) v[i] = low_half(ld_global_nc_u16(row + 2 * (column + i)), raw.dtype);
}

SAMTONE_DEVICE bool is_aligned(const Raw& raw) {
    const u64 bytes = raw.dtype == TYPE_F32 ? 4 : 2;
    return ((reinterpret_cast<u64>(raw.data) | raw.row_bytes | raw.dim * bytes) & 15) == 0;
}

// The part of a raw row that is a segment: elements begin … end − 1.
struct Segment {
    Raw raw; // ends with the segment
    u32 begin;
    bool aligned;
};
SAMTONE_DEVICE Segment segment_of(const Raw& raw, bool aligned, u32 begin, u32 end) {
    return {{raw.data, raw.row_bytes, end, raw.dtype}, begin, aligned && begin % 8 == 0 && end % 8 == 0};
}

// What a sum of squares says of a row.
struct Norm {
    double norm, inverse; // both are 0 for a row that has no direction
    bool finite;
};
SAMTONE_DEVICE Norm norm_of(double squares) {
    const bool finite = squares < 1e300; // it is false for NaN. Squares of finite f32 numbers stay far below 1e300
    const double norm = finite && squares > 0 ? sqrt_rn(squares) : 0;
    return {norm, norm > 0 ? 1 / norm : 0, finite};
}
SAMTONE_DEVICE void add_squares(double& squares, const float (&v)[8]) {
    UNROLL
    for (u32 i = 0; i < 8; ++i) squares = fma_rn(static_cast<double>(v[i]), static_cast<double>(v[i]), squares);
}
// Adds the squares of a segment of a row: this lane's share.
SAMTONE_DEVICE void add_segment(double& squares, const Segment& s, const unsigned char* row) {
    for (u32 column = s.begin + 8 * lane_id(); column < s.raw.dim; column += 8 * WARP) {
        float v[8];
        load_eight(v, s.raw, row, column, s.aligned);
        add_squares(squares, v);
    }
}
