// epilogue.cuh: what both passes over tiles do with the products of a tile: they scale them to cosines, mask them and reduce them.
//
// Shared   Each of the 2·TILE threads loads one index of the tile's two axes and keeps it in registers while the product runs. Afterwards
//          it stores the index as an entry of 48 bytes. The entries of the rows lie before those of the columns. An entry has:
//            0  u32x4  the index as a candidate: query key, passage key, owner, and 2^12/‖x‖ as bits. A query has its keys exchanged
//           16  u32x4  the index as an anchor: query key, passage key, row, highest cosine that it keeps. The keys are exchanged if its
//                      candidates are queries
//           32  u32x4  what only one pass needs: see its kernel
// Sync     E1 all entries are written before any is read. P3 is before, so that nobody still reads the stages of the product
#pragma once
#include "product.cuh"

constexpr u32 EDGE_BYTES = 48;

// In which super-block of the wave a tile is, and where in it.
struct TilePlace {
    u32 block, row, col;
};

// Place k of a rectangle of rows x cols, or of that part of a square which is on and right of its diagonal. A rectangle is visited in
// bands of eight rows, and a band column by column. So thread blocks that run together share both operands in the cache. A triangle is
// visited row by row.
SAMTONE_DEVICE u32x2 place_in(u32 rows, u32 cols, bool triangle, u32 k) {
    if (!triangle) {
        const u32 band = k / (8 * cols), in_band = k % (8 * cols), height = rows - 8 * band < 8 ? rows - 8 * band : 8;
        return {8 * band + in_band % height, in_band / height};
    }
    // Row r begins at r·cols − r (r − 1) / 2. This solves for r, in f32, because f64 is slow on most GPUs. Up to 2047 columns only the
    // root is rounded, so that r is off by one at most. Beyond that it may be off by a few.
    const u64 side = 2ull * cols + 1;
    const float root = sqrt_rn(static_cast<float>(side * side - 8ull * k)), twice = static_cast<float>(side) - root;
    u32 r = twice > 0 ? static_cast<u32>(twice / 2) : 0;
    auto start = [cols](u32 row) { return row * cols - row * (row - 1) / 2; };
    while (r > 0 && start(r) > k) --r;
    while (start(r + 1) <= k) ++r;
    return {r, r + k - start(r)};
}

SAMTONE_DEVICE TilePlace place_of(const Wave& wave, u32 tile) {
    u32 b = 0;
    while (b + 1 < wave.count && tile >= wave.blocks[b + 1].first_tile) ++b;
    const SuperBlock& block = wave.blocks[b];
    const u32x2 place = place_in(block.row.tiles, block.col.tiles, block.triangle != 0, tile - block.first_tile);
    return {b, place.x, place.y};
}

// One index of an axis of the tile, which one thread holds.
struct EdgeEntry {
    u32x4 candidate, anchor;
    u32 row; // the row that it anchors, or NONE
    bool live;
};

// The query key and the passage key of a row as an anchor on this axis. Where the candidates are queries, the keys of both sides are
// exchanged. The rule for such candidates then reads like the rule for passages.
SAMTONE_DEVICE u32x2 keys_of_anchor(const Edge& edge, const u32x4& row) {
    const bool meets_queries = edge.block == PQ || edge.block == QQ;
    return {meets_queries ? row.y : row.x, meets_queries ? row.x : row.y};
}

// Loads one index of an axis.
SAMTONE_DEVICE EdgeEntry load_entry(const Edge& edge, u32 index, const Towers& towers, const AnchorKeys* rows) {
    EdgeEntry entry{{NONE, NONE, NONE, 0}, {NONE, NONE, NONE, 0}, NONE, index < edge.end};
    if (!entry.live) return entry;
    const Tower& tower = tower_of(towers, edge.space);
    entry.candidate = ld_global_nc_u32x4(tower.candidates + index);
    entry.row = entry.candidate.w;
    entry.candidate.w = bits_of(ld_global_f32(tower.inverse + index));
    if (edge.anchors != 0 && entry.row != NONE) {
        const u32x4 anchor = ld_global_u32x4(rows + entry.row);
        const u32x2 keys = keys_of_anchor(edge, anchor);
        entry.anchor = {keys.x, keys.y, entry.row, anchor.z};
    }
    return entry;
}

template <u32 TILE> SAMTONE_DEVICE bool holds_row() { return threadIdx.x < TILE; }

