// sums_sm80.cuh: what logsumexp_sm80.cu and logsumexp_prefixes_sm80.cu do with the cosines of a tile: they keep them for the gradient, and add
// up exponentials. The headers of these files say what lies where in shared memory, and what L1 is.
#pragma once
#include "cosines.cuh"
#include "epilogue.cuh"

template <u32 TILE> SAMTONE_DEVICE shared_address row_sums(u32 warp_col) {
    return shared_base() + 2 * TILE * EDGE_BYTES + warp_col * (12 * TILE);
}
template <u32 TILE> SAMTONE_DEVICE shared_address col_sums(u32 warp_row) { return row_sums<TILE>(TILE / 32) + warp_row * (12 * TILE); }

// Stores the sum, the exponent and the count that one index has in one warp's part.
template <u32 TILE> SAMTONE_DEVICE void store_sum(shared_address sums, u32 index, float sum, float exponent, u32 count) {
    st_shared_f32(sums + 4 * index, sum);
    st_shared_i32(sums + 4 * TILE + 4 * index, static_cast<i32>(exponent));
    st_shared_u32(sums + 8 * TILE + 4 * index, count);
}

// Stores the thread's cosines for the gradient.
template <u32 TILE> SAMTONE_DEVICE void keep(Totals<TILE>& x, float* tile) {
    UNROLL
    for (u32 v = 0; v < 4 * Shape<TILE>::FRAGMENTS; ++v) {
        const float(&four)[4] = x[v / 4][v % 4];
        st_global_cs_f32x4(tile + 4 * (v * Shape<TILE>::THREADS + threadIdx.x), {four[0], four[1], four[2], four[3]});
    }
}

// Adds up the parts of index `index`, and stores the partial sum of the tile.
template <u32 TILE>
SAMTONE_DEVICE void store_partial(shared_address sums, u32 parts, u32 index, Partial* partials, u32* counts, bool ranks, u64 at) {
    i32 exponent = 0;
    bool any = false;
    for (u32 p = 0; p < parts; ++p) {
        const shared_address part = sums + p * (12 * TILE) + 4 * index;
        const i32 mine = ld_shared_i32(part + 4 * TILE);
        if (ld_shared_f32(part) > 0 && (!any || mine > exponent)) {
            exponent = mine;
            any = true;
        }
    }
    float sum = 0;
    u32 count = 0;
    for (u32 p = 0; p < parts; ++p) {
        const shared_address part = sums + p * (12 * TILE) + 4 * index;
        const float mine = ld_shared_f32(part);
        const i32 shift = ld_shared_i32(part + 4 * TILE) - exponent;
        if (mine > 0 && shift > -126) sum += mine * float_of(static_cast<u32>(shift + 127) << 23);
        count += ld_shared_u32(part + 8 * TILE);
    }
    st_global_u32x2(partials + at, {bits_of(sum), static_cast<u32>(exponent)});
    if (ranks) st_global_u32(counts + at, count);
}

