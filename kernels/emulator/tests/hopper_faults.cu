// hopper_faults.cu: each kernel has one defect of compute capability 9.0, and the emulator must say a certain sentence about it.
#include "../../common/hopper.cuh"

// x: 1024 words; y: 1024 words that nobody has written. Shared memory: 24 KiB.
#define FAULT(name, threads) KERNEL(name, threads, [[maybe_unused]] const u32* x, [[maybe_unused]] u32* y)
#define FAULT_OF_TWO(name, threads) KERNEL_CLUSTER(name, threads, 2, [[maybe_unused]] const u32* x, [[maybe_unused]] u32* y)

SAMTONE_DEVICE shared_address barrier() { return shared_base() + 8192; }

// One thread makes the mbarrier, and all may use it.
SAMTONE_DEVICE void make(u32 count) {
    if (threadIdx.x == 0) {
        mbarrier_init(barrier(), count);
        fence_mbarrier_init();
    }
    bar_sync();
}
// One thread loads 16 words.
SAMTONE_DEVICE void load(const u32* x SAMTONE_SITE) {
    mbarrier_arrive_expect_tx(barrier(), 64 SAMTONE_EMULATED_AS(, site));
    cp_async_bulk_load(shared_base(), x, 64, barrier() SAMTONE_EMULATED_AS(, site));
}
SAMTONE_DEVICE void store(u32* y SAMTONE_SITE) {
    cp_async_bulk_store(y, shared_base(), 64 SAMTONE_EMULATED_AS(, site));
    cp_async_bulk_commit_group(SAMTONE_EMULATED_AS(site));
}
// All lanes meet here, but this orders no memory.
SAMTONE_DEVICE void meet(SAMTONE_SITE_ONLY) { vote_sync_ballot(ALL_LANES, true SAMTONE_EMULATED_AS(, site)); }
SAMTONE_DEVICE void write_words(u32 words) {
    for (u32 i = threadIdx.x; i < words; i += blockDim.x) st_shared_u32(shared_base() + 4 * i, i);
}

// ---- mbarriers
FAULT(arrives_at_nothing, 32) { mbarrier_arrive(barrier()); }
FAULT(makes_one_twice, 32) {
    make(1);
    if (threadIdx.x == 0) mbarrier_init(barrier(), 1);
}
FAULT(mbarrier_off_its_place, 32) { mbarrier_init(barrier() + 4, 1); }
FAULT(mbarrier_for_nobody, 32) { mbarrier_init(barrier(), 0); }
FAULT(mbarrier_made_just_now, 32) {
    if (threadIdx.x == 0) mbarrier_init(barrier(), 1);
    meet();
    if (threadIdx.x == 1) mbarrier_arrive(barrier());
}
FAULT(reads_an_mbarrier, 32) {
    make(1);
    st_global_u32(y + threadIdx.x, ld_shared_u32(barrier()));
}
FAULT(writes_an_mbarrier, 32) {
    make(1);
    st_shared_u16(barrier() + 6, 0);
}
FAULT(arrives_too_often, 32) {
    make(1);
    if (threadIdx.x != 0) return;
    mbarrier_arrive_expect_tx(barrier(), 64);
    mbarrier_arrive(barrier());
}
FAULT(expects_a_megabyte, 32) {
    make(1);
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(barrier(), 1 << 20);
}
FAULT(more_than_expected, 32) {
    make(1);
    if (threadIdx.x != 0) return;
    mbarrier_arrive_expect_tx(barrier(), 32);
    cp_async_bulk_load(shared_base(), x, 64, barrier());
    mbarrier_wait(barrier(), 0);
}
FAULT(waits_for_ever, 64) {
    make(2);
    if (threadIdx.x == 40) mbarrier_arrive(barrier());
    if (threadIdx.x == 0) mbarrier_wait(barrier(), 0);
}
FAULT(waits_for_a_phase_too_late, 32) { // two phases later the parity is the same again
    make(1);
    if (threadIdx.x == 0)
        for (u32 i = 0; i < 2; ++i) mbarrier_arrive(barrier());
    bar_warp_sync(ALL_LANES);
    mbarrier_wait(barrier(), 0);
}
FAULT(waits_for_no_parity, 32) {
    make(1);
    mbarrier_wait(barrier(), 2);
}
FAULT(ends_within_a_phase, 32) {
    make(3);
    if (threadIdx.x < 2) mbarrier_arrive(barrier());
}
FAULT(tells_of_one_lane, 64) { // lane 0 arrives, but no barrier orders that after what the other lanes did
    make(1);
    if (warp_id() == 0) {
        write_words(32);
        meet();
    }
    if (threadIdx.x == 0) mbarrier_arrive(barrier());
    if (warp_id() == 1) {
        mbarrier_wait(barrier(), 0);
        st_global_u32(y + lane_id(), ld_shared_u32(shared_base() + 4 * lane_id()));
    }
}

