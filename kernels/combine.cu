// combine.cu: the O(M) steps between the heavy passes. Partial sums become loss, metrics and coefficients. Faults become the status.
// Math     src/combine.rs, line by line: log D_gi = log Σ_b Σ_j exp(β (s^b_ij − s⁺ᵢ)), ℓ_gi − β s⁺ᵢ = log(e_g + D_gi),
//          D_i = −Σ_g c_g w̃ᵢ D_gi / (e_g + D_gi), log a^b_i = log Σ_{g∋b} c_g w̃ᵢ exp(−ℓ_gi)
// In/out   partials and counts of the logsumexp pass, faults of prepare.cu · sums [4][rows], above [2][rows], row_losses, diagonal
//          [rows], log_coefficients [4][rows], results, status (problem.cuh)
// Tiles    grid (⌈rows / 64⌉, prefixes). Of each prefix, the last thread block to come adds up what all have left
// Threads  256. In [1] a thread is one row in one block of loss.md, in [2] the first 64 threads are one row each, in [3] a lane is one
//          value of the results
// Shared   0: 704 bytes, values of the warps (reduce.cuh); 704: 4 bytes, the number that the thread block drew; 768: 2048 bytes,
//          f64 [4][64], logarithms of the rows' sums
// Sync     C1 a row's four logarithms are written before they are read
//          C2 lanes of warp 0 have written what the thread block leaves before lane 0 tells of it
//          C3 a release: by this fence and the number that it draws, the thread block tells the last one of what it left
//          C4 an acquire: a thread block that has drawn the last number knows of what all have left
//          C5 the drawn number is written before it is read. All threads learn what lane 0 knows. All threads have read the values of
//             the warps, so that their place is free
//          R1 reduce.cuh
// Numerics f64, logarithms. Tiles, super-blocks and rows are added in one fixed order, so that every run gives the same bits, whichever
//          thread block is the last. Afterwards the ticket is 0 again
// Limits   fewer than 2^20 groups
#include "common/logarithms.cuh"
#include "common/reduce.cuh"

constexpr u32 COMBINED_ROWS = REDUCE_THREADS / BLOCKS;
// What a thread block finds, and then the call: the sums of losses and metrics, in the order of the results; the logarithm of the largest
// share; and the faulty rows in the order of the status. Rows are negated, so that the largest number is the lowest row. −∞ stands for
// none.
constexpr u32 SUMS = 5, LARGEST_SHARE = 5, FAULTS = 6, FOUND = FAULTS + NO_NEGATIVE + 1;
static_assert(LARGEST_SHARE == SHIFT && FOUND <= WARP, "a lane for each");
constexpr u32 DRAWN = REDUCE_THREADS / WARP * FOUND * 8, LOGARITHMS = 768;
static_assert(DRAWN + 4 <= LOGARITHMS, "as the header says");

// A row without negatives and the group that has none become one number: GROUPS·row + group.
constexpr double GROUPS = 1 << 20;

ABI_STRUCT(Merge, {
    const Partial* partials;
    const u32* counts;
    const u32* anchor_index; // the index in the space of the passages of each row's positive; null for the identity
    u32 tile;
    u32 first; // starts from nothing, instead of adding to what is there
    u64 prefix_partials; // elements from the partials of one prefix to those of the next, and from its counts
});

// Of every prefix there are all arrays but `weight`, `groups` and `faults`, one prefix after the other: sums [prefixes][4][rows] and so on.
ABI_STRUCT(Combine, {
    ExpSum* sums;
    u32* above;
    const double *positive, *weight; // s⁺, w̃
    const Group* groups;
    const double* prefix_weights; // v; null for one prefix of weight 1
    double *row_losses, *diagonal, *log_coefficients, *results;
    const Fault* faults[2];
    double* found; // [grid][FOUND]
    u32 *status, *ticket;
    double beta;
    u32 rows, group_count;
    u32 indices[2]; // how many faults there are
    u32 zero_is_error;
    u32 empty_is_error; // whether a row without any term in its softmax is a fault. Such a row has loss and gradient 0
    u32 merges_only;    // 0 for the last wave, and for sums that are complete. Those of a shard are combined all the same, for the status
    u32 padding;
});