// This thread's index. Thread k < TILE holds row k of the tile, and thread TILE + k holds column k.
template <u32 TILE> SAMTONE_DEVICE u32 edge_index(const Edge& edge, const TilePlace& at) {
    return edge.begin + (holds_row<TILE>() ? at.row : at.col) * TILE + threadIdx.x % TILE;
}
template <u32 TILE>
SAMTONE_DEVICE EdgeEntry load_edge(const SuperBlock& block, const TilePlace& at, const Towers& towers, const AnchorKeys* rows) {
    const Edge& edge = holds_row<TILE>() ? block.row : block.col;
    return load_entry(edge, edge_index<TILE>(edge, at), towers, rows);
}

// One index of an axis in one prefix. An index that does not exist has no scales. What does not exist is loaded from where something is,
// and then forgotten: the PTX compiler would keep the target of a load that may not happen from one prefix to the next.
SAMTONE_DEVICE EdgeEntry load_entry_of_prefix(Scales& scales, const Edge& edge, u32 index, const Towers& towers, const AnchorKeys* rows,
                                              const Prefixes& prefixes, u32 prefix) {
    const bool live = index < edge.end;
    const u32 at = live ? index : edge.begin;
    const u64 of_prefix = static_cast<u64>(prefix) * prefixes.indices[edge.space] + at;
    const Tower& tower = tower_of(towers, edge.space);
    const Scales found = ld_global_scales(prefixes.scales[edge.space] + of_prefix);
    scales = {live ? found.next : 0, live ? found.step : 0, found.power};
    const u32x4 candidate = ld_global_nc_u32x4(tower.candidates + at);
    const u32 inverse = bits_of(ld_global_f32(tower.inverse + of_prefix));
    const bool anchors = live && edge.anchors != 0 && candidate.w != NONE;
    const u32x4 anchor = ld_global_u32x4(rows + static_cast<u64>(prefix) * prefixes.rows + (anchors ? candidate.w : 0));
    const u32x2 keys = keys_of_anchor(edge, anchor);
    EdgeEntry entry{{NONE, NONE, NONE, 0}, {NONE, NONE, NONE, 0}, NONE, live};
    if (live) {
        entry.candidate = {candidate.x, candidate.y, candidate.z, inverse};
        entry.row = candidate.w;
    }
    if (anchors) entry.anchor = {keys.x, keys.y, candidate.w, anchor.z};
    return entry;
}
template <u32 TILE> SAMTONE_DEVICE EdgeEntry load_edge_of_prefix(Scales& scales, const SuperBlock& block, const TilePlace& at,
                                                                 const Towers& towers, const AnchorKeys* rows, const Prefixes& prefixes,
                                                                 u32 prefix) {
    const Edge& edge = holds_row<TILE>() ? block.row : block.col;
    return load_entry_of_prefix(scales, edge, edge_index<TILE>(edge, at), towers, rows, prefixes, prefix);
}

template <u32 TILE> SAMTONE_DEVICE void store_edge(shared_address edges, const EdgeEntry& entry, const u32x4& of_pass) {
    const shared_address at = edges + threadIdx.x * EDGE_BYTES;
    st_shared_u32x4(at, entry.candidate);
    st_shared_u32x4(at + 16, entry.anchor);
    st_shared_u32x4(at + 32, of_pass);
}

// The elements of a thread, seen as rows and columns. It has 2·FRAGMENTS row slots, counted by i, and 8 column slots, counted by j. If
// registers do not suffice, a thread takes its row slots in PARTS, one after the other: then these are those of one part.
template <u32 TILE, u32 PARTS = 1> struct Elements {
    static constexpr u32 ROWS = 2 * Shape<TILE>::FRAGMENTS / PARTS, COLS = 8;
    using Array = float[ROWS / 2][4][4];
    u32 row0, column0; // where this thread's part of the tile begins
    SAMTONE_MEMBER static Elements of_this_thread(u32 part = 0) {
        return {warp_row<TILE>() + part * (TILE / 2 / PARTS) + lane_id() / 4, warp_column<TILE>() + lane_id() % 4 * 2};
    }
    SAMTONE_MEMBER u32 row(u32 i) const { return row0 + 8 * i; }
    SAMTONE_MEMBER u32 column(u32 j) const { return column0 + j / 2 * 8 + j % 2; }
};
template <u32 N> SAMTONE_DEVICE float& element(float (&x)[N][4][4], u32 i, u32 j) { return x[i / 2][j / 2][i % 2 * 2 + j % 2]; }

