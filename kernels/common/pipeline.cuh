// pipeline.cuh: the mainloop of the heavy kernels of compute capability 9.0. They run in clusters of two thread blocks. In each thread
// block one thread copies and two warpgroups multiply. In this file a block is a thread block.
//
// Math     A cluster computes a square of 256 x 256 elements. Block `rank` computes the rows 128 rank … 128 rank + 127 of it, and each
//          warpgroup 64 of these rows. A thread has the elements that wgmma gives it: see hopper.cuh. The columns 0..127 and 128..255
//          are the two halves of the square
// Threads  384: one lane of warp 0 copies, warps 1..3 may load what an epilogue needs, warps 4..11 multiply
// Shared   STAGES slots of 48 KiB, each with 64 of k. A slot has 16 KiB of A, which are this block's own. Then it has 32 KiB of B, which
//          are the cluster's: each block copies one half of them to both. After the slots there are two mbarriers for each, `full` and
//          `empty`. In a ring that serves one block alone, a slot has BYTES bytes
// Sync     P1 the slot is free: all warps that multiply have released it. If both blocks read it, that is the warps of both
//          P2 the slot is full: this block's A and both blocks' halves of B have landed
//          P3 the products of this warp no longer read the slot, which both blocks learn. In a ring of one block: the lanes of this warp
//             have loaded what they need of the slot
//          P4 the mbarriers of both blocks are ready before either block uses them
//          P5 no block ends while the other may still write to it or arrive at its mbarriers
// Numerics Tensor cores cut every partial sum towards zero: see product.cuh. So tensor cores add up a cosine over 64 terms (over 16 in
//          split f32), and the sums of these are added with rounding to nearest
#pragma once
#include "cosines.cuh"
#include "epilogue.cuh"
#include "hopper.cuh"

constexpr u32 CLUSTER = 2, CONSUMERS = 2 * WARPGROUP, PIPELINE_THREADS = WARPGROUP + CONSUMERS;
constexpr u32 HALF = 128, PAIR = 256; // the columns, or rows, of one tile and of two
constexpr u32 A_BYTES = 128 * HALF, B_BYTES = 128 * PAIR, STAGE_BYTES = A_BYTES + B_BYTES;
// The registers of a thread that copies, and of one that multiplies. 128·56 + 256·224 are what 384 threads of 168 registers have.
constexpr u32 COPY_REGISTERS = 56, MULTIPLY_REGISTERS = 224;
constexpr u16 BOTH_BLOCKS = 3;

// The sums of one half. element(x, i, j) is in row slot i of 2 and column slot j of 32.
using HalfSums = float[64];
SAMTONE_DEVICE float& element(HalfSums& x, u32 i, u32 j) { return x[j / 2 * 4 + i * 2 + j % 2]; }

SAMTONE_DEVICE void move_half(HalfSums (&x)[2]) {
    UNROLL
    for (u32 i = 0; i < 64; ++i) x[0][i] = x[1][i];
}
SAMTONE_DEVICE void exchange_halves(HalfSums (&x)[2]) {
    UNROLL
    for (u32 i = 0; i < 64; ++i) {
        const float first = x[0][i];
        x[0][i] = x[1][i];
        x[1][i] = first;
    }
}

SAMTONE_DEVICE u32 consumer() { return warpgroup_id() - 1; }
SAMTONE_DEVICE u32 consumer_warp() { return warp_id() - WARPGROUP / WARP; } // one of 8
// Which of the block's 128 rows, and which of the half's 128 columns, a slot is.
SAMTONE_DEVICE u32 slot_row(u32 i) { return consumer_warp() * 16 + 8 * i + lane_id() / 4; }
SAMTONE_DEVICE u32 slot_column(u32 j) { return j / 2 * 8 + lane_id() % 4 * 2 + j % 2; }

// The ring of slots, as one thread goes around it. BLOCKS is the number of blocks whose warps release a slot.
template <u32 STAGES, u32 BYTES = STAGE_BYTES, u32 BLOCKS = CLUSTER> struct Ring {
    static constexpr u32 SLOTS = STAGES, SLOT_BYTES = BYTES, RELEASES = BLOCKS * CONSUMERS / WARP;
    static constexpr u32 BARRIERS = STAGES * BYTES, END = BARRIERS + 16 * STAGES;
    u32 slot, parity; // `parity` is that of the phase that `full` completes next
    SAMTONE_MEMBER shared_address stage() const { return shared_base() + slot * BYTES; }
    SAMTONE_MEMBER shared_address full() const { return shared_base() + BARRIERS + 16 * slot; }
    SAMTONE_MEMBER shared_address empty() const { return full() + 8; }
    SAMTONE_MEMBER void next() {
        slot = slot + 1 < STAGES ? slot + 1 : 0;
        if (slot == 0) parity ^= 1;
    }
};