SAMTONE_DEVICE void merge_into(ExpSum& all, double sum, i32 exponent) {
    if (sum == 0) return;
    if (all.sum == 0) {
        all = {sum, exponent, 0};
        return;
    }
    const i32 top = all.exponent > exponent ? all.exponent : exponent;
    all = {all.sum * power_of_two(all.exponent - top) + sum * power_of_two(exponent - top), top, 0};
}

// Adds the partials of the tiles of a wave to the sum that a row has in a block of loss.md. Gives the sum.
SAMTONE_DEVICE ExpSum merge(const Wave& wave, const Merge& m, const Combine& c, u32 row, u32 block) {
    constexpr u32 AT_ONCE = 8; // so many loads are under way at once
    const bool ranked = block == QP || block == PQ;
    u32 index = row;
    if ((block == PQ || block == PP) && m.anchor_index != nullptr) index = ld_global_nc_u32(m.anchor_index + row);
    const u64 prefix = blockIdx.y;
    ExpSum* to = c.sums + (prefix * BLOCKS + block) * c.rows + row;
    u32* count_to = c.above + (prefix * 2 + block) * c.rows + row;
    ExpSum all{0, 0, 0};
    u32 count = 0;
    if (m.first == 0) {
        all = ld_global_exp_sum(to);
        if (ranked) count = ld_global_u32(count_to);
    }
    for (u32 b = 0; b < wave.count; ++b) {
        const SuperBlock& s = wave.blocks[b];
        for (u32 side = 0; side < 2; ++side) {
            const Edge &edge = side == 0 ? s.row : s.col, &other = side == 0 ? s.col : s.row;
            if (edge.sums == 0 || edge.block != block || index < edge.begin || index >= edge.end) continue;
            const u32 local = index - edge.begin;
            // In a triangle, the tiles right of the diagonal have sums of rows, and the tiles above it sums of columns.
            const u32 begin = s.triangle != 0 && side == 0 ? local / m.tile : 0;
            const u32 end = s.triangle != 0 && side == 1 ? local / m.tile : other.tiles;
            const u64 first = prefix * m.prefix_partials + (side == 0 ? s.row_partials : s.col_partials) + local;
            for (u32 t = begin; t < end; t += AT_ONCE) {
                u32x2 partials[AT_ONCE];
                u32 counts[AT_ONCE];
                UNROLL
                for (u32 i = 0; i < AT_ONCE; ++i) {
                    const u64 at = first + static_cast<u64>(t + i) * (edge.tiles * m.tile);
                    partials[i] = {0, 0};
                    counts[i] = 0;
                    if (t + i >= end) continue;
                    partials[i] = ld_global_u32x2(m.partials + at);
                    if (s.ranks != 0) counts[i] = ld_global_u32(m.counts + at);
                }
                UNROLL
                for (u32 i = 0; i < AT_ONCE; ++i) {
                    merge_into(all, static_cast<double>(float_of(partials[i].x)), static_cast<i32>(partials[i].y));
                    count += counts[i];
                }
            }
        }
    }
    st_global_exp_sum(to, all);
    if (ranked) st_global_u32(count_to, count);
    return all;
}


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

// log D of a group, from the logarithms of the sums of the row.
SAMTONE_DEVICE double log_negatives(u32 blocks, const double (&ln)[BLOCKS], double positive) {
    double log_d = minus_infinity();
    UNROLL
    for (u32 b = 0; b < BLOCKS; ++b)
        if ((blocks >> b & 1) != 0) log_d = log_add_exp(log_d, ln[b] - positive);
    return log_d;
}

