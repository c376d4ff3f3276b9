// cosines.cuh: cosines that the first pass keeps for the gradient, so that the gradient need not multiply again.
//
// Layout   A super-block that keeps its cosines has one square (skipping.cuh) after the other, in f32. A rectangle has its squares row by
//          row. A triangle has, row by row, those on and right of its diagonal. A square has its tiles row by row. A tile has what the
//          threads that multiply hold in registers after [2] scale: the first four elements of every thread, then the next four of every
//          thread, and so on. So a warp stores and loads 512 bytes in a row, and every thread loads what it stored itself
#pragma once
#include "problem.cuh"

constexpr u64 NOT_KEPT = ~0ull;
ABI_STRUCT(Cosines, {
    float* kept;
    u64 first[MAX_SUPER_BLOCKS]; // the first element of each super-block of the launch, or NOT_KEPT
});

// The first element of square (row, col) of super-block `index`, which keeps its cosines. A square has `elements` elements.
SAMTONE_DEVICE float* kept_square(const Cosines& cosines, const SuperBlock& block, u32 index, u32 row, u32 col, u32 together,
                                  u32 elements) {
    const u64 cols = block.col.tiles / together, r = row;
    const u64 square = block.triangle != 0 ? r * cols - r * (r - 1) / 2 + (col - r) : r * cols + col;
    return cosines.kept + cosines.first[index] + square * elements;
}
