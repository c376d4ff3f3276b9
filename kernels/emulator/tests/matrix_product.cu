// matrix_product.cu: a tiled matrix product by mma.sync, with cp.async, ldmatrix and a swizzle. A test of the emulator.
// Math     C = A · B, with B given by columns (matrix_product_*) or by rows (matrix_product_rows_*)
// In/out   A: m x k, row-major; B: n x k ("by columns") or k x n ("by rows"), row-major, bf16 or f16; C: m x n, f32
// Tiles    64 x 64, 32 of k at a time; one tile per block, grid (⌈n / 64⌉, ⌈m / 64⌉)
// Threads  128: four warps, each 32 x 32 of the tile, as 2 x 4 fragments of 16 x 8
// Shared   3 stages of 8192 bytes: 0 A, 64 rows of 64 bytes; 4096 B, 64 rows of 64 bytes, or 32 rows of 128 bytes.
//          16-byte chunks are permuted within a row, so that the 8 rows of an ldmatrix are in 8 different banks
// Sync     S1 the copies of the stage that this thread made have landed; those of the next stage may be under way
//          S2 those of all threads have landed, and all threads have read the stage that is filled next
// Numerics f32 accumulators
// Limits   k, and n by rows, are multiples of 8; A, B are aligned to 16 bytes, C to 4
#include "../../common/instructions.cuh"

constexpr u32 THREADS = 128, TILE = 64, DEPTH = 32, STAGES = 3, STAGE_BYTES = 2 * TILE * DEPTH * 2, B_OFFSET = TILE * DEPTH * 2;

// The byte offset of 16-byte chunk `chunk` of row `row`. Rows have 4 chunks, so that two rows fill the 32 banks.
SAMTONE_DEVICE u32 narrow(u32 row, u32 chunk) { return row * 64 + ((chunk ^ (row / 2 % 4)) * 16); }
// The same for rows of 8 chunks. One row fills the banks.
SAMTONE_DEVICE u32 wide(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row % 8)) * 16); }

// Copies 16 bytes of a row-major matrix of 16-bit elements, and zeros outside of it.
SAMTONE_DEVICE void copy_chunk(shared_address to, const u16* matrix, u32 row, u32 column, u32 rows, u32 columns) {
    const bool inside = (row < rows || MUTANT(rows_not_guarded)) && column < columns;
    const u16* from = inside ? matrix + static_cast<u64>(row) * columns + column : matrix;
    cp_async_cg_16(to, from, inside ? 16 : 0);
}

template <bool b_by_rows> SAMTONE_DEVICE void fill(u32 stage, const u16* a, const u16* b, u32 m, u32 n, u32 k, u32 k0) {
    const shared_address to = shared_base() + stage * STAGE_BYTES;
    for (u32 i = threadIdx.x; i < TILE * DEPTH / 8; i += THREADS) {
        const u32 row = i / 4, chunk = i % 4;
        copy_chunk(to + narrow(row, chunk), a, blockIdx.y * TILE + row, k0 + 8 * chunk, m, k);
        if (b_by_rows) {
            const u32 deep = i / 8, across = i % 8;
            copy_chunk(to + B_OFFSET + wide(deep, across), b, k0 + deep, blockIdx.x * TILE + 8 * across, k, n);
        } else {
            copy_chunk(to + B_OFFSET + narrow(row, chunk), b, blockIdx.x * TILE + row, k0 + 8 * chunk, n, k);
        }
    }
}

