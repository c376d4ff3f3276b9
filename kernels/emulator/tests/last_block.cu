// last_block.cu: the sum of a vector in one launch. The last thread block to come adds up what all have left. A test of the emulator.
// Math     sum = Σ_i x[i]
// In/out   x: parts x 64 numbers, f32; parts: as many; sum: one; ticket: one u32, which is 0 before and after
// Tiles    block b takes 64 numbers
// Threads  64
// Shared   0: the number that the thread block drew
// Sync     S1 that number is written before it is read
//          The message from block to block is a barrier after the parts are written, a fence, and the drawing of a number. In the last
//          block it is a fence after that, and S1. The results here do not show if one of these is left out, because blocks run one by one
// Numerics f32, fixed order: the same bits whichever thread block is the last
// Limits   none
#include "../../common/instructions.cuh"

constexpr u32 THREADS = 64;

KERNEL(last_block, THREADS, const float* x, float* parts, float* sum, u32* ticket) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x, drawer = MUTANT(another_draws) ? 1 : 0;
    if (MUTANT(fences_too_early) && threadIdx.x == 0) fence_acq_rel_gpu();
    st_global_f32(parts + i, 2 * ld_global_nc_f32(x + i));
    if (!MUTANT(no_barrier)) bar_sync();
    if (threadIdx.x == 0 && !MUTANT(no_release) && !MUTANT(fences_too_early)) fence_acq_rel_gpu();
    if (MUTANT(another_draws)) bar_warp_sync(ALL_LANES);
    if (threadIdx.x == drawer) {
        u32* place = MUTANT(tickets_of_their_own) ? ticket + 1 + blockIdx.x : ticket;
        const u32 number = atom_global_inc_u32(place, gridDim.x - 1);
        if (!MUTANT(no_acquire)) fence_acq_rel_gpu();
        st_shared_u32(shared_base(), MUTANT(no_ticket) || MUTANT(tickets_of_their_own) ? blockIdx.x : number);
    }
    SYNC(S1, bar_sync());
    if (ld_shared_u32(shared_base()) != gridDim.x - 1 || threadIdx.x != THREADS - 1) return;
    float total = 0;
    for (u32 k = 0; k < gridDim.x * THREADS; ++k) total += ld_global_f32(parts + k);
    st_global_f32(sum, total);
}