// All threads of the cluster call this first. `more` makes the mbarriers of the kernel's own.
template <class R, class Make> SAMTONE_DEVICE void start_pipeline(Make more) {
    if (threadIdx.x == 0) {
        for (R ring{0, 0}; ring.slot < R::SLOTS; ++ring.slot) {
            mbarrier_init(ring.full(), 1);
            mbarrier_init(ring.empty(), R::RELEASES);
        }
        more();
        fence_mbarrier_init();
    }
    bar_warp_sync(ALL_LANES); // only whole warps may meet the cluster's barrier
    SYNC(P4, cluster_sync());
}

// All threads of the cluster call this last.
SAMTONE_DEVICE void end_pipeline() {
    bar_warp_sync(ALL_LANES); // the lanes that had nothing to copy wait for the one that had
    SYNC(P5, cluster_sync());
}

// The copying thread calls this. It waits for a free slot, and says how many bytes will fill it.
template <class R> SAMTONE_DEVICE shared_address begin_stage(const R& ring) {
    SYNC(P1, mbarrier_wait(ring.empty(), ring.parity ^ 1));
    mbarrier_arrive_expect_tx(ring.full(), R::SLOT_BYTES);
    return ring.stage();
}

template <class R> SAMTONE_DEVICE void wait_full(const R& ring SAMTONE_SITE) {
    SYNC(P2, mbarrier_wait(ring.full(), ring.parity SAMTONE_EMULATED_AS(, site)));
}

// A warp that multiplies calls this when it is done with the slot.
template <class R> SAMTONE_DEVICE void release(const R& ring SAMTONE_SITE) {
    static_assert(R::RELEASES == CLUSTER * CONSUMERS / WARP, "a slot that both blocks read");
    if (lane_id() < CLUSTER) SYNC(P3, mbarrier_arrive_cluster(ring.empty(), lane_id() SAMTONE_EMULATED_AS(, site)));
}

// The same for a slot of this block's own. Every lane has loaded from it. An arrival in the other block would not order loads.
template <class R> SAMTONE_DEVICE void release_loaded(const R& ring SAMTONE_SITE) {
    static_assert(R::RELEASES == CONSUMERS / WARP, "a slot that this block alone reads");
    SYNC(P3, bar_warp_sync(ALL_LANES SAMTONE_EMULATED_AS(, site)));
    if (lane_id() == 0) mbarrier_arrive(ring.empty() SAMTONE_EMULATED_AS(, site));
}

// ---- the squares of a wave: clusters share them out among themselves

SAMTONE_DEVICE u32 cluster_id() { return blockIdx.x / CLUSTER; }
SAMTONE_DEVICE u32 clusters() { return gridDim.x / CLUSTER; }

SAMTONE_DEVICE u32 squares_of(const SuperBlock& block) {
    const u32 rows = block.row.tiles / 2, cols = block.col.tiles / 2;
    return block.triangle != 0 ? rows * (rows + 1) / 2 : rows * cols;
}
SAMTONE_DEVICE u32 squares_of(const Wave& wave) {
    u32 all = 0;
    for (u32 b = 0; b < wave.count; ++b) all += squares_of(wave.blocks[b]);
    return all;
}

// This block's part of square k: its tile of rows, and the first of its two tiles of columns.
SAMTONE_DEVICE TilePlace square_of(const Wave& wave, u32 k) {
    u32 b = 0;
    for (u32 squares = squares_of(wave.blocks[0]); k >= squares; squares = squares_of(wave.blocks[b])) {
        k -= squares;
        ++b;
    }
    const SuperBlock& block = wave.blocks[b];
    const u32x2 place = place_in(block.row.tiles / 2, block.col.tiles / 2, block.triangle != 0, k);
    return {b, 2 * place.x + cluster_rank(), 2 * place.y};
}

// ---- cosines

