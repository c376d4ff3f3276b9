// warp_exchange.cu: reverses 32 numbers within each warp, through shared memory. A test of the emulator.
// Math     y[w, i] = x[w, 31 - i], once for each of `rounds`. So y = x if `rounds` is even
// In/out   x, y: 32 numbers per warp of the grid, u32
// Tiles    block b takes the numbers 64 b … 64 b + 63
// Threads  64, two warps that never meet
// Shared   0: 64 u32, one per thread
// Sync     S1 the warp's numbers are written before its lanes read each other's
//          S2 they are read before they are written again
// Numerics exact
// Limits   none
#include "../../common/instructions.cuh"

constexpr u32 THREADS = 64;

KERNEL(warp_exchange, THREADS, const u32* x, u32* y, u32 rounds) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    const shared_address mine = shared_base() + 4 * threadIdx.x;
    const shared_address theirs = shared_base() + 4 * (threadIdx.x ^ (WARP - 1));
    u32 value = ld_global_u32(x + i);
    for (u32 round = 0; round < rounds; ++round) {
        st_shared_u32(mine, value);
        if (MUTANT(half_mask)) bar_warp_sync(lane_id() < 16 ? 0x0000ffff : 0xffff0000);
        else SYNC(S1, bar_warp_sync(ALL_LANES));
        value = ld_shared_u32(theirs);
        SYNC(S2, bar_warp_sync(ALL_LANES));
    }
    st_global_u32(y + i, value);
}
