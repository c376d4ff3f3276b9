// sums_sm90a.cuh: what logsumexp_sm90a.cu and logsumexp_prefixes_sm90a.cu do with the cosines of a half: they keep them for the gradient, and
// add up exponentials. The headers of these files say what lies where in shared memory, and what L1 and L2 are.
#pragma once
#include "pipeline.cuh"

constexpr u32 COLUMN_WORDS = 2 * 8 * HALF;
template <u32 STAGES, u32 ENTRIES_BYTES> struct Memory {
    using Slots = Ring<STAGES>;
    static constexpr u32 EDGES = (Slots::END + 15) / 16 * 16, COLUMNS = EDGES + ENTRIES_BYTES, BYTES = COLUMNS + 8 * COLUMN_WORDS;
    static_assert(BYTES <= 227 << 10, "the memory of a multiprocessor");
};

constexpr float SUSPICIOUS = 0x1p-95f; // 2^7 lost terms of 2^-126 are 2^-24 of it

SAMTONE_DEVICE float exponent_of(float largest, const Beta& beta) { return largest > NO_COSINE ? round_f32(beta.high * largest) : 0; }

// What two lanes hold of a row of the warp's part: sum, exponent and number of negatives above the positive.
struct RowSum {
    float sum, exponent;
    u32 count;
};

// A lane has the sums of four adjacent column slots after sum_halving<32, 4, 16>. This is the first of them.
SAMTONE_DEVICE u32 first_column_slot() { return (lane_id() >> 2 & 1) * 16 + (lane_id() >> 3 & 1) * 8 + (lane_id() >> 4 & 1) * 4; }

// `columns` is where this warp's sums of the columns of the half begin.
SAMTONE_DEVICE void store_column_sum(shared_address columns, u32 column, float sum, float exponent, u32 count) {
    st_shared_f32(columns + 4 * column, sum);
    st_shared_i32(columns + 4 * (COLUMN_WORDS + column), static_cast<i32>(exponent) * 32 + static_cast<i32>(count));
}

// [4] ranks: `count` is of the row slot lane % 2. `counts` is of the lane's four columns, each of which has a byte.
template <bool CHECKED>
SAMTONE_DEVICE void count_above(u32& count, u32& counts, HalfSums& x, const KeptSlots& kept, const Edges& edges, u32 half) {
    u32 of_row[2] = {}, of_columns[8] = {};
    float bar[2];
    UNROLL
    for (u32 i = 0; i < 2; ++i) bar[i] = ld_shared_f32(edges.of_pass(0, slot_row(i)));
    UNROLL
    for (u32 j = 0; j < 32; ++j) {
        const float column_bar = ld_shared_f32(edges.of_pass(0, HALF + half * HALF + slot_column(j)));
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            const float s = element(x, i, j);
            of_row[i] += (!CHECKED || is_kept_slot(kept.row, i, j)) & (s > bar[i]) ? 1 : 0;
            of_columns[j / 4] += (!CHECKED || is_kept_slot(kept.col, i, j)) & (s > column_bar) ? 1u << (j % 4 * 8) : 0;
        }
    }
    sum_halving<2, 1, 1>(of_row);
    count = of_row[0] + shfl_sync_bfly(ALL_LANES, of_row[0], 2);
    sum_halving<8, 4, 16>(of_columns);
    counts = of_columns[0];
}