// The copying thread copies the embeddings of a square, along all segments of k. In split f32 the segments are lo·hi, hi·lo and hi·hi. Each
// has the bytes `begin` … `end` of packed rows.
template <Arithmetic A, class R>
SAMTONE_DEVICE void copy_square(R& ring, const SuperBlock& block, const TilePlace& at, const Towers& towers, u32 begin, u32 end) {
    const Tower &left = tower_of(towers, block.row.space), &right = tower_of(towers, block.col.space);
    const u32 half = cluster_rank() * (B_BYTES / 2);
    const unsigned char* a_rows = left.packed + static_cast<u64>(block.row.packed + at.row * HALF) * 128 + begin / 128 * left.panel;
    const unsigned char* b_rows =
        right.packed + static_cast<u64>(block.col.packed + at.col * HALF) * 128 + half + begin / 128 * right.panel;
    for (u32 segment = 0; segment < Numbers<A>::COSINE_SEGMENTS; ++segment) {
        const unsigned char* a = a_rows + (Numbers<A>::SPLIT && segment == 0 ? left.plane : 0);
        const unsigned char* b = b_rows + (Numbers<A>::SPLIT && segment == 1 ? right.plane : 0);
        for (u32 column = begin; column < end; column += 128) {
            const shared_address slot = begin_stage(ring);
            cp_async_bulk_load(slot, a, A_BYTES, ring.full());
            cp_async_bulk_load_multicast(slot + A_BYTES + half, b, B_BYTES / 2, ring.full(), BOTH_BLOCKS);
            ring.next();
            a += left.panel;
            b += right.panel;
        }
    }
}

// The multiplying warpgroups add up both halves along `steps` slots. total[0] has half `first`.
template <Arithmetic A, class R> SAMTONE_DEVICE void multiply_cosines(HalfSums (&total)[2], R& ring, u32 steps, u32 first = 0) {
    constexpr u32 PARTS = Numbers<A>::PARTS;
    for (u32 step = 0; step < steps; ++step) {
        wait_full(ring);
        const u64 a = wgmma_operand(ring.stage() + consumer() * (64 * 128), 0, 1024), b = wgmma_operand(ring.stage() + A_BYTES, 0, 1024);
        UNROLL
        for (u32 half = 0; half < 2; ++half) {
            UNROLL
            for (u32 part = 0; part < PARTS; ++part) {
                HalfSums sums;
                wgmma_fence();
                UNROLL
                for (u32 k = part * (4 / PARTS); k < (part + 1) * (4 / PARTS); ++k)
                    wgmma_m64n128k16_f16<false, false>(sums, advanced(a, 32 * k), advanced(b, (half ^ first) * A_BYTES + 32 * k),
                                                       k > part * (4 / PARTS));
                wgmma_commit_group();
                wgmma_wait_group<0>();
                hold(sums);
                UNROLL
                for (u32 i = 0; i < 64; ++i) total[half][i] += sums[i];
                hold(total[half]); // the next products take the registers of `sums` only after this, because there is no room for two
            }
        }
        release(ring);
        ring.next();
    }
}

// ---- entries: what the epilogue must know of the 128 rows and 256 columns of a square. The rows come first
//
//      0  f32[384]    2^12/‖x‖
//   1536  f32[3][384] what only one pass needs: see its kernel
//   6144  u32x4[384]  the index as a candidate: query key, passage key, owner
//  12288  u32x4[384]  the index as an anchor: query key, passage key, row, highest cosine that it keeps
//
// Sync     E1 all warps that multiply have said that they are done with the square before
//          E2 all entries are written before any is read
//          E3 all lanes of this warp have read the entries
constexpr u32 EDGE_ENTRIES = HALF + PAIR, EDGES_BYTES = 48 * EDGE_ENTRIES, EDGE_LOADERS = WARPGROUP - WARP;
struct Edges {
    shared_address at;
    u32 parity;
    SAMTONE_MEMBER shared_address full() const { return at + EDGES_BYTES; }
    SAMTONE_MEMBER shared_address empty() const { return full() + 8; }
    SAMTONE_MEMBER shared_address scale(u32 entry) const { return at + 4 * entry; }
    SAMTONE_MEMBER shared_address of_pass(u32 k, u32 entry) const { return at + 4 * (EDGE_ENTRIES * (1 + k) + entry); }
    SAMTONE_MEMBER shared_address candidate(u32 entry) const { return at + 16 * (EDGE_ENTRIES + entry); }
    SAMTONE_MEMBER shared_address anchor(u32 entry) const { return at + 16 * (2 * EDGE_ENTRIES + entry); }
};

SAMTONE_DEVICE void make_edges(const Edges& edges) {
    mbarrier_init(edges.full(), EDGE_LOADERS);
    mbarrier_init(edges.empty(), CONSUMERS / WARP);
}

