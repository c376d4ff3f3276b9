// hopper.cu: single instructions of compute capability 9.0, on inputs from the test. A test of the emulator.
#include "../../common/hopper.cuh"

// ---- wgmma: d = a · b twice over, along k = 64. a is 64 x 64 and b is 64 x N. Both are row-major here, and placed as descriptors want
// them.

// The byte of element (index, k) of an operand that begins at an atom. A transposed operand has `panel` bytes for each 64 indices.
SAMTONE_DEVICE u32 place_of(bool transposed, u32 index, u32 k, u32 panel) {
    const u32 at = transposed ? index / 64 * panel + k * 128 + index % 64 * 2 : index * 128 + k * 2;
    return at ^ (at >> 7 & 7) << 4;
}

template <u32 N, bool A_TRANSPOSED, bool B_TRANSPOSED> SAMTONE_DEVICE void product(const u16* a, const u16* b, float* d) {
    constexpr u32 DEPTH = 64, PANEL = 128 * DEPTH;
    const shared_address at_a = shared_base(), at_b = at_a + PANEL;
    for (u32 i = threadIdx.x; i < 64 * DEPTH; i += WARPGROUP)
        st_shared_u16(at_a + place_of(A_TRANSPOSED, i / DEPTH, i % DEPTH, PANEL), ld_global_u16(a + i));
    for (u32 i = threadIdx.x; i < N * DEPTH; i += WARPGROUP)
        st_shared_u16(at_b + place_of(B_TRANSPOSED, i % N, i / N, PANEL), ld_global_u16(b + i));
    fence_proxy_async();
    bar_sync();
    float low[64], high[64];
    wgmma_fence();
    UNROLL
    for (u32 i = 0; i < 8; ++i) {
        const u32 k = i % 4;
        const u64 left = wgmma_operand(at_a + k * (A_TRANSPOSED ? 2048 : 32), 0, 1024);
        const u64 right = wgmma_operand(at_b + k * (B_TRANSPOSED ? 2048 : 32), PANEL, 1024);
        if (N == 256) wgmma_m64n256k16_f16<A_TRANSPOSED, B_TRANSPOSED>(low, high, left, right, i > 0);
        else wgmma_m64n128k16_f16<A_TRANSPOSED, B_TRANSPOSED>(low, left, right, i > 0);
        if (i == 3) wgmma_commit_group();
    }
    wgmma_commit_group();
    wgmma_wait_group<0>();
    hold(low);
    if (N == 256) hold(high);
    UNROLL
    for (u32 i = 0; i < 64; ++i) {
        const u32 row = warp_id() * 16 + lane_id() / 4 + 8 * (i % 4 / 2), column = i / 4 * 8 + lane_id() % 4 * 2 + i % 2;
        st_global_f32(d + row * N + column, low[i]);
        if (N == 256) st_global_f32(d + row * N + 128 + column, high[i]);
    }
}

#define PRODUCT(name, n, a_transposed, b_transposed) \
    KERNEL(name, WARPGROUP, const u16* a, const u16* b, float* d) { product<n, a_transposed, b_transposed>(a, b, d); }
PRODUCT(product_128, 128, false, false)
PRODUCT(product_128_a, 128, true, false)
PRODUCT(product_128_b, 128, false, true)
PRODUCT(product_128_ab, 128, true, true)
PRODUCT(product_256, 256, false, false)
PRODUCT(product_256_a, 256, true, false)
PRODUCT(product_256_b, 256, false, true)
PRODUCT(product_256_ab, 256, true, true)

// ---- stmatrix: stores four registers of every lane to 512 bytes, and then, transposed, to the next 512.
KERNEL(matrix_stores, 32, const u32* x, u32* y) {
    u32 r[4];
    UNROLL
    for (u32 i = 0; i < 4; ++i) r[i] = ld_global_u32(x + 4 * lane_id() + i);
    const shared_address row = shared_base() + 16 * lane_id();
    stmatrix_x4(row, r);
    stmatrix_x4_trans(row + 512, r);
    bar_warp_sync(ALL_LANES);
    for (u32 i = lane_id(); i < 256; i += WARP) st_global_u32(y + i, ld_shared_u32(shared_base() + 4 * i));
}

// ---- named barriers and registers: two pairs of warps exchange what they hold. One pair has more registers.
KERNEL(pairs, 2 * WARPGROUP, const u32* x, u32* y) {
    if (warpgroup_id() == 0) setmaxnreg_dec<40>();
    else setmaxnreg_inc<256>();
    const shared_address mine = shared_base() + 4 * threadIdx.x;
    st_shared_u32(mine, ld_global_u32(x + threadIdx.x));
    const u32 pair = threadIdx.x / 64;
    bar_sync_named(1 + pair, 64);
    st_global_u32(y + threadIdx.x, ld_shared_u32(shared_base() + 4 * (threadIdx.x ^ 63)));
}

// ---- bulk copies: every block of a cluster of two copies its half of 512 words to both blocks. The words return in reverse order. Shared
// memory: 0: 512 words; 2048: 512 words to store; 4096: an mbarrier for the words; 4104: one on which both blocks arrive.
KERNEL_CLUSTER(exchange_halves, 64, 2, const u32* x, u32* y) {
    const shared_address base = shared_base(), words = base + 4096, both = base + 4104;
    const u32 rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbarrier_init(words, 1);
        mbarrier_init(both, 2 * 2);
        fence_mbarrier_init();
    }
    cluster_sync();
    const u32 pair = blockIdx.x / 2;
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(words, 2048);
        cp_async_bulk_load_multicast(base + 1024 * rank, x + 512 * pair + 256 * rank, 1024, words, 3);
    }
    mbarrier_wait(words, 0);
    for (u32 i = threadIdx.x; i < 512; i += 64) st_shared_u32(base + 2048 + 4 * i, ld_shared_u32(base + 4 * (511 - i)));
    fence_proxy_async();
    bar_sync();
    if (lane_id() == 0) {
        mbarrier_arrive_cluster(both, 0);
        mbarrier_arrive_cluster(both, 1);
    }
    mbarrier_wait(both, 0);
    if (threadIdx.x == 0) {
        cp_async_bulk_store(y + 512 * blockIdx.x, base + 2048, 2048);
        cp_async_bulk_commit_group();
        cp_async_bulk_wait_group_read<0>();
    }
    cluster_sync();
}

// ---- one thread copies words in and out again, in groups.
KERNEL(copies_in_and_out, 32, const u32* x, u32* y) {
    const shared_address base = shared_base(), barrier = base + 1024;
    if (threadIdx.x != 0) return;
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    for (u32 i = 0; i < 8; ++i) {
        const u32 half = i % 2;
        cp_async_bulk_wait_group_read<1>(); // the half is free again
        cp_async_bulk_load(base + 512 * half, x + 128 * i, 512, barrier);
        mbarrier_arrive_expect_tx(barrier, 512);
        mbarrier_wait(barrier, i % 2);
        cp_async_bulk_store(y + 128 * i, base + 512 * half, 256);
        cp_async_bulk_store(y + 128 * i + 64, base + 512 * half + 256, 256);
        cp_async_bulk_commit_group();
    }
    cp_async_bulk_wait_group<0>();
    st_global_u32(y + 1024, ld_global_u32(y + 1023));
}
