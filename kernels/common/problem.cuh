// problem.cuh: structs and numbers that host and kernels share. src/cuda/abi.rs declares them in Rust, and tests/emulator/cuda_abi.rs
// compares both.
//
// There are two index spaces: the queries 0..M, and the passages in the order [anchors | others | extras] of src/order.rs. An index of
// either space may anchor one row. A tile pairs the indices of two spaces. Seen along a row of the tile, the index of the column is a
// candidate of the anchor that the row holds. Seen down a column, the index of the row is a candidate of the anchor that the column
// holds. Both share the cosine.
#pragma once
#include "instructions.cuh"

// The four blocks of loss.md, and an index that stands for none.
constexpr u32 QP = 0, PQ = 1, QQ = 2, PP = 3, BLOCKS = 4;
constexpr u32 NONE = 0xffffffffu;

// One axis of a super-block: its rows, or its columns.
ABI_STRUCT(Edge, {
    u32 begin, end; // indices of the space
    u32 space;      // 0 for queries, 1 for passages
    u32 block;      // in whose softmax its anchors take part. If they meet queries, that is PQ or QQ
    u32 anchors;    // whether its indices anchor rows here
    u32 sums;       // whether the sums of its anchors are taken here
    u32 gradients;  // whether the gradients of its embeddings are added here
    u32 tiles;      // ⌈(end − begin) / TILE⌉. Kernels of 9.0 visit pairs of tiles: there it is the next even number
    u32 packed;     // the row of `begin` in the packed embeddings
});

// A rectangle of one matrix of cosines whose gradients of logits fit the workspace, or a square on the diagonal of a symmetric matrix.
ABI_STRUCT(SuperBlock, {
    Edge row, col;
    u32 first_tile;   // the number of its first tile among those of the wave
    u32 tiles;        // how many tiles it has
    u32 triangle;     // both axes are the same. Tiles below the diagonal are mirror images, which no kernel visits
    u32 ranks;        // whether negatives above the positive are counted
    u32 counted;      // whether the columns' part of ∂L/∂β is added here
    u32 first_square; // the number of its first square among those that may be skipped (skipping.cuh). NONE if none of its squares may
    u64 row_partials; // the first element of [col.tiles][row.tiles·TILE] partial sums
    u64 col_partials; // the first element of [row.tiles][col.tiles·TILE] partial sums
    u64 gradient;     // the first element of [row.tiles·TILE][col.tiles·TILE] gradients of logits
});

// At most so many points cut a space into parts (src/regions.rs), its beginning and its end among them.
constexpr u32 MAX_CUTS = 8;

// What one launch visits.
constexpr u32 MAX_SUPER_BLOCKS = 8;
ABI_STRUCT(Wave, {
    u32 count, tiles;
    SuperBlock blocks[MAX_SUPER_BLOCKS];
});

// The packed embeddings of one index space. Row k is its raw embedding times a power of two, so that its norm is 2^12 … 2^13. It is
// stored as f16, as the sum of two f16 (two planes), or as f32. Zeros fill its columns up to a multiple of 128 bytes, and zero rows fill
// the last tile. There are two layouts. For kernels of 8.0 it is row-major. For kernels of 9.0 it consists of panels, each with 128 bytes
// of every row, and the 16-byte chunk c of row r lies at c ^ r % 8. So any eight rows that begin at a multiple of eight are what wgmma
// reads, and one bulk copy fetches a tile.
ABI_STRUCT(Tower, {
    const unsigned char* packed;
    u64 plane;               // bytes from the first to the second plane
    u64 panel;               // bytes from one panel to the next
    const float* inverse;    // 2^12 / norm of the packed row: above 1/2, at most 1. It is 0 for a row without direction. With prefixes
                             // there is one for each prefix: see `Prefixes`
    const u32x4* candidates; // of each index as a candidate: query key, passage key, owner (NONE if every row keeps it), the row that it
                             // anchors (or NONE). The two keys of a query are exchanged: see `keys_of_anchor` in epilogue.cuh
});
ABI_STRUCT(Towers, {
    Tower of[2];
    u32 row_bytes; // of a packed row in one plane
    u32 masked;    // whether any pair of different indices can be masked
});

