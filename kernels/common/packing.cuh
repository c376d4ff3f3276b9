// packing.cuh: what prepare.cu and prepare_prefixes.cu share: where packed embeddings lie, and what is known of the positives.
#pragma once
#include "raw.cuh"
#include "reduce.cuh"

constexpr u32 ROWS_PER_BLOCK = REDUCE_THREADS / WARP;
ABI_CONSTANT u32 PACK_F16 = 0, PACK_F16X3 = 1, PACK_F32 = 2;
constexpr double COSINE_TIE = 1.0 / (1 << 20); // src/mask.rs

ABI_STRUCT(Packing, {
    Raw raw;
    const u32* order;
    unsigned char* packed;
    u64 plane;
    float* inverse;
    double* inverse_norm;
    Fault* faults;        // by index
    u64 row_pitch, panel; // bytes from row to row of a panel, and from panel to panel (problem.cuh)
    u32 indices, padded, row_bytes, format;
    u32 swizzled, parts;
    u32 index[MAX_CUTS], row[MAX_CUTS]; // of each part of the space: its first index, and the packed row of that index
});

ABI_STRUCT(Positives, {
    const u32* positives;  // the passage that is each row's positive; null for the identity
    const u32x2* row_keys; // query key, passage key
    double* positive;      // s⁺
    AnchorKeys* anchors;
    u32 *ticket, *status;
    double margin;       // +∞ if there is none
    u32 wanted, padding; // `wanted` is 0 if they are there already, as the norms are
});

ABI_STRUCT(Prepare, {
    Packing of[2];
    Positives positives;
});

// The positive and the keys of a row go to `to`, which is the row itself. With prefixes it is the row's place among all prefixes.
SAMTONE_DEVICE void store_anchor(const Positives& p, u32 row, u64 to, double cosine) {
    const u32x2 keys = ld_global_nc_u32x2(p.row_keys + row);
    const float threshold = static_cast<float>(cosine + p.margin + COSINE_TIE), above = static_cast<float>(cosine + COSINE_TIE);
    st_global_f64(p.positive + to, cosine);
    st_global_u32x4(p.anchors + to, {keys.x, keys.y, bits_of(threshold), bits_of(above)});
}

// What a warp packs: one row of one space.
struct PackedRow {
    u32 space, packed, index; // its space, its place among the packed rows, and its index in the space
    bool exists;              // false for the rows that fill up the last tile of a part
    u32 row;                  // the raw embedding behind the index
};
SAMTONE_DEVICE PackedRow packed_row_of(const Prepare& all SAMTONE_SITE) {
    u32 packed = blockIdx.x * ROWS_PER_BLOCK + warp_id();
    const u32 space = packed < all.of[0].padded ? 0 : 1; // a thread block has rows of one space
    if (space == 1) packed -= all.of[0].padded;
    const Packing& p = all.of[space];
    u32 part = 0;
    while (part + 1 < p.parts && packed >= p.row[part + 1]) ++part;
    const u32 index = p.index[part] + packed - p.row[part], end = part + 1 < p.parts ? p.index[part + 1] : p.indices;
    const bool exists = index < end;
    u32 row = index;
    if (exists && p.order != nullptr) row = ld_global_nc_u32(p.order + index SAMTONE_EMULATED_AS(, site));
    return {space, packed, index, exists, row};
}

// Where the bytes of a packed row are, from `byte` on, in whole chunks.
struct PackedAt {
    unsigned char* row;
    u64 panel;
    u32 swizzle;
    SAMTONE_MEMBER unsigned char* chunk(u32 byte) const { return row + byte / 128 * panel + (byte / 16 % 8 ^ swizzle) * 16; }
};
SAMTONE_DEVICE PackedAt packed_at(const Packing& p, u32 packed) {
    return {p.packed + packed * p.row_pitch, p.panel, p.swizzled != 0 ? packed % 8 : 0};
}

// Stores eight elements, scaled already, at column `column` of the packed row.
SAMTONE_DEVICE void pack_eight(const Packing& p, const PackedAt& at, u32 column, const float (&v)[8] SAMTONE_SITE) {
    if (p.format == PACK_F32) {
        st_global_f32x4(at.chunk(4 * column), {v[0], v[1], v[2], v[3]} SAMTONE_EMULATED_AS(, site));
        st_global_f32x4(at.chunk(4 * column + 16), {v[4], v[5], v[6], v[7]} SAMTONE_EMULATED_AS(, site));
        return;
    }
    u32 high[4], low[4];
    UNROLL
    for (u32 i = 0; i < 4; ++i) {
        high[i] = cvt_rn_f16x2_f32(v[2 * i], v[2 * i + 1]);
        low[i] = cvt_rn_f16x2_f32(v[2 * i] - low_half(high[i], TYPE_F16), v[2 * i + 1] - high_half(high[i], TYPE_F16));
    }
    st_global_u32x4(at.chunk(2 * column), {high[0], high[1], high[2], high[3]} SAMTONE_EMULATED_AS(, site));
    if (p.format == PACK_F16X3)
        st_global_u32x4(at.chunk(2 * column) + p.plane, {low[0], low[1], low[2], low[3]} SAMTONE_EMULATED_AS(, site));
}

// The power of two that makes a norm 2^12 … 2^13.
SAMTONE_DEVICE i32 power_for(double norm) { return 12 - (static_cast<i32>(bits_of(norm) >> 52) - 1023); }
