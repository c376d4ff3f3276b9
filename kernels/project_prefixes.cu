// project_prefixes.cu: project.cu for calls with prefixes.
// Math     In segment s, ∂L/∂x = β (u − x·A), times the upstream gradient, with u = sums·2^(SHIFT − 24 + t^s) + Σ F^s_i y − x·R^s, where y are
//          the other sides of the positive pairs that x belongs to, and F and R are those of prefixes.cu. A = x·u / ‖x‖² over all segments
//          is what is left along the embedding: the radial part of the longest prefix. Columns behind the longest prefix get 0
// In/out   raw embeddings of both towers, norms, scales, F, R, sums of the gradient products in packed columns · as project.cu
// Tiles    as project.cu
// Threads  256: one warp per output row
// Shared   64 bytes (reduce.cuh)
// Sync     R1, R2 reduce.cuh
// Numerics as project.cu, but the sums have memory of their own
// Limits   gradients are aligned to their elements
#include "common/projection.cuh"

// What `project_prefixes` reads besides.
ABI_STRUCT(Joined, {
    const double* factors;    // F, [prefix][row]
    const double* radials[2]; // R of each output row of each space, [prefix][row]; there is none of the longest prefix
    u32 element_bytes;        // of packed embeddings
    u32 padding;
});

// One segment of an output row, as its warp sees it.
struct Place {
    u32 prefix, begin, end, packed; // columns begin … end − 1, which begin at column `packed` of the sums
    double unit;                    // of the sums
    double radial;                  // R
};

// u at the columns column … column + 7.
SAMTONE_DEVICE void gather(double (&g)[8], const Backward& b, const Prefixes& prefixes, const Joined& joined, const Projection& p,
                           const Place& at, u32 row, u32 column, const Segment& other, const float (&own)[8]) {
    UNROLL
    for (u32 i = 0; i < 8; ++i) g[i] = -at.radial * static_cast<double>(own[i]);
    const double* factors = joined.factors + static_cast<u64>(at.prefix) * prefixes.rows;
    auto add_sum = [&](u32 index) {
        const float* sums = p.sums + index * p.sums_stride + at.packed + (column - at.begin);
        UNROLL
        for (u32 i = 0; i < 8; ++i)
            if (column + i < at.end) g[i] = fma_rn(at.unit, static_cast<double>(ld_global_f32(sums + i)), g[i]);
    };
    auto add_pair = [&](u32 other_row, u32 anchor) {
        add_scaled(g, other.raw, other_row, column, other.aligned, ld_global_f64(factors + anchor));
    };
    if (p.is_passage == 0) {
        add_sum(row);
        add_pair(b.positives != nullptr ? ld_global_nc_u32(b.positives + row) : row, row);
        return;
    }
    for_each_index(b, row, [&](u32 index, bool paired, u32 anchored) {
        add_sum(index);
        if (paired) add_pair(anchored, anchored);
    });
}

SHARED_BYTES(project_prefixes, REDUCE_BYTES);
KERNEL(project_prefixes, REDUCE_THREADS, BY_VALUE(Backward) b, BY_VALUE(Prefixes) prefixes, BY_VALUE(Joined) joined) {
    begin_launch();
    if (blockIdx.x == 0) return finish(b);
    const OutputRow output = output_row(b);
    if (!output.exists) return;
    const Projection& p = b.of[output.space];
    const u32 space = output.space, out_row = output.out_row, row = output.row, index = output.index, indices = prefixes.indices[space];
    const bool aligned = is_aligned(p.own), other_aligned = is_aligned(p.other);
    const unsigned char* x = p.own.data + row * p.own.row_bytes;
    double factor = b.beta * upstream_of(b), along = 0, inverse = 0;
    // This adds up as `prepare_prefixes` did, so that the same embedding gives the same bits.
    double squares = 0;
    bool changed = false;
    u32 begin = 0;
    for (u32 k = 0; k < prefixes.count; ++k) {
        const u32 end = ld_global_nc_u32(prefixes.dims + k);
        add_segment(squares, segment_of(p.own, aligned, begin, end), x);
        const Norm norm = norm_of(reduce_warp<Sum>(squares));
        inverse = ld_global_f64(p.inverse_norm + static_cast<u64>(k) * indices + index);
        changed = changed || !norm.finite || norm.inverse != inverse;
        begin = end;
    }
    if (changed && factor == factor) { // the status of a refused call is there already
        factor = not_a_number();
        if (lane_id() == 0) atom_global_min_u32(b.status + CHANGED_QUERY + p.is_passage, row);
    }
    const double shift = ld_global_f64(b.dots.results + SHIFT) - 24;
    for (u32 pass = 0; pass < 2; ++pass) { // [1] x·u / ‖x‖², [2] tangent and store
        Place at{0, 0, 0, 0, 0, 0};
        for (u32 k = 0; k < prefixes.count; ++k) {
            at.prefix = k;
            at.begin = at.end;
            at.end = ld_global_nc_u32(prefixes.dims + k);
            at.packed = k > 0 ? ld_global_nc_u32(prefixes.segments + k - 1) / joined.element_bytes : 0;
            at.unit = exp2_f64(shift + ld_global_scales(prefixes.scales[space] + static_cast<u64>(k) * indices + index).power);
            at.radial = k + 1 < prefixes.count ? ld_global_f64(joined.radials[space] + static_cast<u64>(k) * p.rows + out_row) : 0;
            const Segment own = segment_of(p.own, aligned, at.begin, at.end), other = segment_of(p.other, other_aligned, at.begin, at.end);
            for (u32 column = at.begin + 8 * lane_id(); column < at.end; column += 8 * WARP) {
                double g[8];
                float v[8];
                load_eight(v, own.raw, x, column, own.aligned);
                gather(g, b, prefixes, joined, p, at, row, column, other, v);
                UNROLL
                for (u32 i = 0; i < 8; ++i) {
                    const double entry = static_cast<double>(v[i]);
                    if (pass == 0) along = fma_rn(g[i], entry, along);
                    else if (column + i < at.end) store_element(p, out_row, column + i, factor * (g[i] - along * entry));
                }
            }
        }
        if (pass == 0) along = reduce_warp<Sum>(along) * inverse * inverse;
        else
            for (u32 column = at.end + lane_id(); column < p.own.dim; column += WARP) store_element(p, out_row, column, factor * 0);
    }
}
