// product.cuh: the mainloop of every heavy kernel of 8.0. It makes one TILE x TILE tile of A·B, along k in stages of 128 bytes.
//
// Math     total[m][n] += Σ_k A[m][k]·B[k][n], where k runs over `steps` stages
// Shape    With TILE 64 there are 4 warps of 32 x 32, with TILE 128 there are 8 warps of 64 x 32. THREADS = 2·TILE. A thread has the
//          elements that mma.sync gives it: total[i][j][r] is row 16 i + g + 8 (r / 2), column 8 j + 2 t + r % 2 of its warp's part,
//          where g = lane / 4 and t = lane % 4
// Shared   STAGES slots of 256·TILE bytes: A, then B, 128·TILE bytes each. An operand lies in one of two ways. "By rows": row m (or n)
//          has its 128 bytes of k in eight 16-byte chunks, chunk c at c ^ m % 8. "By depth": row k has its TILE elements in chunks,
//          chunk c at c ^ k % 8 within each eight. So eight rows of one chunk lie in eight different banks, as ldmatrix wants them
// Sync     P1 the copies of the stage that this thread made have landed
//          P2 those of all threads have landed, and all threads have read the slot that is filled next
//          P3 all threads have read the last stage, so that the caller may write to shared memory
// Numerics Tensor cores cut every term and every partial sum towards zero. Over 1024 terms of one sign that is a bias of 2^-17. So they
//          add up one stage at most, which leaves a bias of 2^-21. Of a cosine, which 1/τ makes a logit, they add up half a stage. The
//          sums of stages are added with rounding to nearest.
//          f16x3: lo·hi + hi·lo + hi·hi, where each operand is the sum of two f16 (22 bits). lo·lo is below the last bit of f32.
//          f16x2: cosines are made as in f16. Gradients of logits are the sum of two f16: lo·x + hi·x
#pragma once
#include "problem.cuh"

enum class Arithmetic { f16, f16x2, f16x3, f32 };

template <Arithmetic A> struct Numbers {
    static constexpr bool TENSOR = A != Arithmetic::f32, SPLIT = A == Arithmetic::f16x3;
    static constexpr u32 BYTES = TENSOR ? 2 : 4;                                    // of an element
    static constexpr u32 GRADIENT_PLANES = SPLIT || A == Arithmetic::f16x2 ? 2 : 1; // of gradients of logits
    static constexpr u32 COSINE_SEGMENTS = SPLIT ? 3 : 1;                           // products of planes
    static constexpr u32 GRADIENT_SEGMENTS = SPLIT ? 3 : GRADIENT_PLANES;
    static constexpr u32 DEPTH = 128 / BYTES;   // elements of k in a stage
    static constexpr u32 PARTS = SPLIT ? 4 : 1; // of a stage. A tensor core adds up each part by itself
};

template <u32 TILE> struct Shape {
    static_assert(TILE == 64 || TILE == 128, "two rows of warps, each of 16-row fragments, TILE / 32 columns of them");
    static constexpr u32 THREADS = 2 * TILE, FRAGMENTS = TILE / 32, STAGES = 3;
    static constexpr u32 OPERAND = 128 * TILE, STAGE = 2 * OPERAND;
};
template <u32 TILE> using Totals = float[Shape<TILE>::FRAGMENTS][4][4];

// Where the warp's part of the tile begins.
template <u32 TILE> SAMTONE_DEVICE u32 warp_row() { return warp_id() / (TILE / 32) * (TILE / 2); }
template <u32 TILE> SAMTONE_DEVICE u32 warp_column() { return warp_id() % (TILE / 32) * 32; }

// How this thread copies its share of one operand from global memory: in each stage four chunks of 16 bytes, `pass` bytes apart.
struct Source {
    const unsigned char* origin; // the first chunk of the first stage, in the first plane
    const unsigned char* next;   // the first chunk of the stage that is copied next
    u64 pass, stage, plane;      // bytes to the next chunk, to the next stage, to the second plane
    u32 filled;                  // 16, or 0 where the matrix has ended: then the copy gives zeros
    u32 to, to_pass;             // offsets in the operand's shared memory
};

// The rows row, row + 1, … of a matrix. k runs along a row.
template <u32 TILE> SAMTONE_DEVICE Source by_rows(const unsigned char* matrix, u64 row_bytes, u64 plane, u32 row) {
    const u32 mine = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const unsigned char* at = matrix + (row + mine) * row_bytes + 16 * chunk;
    return {at, at, TILE / 4 * row_bytes, 128, plane, 16, mine * 128 + (chunk ^ mine % 8) * 16, TILE / 4 * 128};
}

