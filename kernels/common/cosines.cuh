// cosines.cuh: cosines that the first pass keeps for the gradient, so that it need not multiply again.
//
// Layout   of a super-block that keeps them, f32: one square after the other, those of a rectangle row by row, those of a triangle on
//          and right of its diagonal. In a square (skipping.cuh says what that is) its tiles row by row, and in a tile what each of the
//          threads that multiply holds in registers, after [2] scale: its first four elements, those of the next thread, …, then
//          everyone's next four. So a warp stores and loads 512 bytes next to each other, and nobody changes places
#pragma once
#include "problem.cuh"

constexpr u64 NOT_KEPT = ~0ull;
ABI_STRUCT(Cosines, {
    float* kept;
    u64 first[MAX_SUPER_BLOCKS]; // element of each super-block of the launch; or NOT_KEPT
});

// The first element of square `row`, `col` of super-block `index`, which keeps its cosines; a square has `elements`.
SAMTONE_DEVICE float* kept_square(const Cosines& cosines, const SuperBlock& block, u32 index, u32 row, u32 col, u32 together, u32 elements) {
    const u64 cols = block.col.tiles / together, r = row;
    const u64 square = block.triangle != 0 ? r * cols - r * (r - 1) / 2 + (col - r) : r * cols + col;
    return cosines.kept + cosines.first[index] + square * elements;
}