// [4] … [6]: the partial sums of a tile, and its ranks, from its cosines.
template <u32 TILE> SAMTONE_DEVICE void store_sums(Totals<TILE>& x, const Kept& kept, const SuperBlock& block, const TilePlace& at,
                                                   const Beta& beta, Partial* partials, u32* counts) {
    using E = Elements<TILE>;
    // [4] exponents and ranks
    const E elements = E::of_this_thread();
    u32 row_count[E::ROWS] = {}, col_count[E::COLS] = {};
    float largest = NO_COSINE, smallest = -NO_COSINE;
    UNROLL
    for (u32 i = 0; i < E::ROWS; ++i) {
        UNROLL
        for (u32 j = 0; j < E::COLS; ++j) {
            const float s = element(x, i, j);
            if (!is_kept(kept.row | kept.col, i, j)) continue;
            largest = max_f32(largest, s);
            smallest = min_f32(smallest, s);
        }
    }
    if (block.ranks != 0) {
        UNROLL
        for (u32 i = 0; i < E::ROWS; ++i) {
            const float row_bar = ld_shared_f32(shared_base() + elements.row(i) * EDGE_BYTES + 32);
            UNROLL
            for (u32 j = 0; j < E::COLS; ++j) {
                const float s = element(x, i, j);
                const float col_bar = ld_shared_f32(shared_base() + (TILE + elements.column(j)) * EDGE_BYTES + 32);
                row_count[i] += is_kept(kept.row, i, j) && s > row_bar ? 1 : 0;
                col_count[j] += is_kept(kept.col, i, j) && s > col_bar ? 1 : 0;
            }
        }
    }
    largest = max_among(largest, 1, 16);
    smallest = -max_among(-smallest, 1, 16);

    // [5] sums
    float row_sum[E::ROWS] = {}, col_sum[E::COLS] = {}, row_exponent[E::ROWS], col_exponent[E::COLS];
    const float common = largest > NO_COSINE ? round_f32(beta.high * largest) : 0;
    UNROLL
    for (u32 i = 0; i < E::ROWS; ++i) row_exponent[i] = common;
    UNROLL
    for (u32 j = 0; j < E::COLS; ++j) col_exponent[j] = common;
    if (beta.high * (largest - smallest) < 110.0f) { // also when no anchor keeps any
        UNROLL
        for (u32 i = 0; i < E::ROWS; ++i) {
            UNROLL
            for (u32 j = 0; j < E::COLS; ++j) {
                const float e = exponential(element(x, i, j), beta, common);
                row_sum[i] += is_kept(kept.row, i, j) ? e : 0.0f;
                col_sum[j] += is_kept(kept.col, i, j) ? e : 0.0f;
            }
        }
    } else {
        UNROLL
        for (u32 i = 0; i < E::ROWS; ++i) {
            float top = NO_COSINE;
            UNROLL
            for (u32 j = 0; j < E::COLS; ++j)
                if (is_kept(kept.row, i, j)) top = max_f32(top, element(x, i, j));
            top = max_among(top, 1, 2);
            row_exponent[i] = top > NO_COSINE ? round_f32(beta.high * top) : 0;
        }
        UNROLL
        for (u32 j = 0; j < E::COLS; ++j) {
            float top = NO_COSINE;
            UNROLL
            for (u32 i = 0; i < E::ROWS; ++i)
                if (is_kept(kept.col, i, j)) top = max_f32(top, element(x, i, j));
            top = max_among(top, 4, 16);
            col_exponent[j] = top > NO_COSINE ? round_f32(beta.high * top) : 0;
        }
        UNROLL
        for (u32 i = 0; i < E::ROWS; ++i) {
            UNROLL
            for (u32 j = 0; j < E::COLS; ++j) {
                const float s = element(x, i, j);
                row_sum[i] += is_kept(kept.row, i, j) ? exponential(s, beta, row_exponent[i]) : 0.0f;
                col_sum[j] += is_kept(kept.col, i, j) ? exponential(s, beta, col_exponent[j]) : 0.0f;
            }
        }
    }
    sum_halving<E::ROWS, 1, 2>(row_sum);
    sum_halving<E::ROWS, 1, 2>(row_count);
    sum_halving<E::COLS, 4, 16>(col_sum);
    sum_halving<E::COLS, 4, 16>(col_count);

    // [6] store: each warp's part to shared memory, then one sum for each index
    choose_halving<E::ROWS, 1, 2>(row_exponent);
    choose_halving<E::COLS, 4, 16>(col_exponent);
    const u32 first = first_row_slot<E::ROWS>();
    UNROLL
    for (u32 i = 0; i < E::ROWS / 4; ++i)
        store_sum<TILE>(row_sums<TILE>(warp_id() % (TILE / 32)), elements.row(first + i), row_sum[i], row_exponent[i], row_count[i]);
    store_sum<TILE>(col_sums<TILE>(warp_id() / (TILE / 32)), elements.column(column_slot()), col_sum[0], col_exponent[0], col_count[0]);
    SYNC(L1, bar_sync());
    const u32 index = threadIdx.x % TILE;
    const bool ranks = block.ranks != 0;
    if (holds_row<TILE>()) {
        const u64 to = block.row_partials + static_cast<u64>(at.col) * (block.row.tiles * TILE) + at.row * TILE + index;
        if (block.row.sums != 0) store_partial<TILE>(row_sums<TILE>(0), TILE / 32, index, partials, counts, ranks, to);
    } else if (block.col.sums != 0 && !(block.triangle != 0 && at.row == at.col)) { // on the diagonal, the sums of the rows stand for both
        const u64 to = block.col_partials + static_cast<u64>(at.row) * (block.col.tiles * TILE) + at.col * TILE + index;
        store_partial<TILE>(col_sums<TILE>(0), 2, index, partials, counts, ranks, to);
    }
}