// The rows depth, depth + 1, … of a matrix, each of which is one k. Of each row, which has `row_bytes`, these are TILE elements from byte
// `column_bytes` on.
template <u32 TILE, Arithmetic A>
SAMTONE_DEVICE Source by_depth(const unsigned char* matrix, u64 row_bytes, u64 plane, u32 depth, u32 column_bytes) {
    constexpr u32 CHUNKS = TILE * Numbers<A>::BYTES / 16, ROWS = Shape<TILE>::THREADS / CHUNKS;
    static_assert(ROWS % 8 == 0, "a thread's chunks are at the same place of their swizzled rows");
    const u32 mine = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const u32 column = column_bytes + 16 * chunk;
    const bool inside = column < row_bytes;
    const unsigned char* at = matrix + (depth + mine) * row_bytes + (inside ? column : 0);
    const u32 swizzled = (chunk & ~7u) | ((chunk ^ mine) & 7);
    return {at,
            at,
            ROWS * row_bytes,
            Numbers<A>::DEPTH * row_bytes,
            plane,
            inside ? 16u : 0u,
            mine * (16 * CHUNKS) + swizzled * 16,
            ROWS * 16 * CHUNKS};
}

SAMTONE_DEVICE void copy_stage(Source& source, shared_address operand) {
    UNROLL
    for (u32 i = 0; i < 4; ++i) cp_async_cg_16(operand + source.to + i * source.to_pass, source.next + i * source.pass, source.filled);
    source.next += source.stage;
}

// How an operand lies in shared memory: see above.
enum class Layout { rows, depth };

// sums += A·B over 64 / PARTS of k, from `start` on, by tensor cores.
template <u32 TILE, u32 PARTS, Layout A_LAYOUT, Layout B_LAYOUT>
SAMTONE_DEVICE void multiply_f16(Totals<TILE>& sums, shared_address stage, u32 start) {
    constexpr u32 FRAGMENTS = Shape<TILE>::FRAGMENTS;
    const u32 lane = lane_id(), row0 = warp_row<TILE>(), column0 = warp_column<TILE>();
    const shared_address a_at = stage, b_at = stage + Shape<TILE>::OPERAND;
    UNROLL
    for (u32 step = 0; step < 64 / PARTS; step += 16) {
        const u32 deep = start + step;
        u32 a[FRAGMENTS][4], b[4][2];
        UNROLL
        for (u32 i = 0; i < FRAGMENTS; ++i) { // the matrices are rows 0..7 and 8..15 of the fragment, then the same rows at k + 8
            const u32 first = row0 + 16 * i;
            if (A_LAYOUT == Layout::rows) {
                const u32 row = first + lane % 16, chunk = deep / 8 + lane / 16;
                ldmatrix_x4(a[i], a_at + row * 128 + (chunk ^ lane % 8) * 16);
            } else {
                const u32 row = deep + lane / 16 * 8 + lane % 8, chunk = first / 8 + lane / 8 % 2;
                ldmatrix_x4_trans(a[i], a_at + row * (2 * TILE) + ((chunk & ~7u) | ((chunk ^ lane) & 7)) * 16);
            }
        }
        UNROLL
        for (u32 pair = 0; pair < 2; ++pair) { // loads two fragments at a time: columns 16 pair … 16 pair + 15
            const u32 first = column0 + 16 * pair;
            u32 both[4];
            if (B_LAYOUT == Layout::rows) {
                const u32 row = first + lane % 8 + lane / 16 * 8, chunk = deep / 8 + lane / 8 % 2;
                ldmatrix_x4(both, b_at + row * 128 + (chunk ^ lane % 8) * 16);
            } else {
                const u32 row = deep + lane % 16, chunk = first / 8 + lane / 16;
                ldmatrix_x4_trans(both, b_at + row * (2 * TILE) + ((chunk & ~7u) | ((chunk ^ lane) & 7)) * 16);
            }
            b[2 * pair][0] = both[0];
            b[2 * pair][1] = both[1];
            b[2 * pair + 1][0] = both[2];
            b[2 * pair + 1][1] = both[3];
        }
        UNROLL
        for (u32 i = 0; i < FRAGMENTS; ++i) {
            UNROLL
            for (u32 j = 0; j < 4; ++j) mma_m16n8k16_f16(sums[i][j], a[i], b[j]);
        }
    }
}

