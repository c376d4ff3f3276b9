// transpose.cu: transposed copy through tiles in shared memory. A test of the emulator.
// Math     y[j, i] = x[i, j]
// In/out   x: rows x columns, y: columns x rows, f32, row-major
// Tiles    32 x 32; block b walks over tiles b, b + grid, …
// Threads  256; thread (warp w, lane l) takes column l of the tile's rows w, w + 8, w + 16, w + 24
// Shared   0: 32 rows of 33 f32, the tile, rewritten for each tile. The 33rd number spreads a column over all banks
// Sync     S1 the tile is written before its columns are read
//          S2 it is read before the next one is written
// Numerics exact
// Limits   rows and columns are below 2^31. The last tiles may be partly filled
#include "../../common/instructions.cuh"

constexpr u32 THREADS = 256, TILE = 32, PITCH = TILE + 1;

KERNEL(transpose, THREADS, const float* x, float* y, u32 rows, u32 columns) {
    const u32 tiles_across = (columns + TILE - 1) / TILE, tiles = (rows + TILE - 1) / TILE * tiles_across;
    const u32 pitch = MUTANT(overlapping_rows) ? TILE - 1 : MUTANT(shared_too_small) ? PITCH + 1 : PITCH;
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u32 row0 = tile / tiles_across * TILE, column0 = tile % tiles_across * TILE;
        for (u32 i = warp_id(); i < TILE; i += THREADS / WARP) {
            const u32 row = row0 + i, column = column0 + lane_id();
            if (row < rows && (column < columns || MUTANT(read_past_end))) {
                const float* from = x + static_cast<u64>(row) * columns + column;
                float value = MUTANT(misaligned) ? ld_global_nc_f32x2(from).x : ld_global_nc_f32(from);
                st_shared_f32(shared_base() + 4 * (i * pitch + lane_id()), value);
                if (MUTANT(barrier_in_branch)) bar_sync();
            }
        }
        SYNC(S1, bar_sync());
        for (u32 i = warp_id(); i < TILE; i += THREADS / WARP) {
            const u32 row = row0 + lane_id(), column = column0 + i;
            const bool inside = row < rows && column < columns;
            if (inside || (MUTANT(unwritten) && row < rows)) {
                float value = ld_shared_f32(shared_base() + 4 * (lane_id() * pitch + i));
                if (inside) st_global_f32(y + static_cast<u64>(MUTANT(same_place) ? 0 : column) * rows + row, value);
            }
        }
        SYNC(S2, bar_sync());
    }
}
