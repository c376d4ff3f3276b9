// skipping.cuh: squares of cosines that are left out of the gradient because no anchor in them has more than a trace of its negatives'
// softmax mass there: see docs/skipping.md.
//
// A square is what a block of threads, or a cluster, computes at a time: TILE, or 256, rows and columns, `together` tiles along either
// edge. Arrays of squares have an entry for each one of a super-block from `first_square` on, row-major, those below the diagonal of a
// triangle included.
#pragma once
#include "problem.cuh"

SAMTONE_DEVICE u32 square_entry(const SuperBlock& block, u32 row, u32 col, u32 together) {
    return block.first_square + row * (block.col.tiles / together) + col;
}

// `skipped`: a word for each square, 0 where it is computed; null where nothing is skipped.
SAMTONE_DEVICE bool is_skipped(const u32* skipped, const SuperBlock& block, u32 row, u32 col, u32 together SAMTONE_SITE) {
    return skipped != nullptr && block.first_square != NONE &&
           ld_global_u32(skipped + square_entry(block, row, col, together) SAMTONE_EMULATED_AS(, site)) != 0;
}

// The squares that a row or a column of squares meets: what a product along it walks over.
struct Line {
    const u32* skipped; // of its first square; null: all are computed
    u32 stride, count;
};
// Side 0: row `index` of squares; 1: column `index`.
SAMTONE_DEVICE Line line_of(const u32* skipped, const SuperBlock& block, u32 side, u32 index, u32 together) {
    const u32 rows = block.row.tiles / together, cols = block.col.tiles / together;
    const bool any = skipped != nullptr && block.first_square != NONE;
    return {any ? skipped + (side == 0 ? square_entry(block, index, 0, together) : square_entry(block, 0, index, together)) : nullptr,
            side == 0 ? 1 : cols, side == 0 ? cols : rows};
}

// Bit k: whether square from + k of the line is computed. All lanes of a warp.
SAMTONE_DEVICE u32 computed_from(const Line& line, u32 from SAMTONE_SITE) {
    const u32 k = from + lane_id();
    bool computed = k < line.count;
    if (computed && line.skipped != nullptr)
        computed = ld_global_u32(line.skipped + static_cast<u64>(k) * line.stride SAMTONE_EMULATED_AS(, site)) == 0;
    return vote_sync_ballot(ALL_LANES, computed SAMTONE_EMULATED_AS(, site));
}
