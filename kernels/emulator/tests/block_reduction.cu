// block_reduction.cu: sums of the rows of a matrix, where one thread block takes several rows. A test of the emulator.
// Math     sums[i] = Σ_j x[i, j]
// In/out   x: rows x columns, f32, row-major; sums: rows, f32
// Tiles    block b takes rows b, b + grid, …
// Threads  128; thread i adds the columns i, i + 128, …; lane 0 of each warp writes the warp's sum; warp 0 adds these
// Shared   0: 4 f32, sums of the warps, rewritten for each row
// Sync     S1 sums of the warps are written before warp 0 reads them
//          S2 warp 0 has read them before the next row's are written
// Numerics f32, fixed order
// Limits   none
#include "../../common/instructions.cuh"

constexpr u32 THREADS = 128;

SAMTONE_DEVICE float warp_sum(u32 mask, float x SAMTONE_SITE) {
    UNROLL
    for (u32 step = WARP / 2; step > 0; step /= 2) x += shfl_sync_bfly(mask, x, step SAMTONE_EMULATED_AS(, site));
    return x;
}

KERNEL(block_reduction, THREADS, const float* x, float* sums, u32 rows, u32 columns) {
    const shared_address partials = shared_base();
    if (MUTANT(early_end) && threadIdx.x >= 96) return;
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
        float sum = 0;
        const u32 end = MUTANT(out_of_bounds) ? columns + 1 : columns;
        for (u32 column = threadIdx.x; column < end; column += THREADS)
            sum += ld_global_nc_f32(x + static_cast<u64>(row) * columns + column);
        if (MUTANT(divergent_shuffle)) {
            if (lane_id() < 16) sum = warp_sum(ALL_LANES, sum);
            else sum = warp_sum(ALL_LANES, sum);
        } else if (MUTANT(wrong_mask)) {
            sum = warp_sum(0x0000ffff, sum);
        } else {
            sum = warp_sum(ALL_LANES, sum);
        }
        if (lane_id() == 0) st_shared_f32(partials + 4 * warp_id(), sum);
        SYNC(S1, bar_sync());
        if (warp_id() == 0) {
            float total = lane_id() < THREADS / WARP ? ld_shared_f32(partials + 4 * lane_id()) : 0.0f;
            total = warp_sum(ALL_LANES, total);
            if (lane_id() == 0) st_global_f32(sums + row, total);
        }
        if (MUTANT(barrier_in_branch)) {
            if (warp_id() == 0) bar_sync();
        } else {
            SYNC(S2, bar_sync());
        }
    }
}