// The prefixes of a call (docs/loss.md). A call that has only the whole embedding, with weight 1, has kernels of its own, which get none
// of this. Prefix k ends with segment k of an embedding. Segments begin at multiples of 128 bytes of a packed row. Segment k of a row is
// its raw part times 2^t, where t is that of prefix k: the row's norm up to the end of the segment is then 2^12 … 2^13. Arrays that have
// a part for each prefix have one part after the other: inverse norms [prefix][index], anchor keys [prefix][row], and so on.
ABI_STRUCT(Prefixes, {
    const u32* segments;    // where each segment ends in a packed row, in bytes
    const u32* dims;        // where it ends in a raw row, in elements
    const u32x4* scales[2]; // of each space, [prefix][index]: see `Scales`
    u32 count, rows;        // of prefixes; of the batch, M
    u32 indices[2];         // of each space
    u64 partials;           // elements from the partial sums of one prefix to those of the next, and from its counts and radial sums
    u64 cosines;            // elements from the stored cosines of one prefix to those of the next
    u64 gradients;          // bytes from the gradients of logits of one prefix to those of the next
});

// What is known of an index in a prefix besides its inverse norm.
struct Scales {
    float next; // its norm in units of the next segment. The product of two indices times both is a cosine
    float step; // 2^(t of the next prefix − t of this one), at most 1
    i32 power;  // t. Of a prefix without direction it is that of the next one
};
SAMTONE_DEVICE Scales ld_global_scales(const u32x4* at SAMTONE_SITE) {
    const u32x4 words = ld_global_u32x4(at SAMTONE_EMULATED_AS(, site));
    return {float_of(words.x), float_of(words.y), static_cast<i32>(words.z)};
}

// What is known of a row as an anchor: query key, passage key, and two numbers as bits of f32. They are the highest cosine that the row
// keeps, and s⁺ with a slack. A negative above the latter outranks the positive.
using AnchorKeys = u32x4;

// β·log2 e as the sum of two floats: see `exponential` in epilogue.cuh.
ABI_STRUCT(Beta, { float high, low; });

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
    u32 blocks; // bit b is set if block b is in it
    u32 copies; // copies of the positive in the denominator
});

// What is wrong with one embedding. The first number is its row if it is not finite, the second its row if its norm is zero. Else NONE.
using Fault = u32x2;

// What a call found wrong with its inputs, a u32 for each kind of fault: the lowest row that has it, or NONE. `combine` writes all of
// them. A backward call adds embeddings whose norm is not the one of the forward call. REPACKED are those that `prepare` packs again,
// and CHANGED those that only `project` reads.
constexpr u32 NON_FINITE_QUERY = 0, NON_FINITE_PASSAGE = 1, ZERO_QUERY = 2, ZERO_PASSAGE = 3, NO_NEGATIVE = 4, NO_NEGATIVE_GROUP = 5,
              REPACKED_QUERY = 6, REPACKED_PASSAGE = 7, CHANGED_QUERY = 8, CHANGED_PASSAGE = 9, STATUS_WORDS = 10;

// Whether a call is refused. Then its results are NaN, so that a caller that never looks at the status sees no wrong number. CHANGED
// embeddings refuse no call, because then a result would depend on who looks first. `project` refuses the rows that it finds, and all
// other rows are right.
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

// Where the results of a call are. Each is an f64. With prefixes those of each prefix follow, which have no temperature gradient. LARGEST is
// the logarithm of the largest share that a row has in the gradient, −∞ if there is none.
constexpr u32 LOSS = 0, PRECISION_QP = 1, MRR_QP = 2, PRECISION_PQ = 3, MRR_PQ = 4, SHIFT = 5, BETA_SUM = 6, GRAD_TAU = 7,
              GRAD_LOG_BETA = 8, SQUARES = 9, SKIPPED = 10, LARGEST = 11, RESULTS = 16;

// 2^n for a whole n from −1022 to 1023. It is 0 for a smaller n, and 2^1023 for a larger one.
SAMTONE_DEVICE double power_of_two(i32 n) {
    const i32 biased = n + 1023;
    return double_of(static_cast<u64>(biased < 0 ? 0 : biased > 2046 ? 2046 : biased) << 52);
}

// This gives a reference, because a copy that is chosen at run time would lie in local memory.
SAMTONE_DEVICE const Tower& tower_of(const Towers& towers, u32 space) { return towers.of[space]; }

// Loads and stores of the structs above in global memory.
SAMTONE_DEVICE ExpSum ld_global_exp_sum(const ExpSum* at SAMTONE_SITE) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(at);
    return {ld_global_f64(bytes SAMTONE_EMULATED_AS(, site)), ld_global_i32(bytes + 8 SAMTONE_EMULATED_AS(, site)), 0};
}
SAMTONE_DEVICE void st_global_exp_sum(ExpSum* at, const ExpSum& x SAMTONE_SITE) {
    unsigned char* bytes = reinterpret_cast<unsigned char*>(at);
    st_global_f64(bytes, x.sum SAMTONE_EMULATED_AS(, site));
    st_global_i32(bytes + 8, x.exponent SAMTONE_EMULATED_AS(, site));
}
