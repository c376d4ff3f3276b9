// faults.cu: each kernel has one defect, and the emulator must say a certain sentence about it. A test of the emulator.
#include "../../common/instructions.cuh"

KERNEL(plain_use_of_a_pointer, 32, const float* x, float* y) { st_global_f32(y + lane_id(), x[lane_id()]); }

KERNEL(reads_unwritten_global, 32, const float* x, float* y) { st_global_f32(y + lane_id(), ld_global_f32(x + lane_id())); }

KERNEL(reads_unwritten_shared, 32, float* y) { st_global_f32(y + lane_id(), ld_shared_f32(shared_base() + 4 * lane_id())); }

KERNEL(address_of_no_buffer, 32, float* y) { st_global_f32(y + lane_id(), ld_global_f32(static_cast<const float*>(nullptr) + lane_id())); }

KERNEL(blocks_write_one_place, 32, float* y) { st_global_f32(y + lane_id(), static_cast<float>(blockIdx.x)); }

KERNEL(read_only_after_a_write, 32, float* y) {
    st_global_f32(y + lane_id(), 1.0f);
    st_global_f32(y + lane_id(), 1.0f + ld_global_nc_f32(y + lane_id()));
}

KERNEL(copy_that_nobody_awaits, 32, const float* x) {
    cp_async_ca_4(shared_base() + 4 * lane_id(), x + lane_id(), 4);
    cp_async_commit_group();
}

KERNEL(shuffle_of_half_a_warp, 32, const u32* x, u32* y) {
    if (lane_id() < 16) st_global_u32(y + lane_id(), shfl_sync_idx(0x0000ffff, ld_global_u32(x + lane_id()), lane_id() + 1));
}

KERNEL(product_of_half_a_warp, 32, float* y) {
    const u32 a[4] = {}, b[2] = {};
    float d[4] = {};
    if (lane_id() < 16) mma_m16n8k16_bf16(d, a, b);
    st_global_f32(y + lane_id(), d[0]);
}

KERNEL(overflows_an_index, 32, i32* y, i32 n) { st_global_i32(y + lane_id(), n + static_cast<i32>(lane_id())); }

KERNEL(leaves_a_local_array, 32, i32* y, u32 n) {
    i32 local[4] = {1, 2, 3, 4};
    for (u32 i = 0; i < n; ++i) local[i] += local[(i + 1) % n];
    st_global_i32(y + lane_id(), local[0]);
}

KERNEL(never_ends, 32, u32* y) {
    while (ld_global_u32(y) != 1) {
    }
}

// The launch of this kernel may begin before earlier ones are complete.
KERNEL(touches_before_it_waits, 32, const float* x, float* y) {
    if (threadIdx.x == 0) begin_launch();
    st_global_f32(y + threadIdx.x, ld_global_f32(x + threadIdx.x)); // the others have not waited
}

KERNEL(ends_without_waiting, 32, float*, float*) {
    if (threadIdx.x != 5) begin_launch();
}

KERNEL(reads_only_what_a_launch_wrote, 32, float* x, float* y) {
    begin_launch();
    if (blockIdx.x != 0) return;
    st_global_f32(y + threadIdx.x, ld_global_nc_f32(x + threadIdx.x));
}
