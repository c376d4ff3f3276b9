// combine.cu: the O(M) steps between the heavy passes: partial sums → loss, metrics, coefficients; and the dot of ∂L/∂β.
// Math     src/combine.rs, line by line: log D_gi = log Σ_b Σ_j exp(β (s^b_ij − s⁺ᵢ)), ℓ_gi − β s⁺ᵢ = log(e_g + D_gi),
//          D_i = −Σ_g c_g w̃ᵢ D_gi / (e_g + D_gi), log a^b_i = log Σ_{g∋b} c_g w̃ᵢ exp(−ℓ_gi)
// In/out   partials and counts of the logsumexp pass · sums [4][rows], above [2][rows], row_losses, diagonal [rows],
//          log_coefficients [4][rows], results (problem.cuh)
// Tiles    merge: grid (⌈rows / 256⌉, 4): a thread is one row in one block. combine: grid (⌈rows / 256⌉). Others: one block
// Threads  256
// Shared   64 bytes (reduce.cuh)
// Sync     R1, R2 reduce.cuh
// Numerics f64, logarithms. Tiles, super-blocks and rows are added in one fixed order: same bits on every run
// Limits   none
#include "common/reduce.cuh"

SAMTONE_DEVICE void merge_into(ExpSum& all, double sum, i32 exponent) {
    if (sum == 0) return;
    if (all.sum == 0) {
        all = {sum, exponent, 0};
        return;
    }
    const i32 top = all.exponent > exponent ? all.exponent : exponent;
    all = {all.sum * power_of_two(all.exponent - top) + sum * power_of_two(exponent - top), top, 0};
}

// Adds the partials of the tiles of a wave to the sums of every row; `first`: instead of adding, starts from nothing.
KERNEL(merge, REDUCE_THREADS, BY_VALUE(Wave) wave, const Partial* partials, const u32* counts, const u32* anchor_index,
       ExpSum* sums, u32* above, u32 rows, u32 tile, u32 first) {
    const u32 row = blockIdx.x * REDUCE_THREADS + threadIdx.x, block = blockIdx.y;
    if (row >= rows) return;
    const bool ranked = block == QP || block == PQ;
    u32 index = row;
    if ((block == PQ || block == PP) && anchor_index != nullptr) index = ld_global_nc_u32(anchor_index + row);
    ExpSum* to = sums + static_cast<u64>(block) * rows + row;
    u32* count_to = above + static_cast<u64>(block) * rows + row;
    ExpSum all{0, 0, 0};
    u32 count = 0;
    if (first == 0) {
        all = ld_global_exp_sum(to);
        if (ranked) count = ld_global_u32(count_to);
    }
    for (u32 b = 0; b < wave.count; ++b) {
        const SuperBlock& s = wave.blocks[b];
        for (u32 side = 0; side < 2; ++side) {
            const Edge &edge = side == 0 ? s.row : s.col, &other = side == 0 ? s.col : s.row;
            if (edge.sums == 0 || edge.block != block || index < edge.begin || index >= edge.end) continue;
            const u32 local = index - edge.begin;
            // Of a triangle, tiles right of the diagonal give rows, and those above it columns.
            const u32 begin = s.triangle != 0 && side == 0 ? local / tile : 0;
            const u32 end = s.triangle != 0 && side == 1 ? local / tile : other.tiles;
            for (u32 t = begin; t < end; ++t) {
                const u64 at = (side == 0 ? s.row_partials : s.col_partials) + static_cast<u64>(t) * (edge.tiles * tile) + local;
                const u32x2 partial = ld_global_u32x2(partials + at);
                merge_into(all, static_cast<double>(float_of(partial.x)), static_cast<i32>(partial.y));
                if (s.ranks != 0) count += ld_global_u32(counts + at);
            }
        }
    }
    st_global_exp_sum(to, all);
    if (ranked) st_global_u32(count_to, count);
}