SAMTONE_DEVICE void store_entry(const Edges& edges, u32 e, const EdgeEntry& entry, const float (&numbers)[3]) {
    st_shared_u32(edges.scale(e), entry.candidate.w);
    UNROLL
    for (u32 k = 0; k < 3; ++k) st_shared_f32(edges.of_pass(k, e), numbers[k]);
    st_shared_u32x4(edges.candidate(e), entry.candidate);
    st_shared_u32x4(edges.anchor(e), entry.anchor);
}

// Warps 1..3 load the entries of a square. `of_pass(numbers, entry, is row)` gives the three numbers of the pass for each.
template <class OfPass> SAMTONE_DEVICE void load_edges(Edges& edges, const SuperBlock& block, const TilePlace& at, const Towers& towers,
                                                       const AnchorKeys* rows, OfPass of_pass) {
    SYNC(E1, mbarrier_wait(edges.empty(), edges.parity ^ 1));
    for (u32 e = threadIdx.x - WARP; e < EDGE_ENTRIES; e += EDGE_LOADERS) {
        const bool row = e < HALF;
        const Edge& edge = row ? block.row : block.col;
        const EdgeEntry entry = load_entry(edge, edge.begin + (row ? at.row * HALF + e : at.col * HALF + e - HALF), towers, rows);
        float numbers[3];
        of_pass(numbers, entry, row);
        store_entry(edges, e, entry, numbers);
    }
    SYNC(E2, mbarrier_arrive(edges.full()));
    edges.parity ^= 1;
}

SAMTONE_DEVICE void wait_edges(const Edges& edges SAMTONE_SITE) {
    SYNC(E2, mbarrier_wait(edges.full(), edges.parity SAMTONE_EMULATED_AS(, site)));
}
SAMTONE_DEVICE void release_edges(Edges& edges SAMTONE_SITE) {
    SYNC(E3, bar_warp_sync(ALL_LANES SAMTONE_EMULATED_AS(, site)));
    if (lane_id() == 0) mbarrier_arrive(edges.empty() SAMTONE_EMULATED_AS(, site));
    edges.parity ^= 1;
}

// [1] load: the warpgroup that copies calls this. It visits all squares of this cluster for which `left_out` is false. The copying thread
// calls `copy(super-block, place)`. `of_pass(numbers, entry, axis)` gives the three numbers of the pass for each entry.
template <class Copy, class OfPass, class LeftOut> SAMTONE_DEVICE void load_squares(Edges& edges, const Wave& wave, const Towers& towers,
                                                                                    const AnchorKeys* rows, Copy copy, OfPass of_pass,
                                                                                    LeftOut left_out) {
    const u32 squares = squares_of(wave);
    if (threadIdx.x == 0) {
        for (u32 k = cluster_id(); k < squares; k += clusters()) {
            const TilePlace at = square_of(wave, k);
            if (left_out(at)) continue;
            copy(wave.blocks[at.block], at);
        }
    } else if (warp_id() > 0) {
        for (u32 k = cluster_id(); k < squares; k += clusters()) {
            const TilePlace at = square_of(wave, k);
            if (left_out(at)) continue;
            const SuperBlock& block = wave.blocks[at.block];
            load_edges(edges, block, at, towers, rows,
                       [&](float(&numbers)[3], const EdgeEntry& entry, bool row) { of_pass(numbers, entry, row ? block.row : block.col); });
        }
    }
}

// Multiplies the elements of one half by `factor`, and by what an array of the entries has for their row and for their column.
SAMTONE_DEVICE void multiply_half(HalfSums& x, shared_address array, u32 half, float factor) {
    float scale[2];
    UNROLL
    for (u32 i = 0; i < 2; ++i) scale[i] = ld_shared_f32(array + 4 * slot_row(i)) * factor;
    UNROLL
    for (u32 j = 0; j < 32; j += 2) {
        const f32x2 column = ld_shared_f32x2(array + 4 * (HALF + half * HALF + slot_column(j)));
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            element(x, i, j) = mul_rn(element(x, i, j), scale[i] * column.x);
            element(x, i, j + 1) = mul_rn(element(x, i, j + 1), scale[i] * column.y);
        }
    }
}

// [2] scale: makes cosines of the products of one half, in place.
SAMTONE_DEVICE void scale_half(HalfSums& x, const Edges& edges, u32 half) { multiply_half(x, edges.scale(0), half, 0x1p-24f); }