// ---- clusters
FAULT_OF_TWO(arrives_at_a_third_block, 32) {
    make(1);
    cluster_sync();
    if (threadIdx.x == 0) mbarrier_arrive_cluster(barrier(), 2);
}
FAULT_OF_TWO(arrives_without_the_fence, 32) {
    if (threadIdx.x == 0) mbarrier_init(barrier(), 2);
    cluster_sync();
    if (threadIdx.x == 0) mbarrier_arrive_cluster(barrier(), cluster_rank() ^ 1);
}
FAULT_OF_TWO(copies_to_a_third_block, 32) {
    make(1);
    cluster_sync();
    if (threadIdx.x == 0) cp_async_bulk_load_multicast(shared_base(), x, 64, barrier(), 7);
}
FAULT_OF_TWO(arrives_at_an_ended_block, 32) {
    make(1);
    cluster_sync();
    if (cluster_rank() == 0 && threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier(), 64);
        cp_async_bulk_load(shared_base(), x, 64, barrier());
        mbarrier_wait(barrier(), 0); // this takes long if the copy is late
        mbarrier_arrive_cluster(barrier(), 1);
    }
}
FAULT_OF_TWO(one_block_goes_elsewhere, 32) {
    if (cluster_rank() == 0) cluster_sync();
    else cluster_sync();
}
FAULT_OF_TWO(one_block_ends, 32) {
    if (cluster_rank() == 0) cluster_sync();
}
FAULT_OF_TWO(tells_another_block_of_loads, 32) { // mbarrier_arrive_cluster is no release to another block
    make(1);
    if (cluster_rank() == 0) write_words(32);
    cluster_sync();
    if (cluster_rank() == 0) {
        st_global_u32(y + lane_id(), ld_shared_u32(shared_base() + 4 * lane_id()));
        bar_warp_sync(ALL_LANES);
        if (threadIdx.x == 0) mbarrier_arrive_cluster(barrier(), 1);
    } else if (threadIdx.x == 0) {
        mbarrier_wait(barrier(), 0);
        cp_async_bulk_load_multicast(shared_base(), x, 128, barrier(), 1);
    }
    cluster_sync();
}

// ---- bulk copies
FAULT(loads_eight_bytes, 32) {
    make(1);
    cp_async_bulk_load(shared_base(), x, 8, barrier());
}
FAULT(loads_from_between, 32) {
    make(1);
    cp_async_bulk_load(shared_base(), x + 2, 64, barrier());
}
FAULT(loads_to_between, 32) {
    make(1);
    cp_async_bulk_load(shared_base() + 8, x, 64, barrier());
}
FAULT(loads_past_the_source, 32) {
    make(1);
    cp_async_bulk_load(shared_base(), x + 1016, 64, barrier());
}
FAULT(loads_past_the_end, 32) {
    make(1);
    cp_async_bulk_load(shared_base() + 24576 - 32, x, 64, barrier());
}
FAULT(loads_without_the_fence, 32) {
    if (threadIdx.x == 0) mbarrier_init(barrier(), 1);
    bar_sync();
    if (threadIdx.x == 0) load(x);
}
FAULT(reads_what_is_under_way, 32) {
    make(1);
    if (threadIdx.x != 0) return;
    load(x);
    st_global_u32(y, ld_shared_u32(shared_base()));
}
FAULT(reads_what_another_waited_for, 32) {
    make(1);
    if (threadIdx.x == 0) {
        load(x);
        mbarrier_wait(barrier(), 0);
    }
    meet();
    st_global_u32(y + threadIdx.x, ld_shared_u32(shared_base()));
}
FAULT(loads_over_readers, 32) {
    make(1);
    write_words(16);
    bar_sync();
    if (threadIdx.x == 1) ld_shared_u32(shared_base());
    meet();
    if (threadIdx.x == 0) {
        load(x);
        mbarrier_wait(barrier(), 0);
    }
}
FAULT(rewrites_a_source, 32) {
    make(1);
    if (threadIdx.x != 0) return;
    load(x);
    st_global_u32(const_cast<u32*>(x), 1);
}
FAULT(loads_what_was_just_stored, 32) {
    make(1);
    if (threadIdx.x != 0) return;
    for (u32 i = 0; i < 16; ++i) st_global_u32(y + i, i);
    fence_proxy_async();
    load(y);
}
FAULT(ends_with_a_copy_under_way, 32) {
    make(2);
    if (threadIdx.x == 0) load(x);
}
FAULT(stores_without_the_fence, 32) {
    write_words(16);
    bar_sync();
    if (threadIdx.x == 0) store(y);
}
FAULT(fences_for_others, 32) {
    write_words(16);
    bar_sync();
    if (threadIdx.x != 0) return;
    fence_proxy_async();
    store(y);
}
FAULT(fences_without_a_barrier, 32) {
    write_words(16);
    fence_proxy_async();
    meet();
    if (threadIdx.x == 0) store(y);
}
FAULT(fences_before_it_stores, 32) {
    fence_proxy_async();
    write_words(16);
    bar_sync();
    if (threadIdx.x == 0) store(y);
}
FAULT(rewrites_what_is_stored, 32) {
    if (threadIdx.x != 0) return;
    for (u32 i = 0; i < 16; ++i) st_shared_u32(shared_base() + 4 * i, i);
    fence_proxy_async();
    store(y);
    st_shared_u32(shared_base(), 1);
}
FAULT(reads_what_is_being_stored, 32) {
    if (threadIdx.x != 0) return;
    for (u32 i = 0; i < 16; ++i) st_shared_u32(shared_base() + 4 * i, i);
    fence_proxy_async();
    store(y);
    cp_async_bulk_wait_group_read<0>(); // this ends the reads of shared memory, which is not enough
    ld_global_u32(y);
}
FAULT(ends_before_its_stores, 32) {
    if (threadIdx.x != 0) return;
    for (u32 i = 0; i < 16; ++i) st_shared_u32(shared_base() + 4 * i, i);
    fence_proxy_async();
    store(y);
}