// Loss, coefficients and metrics of a row, from the logarithms of its sums.
SAMTONE_DEVICE void combine_row(const Combine& c, u32 row, const double (&ln)[BLOCKS], double (&found)[FOUND]) {
    const u64 prefix = blockIdx.y, of_prefix = prefix * c.rows;
    const double positive = c.beta * ld_global_f64(c.positive + of_prefix + row), weight = ld_global_nc_f64(c.weight + row);
    const double prefix_weight = c.prefix_weights != nullptr ? ld_global_nc_f64(c.prefix_weights + prefix) : 1;
    double coefficients[BLOCKS], row_loss = 0, diagonal = 0;
    UNROLL
    for (u32 b = 0; b < BLOCKS; ++b) coefficients[b] = minus_infinity();
    for (u32 g = 0; g < c.group_count; ++g) {
        const unsigned char* group = reinterpret_cast<const unsigned char*>(c.groups + g);
        const double coefficient = ld_global_nc_f64(group);
        const u32x2 rest = ld_global_nc_u32x2(group + 8);
        if (!(coefficient > 0)) continue;
        const double e = rest.y, log_d = log_negatives(rest.x, ln, positive);
        if (e == 0 && log_d == minus_infinity()) {
            double& none = found[FAULTS + NO_NEGATIVE];
            if (c.empty_is_error != 0 && weight != 0 && none == minus_infinity()) none = -(GROUPS * row + g);
            continue;
        }
        const double relative = log_add(e, log_d);
        row_loss += coefficient * relative;
        if (weight == 0) continue;
        const double factor = prefix_weight * (coefficient * weight);
        diagonal -= factor * exp_f64(log_d - relative);
        const double log_coefficient = log_f64(factor) - relative - positive;
        UNROLL
        for (u32 b = 0; b < BLOCKS; ++b)
            if ((rest.x >> b & 1) != 0) coefficients[b] = log_add_exp(coefficients[b], log_coefficient);
    }
    st_global_f64(c.row_losses + of_prefix + row, row_loss);
    st_global_f64(c.diagonal + of_prefix + row, diagonal);
    UNROLL
    for (u32 b = 0; b < BLOCKS; ++b) {
        st_global_f64(c.log_coefficients + (prefix * BLOCKS + b) * c.rows + row, coefficients[b]);
        found[LARGEST_SHARE] = Largest::of(coefficients[b] + ln[b], found[LARGEST_SHARE]); // a NaN does not count
    }
    found[LOSS] = row_loss * weight;
    UNROLL
    for (u32 k = 0; k < 2; ++k) {
        const u32 above = ld_global_u32(c.above + (prefix * 2 + k) * c.rows + row);
        found[PRECISION_QP + 2 * k] = above == 0 ? weight : 0;
        found[MRR_QP + 2 * k] = weight / (1.0 + above);
    }
}

// Each thread looks at a share of the faults of the embeddings.
SAMTONE_DEVICE void find_faults(const Combine& c, double (&found)[FOUND]) {
    UNROLL
    for (u32 space = 0; space < 2; ++space)
        for (u32 k = blockIdx.x * REDUCE_THREADS + threadIdx.x; k < c.indices[space]; k += gridDim.x * REDUCE_THREADS) {
            const Fault fault = ld_global_u32x2(c.faults[space] + k);
            auto note = [&](u32 word, u32 row) {
                if (row != NONE) found[FAULTS + word] = Largest::of(found[FAULTS + word], -static_cast<double>(row));
            };
            note(NON_FINITE_QUERY + space, fault.x);
            note(ZERO_QUERY + space, fault.y);
        }
}

