// problem.cuh: structs and numbers that host and kernels share. src/cuda/abi.rs declares them in Rust, and tests/emulator/cuda_abi.rs
// compares both.
//
// Two index spaces: queries 0..M, and passages in the order [anchors | others | extras] of src/order.rs. An index of either
// may anchor one row; a tile pairs indices of two spaces. Seen along a tile's row, the column is a candidate of the row's
// anchor; seen down a column, the row is a candidate of the column's anchor. Both share the cosine.
#pragma once
#include "instructions.cuh"

// A block of cosines of loss.md, or an index that is none.
constexpr u32 QP = 0, PQ = 1, QQ = 2, PP = 3, BLOCKS = 4;
constexpr u32 NONE = 0xffffffffu;

// One side of a super-block.
ABI_STRUCT(Edge, {
    u32 begin, end; // indices of the space
    u32 space;      // 0 queries, 1 passages
    u32 block;      // whose softmax its anchors take part in: of an edge that meets queries PQ or QQ
    u32 anchors;    // whether its indices anchor rows here
    u32 sums;       // whether the sums of its anchors are taken here
    u32 gradients;  // whether gradients of its embeddings are added here
    u32 tiles;      // ⌈(end − begin) / TILE⌉; for kernels of 9.0, which visit pairs of tiles, the next even number
    u32 packed;     // row of `begin` in the packed embeddings
});

// A rectangle of one matrix of cosines whose gradient tile fits the workspace; or a square on the diagonal of a symmetric one.
ABI_STRUCT(SuperBlock, {
    Edge row, col;
    u32 first_tile;   // among the tiles of the wave
    u32 tiles;        // their number
    u32 triangle;     // both edges are the same: tiles below the diagonal are mirror images, and not visited
    u32 ranks;        // whether kept negatives above the positive are counted
    u32 counted;      // whether the columns' part of ∂L/∂β is added here
    u32 first_square; // of its squares among those that may be skipped (skipping.cuh); NONE: none of them may
    u64 row_partials; // first element of [col.tiles][row.tiles·TILE] partial sums
    u64 col_partials; // first element of [row.tiles][col.tiles·TILE] partial sums
    u64 gradient;     // first element of [row.tiles·TILE][col.tiles·TILE] gradients of logits
});

// Points at which a space is cut into parts (src/regions.rs), its beginning and end among them.
constexpr u32 MAX_CUTS = 8;

// What one launch visits.
constexpr u32 MAX_SUPER_BLOCKS = 8;
ABI_STRUCT(Wave, {
    u32 count, tiles;
    SuperBlock blocks[MAX_SUPER_BLOCKS];
});

// The packed embeddings of one index space: row k is its raw embedding times a power of two, of norm 2^12 … 2^13, as f16, as
// the sum of two f16 (planes), or as f32. Columns go on as zeros up to a multiple of 128 bytes, and rows to whole tiles.
// Two layouts: row-major for kernels of 8.0; for those of 9.0 panels of 128 bytes of every row, in which the 16-byte chunk c of row
// r is at c ^ r % 8: any eight rows that begin at a multiple of eight are what wgmma reads, and a tile is one bulk copy.
ABI_STRUCT(Tower, {
    const unsigned char* packed;
    u64 plane;               // bytes from the first to the second plane
    u64 panel;               // bytes from the first to the second 128 bytes of a row
    const float* inverse;    // 2^12 / norm of the packed row: above 1/2 up to 1; 0 for a row without direction
    const u32x4* candidates; // as a candidate: query key, passage key (of queries exchanged: see `keys_of_anchor` in epilogue.cuh),
                             // owner (NONE: everyone's); the row it anchors, or NONE
});
ABI_STRUCT(Towers, {
    Tower of[2];
    u32 row_bytes; // of a packed row in one plane
    u32 masked;    // whether pairs of different indices can be masked at all
});

// Of a row as an anchor: query key, passage key, and, as bits of f32, the highest cosine it keeps and s⁺ with the slack above
// which a negative outranks it.
using AnchorKeys = u32x4;

// β·log2 e as two floats: see `exponential` in epilogue.cuh.
ABI_STRUCT(Beta, {
    float high, low;
});

