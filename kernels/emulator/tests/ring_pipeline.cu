// ring_pipeline.cu: a matrix product by wgmma, with a ring of slots and copies that two thread blocks share. A test of the emulator.
// Math     C = A · Bᵀ, rounded to f16
// In/out   A: m x k, B: n x k, f16. They are packed: 64 rows and 64 of k are 64 rows of 128 bytes as wgmma reads them (packed_at in
//          tests/emulator/pipeline.rs). The pieces of the same 64 rows lie one after the other along k; C: m x n, f16, row-major
// Tiles    a cluster computes 128 x 128 of C, block `rank` 64 rows of them, and takes every clusters-th square
// Threads  256: one thread copies; warps 4..7 multiply and hold 64 x 128 sums
// Shared   STAGES slots of 24 KiB, each with 64 of k: A of this block, 8 KiB, and B, 16 KiB, of which each block copies half;
//          then 16 KiB: this block's part of C; then two mbarriers for each slot, `full` and `empty`
// Sync     S1 the slot is free in both blocks
//          S2 the slot is full
//          S3 the products have read the slot
//          S4 the mbarriers are ready in both blocks
//          S5 no block ends while the other may write to it or arrive at it
//          S6 asynchronous reads see what this thread stored
//          S7 all threads have stored and fenced
//          S8 the copy of C has been read before its place is written again
//          S9 all threads know that
//          S10 the products of the slot before are done, those of this slot are under way
//          S11 all products are done
// Numerics f32 accumulators, cut as tensor cores do
// Limits   m, n multiples of 128, k of 64
#include "../../common/hopper.cuh"

constexpr u32 STAGES = 3, TILE_BYTES = 64 * 128, STAGE_BYTES = 3 * TILE_BYTES, RESULT = STAGES * STAGE_BYTES;
constexpr u32 BARRIERS = RESULT + 64 * 256, CLUSTER = 2, STORES = 1;

struct Slot {
    u32 number = 0, parity = 0;
    SAMTONE_MEMBER shared_address at() const { return shared_base() + number * STAGE_BYTES; }
    SAMTONE_MEMBER shared_address full() const { return shared_base() + BARRIERS + 16 * number; }
    SAMTONE_MEMBER shared_address empty() const { return full() + 8; }
    SAMTONE_MEMBER void next() {
        number = (number + 1) % STAGES;
        if (number == 0) parity ^= 1;
    }
};

SAMTONE_DEVICE void copy(Slot& slot, const unsigned char* a, const unsigned char* b, u32 steps) {
    const u32 rank = cluster_rank();
    for (u32 step = 0; step < steps; ++step) {
        SYNC(S1, mbarrier_wait(slot.empty(), slot.parity ^ 1));
        const u32 wrong = MUTANT(expects_too_much) ? 16 : MUTANT(expects_too_little) ? -16 : 0;
        mbarrier_arrive_expect_tx(slot.full(), STAGE_BYTES + wrong);
        cp_async_bulk_load(slot.at(), a + step * TILE_BYTES, TILE_BYTES, slot.full());
        const u32 half = MUTANT(same_half) ? 0 : rank;
        const unsigned char* from = b + (half * steps + step) * TILE_BYTES;
        const u16 ranks = MUTANT(no_multicast) ? 1 << rank : 3;
        cp_async_bulk_load_multicast(slot.at() + (1 + half) * TILE_BYTES, from, TILE_BYTES, slot.full(), ranks);
        slot.next();
    }
}

// The products of this warp have read the slot.
SAMTONE_DEVICE void release(const Slot& slot) {
    if (lane_id() < CLUSTER || MUTANT(every_lane_releases)) SYNC(S3, mbarrier_arrive_cluster(slot.empty(), lane_id() % CLUSTER));
}