// Multiplies each element by a number of its row's entry and by that of its column's. The number is `at` bytes from where an entry begins,
// and entries lie at the start of shared memory.
template <u32 TILE, u32 PARTS>
SAMTONE_DEVICE void multiply_by_entries(typename Elements<TILE, PARTS>::Array& x, const Elements<TILE, PARTS>& elements, u32 at) {
    using E = Elements<TILE, PARTS>;
    const shared_address rows = shared_base() + at, cols = rows + TILE * EDGE_BYTES;
    float of_col[E::COLS];
    UNROLL
    for (u32 j = 0; j < E::COLS; ++j) of_col[j] = ld_shared_f32(cols + elements.column(j) * EDGE_BYTES);
    UNROLL
    for (u32 i = 0; i < E::ROWS; ++i) {
        const float of_row = ld_shared_f32(rows + elements.row(i) * EDGE_BYTES);
        UNROLL
        for (u32 j = 0; j < E::COLS; ++j) element(x, i, j) = mul_rn(mul_rn(element(x, i, j), of_row), of_col[j]);
    }
}

// The rule of src/mask.rs: whether the candidate at cosine s is a negative of the anchor. It has no branches, because all of it is in
// registers.
SAMTONE_DEVICE bool keys_differ(const u32x4& candidate, const u32x4& anchor) {
    return (candidate.x != anchor.x) & (candidate.y != anchor.y) & (candidate.y != anchor.x) &
           ((candidate.z == NONE) | (candidate.z == anchor.z));
}
SAMTONE_DEVICE bool is_negative(const u32x4& candidate, const u32x4& anchor, float s) {
    return keys_differ(candidate, anchor) & (s <= float_of(anchor.w));
}

// Which elements of the thread are negatives that the anchor of their row, or of their column, keeps. Element (i, j) is bit 8 i + j.
struct Kept {
    u64 row, col;
};

// What the mask must know of a tile: whether its rows and its columns anchor, whether any pair may be masked, and how many rows and columns
// exist.
struct TileMask {
    bool row_anchors, col_anchors, masked;
    u32 live_rows, live_cols;
};

template <u32 TILE> SAMTONE_DEVICE TileMask mask_of(const SuperBlock& block, const TilePlace& at, const Towers& towers) {
    const u32 row = block.row.begin + at.row * TILE, col = block.col.begin + at.col * TILE;
    const u32 rows = row < block.row.end ? block.row.end - row : 0, cols = col < block.col.end ? block.col.end - col : 0;
    // Default keys mask a pair only where both indices are the same. The order of the passages guarantees that.
    const bool overlap = row < col + TILE && col < row + TILE;
    return {block.row.anchors != 0, block.col.anchors != 0, towers.masked != 0 || overlap, rows < TILE ? rows : TILE,
            cols < TILE ? cols : TILE};
}

// [2] scale: makes cosines of products, in place, unless they are cosines already. [3] mask.
template <u32 TILE, bool SCALED, u32 PARTS> SAMTONE_DEVICE Kept scale_and_mask(typename Elements<TILE, PARTS>::Array& x,
                                                                               const Elements<TILE, PARTS>& elements, shared_address edges,
                                                                               const TileMask& tile) {
    using E = Elements<TILE, PARTS>;
    const shared_address cols = edges + TILE * EDGE_BYTES;
    const bool checked = tile.masked || tile.live_rows < TILE || tile.live_cols < TILE;
    Kept kept{tile.row_anchors ? ~0ull : 0, tile.col_anchors ? ~0ull : 0};
    if (SCALED && !checked) return kept;
    float col_scale[E::COLS]; // loaded once for all rows
    UNROLL
    for (u32 j = 0; !SCALED && j < E::COLS; ++j) col_scale[j] = ld_shared_f32(cols + elements.column(j) * EDGE_BYTES + 12);
    UNROLL
    for (u32 i = 0; i < E::ROWS; ++i) {
        const u32 row = elements.row(i);
        const u32x4 r = ld_shared_u32x4(edges + row * EDGE_BYTES);
        const float scale = float_of(r.w) * 0x1p-24f;
        u32x4 anchor{};
        if (checked) anchor = ld_shared_u32x4(edges + row * EDGE_BYTES + 16);
        UNROLL
        for (u32 j = 0; j < E::COLS; ++j) {
            const u32 column = elements.column(j);
            float& s = element(x, i, j);
            if (!SCALED) s = mul_rn(mul_rn(s, scale), col_scale[j]);
            if (checked) {
                const u32x4 c = ld_shared_u32x4(cols + column * EDGE_BYTES);
                const u32x4 other = ld_shared_u32x4(cols + column * EDGE_BYTES + 16);
                const bool live = (row < tile.live_rows) & (column < tile.live_cols);
                if (!(live & is_negative(c, anchor, s))) kept.row &= ~(1ull << (8 * i + j));
                if (!(live & is_negative(r, other, s))) kept.col &= ~(1ull << (8 * i + j));
            }
        }
    }
    return kept;
}
SAMTONE_DEVICE bool is_kept(u64 bits, u32 i, u32 j) { return (bits >> (8 * i + j) & 1) != 0; }