struct Combine {
    const ExpSum* sums;
    const u32* above;
    const double *positive, *weight; // s⁺, w̃
    const Group* groups;
    double *row_losses, *diagonal, *log_coefficients;
    double* block_results; // [grid][8]: loss, four metrics, log of the largest share
    u32* status;
    double beta;
    u32 rows, group_count;
};

constexpr double LN_2 = 0.693147180559945309417232121458;

SAMTONE_DEVICE double ln_of(const ExpSum& x) { return x.sum == 0 ? minus_infinity() : log_f64(x.sum) + x.exponent * LN_2; }

// log(exp(a) + exp(b)).
SAMTONE_DEVICE double log_add_exp(double a, double b) {
    const double top = a > b ? a : b, low = a > b ? b : a;
    return top == minus_infinity() ? top : top + log1p_f64(exp_f64(low - top));
}

// log(e + exp(x)).
SAMTONE_DEVICE double log_add(double e, double x) {
    if (e == 0) return x;
    const double base = log_f64(e), y = x - base;
    return base + (y > 0 ? y + log1p_f64(exp_f64(-y)) : log1p_f64(exp_f64(y)));
}

// log D of a group, from the logarithms of the row's sums.
SAMTONE_DEVICE double log_negatives(u32 blocks, const double (&ln)[BLOCKS], double positive) {
    double log_d = minus_infinity();
    UNROLL
    for (u32 b = 0; b < BLOCKS; ++b)
        if ((blocks >> b & 1) != 0) log_d = log_add_exp(log_d, ln[b] - positive);
    return log_d;
}

KERNEL(combine, REDUCE_THREADS, BY_VALUE(Combine) c) {
    const u32 row = blockIdx.x * REDUCE_THREADS + threadIdx.x;
    double loss = 0, precision[2] = {}, mrr[2] = {}, magnitude = minus_infinity();
    if (row < c.rows) {
        const double positive = c.beta * ld_global_f64(c.positive + row), weight = ld_global_nc_f64(c.weight + row);
        double ln[BLOCKS], coefficients[BLOCKS], row_loss = 0, diagonal = 0;
        UNROLL
        for (u32 b = 0; b < BLOCKS; ++b) {
            ln[b] = ln_of(ld_global_exp_sum(c.sums + static_cast<u64>(b) * c.rows + row));
            coefficients[b] = minus_infinity();
        }
        for (u32 g = 0; g < c.group_count; ++g) {
            const unsigned char* group = reinterpret_cast<const unsigned char*>(c.groups + g);
            const double coefficient = ld_global_nc_f64(group);
            const u32x2 rest = ld_global_nc_u32x2(group + 8);
            if (!(coefficient > 0)) continue;
            const double e = rest.y, log_d = log_negatives(rest.x, ln, positive);
            if (e == 0 && log_d == minus_infinity()) {
                if (weight != 0) atom_global_min_u32(c.status + NO_NEGATIVE, row);
                continue;
            }
            const double relative = log_add(e, log_d);
            row_loss += coefficient * relative;
            if (weight == 0) continue;
            diagonal -= coefficient * weight * exp_f64(log_d - relative);
            const double log_coefficient = log_f64(coefficient * weight) - relative - positive;
            UNROLL
            for (u32 b = 0; b < BLOCKS; ++b)
                if ((rest.x >> b & 1) != 0) coefficients[b] = log_add_exp(coefficients[b], log_coefficient);
        }
        st_global_f64(c.row_losses + row, row_loss);
        st_global_f64(c.diagonal + row, diagonal);
        UNROLL
        for (u32 b = 0; b < BLOCKS; ++b) {
            st_global_f64(c.log_coefficients + static_cast<u64>(b) * c.rows + row, coefficients[b]);
            const double share = coefficients[b] + ln[b];
            if (share > magnitude) magnitude = share;
        }
        loss = row_loss * weight;
        UNROLL
        for (u32 k = 0; k < 2; ++k) {
            const u32 above = ld_global_u32(c.above + static_cast<u64>(k) * c.rows + row);
            precision[k] = above == 0 ? weight : 0;
            mrr[k] = weight / (1.0 + above);
        }
    }
    const double sums[5] = {loss, precision[0], mrr[0], precision[1], mrr[1]};
    UNROLL
    for (u32 k = 0; k < 5; ++k) {
        const double all = reduce_block<Sum>(sums[k]);
        if (threadIdx.x == 0) st_global_f64(c.block_results + 8 * blockIdx.x + k, all);
    }
    magnitude = reduce_block<Largest>(magnitude);
    if (threadIdx.x == 0) st_global_f64(c.block_results + 8 * blockIdx.x + 5, magnitude);
}