// Σ exp(β s) as sum·2^exponent.
ABI_STRUCT(Partial, {
    float sum;
    i32 exponent;
});
ABI_STRUCT(ExpSum, {
    double sum;
    i32 exponent;
    u32 padding;
});

// One softmax group of the loss.
ABI_STRUCT(Group, {
    double coefficient;
    u32 blocks; // bit b: block b is in it
    u32 copies; // of the positive in the denominator
});

// What is wrong with one embedding: its row, NONE if it is finite, and if its norm is not zero.
using Fault = u32x2;

// What a call found wrong with its inputs: the lowest row, NONE if there is none. u32 each. `combine` writes all of them. A backward call
// adds embeddings of another norm than those of the forward call: those that `prepare` packs again, and those that only `project` reads.
constexpr u32 NON_FINITE_QUERY = 0, NON_FINITE_PASSAGE = 1, ZERO_QUERY = 2, ZERO_PASSAGE = 3, NO_NEGATIVE = 4, NO_NEGATIVE_GROUP = 5,
              REPACKED_QUERY = 6, REPACKED_PASSAGE = 7, CHANGED_QUERY = 8, CHANGED_PASSAGE = 9, STATUS_WORDS = 10;

// Whether a call is refused: its results are NaN then, so that a caller that never looks at the status sees no wrong number. Not for what
// `project` finds, which may not depend on who looks first: it refuses the rows that it finds, and the others are right.
SAMTONE_DEVICE bool is_refused(const u32* status, u32 zero_is_error SAMTONE_SITE) {
    bool refused = ld_global_u32(status + NO_NEGATIVE SAMTONE_EMULATED_AS(, site)) != NONE;
    for (u32 word = REPACKED_QUERY; word <= REPACKED_PASSAGE; ++word)
        refused = refused || ld_global_u32(status + word SAMTONE_EMULATED_AS(, site)) != NONE;
    for (u32 word = 0; word < (zero_is_error != 0 ? 4u : 2u); ++word)
        refused = refused || ld_global_u32(status + word SAMTONE_EMULATED_AS(, site)) != NONE;
    return refused;
}
SAMTONE_DEVICE double not_a_number() { return double_of(0x7ff8000000000000ull); }
SAMTONE_DEVICE double infinity() { return double_of(0x7ff0000000000000ull); }
SAMTONE_DEVICE double minus_infinity() { return double_of(0xfff0000000000000ull); }

// Results of a call, f64 each.
constexpr u32 LOSS = 0, PRECISION_QP = 1, MRR_QP = 2, PRECISION_PQ = 3, MRR_PQ = 4, SHIFT = 5, BETA_SUM = 6, GRAD_TAU = 7,
              GRAD_LOG_BETA = 8, SQUARES = 9, SKIPPED = 10, RESULTS = 16;

// 2^n for whole n of −1022 … 1023, else 0 or 2^1023.
SAMTONE_DEVICE double power_of_two(i32 n) {
    const i32 biased = n + 1023;
    return double_of(static_cast<u64>(biased < 0 ? 0 : biased > 2046 ? 2046 : biased) << 52);
}

// A reference, because a copy chosen at run time would be made in local memory.
SAMTONE_DEVICE const Tower& tower_of(const Towers& towers, u32 space) { return towers.of[space]; }

// Loads of the structs above from global memory.
SAMTONE_DEVICE ExpSum ld_global_exp_sum(const ExpSum* at SAMTONE_SITE) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(at);
    return {ld_global_f64(bytes SAMTONE_EMULATED_AS(, site)), ld_global_i32(bytes + 8 SAMTONE_EMULATED_AS(, site)), 0};
}
SAMTONE_DEVICE void st_global_exp_sum(ExpSum* at, const ExpSum& x SAMTONE_SITE) {
    unsigned char* bytes = reinterpret_cast<unsigned char*>(at);
    st_global_f64(bytes, x.sum SAMTONE_EMULATED_AS(, site));
    st_global_i32(bytes + 8, x.exponent SAMTONE_EMULATED_AS(, site));
}