// 2^(s·β·log2 e − k) for a whole k. The fused multiply-add rounds the product with the high part only after k was subtracted. So 1/τ,
// which is rounded to f32, costs no digit of a logit near 100.
SAMTONE_DEVICE float exponential(float s, const Beta& beta, float k) { return ex2_approx(fma_rn(s, beta.low, fma_rn(s, beta.high, -k))); }

// This is below every cosine.
constexpr float NO_COSINE = -4;

// ---- reductions among lanes

// Adds up N values over the lanes that differ in the bits BIT, 2·BIT, … LAST. Each step exchanges half of a lane's values with one other
// lane, so that a lane ends up with N / (number of lanes) sums. Its bits choose which ones, the lowest bit first. For 8 values over 8 lanes
// that takes 4 + 2 + 1 exchanges, where one value after the other would take 24. The operands of each sum are the same in both lanes, in
// swapped places.
template <u32 N, u32 BIT, u32 LAST, class T> SAMTONE_DEVICE void sum_halving(T (&v)[N] SAMTONE_SITE) {
    if constexpr (BIT <= LAST) {
        const bool upper = (lane_id() & BIT) != 0;
        T half[N / 2];
        UNROLL
        for (u32 i = 0; i < N / 2; ++i) {
            const T mine = upper ? v[N / 2 + i] : v[i], theirs = upper ? v[i] : v[N / 2 + i];
            half[i] = mine + shfl_sync_bfly(ALL_LANES, theirs, BIT SAMTONE_EMULATED_AS(, site));
        }
        sum_halving<N / 2, 2 * BIT, LAST>(half SAMTONE_EMULATED_AS(, site));
        UNROLL
        for (u32 i = 0; i < N / 2; ++i) v[i] = half[i];
    }
}

// Of N values that all these lanes share, this leaves those whose sums a lane holds after `sum_halving`. It selects instead of indexing,
// because an index that is known only at run time would move the array to local memory.
template <u32 N, u32 BIT, u32 LAST> SAMTONE_DEVICE void choose_halving(float (&v)[N]) {
    if constexpr (BIT <= LAST) {
        const bool upper = (lane_id() & BIT) != 0;
        float half[N / 2];
        UNROLL
        for (u32 i = 0; i < N / 2; ++i) half[i] = upper ? v[N / 2 + i] : v[i];
        choose_halving<N / 2, 2 * BIT, LAST>(half);
        UNROLL
        for (u32 i = 0; i < N / 2; ++i) v[i] = half[i];
    }
}

// The row slots whose sums a lane holds after sum_halving<ROWS, 1, 2>: this one and the ROWS / 4 − 1 that follow.
template <u32 ROWS> SAMTONE_DEVICE u32 first_row_slot() {
    return (lane_id() & 1) * (ROWS / 2) + (lane_id() >> 1 & 1) * (ROWS / 4);
}
// The column slot whose sum a lane holds after sum_halving<8, 4, 16>.
SAMTONE_DEVICE u32 column_slot() { return (lane_id() >> 2 & 1) * 4 + (lane_id() >> 3 & 1) * 2 + (lane_id() >> 4 & 1); }

// The largest value among the lanes that differ in the bits `first` … `last`.
SAMTONE_DEVICE float max_among(float x, u32 first, u32 last SAMTONE_SITE) {
    for (u32 bit = first; bit <= last; bit *= 2) x = max_f32(x, shfl_sync_bfly(ALL_LANES, x, bit SAMTONE_EMULATED_AS(, site)));
    return x;
}