// The products of a slot are under way while the next slot is waited for.
SAMTONE_DEVICE void multiply(float (&sums)[64], Slot& slot, u32 steps) {
    Slot previous = slot;
    for (u32 step = 0; step < steps; ++step) {
        const u32 parity = slot.parity ^ (MUTANT(wrong_parity) ? 1 : 0);
        if (!MUTANT(one_lane_waits) || lane_id() == 0) SYNC(S2, mbarrier_wait(slot.full(), parity));
        if (!MUTANT(no_wgmma_fence)) wgmma_fence();
        UNROLL
        for (u32 k = 0; k < 4; ++k) {
            const u64 a = wgmma_operand(slot.at() + 32 * k, 0, MUTANT(wrong_stride) ? 512 : 1024);
            const u64 b = wgmma_operand(slot.at() + TILE_BYTES + (MUTANT(not_advanced) ? 0 : 32 * k), 0, 1024);
            wgmma_m64n128k16_f16<false, false>(sums, a, b, !MUTANT(forgets) || k > 0);
        }
        if (!MUTANT(no_commit)) wgmma_commit_group();
        if (step > 0) {
            if (!MUTANT(early_release)) SYNC(S10, wgmma_wait_group<1>());
            release(previous);
        }
        previous = slot;
        slot.next();
    }
    SYNC(S11, wgmma_wait_group<0>());
    hold(sums);
    release(previous);
}

// `c` has 64 rows of `n` elements. 128 columns of it are this cluster's.
SAMTONE_DEVICE void store(u16* c, u32 n, const float (&sums)[64]) {
    const shared_address result = shared_base() + RESULT + (MUTANT(over_mbarriers) ? 16 * STAGES : 0);
    const u32 thread = threadIdx.x - WARPGROUP, warp = thread / WARP, matrix = lane_id() / 8;
    if (thread == 0) SYNC(S8, cp_async_bulk_wait_group_read<0>());
    SYNC(S9, bar_sync_named(STORES, WARPGROUP));
    UNROLL
    for (u32 j = 0; j < 8; ++j) {
        u32 r[4];
        UNROLL
        for (u32 i = 0; i < 4; ++i) r[i] = cvt_rn_f16x2_f32(sums[8 * j + 2 * i], sums[8 * j + 2 * i + 1]);
        // The matrices are rows 0..7 and 8..15 of the columns 16 j … 16 j + 7, then the same rows of the eight columns after.
        stmatrix_x4(result + (warp * 16 + matrix % 2 * 8 + lane_id() % 8) * 256 + (2 * j + matrix / 2) * 16, r);
    }
    SYNC(S6, fence_proxy_async());
    SYNC(S7, bar_sync_named(STORES, MUTANT(half_a_barrier) ? WARPGROUP / 2 : WARPGROUP));
    if (thread == 0) {
        for (u32 row = 0; row < 64; ++row) cp_async_bulk_store(c + static_cast<u64>(row) * n, shared_base() + RESULT + row * 256, 256);
        if (!MUTANT(stores_not_committed)) cp_async_bulk_commit_group();
    }
}

KERNEL_CLUSTER(ring_pipeline, 2 * WARPGROUP, CLUSTER, const unsigned char* a, const unsigned char* b, u16* c, u32 m, u32 n, u32 k) {
    const u32 rank = cluster_rank(), steps = k / 64, columns = n / 128, squares = m / 128 * columns;
    Slot slot;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; ++i, slot.next()) {
            mbarrier_init(slot.full(), 1);
            mbarrier_init(slot.empty(), MUTANT(own_warps_only) ? 4 : CLUSTER * 4);
        }
        slot = Slot();
        if (!MUTANT(no_init_fence)) fence_mbarrier_init();
    }
    SYNC(S4, cluster_sync());
    const u32 first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    if (warpgroup_id() == 0) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0)
            for (u32 i = first; i < squares; i += clusters)
                copy(slot, a + (i / columns * 2 + rank) * steps * TILE_BYTES, b + i % columns * 2 * steps * TILE_BYTES, steps);
    } else {
        if (MUTANT(early_end) && threadIdx.x == WARPGROUP + 5) return;
        setmaxnreg_inc<256>();
        for (u32 i = first; i < squares; i += clusters) {
            float sums[64] = {};
            multiply(sums, slot, steps);
            store(c + static_cast<u64>(i / columns * 128 + rank * 64) * n + i % columns * 128, n, sums);
        }
        if (threadIdx.x == WARPGROUP && !MUTANT(ends_before_its_stores)) cp_async_bulk_wait_group_read<0>();
    }
    bar_warp_sync(ALL_LANES);
    SYNC(S5, cluster_sync());
}
