// double_buffered_copy.cu: reverses segments of a vector while the next segment is on its way. A test of the emulator.
// Math     y[512 s + i] = x[512 s + 511 - i], with x = 0 from n on
// In/out   x: n f32; y: 512 · segments f32
// Tiles    block b walks over segments b, b + grid, …
// Threads  128; thread i copies the 16 bytes of elements 4 i … 4 i + 3, and reads what thread 127 - i copied
// Shared   two stages of 512 f32: 0 even and 2048 odd steps
// Sync     S1 the copies of the segment that this thread made have landed; those of the next segment may be under way
//          S2 those of all threads have landed
//          S3 all threads have read the stage before it is filled again
// Numerics exact
// Limits   n is any; x is aligned to 16 bytes, n is a multiple of 4
#include "../../common/instructions.cuh"

constexpr u32 THREADS = 128, SEGMENT = 4 * THREADS, STAGE_BYTES = 4 * SEGMENT;

SAMTONE_DEVICE void fill(u32 stage, const float* x, u32 n, u32 segment) {
    const u32 first = segment * SEGMENT + 4 * threadIdx.x;
    const bool inside = first < n || MUTANT(no_zero_fill);
    const float* from = inside ? x + first + (MUTANT(misaligned_source) ? 1 : 0) : x;
    const shared_address to = shared_base() + stage * STAGE_BYTES + 16 * threadIdx.x;
    cp_async_cg_16(to + (MUTANT(misaligned_target) ? 8 : 0), from, inside ? 16 : 0);
}

KERNEL(double_buffered_copy, THREADS, const float* x, float* y, u32 n, u32 segments) {
    u32 stage = 0;
    if (blockIdx.x < segments) fill(stage, x, n, blockIdx.x);
    cp_async_commit_group();
    for (u32 segment = blockIdx.x; segment < segments; segment += gridDim.x) {
        const u32 next = segment + gridDim.x;
        if (next < segments) fill(stage ^ (MUTANT(same_stage) ? 0 : 1), x, n, next);
        if (!MUTANT(no_commit)) cp_async_commit_group();
        if (MUTANT(waits_too_little)) cp_async_wait_group<2>();
        else SYNC(S1, cp_async_wait_group<1>());
        SYNC(S2, bar_sync());
        const f32x4 v = ld_shared_f32x4(shared_base() + stage * STAGE_BYTES + 16 * (THREADS - 1 - threadIdx.x));
        st_global_f32x4(y + segment * SEGMENT + 4 * threadIdx.x, f32x4{v.w, v.z, v.y, v.x});
        SYNC(S3, bar_sync());
        stage ^= 1;
    }
}
