// skipping.cuh: squares of cosines that are left out of the gradient. In such a square no anchor has more than a trace of the softmax mass
// of its negatives: see docs/skipping.md.
//
// A square is what one thread block of 8.0, or one cluster of 9.0, computes at a time. It has TILE or 256 rows and columns, which are
// `together` tiles in each direction. An array of squares has an entry for every square of a super-block, row by row, from `first_square`
// on. That includes the squares below the diagonal of a triangle.
#pragma once
#include "problem.cuh"

SAMTONE_DEVICE u32 square_entry(const SuperBlock& block, u32 row, u32 col, u32 together) {
    return block.first_square + row * (block.col.tiles / together) + col;
}

// `skipped` has a word for each square, which is 0 if the square is computed. It is null if nothing is skipped.
SAMTONE_DEVICE bool is_skipped(const u32* skipped, const SuperBlock& block, u32 row, u32 col, u32 together SAMTONE_SITE) {
    return skipped != nullptr && block.first_square != NONE &&
           ld_global_u32(skipped + square_entry(block, row, col, together) SAMTONE_EMULATED_AS(, site)) != 0;
}

// A row or a column of squares. A product walks along it.
struct Line {
    const u32* skipped; // the word of its first square; null if all are computed
    u32 stride, count;
};
// For side 0 this is row `index` of the squares, for side 1 column `index`.
SAMTONE_DEVICE Line line_of(const u32* skipped, const SuperBlock& block, u32 side, u32 index, u32 together) {
    const u32 rows = block.row.tiles / together, cols = block.col.tiles / together;
    const bool any = skipped != nullptr && block.first_square != NONE;
    return {any ? skipped + (side == 0 ? square_entry(block, index, 0, together) : square_entry(block, 0, index, together)) : nullptr,
            side == 0 ? 1 : cols, side == 0 ? cols : rows};
}

// Bit k says whether square from + k of the line is computed. All lanes of a warp call this.
SAMTONE_DEVICE u32 computed_from(const Line& line, u32 from SAMTONE_SITE) {
    const u32 k = from + lane_id();
    bool computed = k < line.count;
    if (computed && line.skipped != nullptr)
        computed = ld_global_u32(line.skipped + static_cast<u64>(k) * line.stride SAMTONE_EMULATED_AS(, site)) == 0;
    return vote_sync_ballot(ALL_LANES, computed SAMTONE_EMULATED_AS(, site));
}
