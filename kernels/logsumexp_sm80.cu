// logsumexp_sm80.cu: sums of exponentials of the rows and columns of tiles of cosines, and ranks; mma.sync.
// Math     for every index i of a tile's rows that anchors a row of the batch: Σ exp(β s_ij) over the negatives j of the tile that it
//          keeps, and the number of those whose s_ij is above s⁺. The same for the indices of its columns. reference.rs: `Negatives::kept`
// In/out   towers: packed embeddings; rows: keys of the anchors · for each index and tile a partial sum {f32 sum, i32 exponent} and a count
//          (u32), whose places are in problem.cuh; cosines: of super-blocks that keep them, for gradient_tile (cosines.cuh)
// Tiles    one tile per thread block, grid (tiles of the wave)
// Threads  2·TILE; see product.cuh
// Shared   the stages of product.cuh. Afterwards
//            0              entries, 48 bytes each (epilogue.cuh). This pass adds s⁺ with slack, as bits
//            96·TILE        for each column of warps: TILE sums, TILE exponents, TILE counts of the rows
//            then           for each row of warps: the same of the columns
// Sync     P1, P2, P3 product.cuh; E1 epilogue.cuh
//          L1 every warp's sums are written before they are added up
// Numerics Cosines and exponentials are f32. Exponents are whole numbers. A warp looks at the cosines of its part that any anchor keeps. If
//          they span less than 2^110, one exponential under one exponent serves rows and columns. Else each row and column has the
//          exponent of its own largest term, so that nothing that counts is lost at any temperature. An index without negatives gives
//          the sum 0. Every run gives the same bits: the order is fixed, and there are no atomics
// Limits   packed rows are multiples of 128 bytes, and 128 more rows exist than indices
#include "common/sums_sm80.cuh"

template <u32 TILE, Arithmetic A> SAMTONE_DEVICE void logsumexp(const Wave& wave, const Towers& towers, const AnchorKeys* rows, Beta beta,
                                                                Partial* partials, u32* counts, const Cosines& cosines) {
    begin_launch();
    // [1] load
    const TilePlace at = place_of(wave, blockIdx.x);
    const SuperBlock& block = wave.blocks[at.block];
    const EdgeEntry edge = load_edge<TILE>(block, at, towers, rows);
    float bar = 0;
    if (edge.anchor.z != NONE) bar = float_of(ld_global_u32(reinterpret_cast<const u32*>(rows + edge.row) + 3));
    const Tower &left = tower_of(towers, block.row.space), &right = tower_of(towers, block.col.space);
    float x[Shape<TILE>::FRAGMENTS][4][4] = {};
    multiply<TILE, A, Numbers<A>::COSINE_SEGMENTS, Layout::rows, Layout::rows>(
        x, by_rows<TILE>(left.packed, towers.row_bytes, left.plane, block.row.packed + at.row * TILE),
        by_rows<TILE>(right.packed, towers.row_bytes, right.plane, block.col.packed + at.col * TILE), towers.row_bytes / 128);

    // [2] scale, [3] mask
    store_edge<TILE>(shared_base(), edge, {bits_of(bar), 0, 0, 0});
    SYNC(E1, bar_sync());
    const Kept kept = scale_and_mask<TILE, false>(x, Elements<TILE>::of_this_thread(), shared_base(), mask_of<TILE>(block, at, towers));
    if (cosines.first[at.block] != NOT_KEPT) keep<TILE>(x, kept_square(cosines, block, at.block, at.row, at.col, 1, TILE * TILE));
    store_sums<TILE>(x, kept, block, at, beta, partials, counts);
}

#define LOGSUMEXP(name, TILE, arithmetic)                                                                                                  \
    SHARED_BYTES(name, Shape<TILE>::STAGES* Shape<TILE>::STAGE);                                                                           \
    KERNEL(name, Shape<TILE>::THREADS, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta, Partial* partials, \
           u32* counts, BY_VALUE(Cosines) cosines) {                                                                                       \
        logsumexp<TILE, Arithmetic::arithmetic>(wave, towers, rows, beta, partials, counts, cosines);                                      \
    }
LOGSUMEXP(logsumexp_f16_64, 64, f16)
LOGSUMEXP(logsumexp_f16_128, 128, f16)
LOGSUMEXP(logsumexp_f16x3_64, 64, f16x3)
LOGSUMEXP(logsumexp_f16x3_128, 128, f16x3)
LOGSUMEXP(logsumexp_f32_64, 64, f32)
