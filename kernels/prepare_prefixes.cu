// prepare_prefixes.cu: prepare.cu for calls with prefixes.
// Math     n^k = ‖x[: d_k]‖ (f64); packed segment k = x[d_(k−1) : d_k]·2^t with 2^t·n^k in [2^12, 2^13), t = t^k; inverse^k = 2^12/(2^t·n^k);
//          scales^k (problem.cuh). s⁺ᵢ of each prefix, with its thresholds
// In/out   as prepare.cu. Norms, inverses, scales, positives and anchors have a part for each prefix, one after the other. A row is not
//          finite if its longest prefix is not, and has norm zero if its shortest prefix has
// Tiles    as prepare.cu
// Threads  256: one warp per index. The warp of a query also reads its positive
// Shared   none
// Sync     none but exchanges within a warp
// Numerics as prepare.cu. Sums of squares run on from segment to segment. A prefix of norm zero has entries of zero alone. It takes the
//          power of the next prefix that has a direction, because its columns get gradients from that
// Limits   as prepare.cu; segments of packed rows end at multiples of 128 bytes
#include "common/packing.cuh"

// Adds the products of a segment with that of another row.
SAMTONE_DEVICE void add_products(double& dot, const Segment& s, const unsigned char* row, const Segment& other, const unsigned char* other_row) {
    for (u32 column = s.begin + 8 * lane_id(); column < s.raw.dim; column += 8 * WARP) {
        float v[8], w[8];
        load_eight(v, s.raw, row, column, s.aligned);
        load_eight(w, other.raw, other_row, column, other.aligned);
        UNROLL
        for (u32 i = 0; i < 8; ++i) dot = fma_rn(static_cast<double>(v[i]), static_cast<double>(w[i]), dot);
    }
}

KERNEL(prepare_prefixes, REDUCE_THREADS, BY_VALUE(Prepare) all, BY_VALUE(Prefixes) prefixes) {
    begin_launch();
    const Positives& positives = all.positives;
    if (blockIdx.x == 0)
        for (u32 k = threadIdx.x; k < prefixes.count; k += REDUCE_THREADS) st_global_u32(positives.ticket + k, 0);
    const PackedRow at = packed_row_of(all);
    const Packing& p = all.of[at.space];
    const PackedAt out = packed_at(p, at.packed);
    const bool aligned = is_aligned(p.raw), pairs = at.exists && at.space == 0 && positives.wanted != 0;
    const unsigned char* x = p.raw.data + at.row * p.raw.row_bytes;
    const Raw& other = all.of[1].raw;
    const bool other_aligned = is_aligned(other);
    u32 positive = at.row;
    if (pairs && positives.positives != nullptr) positive = ld_global_nc_u32(positives.positives + at.row);
    const unsigned char* y = other.data + positive * other.row_bytes;
    const u32 bytes = p.format == PACK_F32 ? 4 : 2, indices = prefixes.indices[at.space];
    u32x4* scales = const_cast<u32x4*>(prefixes.scales[at.space]) + at.index;
    auto store_scales = [&](u32 k, float next, float step, i32 power) {
        if (lane_id() == 0) st_global_u32x4(scales + static_cast<u64>(k) * indices, {bits_of(next), bits_of(step), static_cast<u32>(power), 0});
    };

    double squares = 0, other_squares = 0, dot = 0, last_norm = 0;
    i32 last_power = 0;
    u32 begin = 0, packed_begin = 0, pending = 0; // the scales of the prefixes from `pending` on are not stored yet
    bool zero = false, changed = false;
    Norm norm{0, 0, true};
    for (u32 k = 0; k < prefixes.count; ++k) {
        const u32 end = ld_global_nc_u32(prefixes.dims + k), packed_end = ld_global_nc_u32(prefixes.segments + k);
        const Segment segment = segment_of(p.raw, aligned, begin, end);
        double scale = 0;
        if (at.exists) { // [1] norms, and of a query the cosine with its positive
            add_segment(squares, segment, x);
            const double all_squares = reduce_warp<Sum>(squares);
            norm = norm_of(all_squares);
            double inverse = 0;
            if (norm.norm > 0) {
                const i32 power = power_for(norm.norm);
                scale = power_of_two(power);
                inverse = 4096 / (norm.norm * scale);
                for (; pending < k; ++pending) {
                    if (last_norm > 0)
                        store_scales(pending, static_cast<float>(last_norm * scale), static_cast<float>(power_of_two(power - last_power)),
                                     last_power);
                    else store_scales(pending, 0, 1, power);
                }
                last_norm = norm.norm;
                last_power = power;
            }
            if (k == 0) zero = all_squares == 0;
            const u64 to = static_cast<u64>(k) * indices + at.index;
            if (lane_id() == 0) {
                st_global_f32(p.inverse + to, static_cast<float>(inverse));
                if (positives.wanted != 0) st_global_f64(p.inverse_norm + to, norm.inverse);
                else changed = changed || norm.inverse != ld_global_f64(p.inverse_norm + to);
            }
            if (pairs) {
                const Segment others = segment_of(other, other_aligned, begin, end);
                add_segment(other_squares, others, y);
                add_products(dot, segment, x, others, y);
                const double other_all = reduce_warp<Sum>(other_squares), all_products = reduce_warp<Sum>(dot);
                if (lane_id() == 0)
                    store_anchor(positives, at.row, static_cast<u64>(k) * prefixes.rows + at.row,
                                 all_products * norm.inverse * norm_of(other_all).inverse);
            }
        }
        // [2] pack
        for (u32 column = 8 * lane_id(); column < (packed_end - packed_begin) / bytes; column += 8 * WARP) {
            float v[8] = {};
            if (scale > 0) {
                load_eight(v, segment.raw, x, begin + column, segment.aligned);
                UNROLL
                for (u32 i = 0; i < 8; ++i) v[i] = static_cast<float>(v[i] * scale); // in f64, because the power alone may exceed f32
            }
            pack_eight(p, out, packed_begin / bytes + column, v);
        }
        begin = end;
        packed_begin = packed_end;
    }
    if (!at.exists) return;
    for (; pending < prefixes.count; ++pending) store_scales(pending, 0, 1, last_power);
    if (lane_id() != 0) return;
    if (positives.wanted != 0) {
        st_global_u32x2(p.faults + at.index, {norm.finite ? NONE : at.row, zero ? at.row : NONE});
    } else if (changed || !norm.finite) {
        // The status gets the lowest row, in whichever order they come.
        atom_global_min_u32(positives.status + (norm.finite ? REPACKED_QUERY : NON_FINITE_QUERY) + at.space, at.row);
    }
}