// ---- named barriers
FAULT(barrier_0_by_name, 64) { bar_sync_named(0, 64); }
FAULT(barrier_16, 64) { bar_sync_named(16, 64); }
FAULT(barrier_of_a_part, 64) { bar_sync_named(1, 48); }
FAULT(barrier_of_two_sizes, 96) { bar_sync_named(1, warp_id() == 0 ? 64 : 96); }
FAULT(barrier_of_half_a_warp, 64) {
    if (lane_id() < 16) bar_sync_named(1, 64);
}
FAULT(barrier_at_two_lines, 64) {
    if (lane_id() < 16) bar_sync_named(1, 64);
    else bar_sync_named(1, 64);
}
FAULT(barrier_of_one_warp_too_few, 64) {
    if (warp_id() == 0) bar_sync_named(3, 64);
}

// ---- warpgroups
FAULT(few_registers, 128) { setmaxnreg_dec<16>(); }
FAULT(registers_of_a_warp, 128) {
    if (warp_id() == 2) setmaxnreg_dec<40>();
}
FAULT(registers_of_two_sizes, 128) {
    if (warp_id() == 2) setmaxnreg_dec<40>();
    else setmaxnreg_dec<48>();
}
FAULT(more_registers_than_there_are, 384) {
    if (warpgroup_id() == 0) setmaxnreg_dec<64>();
    else setmaxnreg_inc<232>();
}
FAULT(increase_to_fewer, 256) { setmaxnreg_inc<232>(); }
FAULT(decrease_to_more, 384) { setmaxnreg_dec<176>(); }
FAULT(half_a_warpgroup, 64) { setmaxnreg_dec<40>(); }

// a has 64 rows of 128 bytes and b has 128 rows, all of zeros. Together they have 24 KiB.
SAMTONE_DEVICE void write_operands() {
    for (u32 i = threadIdx.x; i < 6144; i += blockDim.x) st_shared_u32(shared_base() + 4 * i, 0);
}
SAMTONE_DEVICE u64 a_operand() { return wgmma_operand(shared_base(), 0, 1024); }
SAMTONE_DEVICE u64 b_operand() { return wgmma_operand(shared_base() + 8192, 0, 1024); }
SAMTONE_DEVICE void start() {
    write_operands();
    fence_proxy_async();
    bar_sync();
    wgmma_fence();
}
SAMTONE_DEVICE void multiply(float (&d)[64], u64 a, u64 b SAMTONE_SITE) {
    wgmma_m64n128k16_f16<false, false>(d, a, b, false SAMTONE_EMULATED_AS(, site));
}
SAMTONE_DEVICE void finish(float (&d)[64]) {
    wgmma_commit_group();
    wgmma_wait_group<0>();
    hold(d);
}