template <bool b_by_rows, bool is_bf16> SAMTONE_DEVICE void product(const u16* a, const u16* b, float* c, u32 m, u32 n, u32 k) {
    const u32 lane = lane_id(), warp_row = warp_id() / 2 * 32, warp_column = warp_id() % 2 * 32;
    float sums[2][4][4] = {};
    const u32 steps = (k + DEPTH - 1) / DEPTH;
    for (u32 step = 0; step < STAGES - 1; ++step) { // [1] load the first stages
        if (step < steps) fill<b_by_rows>(step, a, b, m, n, k, step * DEPTH);
        cp_async_commit_group();
    }
    for (u32 step = 0; step < steps; ++step) {
        SYNC(S1, cp_async_wait_group<STAGES - 2>());
        SYNC(S2, bar_sync());
        const u32 ahead = step + STAGES - 1; // [2] load a later stage
        const u32 filled = MUTANT(stage_in_use) ? step % STAGES : ahead % STAGES;
        if (ahead < steps) fill<b_by_rows>(filled, a, b, m, n, k, ahead * DEPTH);
        cp_async_commit_group();

        const shared_address stage = shared_base() + step % STAGES * STAGE_BYTES;
        UNROLL
        for (u32 deep = 0; deep < DEPTH; deep += 16) { // [3] multiply
            u32 fragments_a[2][4], fragments_b[4][2];
            UNROLL
            for (u32 i = 0; i < 2; ++i) {
                // The matrices are rows 0..7 and 8..15 of the fragment, then the same rows at k + 8.
                const u32 row = warp_row + 16 * i + lane % 16, chunk = deep / 8 + lane / 16;
                ldmatrix_x4(fragments_a[i],
                            stage + (MUTANT(no_swizzle) ? row * 64 + chunk * 16 : narrow(row, chunk)) + (MUTANT(misaligned) ? 4 : 0));
            }
            UNROLL
            for (u32 pair = 0; pair < 2; ++pair) { // two fragments of B at a time: columns 16 pair … 16 pair + 15
                u32 both[4];
                const u32 first = warp_column + 16 * pair;
                if (b_by_rows) {
                    const u32 row = deep + lane % 16, chunk = first / 8 + lane / 16;
                    const shared_address at = stage + B_OFFSET + wide(row, chunk);
                    if (MUTANT(not_transposed)) ldmatrix_x4(both, at);
                    else ldmatrix_x4_trans(both, at);
                } else {
                    const u32 row = first + lane % 8 + lane / 16 * 8, chunk = deep / 8 + lane / 8 % 2;
                    ldmatrix_x4(both, stage + B_OFFSET + narrow(row, chunk));
                }
                fragments_b[2 * pair][0] = both[0];
                fragments_b[2 * pair][1] = both[1];
                fragments_b[2 * pair + 1][0] = both[2];
                fragments_b[2 * pair + 1][1] = both[3];
            }
            if (MUTANT(registers_swapped)) {
                const u32 kept = fragments_a[0][1];
                fragments_a[0][1] = fragments_a[0][2];
                fragments_a[0][2] = kept;
            }
            UNROLL
            for (u32 i = 0; i < 2; ++i) {
                UNROLL
                for (u32 j = 0; j < 4; ++j) {
                    if (is_bf16) mma_m16n8k16_bf16(sums[i][j], fragments_a[i], fragments_b[j]);
                    else mma_m16n8k16_f16(sums[i][j], fragments_a[i], fragments_b[j]);
                }
            }
        }
    }
    cp_async_wait_group<0>();
    UNROLL
    for (u32 i = 0; i < 2; ++i) { // [4] store
        UNROLL
        for (u32 j = 0; j < 4; ++j) {
            UNROLL
            for (u32 r = 0; r < 4; ++r) {
                const u32 row = blockIdx.y * TILE + warp_row + 16 * i + lane / 4 + r / 2 * 8;
                const u32 column = blockIdx.x * TILE + warp_column + 8 * j + lane % 4 * 2 + r % 2;
                if ((row < m || MUTANT(stores_not_guarded)) && column < n)
                    st_global_f32(c + static_cast<u64>(row) * n + column, sums[i][j][r]);
            }
        }
    }
}

KERNEL(matrix_product_bf16, THREADS, const u16* a, const u16* b, float* c, u32 m, u32 n, u32 k) { product<false, true>(a, b, c, m, n, k); }
KERNEL(matrix_product_f16, THREADS, const u16* a, const u16* b, float* c, u32 m, u32 n, u32 k) { product<false, false>(a, b, c, m, n, k); }
KERNEL(matrix_product_rows_bf16, THREADS, const u16* a, const u16* b, float* c, u32 m, u32 n, u32 k) {
    product<true, true>(a, b, c, m, n, k);
}
KERNEL(matrix_product_rows_f16, THREADS, const u16* a, const u16* b, float* c, u32 m, u32 n, u32 k) {
    product<true, false>(a, b, c, m, n, k);
}