// Makes results and status of what the call found: lane k of the warp has value k. Where the sums of P@1
// and MRR are equal, both are 1: `Metrics::from_sums` in src/output.rs says why. Both are added up in the same order, as it wants.
SAMTONE_DEVICE void finish(const Combine& c, double value) {
    const u32 k = lane_id();
    const bool faulty = k >= FAULTS && k < FOUND && value != minus_infinity();
    const u32 faults = vote_sync_ballot(ALL_LANES, faulty) >> FAULTS;
    const u32 fatal = 1u << NO_NEGATIVE | (c.zero_is_error != 0 ? 15u : 3u); // as in `is_refused`
    if (k == LOSS && (faults & fatal) != 0) value = not_a_number();
    const double of_qp = shfl_sync_bfly(ALL_LANES, value, PRECISION_QP ^ MRR_QP);
    const double of_pq = shfl_sync_bfly(ALL_LANES, value, PRECISION_PQ ^ MRR_PQ);
    if (k >= PRECISION_QP && k <= MRR_PQ && value == (k <= MRR_QP ? of_qp : of_pq)) value = 1;
    double* results = c.results + blockIdx.y * RESULTS;
    if (k < SUMS) st_global_f64(results + k, value);
    if (k == LARGEST_SHARE) {
        st_global_f64(results + SHIFT, shift_of(value));
        st_global_f64(results + LARGEST, value);
    }
    if (k < FAULTS || k >= FAULTS + STATUS_WORDS) return;
    u32* word = c.status + blockIdx.y * STATUS_WORDS + (k - FAULTS);
    if (k - FAULTS < NO_NEGATIVE) st_global_u32(word, faulty ? static_cast<u32>(-value) : NONE);
    else if (k - FAULTS == NO_NEGATIVE) {
        const u64 both = faulty ? static_cast<u64>(-value) : 0;
        st_global_u32(word, faulty ? static_cast<u32>(both >> 20) : NONE);
        st_global_u32(word + 1, faulty ? static_cast<u32>(both & 0xfffff) : NONE);
    } else if (k - FAULTS > NO_NEGATIVE_GROUP) st_global_u32(word, NONE);
}

SHARED_BYTES(combine, LOGARITHMS + REDUCE_THREADS * 8);
KERNEL(combine, REDUCE_THREADS, BY_VALUE(Wave) wave, BY_VALUE(Merge) m, BY_VALUE(Combine) c) {
    begin_launch();
    const u32 row = blockIdx.x * COMBINED_ROWS + threadIdx.x % COMBINED_ROWS, block = threadIdx.x / COMBINED_ROWS;
    const shared_address logarithm = shared_base() + LOGARITHMS + 8 * threadIdx.x;
    // [1] merge
    if (row < c.rows) {
        const ExpSum sum = merge(wave, m, c, row, block);
        if (c.merges_only == 0) st_shared_f64(logarithm, ln_of(sum));
    }
    if (c.merges_only != 0) return;
    SYNC(C1, bar_sync());
    // [2] combine
    double found[FOUND];
    UNROLL
    for (u32 k = 0; k < FOUND; ++k) found[k] = k < SUMS ? 0 : minus_infinity();
    if (block == 0 && row < c.rows) {
        double ln[BLOCKS];
        UNROLL
        for (u32 b = 0; b < BLOCKS; ++b) ln[b] = ld_shared_f64(logarithm + b * (8 * COMBINED_ROWS));
        combine_row(c, row, ln, found);
    }
    find_faults(c, found);
    double value = reduce_block_to_lanes<SUMS>(found);
    double* left = c.found + static_cast<u64>(blockIdx.y) * gridDim.x * FOUND; // by the thread blocks of this prefix
    if (warp_id() == 0) {
        if (lane_id() < FOUND) st_global_f64(left + blockIdx.x * FOUND + lane_id(), value);
        SYNC(C2, bar_warp_sync(ALL_LANES));
        if (lane_id() == 0) {
            SYNC(C3, fence_acq_rel_gpu());
            const u32 drawn = atom_global_inc_u32(c.ticket + blockIdx.y, gridDim.x - 1);
            SYNC(C4, fence_acq_rel_gpu());
            st_shared_u32(shared_base() + DRAWN, drawn);
        }
    }
    SYNC(C5, bar_sync());
    if (ld_shared_u32(shared_base() + DRAWN) != gridDim.x - 1) return;
    // [3] results
    UNROLL
    for (u32 k = 0; k < FOUND; ++k) found[k] = k < SUMS ? 0 : minus_infinity();
    for (u32 b = threadIdx.x; b < gridDim.x; b += REDUCE_THREADS) {
        UNROLL
        for (u32 k = 0; k < FOUND; ++k) {
            const double x = ld_global_f64(left + b * FOUND + k);
            found[k] = k < SUMS ? found[k] + x : Largest::of(found[k], x);
        }
    }
    value = reduce_block_to_lanes<SUMS>(found);
    if (warp_id() == 0) finish(c, value);
}