// Results from those of the blocks. The largest share of the gradient becomes about 2^13 in units of 2^SHIFT, so that gradients
// of logits use the range of f16 and none leaves it.
KERNEL(finish_forward, REDUCE_THREADS, BY_VALUE(Combine) c, double* results, u32 blocks, u32 zero_is_error) {
    constexpr u32 TARGET = 13;
    for (u32 k = 0; k < 5; ++k) {
        double x = 0;
        for (u32 b = threadIdx.x; b < blocks; b += REDUCE_THREADS) x += ld_global_f64(c.block_results + 8 * b + k);
        x = reduce_block<Sum>(x);
        if (threadIdx.x == 0) st_global_f64(results + k, x); // LOSS … MRR_PQ
    }
    double magnitude = minus_infinity();
    for (u32 b = threadIdx.x; b < blocks; b += REDUCE_THREADS)
        magnitude = Largest::of(magnitude, ld_global_f64(c.block_results + 8 * b + 5));
    magnitude = reduce_block<Largest>(magnitude);
    if (threadIdx.x != 0) return;
    st_global_f64(results + SHIFT, magnitude == minus_infinity() ? 0 : round_f64(magnitude / LN_2) - TARGET);
    const u32 row = ld_global_u32(c.status + NO_NEGATIVE);
    for (u32 g = 0; row != NONE && g < c.group_count; ++g) {
        const unsigned char* group = reinterpret_cast<const unsigned char*>(c.groups + g);
        double ln[BLOCKS];
        UNROLL
        for (u32 b = 0; b < BLOCKS; ++b) ln[b] = ln_of(ld_global_exp_sum(c.sums + static_cast<u64>(b) * c.rows + row));
        const u32x2 rest = ld_global_nc_u32x2(group + 8);
        if (!(ld_global_nc_f64(group) > 0) || rest.y != 0 || log_negatives(rest.x, ln, 0) != minus_infinity()) continue;
        st_global_u32(c.status + NO_NEGATIVE_GROUP, g);
        break;
    }
    if (is_refused(c.status, zero_is_error)) st_global_f64(results + LOSS, not_a_number());
}

// BETA_SUM ← (first ? 0 : BETA_SUM) + Σ of the tiles of a wave.
KERNEL(sum_dots, REDUCE_THREADS, const double* dots, double* results, u32 tiles, u32 first) {
    double x = 0;
    for (u32 t = threadIdx.x; t < tiles; t += REDUCE_THREADS) x += ld_global_f64(dots + t);
    x = reduce_block<Sum>(x);
    if (threadIdx.x == 0) st_global_f64(results + BETA_SUM, first != 0 ? x : ld_global_f64(results + BETA_SUM) + x);
}

// ∂L/∂τ and ∂L/∂log β from Σ G (s − s⁺), which is ∂L/∂β without the cancellation of the negatives and the positive.
KERNEL(finish_backward, WARP, double* results, const float* upstream, double factor, double beta, const u32* status,
       u32 zero_is_error) {
    if (threadIdx.x != 0) return;
    double scale = factor * exp2_f64(ld_global_f64(results + SHIFT));
    if (upstream != nullptr) scale *= ld_global_f32(upstream);
    if (is_refused(status, zero_is_error)) scale = not_a_number();
    const double grad_beta = scale * ld_global_f64(results + BETA_SUM);
    st_global_f64(results + GRAD_TAU, -beta * beta * grad_beta);
    st_global_f64(results + GRAD_LOG_BETA, beta * grad_beta);
}