// Whether the tile of this half is the mirror image of another tile, which is computed.
SAMTONE_DEVICE bool is_mirrored(const SuperBlock& block, const TilePlace& at, u32 half) {
    return block.triangle != 0 && at.col + half < at.row;
}

// Where a super-block that keeps its cosines has those of this block's tile of a half.
SAMTONE_DEVICE float* kept_tile(const Cosines& cosines, const SuperBlock& block, const TilePlace& at, u32 half) {
    return kept_square(cosines, block, at.block, at.row / 2, at.col / 2, 2, PAIR * PAIR) + (at.row % 2 * 2 + half) * (HALF * HALF);
}

// Which of the thread's elements of a half are negatives that the anchor of their row, or of their column, keeps. Each row slot has a word.
struct KeptSlots {
    u32 row[2], col[2];
};
SAMTONE_DEVICE bool is_kept_slot(const u32 (&bits)[2], u32 i, u32 j) { return (bits[i] >> j & 1) != 0; }

// What the mask must know of one half, as `mask_of` says it of a tile.
SAMTONE_DEVICE TileMask mask_of_half(const SuperBlock& block, const TilePlace& at, u32 half, const Towers& towers) {
    return mask_of<HALF>(block, {at.block, at.row, at.col + half}, towers);
}

// [3] mask.
SAMTONE_DEVICE KeptSlots mask_half(HalfSums& x, const Edges& edges, u32 half, const TileMask& tile) {
    KeptSlots kept{{0, 0}, {0, 0}};
    u32x4 r[2], anchor[2];
    bool live[2];
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        r[i] = ld_shared_u32x4(edges.candidate(slot_row(i)));
        anchor[i] = ld_shared_u32x4(edges.anchor(slot_row(i)));
        live[i] = slot_row(i) < tile.live_rows;
    }
    KEEP_LOOP // keys need no element of x. If this were unrolled, all keys would be loaded at once
    for (u32 j = 0; j < 32; ++j) {
        const u32 column = slot_column(j), entry = HALF + half * HALF + column;
        const u32x4 c = ld_shared_u32x4(edges.candidate(entry)), other = ld_shared_u32x4(edges.anchor(entry));
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            const bool exists = live[i] & (column < tile.live_cols);
            kept.row[i] |= static_cast<u32>(exists & tile.row_anchors & keys_differ(c, anchor[i])) << j;
            kept.col[i] |= static_cast<u32>(exists & tile.col_anchors & keys_differ(r[i], other)) << j;
        }
    }
    UNROLL
    for (u32 j = 0; j < 32; ++j) {
        const float highest = ld_shared_f32(edges.anchor(HALF + half * HALF + slot_column(j)) + 12);
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            if (!(element(x, i, j) <= float_of(anchor[i].w))) kept.row[i] &= ~(1u << j);
            if (!(element(x, i, j) <= highest)) kept.col[i] &= ~(1u << j);
        }
    }
    return kept;
}

// The largest cosine of the warp's part of a half that any anchor keeps.
template <bool CHECKED> SAMTONE_DEVICE float largest_of(HalfSums& x, const KeptSlots& kept) {
    float largest = NO_COSINE;
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        UNROLL
        for (u32 j = 0; j < 32; ++j)
            if (!CHECKED || (is_kept_slot(kept.row, i, j) | is_kept_slot(kept.col, i, j))) largest = max_f32(largest, element(x, i, j));
    }
    return max_among(largest, 1, 16);
}
SAMTONE_DEVICE bool needs_mask(const TileMask& tile) { return tile.masked || tile.live_rows < HALF || tile.live_cols < HALF; }

// ---- prefixes: one epilogue after another, each with entries of its own

// Two sets of entries in turn. Warps 1..3 fill one of them while the other is read. This hides the chain of their loads, which may take
// longer than the products of a short segment. Behind the two mbarriers of a set there is a fourth number of the pass for each entry. It
// brings sums from the units of one prefix to those of the next, or back.
//
//  18448  f32[384]    `Scales::next` or `Scales::step`. In the longest prefix it is 0
constexpr u32 EDGES_IN_TURN_BYTES = EDGES_BYTES + 16 + 4 * EDGE_ENTRIES;
SAMTONE_DEVICE shared_address units(const Edges& edges, u32 entry) { return edges.at + EDGES_BYTES + 16 + 4 * entry; }
struct EdgesInTurn {
    shared_address first;
    u32 turn; // how many sets came before. This takes one register, where the place and the parity of a set would take two
    SAMTONE_MEMBER Edges set() const { return {first + turn % 2 * EDGES_IN_TURN_BYTES, turn / 2 % 2}; }
};
SAMTONE_DEVICE void make_edges(const EdgesInTurn& edges) {
    make_edges(Edges{edges.first, 0});
    make_edges(Edges{edges.first + EDGES_IN_TURN_BYTES, 0});
}

