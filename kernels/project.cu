// project.cu: makes gradients of the sums: the diagonal term, the projection onto the tangent of each embedding, the factor β, and the
// output type. Also ∂L/∂β.
// Math     ∂L/∂x = β (I − x̂x̂ᵀ)(u + Σ D_i ŷ) / ‖x‖, times the upstream gradient. u = Σ_j G_j ŷ_j over the negatives
//          = sums·2^SHIFT·2^-12 / n, where n = 2^12/‖packed‖. ŷ is the other side of each positive pair that x belongs to.
//          ∂L/∂τ = −β²·∂L/∂β, ∂L/∂log β = β·∂L/∂β from the dots of the gradient tiles
// In/out   raw embeddings of both towers, norms, D, sums of gradient_product_sm80.cu · gradients, f32, f16 or bf16, any row stride;
//          dots · results
// Tiles    project: grid (1 + ⌈rows of ∂L/∂q / 8⌉ + ⌈rows of ∂L/∂p / 8⌉), the first thread block for ∂L/∂β. sum_dots: one thread block
// Threads  256: one warp per output row
// Shared   64 bytes (reduce.cuh)
// Sync     R1, R2 reduce.cuh
// Numerics f64 until the gradient is stored, which rounds once. The gradients may lie where the sums are: a lane reads an element before it
//          writes it. A row without direction gets zeros. A refused call gets NaN. A row whose norm is not that of the forward call gets
//          NaN as well, and the status then names it. Dots are added in one fixed order
// Limits   gradients are aligned to their elements
#include "common/projection.cuh"

// Runs after each wave but the last. The dots of the last wave are added by `project`.
SHARED_BYTES(sum_dots, REDUCE_BYTES);
KERNEL(sum_dots, REDUCE_THREADS, BY_VALUE(Dots) dots) {
    begin_launch();
    sum_of(dots);
}

// u + Σ D_i ŷ at the columns column … column + 7.
SAMTONE_DEVICE void gather(double (&g)[8], const Backward& b, const Projection& p, u32 row, u32 column, double unit, bool aligned) {
    UNROLL
    for (u32 i = 0; i < 8; ++i) g[i] = 0;
    auto add_sum = [&](u32 index) {
        const double inverse = static_cast<double>(ld_global_f32(p.inverse + index)), scale = inverse > 0 ? unit / inverse : 0;
        UNROLL
        for (u32 i = 0; i < 8; ++i)
            if (column + i < p.own.dim)
                g[i] = fma_rn(scale, static_cast<double>(ld_global_f32(p.sums + index * p.sums_stride + column + i)), g[i]);
    };
    if (p.is_passage == 0) {
        const u32 positive = b.positives != nullptr ? ld_global_nc_u32(b.positives + row) : row;
        const u32 index = b.anchor_index != nullptr ? ld_global_nc_u32(b.anchor_index + row) : row;
        add_sum(row);
        add_scaled(g, p.other, positive, column, aligned, ld_global_f64(b.diagonal + row) * ld_global_f64(p.other_inverse_norm + index));
        return;
    }
    for_each_index(b, row, [&](u32 index, bool paired, u32 anchored) {
        add_sum(index);
        if (!paired) return;
        add_scaled(g, p.other, anchored, column, aligned,
                   ld_global_f64(b.diagonal + anchored) * ld_global_f64(p.other_inverse_norm + anchored));
    });
}

SHARED_BYTES(project, REDUCE_BYTES);
KERNEL(project, REDUCE_THREADS, BY_VALUE(Backward) b) {
    begin_launch();
    if (blockIdx.x == 0) return finish(b);
    const OutputRow at = output_row(b);
    if (!at.exists) return;
    const Projection& p = b.of[at.space];
    const u32 out_row = at.out_row, row = at.row, index = at.index;
    const bool aligned = is_aligned(p.own), other_aligned = is_aligned(p.other);
    const double inverse = ld_global_f64(p.inverse_norm + index);
    const double unit = exp2_f64(ld_global_f64(b.dots.results + SHIFT) - 12);
    const unsigned char* x = p.own.data + row * p.own.row_bytes;
    double factor = b.beta * inverse * upstream_of(b), along = 0, squares = 0;
    // This adds up as `prepare` did, so that the same embedding gives the same bits. The loop is apart to free its registers again.
    for (u32 column = 8 * lane_id(); column < p.own.dim; column += 8 * WARP) {
        float v[8];
        load_eight(v, p.own, x, column, aligned);
        add_squares(squares, v);
    }
    const Norm norm = norm_of(reduce_warp<Sum>(squares));
    if ((!norm.finite || norm.inverse != inverse) && factor == factor) { // the status of a refused call is there already
        factor = not_a_number();
        if (lane_id() == 0) atom_global_min_u32(b.status + CHANGED_QUERY + p.is_passage, row);
    }
    for (u32 pass = 0; pass < 2; ++pass) { // [1] x̂·g / ‖x‖, [2] tangent and store
        for (u32 column = 8 * lane_id(); column < p.own.dim; column += 8 * WARP) {
            double g[8];
            float v[8];
            gather(g, b, p, row, column, unit, other_aligned);
            load_eight(v, p.own, x, column, aligned);
            UNROLL
            for (u32 i = 0; i < 8; ++i) {
                const double own = static_cast<double>(v[i]);
                if (pass == 0) along = fma_rn(g[i], own, along);
                else if (column + i < p.own.dim) store_element(p, out_row, column + i, factor * (g[i] - along * own));
            }
        }
        if (pass == 0) along = reduce_warp<Sum>(along) * inverse * inverse;
    }
}