FAULT(product_of_nothing, 128) {
    float d[64];
    wgmma_fence();
    multiply(d, a_operand(), b_operand());
    finish(d);
}
FAULT(product_without_the_fence, 128) {
    float d[64];
    write_operands();
    bar_sync();
    wgmma_fence();
    multiply(d, a_operand(), b_operand());
    finish(d);
}
FAULT(product_without_a_barrier, 128) {
    float d[64];
    write_operands();
    fence_proxy_async();
    wgmma_fence();
    multiply(d, a_operand(), b_operand());
    finish(d);
}
FAULT(product_past_the_end, 128) {
    float d[64];
    start();
    multiply(d, a_operand(), wgmma_operand(shared_base() + 16384, 0, 1024));
    finish(d);
}
FAULT(product_of_plain_rows, 128) {
    float d[64];
    start();
    multiply(d, a_operand() & ~(1ull << 62), b_operand());
    finish(d);
}
FAULT(product_within_an_atom, 128) {
    float d[64];
    start();
    multiply(d, a_operand(), wgmma_operand(shared_base() + 8192 + 128, 0, 1024));
    finish(d);
}
FAULT(product_across_rows, 128) {
    float d[64];
    start();
    multiply(d, wgmma_operand(shared_base() + 112, 0, 1024), b_operand());
    finish(d);
}
FAULT(product_of_one_panel, 128) {
    float d[64];
    start();
    wgmma_m64n128k16_f16<false, true>(d, a_operand(), b_operand(), false);
    finish(d);
}
FAULT(product_by_half, 128) {
    float d[64] = {};
    start();
    if (warp_id() < 2) multiply(d, a_operand(), b_operand());
    finish(d);
}
FAULT(products_at_two_lines, 128) {
    float d[64];
    start();
    if (warp_id() < 2) multiply(d, a_operand(), b_operand());
    else multiply(d, a_operand(), b_operand());
    finish(d);
}
FAULT(products_of_two_operands, 128) {
    float d[64];
    start();
    multiply(d, a_operand() + (warp_id() == 3 ? 2 : 0), b_operand());
    finish(d);
}
FAULT(products_in_two_groups, 128) {
    float d[64];
    start();
    if (warp_id() == 3) wgmma_commit_group();
    multiply(d, a_operand(), b_operand());
    finish(d);
}
FAULT(product_into_other_sums, 128) {
    float d[64], e[64];
    start();
    multiply(d, a_operand(), b_operand());
    multiply(e, a_operand(), b_operand());
    multiply(warp_id() == 3 ? e : d, a_operand(), b_operand());
    finish(d);
}
FAULT(no_fence_at_first, 128) {
    float d[64];
    write_operands();
    fence_proxy_async();
    bar_sync();
    multiply(d, a_operand(), b_operand());
    finish(d);
}
FAULT(no_fence_after_a_wait, 128) {
    float d[64];
    start();
    multiply(d, a_operand(), b_operand());
    finish(d);
    multiply(d, a_operand(), b_operand());
    finish(d);
}
FAULT(overwrites_an_operand, 128) {
    float d[64];
    start();
    multiply(d, a_operand(), b_operand());
    wgmma_commit_group();
    bar_sync(); // it waits for the threads, but not for their product
    write_operands();
    wgmma_wait_group<0>();
    hold(d);
}
FAULT(overwrites_what_others_multiply, 128) { // all warps read b
    float d[64];
    start();
    multiply(d, a_operand(), b_operand());
    finish(d);
    if (warp_id() == 1) st_shared_u32(shared_base() + 8192, 1);
}
FAULT(ends_before_its_product, 128) {
    float d[64];
    start();
    multiply(d, a_operand(), b_operand());
    wgmma_commit_group();
}
FAULT(ends_with_an_open_group, 128) {
    float d[64];
    start();
    multiply(d, a_operand(), b_operand());
    wgmma_wait_group<0>();
}

// This has no fault. It shows what sums are until they have been waited for, and what they are then. y has 128 of each.
KERNEL(sums_before_and_after, 128, u32* y) {
    float d[64];
    start();
    multiply(d, a_operand(), b_operand());
    wgmma_commit_group();
    st_global_f32(y + threadIdx.x, d[5]);
    wgmma_wait_group<0>();
    hold(d);
    st_global_f32(y + 128 + threadIdx.x, d[5]);
}