// The same by fused multiply-add in f32, which rounds to nearest. It is slow and exact, and serves to check the others.
template <u32 TILE, Layout A_LAYOUT, Layout B_LAYOUT> SAMTONE_DEVICE void multiply_f32(Totals<TILE>& sums, shared_address stage) {
    constexpr u32 FRAGMENTS = Shape<TILE>::FRAGMENTS;
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    auto at = [](Layout layout, shared_address operand, u32 along, u32 k) {
        if (layout == Layout::rows) return operand + along * 128 + (k / 4 ^ along % 8) * 16 + k % 4 * 4;
        const u32 chunk = along / 4;
        return operand + k * (4 * TILE) + ((chunk & ~7u) | ((chunk ^ k) & 7)) * 16 + along % 4 * 4;
    };
    for (u32 k = 0; k < 32; ++k) {
        float a[FRAGMENTS][2], b[4][2];
        UNROLL
        for (u32 i = 0; i < FRAGMENTS; ++i) {
            UNROLL
            for (u32 half = 0; half < 2; ++half)
                a[i][half] = ld_shared_f32(at(A_LAYOUT, stage, warp_row<TILE>() + 16 * i + 8 * half + g, k));
        }
        UNROLL
        for (u32 j = 0; j < 4; ++j) {
            UNROLL
            for (u32 side = 0; side < 2; ++side)
                b[j][side] = ld_shared_f32(at(B_LAYOUT, stage + Shape<TILE>::OPERAND, warp_column<TILE>() + 8 * j + 2 * t + side, k));
        }
        UNROLL
        for (u32 i = 0; i < FRAGMENTS; ++i) {
            UNROLL
            for (u32 j = 0; j < 4; ++j) {
                UNROLL
                for (u32 r = 0; r < 4; ++r) sums[i][j][r] = fma_rn(a[i][r / 2], b[j][r % 2], sums[i][j][r]);
            }
        }
    }
}

// total += A·B along `steps` ≥ 1 stages of each segment. Leaves shared memory free.
template <u32 TILE, Arithmetic A, u32 SEGMENTS, Layout A_LAYOUT, Layout B_LAYOUT>
SAMTONE_DEVICE void multiply(Totals<TILE>& total, Source a, Source b, u32 steps) {
    using S = Shape<TILE>;
    constexpr u32 FRAGMENTS = S::FRAGMENTS;
    const u32 all = SEGMENTS * steps;
    u32 copied = 0, segment_left = steps, segment = 0;
    auto copy_next = [&]() {
        if (copied < all) {
            const shared_address slot = shared_base() + copied % S::STAGES * S::STAGE;
            copy_stage(a, slot);
            copy_stage(b, slot + S::OPERAND);
            ++copied;
            if (SEGMENTS > 1 && --segment_left == 0) {
                segment_left = steps;
                ++segment;
                a.next = a.origin;
                b.next = b.origin + (segment + 1 < SEGMENTS ? b.plane : 0);
            }
        }
        cp_async_commit_group(); // also when there is nothing left to copy, so that the count of groups stays the same
    };
    if (SEGMENTS > 1) a.next += a.plane; // segments: lo·hi, (hi·lo,) hi·hi. Small terms come first and lose nothing to the large sum
    for (u32 stage = 0; stage < S::STAGES - 1; ++stage) copy_next();

    for (u32 step = 0; step < all; ++step) {
        SYNC(P1, cp_async_wait_group<S::STAGES - 2>());
        SYNC(P2, bar_sync());
        copy_next();
        const shared_address slot = shared_base() + step % S::STAGES * S::STAGE;
        // Cosines, whose operands both lie by rows, are added to the total after half a stage.
        constexpr u32 PARTS = Numbers<A>::TENSOR && B_LAYOUT == Layout::rows && Numbers<A>::PARTS == 1 ? 2 : Numbers<A>::PARTS;
        auto add_part = [&](u32 part) {
            float sums[FRAGMENTS][4][4] = {};
            if constexpr (Numbers<A>::TENSOR) multiply_f16<TILE, PARTS, A_LAYOUT, B_LAYOUT>(sums, slot, part * (64 / PARTS));
            else multiply_f32<TILE, A_LAYOUT, B_LAYOUT>(sums, slot);
            UNROLL
            for (u32 i = 0; i < FRAGMENTS; ++i) {
                UNROLL
                for (u32 j = 0; j < 4; ++j) {
                    UNROLL
                    for (u32 r = 0; r < 4; ++r) total[i][j][r] += sums[i][j][r];
                }
            }
        };
        if constexpr (PARTS == 1) {
            add_part(0);
        } else {
            KEEP_LOOP // if this were unrolled, the fragments of all parts would be alive at once, which are more than there are registers
            for (u32 part = 0; part < PARTS; ++part) add_part(part);
        }
    }
    SYNC(P3, bar_sync());
}