// [5] sums under one exponent. If a sum may have lost terms, this stores nothing and gives false.
template <bool CHECKED> SAMTONE_DEVICE bool sum_together(RowSum& of_row, shared_address columns, u32 counts, HalfSums& x,
                                                         const KeptSlots& kept, const SuperBlock& block, const TileMask& tile,
                                                         const Beta& beta, float exponent) {
    float row[2] = {}, column[32];
    UNROLL
    for (u32 j = 0; j < 32; ++j) {
        column[j] = 0;
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            const float e = exponential(element(x, i, j), beta, exponent);
            row[i] += !CHECKED || is_kept_slot(kept.row, i, j) ? e : 0.0f;
            column[j] += !CHECKED || is_kept_slot(kept.col, i, j) ? e : 0.0f;
        }
    }
    sum_halving<2, 1, 1>(row);
    sum_halving<32, 4, 16>(column);
    of_row.sum = row[0] + shfl_sync_bfly(ALL_LANES, row[0], 2);
    of_row.exponent = exponent;
    bool lost = block.row.sums != 0 && slot_row(lane_id() % 2) < tile.live_rows && of_row.sum < SUSPICIOUS;
    const u32 first = first_column_slot();
    UNROLL
    for (u32 k = 0; k < 4; ++k) lost = lost || (block.col.sums != 0 && slot_column(first + k) < tile.live_cols && column[k] < SUSPICIOUS);
    if (vote_sync_ballot(ALL_LANES, lost) != 0) return false;
    UNROLL
    for (u32 k = 0; k < 4; ++k) store_column_sum(columns, slot_column(first + k), column[k], exponent, counts >> (8 * k) & 255);
    return true;
}

// [5] sums of each row and each column under its own exponent.
SAMTONE_DEVICE void sum_apart(RowSum& of_row, shared_address columns, u32 counts, HalfSums& x, const KeptSlots& kept, const Beta& beta) {
    float row[2] = {}, row_exponent[2];
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        float top = NO_COSINE;
        UNROLL
        for (u32 j = 0; j < 32; ++j)
            if (is_kept_slot(kept.row, i, j)) top = max_f32(top, element(x, i, j));
        row_exponent[i] = exponent_of(max_among(top, 1, 2), beta);
    }
    UNROLL
    for (u32 j = 0; j < 32; ++j) { // one column after the other, because the exponents of all would not fit the registers
        float top = NO_COSINE, column = 0;
        UNROLL
        for (u32 i = 0; i < 2; ++i)
            if (is_kept_slot(kept.col, i, j)) top = max_f32(top, element(x, i, j));
        const float exponent = exponent_of(max_among(top, 4, 16), beta);
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            const float s = element(x, i, j);
            row[i] += is_kept_slot(kept.row, i, j) ? exponential(s, beta, row_exponent[i]) : 0.0f;
            column += is_kept_slot(kept.col, i, j) ? exponential(s, beta, exponent) : 0.0f;
        }
        for (u32 bit = 4; bit < WARP; bit *= 2) column += shfl_sync_bfly(ALL_LANES, column, bit);
        if (first_column_slot() == j / 4 * 4) store_column_sum(columns, slot_column(j), column, exponent, counts >> (j % 4 * 8) & 255);
    }
    sum_halving<2, 1, 1>(row);
    of_row.sum = row[0] + shfl_sync_bfly(ALL_LANES, row[0], 2);
    of_row.exponent = (lane_id() & 1) != 0 ? row_exponent[1] : row_exponent[0];
}

template <bool CHECKED> SAMTONE_DEVICE bool sum_half(RowSum& of_row, u32& counts, shared_address columns, HalfSums& x,
                                                     const KeptSlots& kept, const SuperBlock& block, const Edges& edges, u32 half,
                                                     const TileMask& tile, const Beta& beta) {
    if (block.ranks != 0) count_above<CHECKED>(of_row.count, counts, x, kept, edges, half);
    const float exponent = exponent_of(largest_of<CHECKED>(x, kept), beta);
    return sum_together<CHECKED>(of_row, columns, counts, x, kept, block, tile, beta, exponent);
}

// Stores the thread's cosines of a half for the gradient.
SAMTONE_DEVICE void keep(HalfSums& x, float* tile) {
    UNROLL
    for (u32 v = 0; v < 16; ++v)
        st_global_cs_f32x4(tile + 4 * (v * CONSUMERS + threadIdx.x - WARPGROUP), {x[4 * v], x[4 * v + 1], x[4 * v + 2], x[4 * v + 3]});
}

