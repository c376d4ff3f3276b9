// project.cu: the diagonal term, the projection onto the tangent of each embedding, the factor β, and the output type.
// Math     ∂L/∂x = β (I − x̂x̂ᵀ)(u + Σ D_i ŷ) / ‖x‖, u = Σ_j G_j ŷ_j over the negatives = sums·2^SHIFT·2^-12 / n, where n = 2^12/‖packed‖
//          and ŷ is the other side of each positive pair that x belongs to; times the upstream gradient
// In/out   raw embeddings of both towers, norms, D, sums of gradient_product_sm80.cu · gradients, f32, f16 or bf16, any row stride
// Tiles    grid (⌈output rows / 8⌉)
// Threads  256: one warp per output row
// Shared   none
// Sync     none but exchanges within a warp
// Numerics f64 until it is stored, rounded once. May write where the sums are: a lane reads an element before it writes it. A row
//          without direction gets zeros; a refused call NaN
// Limits   gradients are aligned to their elements
#include "common/raw.cuh"
#include "common/reduce.cuh"

struct Projection {
    Raw own, other;               // raw embeddings of the tower, and of the other one
    const float* sums;
    u64 sums_stride;              // elements
    const float* inverse;         // of the tower, by index
    const double *inverse_norm, *other_inverse_norm; // by index
    const double *diagonal, *results;
    // Pairs. Queries: the passage and the index of each row's positive (null: the identity). Passages: the indices behind each
    // passage, occurrence_start[n] … occurrence_start[n + 1] (null: the identity), and the row that each index anchors.
    const u32 *positives, *anchor_index, *occurrence_start, *occurrences, *anchor_row;
    const float* upstream;        // null for 1
    const u32* status;
    unsigned char* out;
    u64 out_row_bytes;
    double factor;                // β, times the host's part of the upstream gradient
    u32 out_type, rows;           // of the output
    u32 first_row;                // queries: the row of the first output row
    u32 row_begin, row_end;       // rows of the shard
    u32 is_passage, zero_is_error, padding;
};

SAMTONE_DEVICE void store_element(const Projection& p, u32 row, u32 column, double value) {
    unsigned char* to = p.out + row * p.out_row_bytes;
    const float x = static_cast<float>(value);
    if (p.out_type == TYPE_F32) st_global_f32(to + 4 * column, x);
    else st_global_u16(to + 2 * column, p.out_type == TYPE_F16 ? cvt_rn_f16_f32(x).bits : cvt_rn_bf16_f32(x).bits);
}

// One embedding times a number.
SAMTONE_DEVICE void add_scaled(double (&g)[8], const Raw& raw, u32 row, u32 column, bool aligned, double scale) {
    float y[8];
    load_eight(y, raw, raw.data + row * raw.row_bytes, column, aligned);
    UNROLL
    for (u32 i = 0; i < 8; ++i) g[i] = fma_rn(scale, static_cast<double>(y[i]), g[i]);
}

// u + Σ D_i ŷ at columns column … column + 7.
SAMTONE_DEVICE void gather(double (&g)[8], const Projection& p, u32 row, u32 column, double unit, bool aligned) {
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
        const u32 positive = p.positives != nullptr ? ld_global_nc_u32(p.positives + row) : row;
        const u32 index = p.anchor_index != nullptr ? ld_global_nc_u32(p.anchor_index + row) : row;
        add_sum(row);
        add_scaled(g, p.other, positive, column, aligned, ld_global_f64(p.diagonal + row) * ld_global_f64(p.other_inverse_norm + index));
        return;
    }
    u32 first = row, last = row + 1;
    if (p.occurrence_start != nullptr) {
        first = ld_global_nc_u32(p.occurrence_start + row);
        last = ld_global_nc_u32(p.occurrence_start + row + 1);
    }
    for (u32 k = first; k < last; ++k) {
        const u32 index = p.occurrence_start != nullptr ? ld_global_nc_u32(p.occurrences + k) : k;
        const u32 anchored = ld_global_nc_u32(p.anchor_row + index);
        add_sum(index);
        if (anchored < p.row_begin || anchored >= p.row_end) continue; // also NONE
        add_scaled(g, p.other, anchored, column, aligned,
                   ld_global_f64(p.diagonal + anchored) * ld_global_f64(p.other_inverse_norm + anchored));
    }
}

KERNEL(project, REDUCE_THREADS, BY_VALUE(Projection) p) {
    const u32 out_row = blockIdx.x * (REDUCE_THREADS / WARP) + warp_id();
    if (out_row >= p.rows) return;
    const u32 row = p.first_row + out_row;
    u32 index = row;
    if (p.is_passage != 0 && p.occurrence_start != nullptr)
        index = ld_global_nc_u32(p.occurrences + ld_global_nc_u32(p.occurrence_start + row));
    const bool aligned = is_aligned(p.own), other_aligned = is_aligned(p.other);
    const double inverse = ld_global_f64(p.inverse_norm + index);
    const double unit = exp2_f64(ld_global_f64(p.results + SHIFT) - 12);
    const unsigned char* x = p.own.data + row * p.own.row_bytes;
    double along = 0, factor = p.factor * inverse;
    if (p.upstream != nullptr) factor *= ld_global_f32(p.upstream);
    if (is_refused(p.status, p.zero_is_error)) factor = not_a_number();
    for (u32 pass = 0; pass < 2; ++pass) { // [1] x̂·g / ‖x‖, [2] tangent and store
        for (u32 column = 8 * lane_id(); column < p.own.dim; column += 8 * WARP) {
            double g[8];
            float v[8];
            gather(g, p, row, column, unit, other_aligned);
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
