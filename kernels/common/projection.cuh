// projection.cuh: what project.cu and project_prefixes.cu share: their parameters, ∂L/∂β, and how gradients are stored.
#pragma once
#include "raw.cuh"
#include "reduce.cuh"

constexpr u32 ROWS_PER_BLOCK = REDUCE_THREADS / WARP;

// How the gradient of one tower is made.
ABI_STRUCT(Projection, {
    Raw own, other; // the raw embeddings of this tower, and of the other one
    const float* sums;
    u64 sums_stride;                                 // from row to row, in elements
    const float* inverse;                            // of this tower, by index
    const double *inverse_norm, *other_inverse_norm; // by index
    unsigned char* out;
    u64 out_row_bytes;
    u32 out_type, rows; // of the output. There are no rows if the gradient is not wanted
    u32 first_row;      // of the queries: the row that the first output row belongs to
    u32 is_passage;
});

// The dots of a wave. Their sum is added to that of earlier waves.
ABI_STRUCT(Dots, {
    const double* dots;
    double* results;
    u32 count;
    u32 first; // starts from nothing, instead of adding
});

ABI_STRUCT(Backward, {
    Projection of[2];
    Dots dots;
    const double* diagonal;
    // Pairs. For queries: the passage that is each row's positive, and its index (null for the identity). For passages: the indices behind
    // passage n are occurrences[occurrence_start[n] … occurrence_start[n + 1] − 1] (null for the identity), and the row of each index.
    const u32 *positives, *anchor_index, *occurrence_start, *occurrences, *anchor_row;
    const float* upstream; // null for 1
    u32* status;
    double beta, factor;    // `factor` is the host's part of the upstream gradient
    u32 row_begin, row_end; // the rows of the shard
    u32 zero_is_error, padding;
});

// BETA_SUM ← (first ? 0 : BETA_SUM) + Σ dots. Only thread 0 gets the sum with what was there before.
SAMTONE_DEVICE double sum_of(const Dots& d SAMTONE_SITE) {
    double x = 0;
    for (u32 t = threadIdx.x; t < d.count; t += REDUCE_THREADS) x += ld_global_f64(d.dots + t SAMTONE_EMULATED_AS(, site));
    x = reduce_block<Sum>(x SAMTONE_EMULATED_AS(, site));
    if (threadIdx.x != 0) return x;
    if (d.first == 0) x += ld_global_f64(d.results + BETA_SUM SAMTONE_EMULATED_AS(, site));
    st_global_f64(d.results + BETA_SUM, x SAMTONE_EMULATED_AS(, site));
    return x;
}

// The upstream gradient, or NaN if the call is refused.
SAMTONE_DEVICE double upstream_of(const Backward& b SAMTONE_SITE) {
    if (is_refused(b.status, b.zero_is_error SAMTONE_EMULATED_AS(, site))) return not_a_number();
    return b.upstream != nullptr ? b.factor * ld_global_f32(b.upstream SAMTONE_EMULATED_AS(, site)) : b.factor;
}

// ∂L/∂τ and ∂L/∂log β from Σ G (s − s⁺). That is ∂L/∂β without the cancellation of the negatives and the positive.
SAMTONE_DEVICE void finish(const Backward& b) {
    const double sum = sum_of(b.dots);
    if (threadIdx.x != 0) return;
    const double grad_beta = upstream_of(b) * exp2_f64(ld_global_f64(b.dots.results + SHIFT)) * sum;
    st_global_f64(b.dots.results + GRAD_TAU, -b.beta * b.beta * grad_beta);
    st_global_f64(b.dots.results + GRAD_LOG_BETA, b.beta * grad_beta);
}

SAMTONE_DEVICE void store_element(const Projection& p, u32 row, u32 column, double value) {
    unsigned char* to = p.out + row * p.out_row_bytes;
    const float x = static_cast<float>(value);
    if (p.out_type == TYPE_F32) st_global_f32(to + 4 * column, x);
    else st_global_u16(to + 2 * column, p.out_type == TYPE_F16 ? cvt_rn_f16_f32(x).bits : cvt_rn_bf16_f32(x).bits);
}

// Adds one embedding times a number.
SAMTONE_DEVICE void add_scaled(double (&g)[8], const Raw& raw, u32 row, u32 column, bool aligned, double scale) {
    float y[8];
    load_eight(y, raw, raw.data + row * raw.row_bytes, column, aligned);
    UNROLL
    for (u32 i = 0; i < 8; ++i) g[i] = fma_rn(scale, static_cast<double>(y[i]), g[i]);
}

// The row of an output that a warp makes.
struct OutputRow {
    u32 space, out_row;
    u32 row, index; // the embedding, and the first index behind it
    bool exists;
};
// Thread block 0 makes no rows: see `finish`.
SAMTONE_DEVICE OutputRow output_row(const Backward& b SAMTONE_SITE) {
    u32 block = blockIdx.x - 1;
    const u32 blocks = (b.of[0].rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK, space = block < blocks ? 0 : 1;
    if (space == 1) block -= blocks;
    const u32 out_row = block * ROWS_PER_BLOCK + warp_id();
    if (out_row >= b.of[space].rows) return {space, out_row, 0, 0, false};
    const u32 row = b.of[space].first_row + out_row;
    u32 index = row;
    if (b.of[space].is_passage != 0 && b.occurrence_start != nullptr)
        index = ld_global_nc_u32(b.occurrences + ld_global_nc_u32(b.occurrence_start + row SAMTONE_EMULATED_AS(, site))
                                     SAMTONE_EMULATED_AS(, site));
    return {space, out_row, row, index, true};
}

// Calls `visit(index, whether a row of the shard has its positive there, that row)` for every index behind a passage.
template <class Visit> SAMTONE_DEVICE void for_each_index(const Backward& b, u32 passage, Visit visit) {
    u32 first = passage, last = passage + 1;
    if (b.occurrence_start != nullptr) {
        first = ld_global_nc_u32(b.occurrence_start + passage);
        last = ld_global_nc_u32(b.occurrence_start + passage + 1);
    }
    for (u32 k = first; k < last; ++k) {
        const u32 index = b.occurrence_start != nullptr ? ld_global_nc_u32(b.occurrences + k) : k;
        const u32 anchored = ld_global_nc_u32(b.anchor_row + index);
        visit(index, anchored >= b.row_begin && anchored < b.row_end, anchored); // it is of no shard if it is NONE
    }
}