// Adds up the eight warps' sums of one column of a half, and stores the partial sum of the tile.
SAMTONE_DEVICE void store_column(shared_address sums, Partial* partials, u32* counts, bool ranks, u64 at) {
    i32 exponent = 0;
    bool any = false;
    UNROLL
    for (u32 warp = 0; warp < 8; ++warp) {
        const i32 mine = ld_shared_i32(sums + 4 * (COLUMN_WORDS + warp * HALF)) >> 5;
        if (ld_shared_f32(sums + 4 * warp * HALF) > 0 && (!any || mine > exponent)) {
            exponent = mine;
            any = true;
        }
    }
    float sum = 0;
    u32 count = 0;
    UNROLL
    for (u32 warp = 0; warp < 8; ++warp) {
        const float mine = ld_shared_f32(sums + 4 * warp * HALF);
        const i32 word = ld_shared_i32(sums + 4 * (COLUMN_WORDS + warp * HALF)), shift = (word >> 5) - exponent;
        if (mine > 0 && shift > -126) sum += mine * float_of(static_cast<u32>(shift + 127) << 23);
        count += static_cast<u32>(word) & 31;
    }
    st_global_u32x2(partials + at, {bits_of(sum), static_cast<u32>(exponent)});
    if (ranks) st_global_u32(counts + at, count);
}

// [3] mask, [4] ranks, [5] sums, and [6] store: of the cosines of one half. The sums of the rows are whole. Those of the columns are left
// in the memory from `columns` on.
SAMTONE_DEVICE void sum_and_store_rows(HalfSums& x, shared_address columns, const SuperBlock& block, const TilePlace& at, u32 half,
                                       const Towers& towers, const Edges& edges, const Beta& beta, Partial* partials, u32* counts) {
    const TileMask tile = mask_of_half(block, at, half, towers);
    const shared_address of_warp = columns + 4 * (half * 8 + consumer_warp()) * HALF;
    KeptSlots kept{{~0u, ~0u}, {~0u, ~0u}};
    RowSum of_row{0, 0, 0};
    u32 column_counts = 0;
    bool summed;
    if (needs_mask(tile)) {
        kept = mask_half(x, edges, half, tile);
        summed = sum_half<true>(of_row, column_counts, of_warp, x, kept, block, edges, half, tile, beta);
    } else {
        summed = sum_half<false>(of_row, column_counts, of_warp, x, kept, block, edges, half, tile, beta);
    }
    if (!summed) sum_apart(of_row, of_warp, column_counts, x, kept, beta);
    if (block.row.sums != 0 && (lane_id() & 2) == 0) {
        const u64 to =
            block.row_partials + static_cast<u64>(at.col + half) * (block.row.tiles * HALF) + at.row * HALF + slot_row(lane_id() % 2);
        st_global_u32x2(partials + to, {bits_of(of_row.sum), static_cast<u32>(static_cast<i32>(of_row.exponent))});
        if (block.ranks != 0) st_global_u32(counts + to, of_row.count);
    }
}

// [6] store: each thread adds up the sums of one column of the two halves among the warps, and stores it.
SAMTONE_DEVICE void store_columns(shared_address columns, const SuperBlock& block, const TilePlace& at, Partial* partials, u32* counts) {
    const u32 half = consumer(), column = threadIdx.x % HALF;
    // In a tile on the diagonal, the sums of the rows stand for both.
    if (block.col.sums != 0 && (block.triangle == 0 || at.col + half > at.row)) {
        const u64 to = block.col_partials + static_cast<u64>(at.row) * (block.col.tiles * HALF) + (at.col + half) * HALF + column;
        store_column(columns + 4 * (half * 8 * HALF + column), partials, counts, block.ranks != 0, to);
    }
}