SAMTONE_DEVICE void release_edges(EdgesInTurn& in_turn SAMTONE_SITE) {
    Edges edges = in_turn.set();
    release_edges(edges SAMTONE_EMULATED_AS(, site));
    ++in_turn.turn;
}

// Changes the units of the sums of one half, in place.
SAMTONE_DEVICE void change_units(HalfSums& x, const Edges& edges, u32 half) { multiply_half(x, units(edges, 0), half, 1); }

// One index of an axis in one prefix.
struct PrefixEntry {
    EdgeEntry of; // as without prefixes
    float bar;    // s⁺ with slack of the row that it anchors, or 0
    Scales scales;
};

// Loads it. `rows` are those of the prefix, or null where nothing is masked. Loads that do not depend on the row come before those that do.
SAMTONE_DEVICE PrefixEntry load_entry(const Edge& edge, u32 index, const Towers& towers, const AnchorKeys* rows, const Prefixes& prefixes,
                                      u32 prefix) {
    PrefixEntry entry{{{NONE, NONE, NONE, 0}, {NONE, NONE, NONE, 0}, NONE, index < edge.end}, 0, {0, 0, 0}};
    if (!entry.of.live) return entry;
    const Tower& tower = tower_of(towers, edge.space);
    const u64 in_prefix = static_cast<u64>(prefix) * prefixes.indices[edge.space] + index;
    entry.of.candidate = ld_global_nc_u32x4(tower.candidates + index);
    const float inverse = ld_global_f32(tower.inverse + in_prefix);
    if (prefix + 1 < prefixes.count) entry.scales = ld_global_scales(prefixes.scales[edge.space] + in_prefix);
    entry.of.row = entry.of.candidate.w;
    entry.of.candidate.w = bits_of(inverse);
    if (rows != nullptr && edge.anchors != 0 && entry.of.row != NONE) {
        const u32x4 anchor = ld_global_u32x4(rows + entry.of.row);
        const u32x2 keys = keys_of_anchor(edge, anchor);
        entry.of.anchor = {keys.x, keys.y, entry.of.row, anchor.z};
        entry.bar = float_of(anchor.w);
    }
    return entry;
}

// [1] load: the entries of one prefix. They are those of the tile of rows, and of COLUMNS columns from column tile `at.col` on.
// `of_pass(numbers, entry, edge)` gives the three numbers of the pass for each entry, and returns the fourth.
template <u32 COLUMNS, class OfPass> SAMTONE_DEVICE void load_edges(EdgesInTurn& in_turn, const SuperBlock& block, const TilePlace& at,
                                                                    const Towers& towers, const AnchorKeys* rows, const Prefixes& prefixes,
                                                                    u32 prefix, OfPass of_pass) {
    const Edges edges = in_turn.set();
    ++in_turn.turn;
    SYNC(E1, mbarrier_wait(edges.empty(), edges.parity ^ 1));
    for (u32 e = threadIdx.x - WARP; e < HALF + COLUMNS; e += EDGE_LOADERS) {
        const Edge& edge = e < HALF ? block.row : block.col;
        const u32 index = edge.begin + (e < HALF ? at.row * HALF + e : at.col * HALF + e - HALF);
        const PrefixEntry entry = load_entry(edge, index, towers, rows, prefixes, prefix);
        float numbers[3];
        const float fourth = of_pass(numbers, entry, edge);
        store_entry(edges, e, entry.of, numbers);
        st_shared_f32(units(edges, e), fourth);
    }
    SYNC(E2, mbarrier_arrive(edges.full()));
}

// [1] load: the warpgroup that copies calls this. It visits all squares of this cluster. The copying thread calls `copy(super-block,
// place)`, and warps 1..3 call `load(super-block, place)`.
template <class Copy, class Load> SAMTONE_DEVICE void load_squares(const Wave& wave, Copy copy, Load load) {
    const u32 squares = squares_of(wave);
    for (u32 k = cluster_id(); k < squares; k += clusters()) {
        const TilePlace at = square_of(wave, k);
        if (threadIdx.x == 0) copy(wave.blocks[at.block], at);
        else if (warp_id() > 0) load(wave.blocks[at.block], at);
    }
}
