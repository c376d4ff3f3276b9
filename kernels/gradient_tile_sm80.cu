// gradient_tile_sm80.cu: gradient of the loss with respect to tiles of cosines; mma.sync.
// Math     g_ij = exp(β s_ij)·([row i keeps j] a_i + [column j keeps i] b_j), with log a, log b from combine.cu, in units of 2^SHIFT.
//          ĝ_ij = g_ij·n_i·n_j with n = 2^12/‖packed row‖, so that products with packed rows need no other scale.
//          dots: Σ g (s − s⁺), where each part of g has the positive of its own anchor
// In/out   towers, rows, log_coefficients [4][rows_count], positive [rows_count], results (SHIFT), skipped (skipping.cuh). Kernels named
//          `kept` read no packed embeddings, but the cosines that logsumexp_sm80.cu kept (cosines.cuh) · gradients: for each
//          super-block a row-major matrix [row.tiles·TILE][col.tiles·TILE], f16, two planes of f16, or f32; dots: an f64 for each tile
// Tiles    one tile per thread block, grid (tiles of the wave). Off the diagonal of a triangle, the thread block also writes the mirror
//          image of the tile. For a tile that is skipped it writes nothing but a dot of 0
// Threads  2·TILE; see product.cuh
// Shared   the stages of product.cuh, if the cosines are not kept. Afterwards
//            0           entries, 48 bytes each (epilogue.cuh). This pass adds exponent and factor of the coefficient, and s⁺
//            96·TILE     the tile, one plane after the other, in rows of TILE elements and 16 bytes of padding. The 16-byte chunk c of
//                        row r is at c ^ r / 8 % 8, so that both rows and columns of chunks lie in different banks
//            then        4 bytes for each warp: its part of the dot
// Sync     P1, P2, P3 product.cuh; E1 epilogue.cuh
//          G1 the whole tile and all dots are written before they are read
// Numerics As logsumexp_sm80.cu. A coefficient is factor·2^exponent with a whole exponent. If no coefficient of a warp exceeds 2^60 times
//          the inverse of its largest exponential, one exponential serves both rows and columns. Else each is taken with its own. |g| ≤
//          2^14, so that it cannot leave f16. What lies below 2^-24 is lost, which is 2^-38 of the largest row. Kept cosines give the same
//          bits as recomputed ones: each product after [2] scale is mul_rn or fma_rn, so that no compiler fuses it in one kernel only
// Limits   as logsumexp_sm80.cu
#include "common/gradients_sm80.cuh"
#include "common/skipping.cuh"

template <u32 TILE, Arithmetic A, bool KEPT>
SAMTONE_DEVICE void gradient_tile(const Wave& wave, const Towers& towers, const AnchorKeys* rows, Beta beta, const double* log_coefficients,
                                  const double* positive, const double* results, u32 row_count, unsigned char* gradients, u64 plane,
                                  double* dots, const u32* skipped, const Cosines& cosines) {
    begin_launch();
    using E = Elements<TILE>;
    // [1] load
    const TilePlace at = place_of(wave, blockIdx.x);
    const SuperBlock& block = wave.blocks[at.block];
    if (is_skipped(skipped, block, at.row, at.col, 1)) {
        if (threadIdx.x == 0) st_global_f64(dots + blockIdx.x, 0);
        return;
    }
    float x[Shape<TILE>::FRAGMENTS][4][4] = {};
    if constexpr (KEPT) load_kept<TILE>(x, kept_square(cosines, block, at.block, at.row, at.col, 1, TILE * TILE));
    const EdgeEntry edge = load_edge<TILE>(block, at, towers, rows);
    const u32 of = holds_row<TILE>() ? block.row.block : block.col.block;
    const Coefficient c = coefficient_of(log_coefficients, positive, results, row_count, of, edge);
    if constexpr (!KEPT) {
        const Tower &left = tower_of(towers, block.row.space), &right = tower_of(towers, block.col.space);
        multiply<TILE, A, Numbers<A>::COSINE_SEGMENTS, Layout::rows, Layout::rows>(
            x, by_rows<TILE>(left.packed, towers.row_bytes, left.plane, block.row.packed + at.row * TILE),
            by_rows<TILE>(right.packed, towers.row_bytes, right.plane, block.col.packed + at.col * TILE), towers.row_bytes / 128);
    }

    // [2] scale, [3] mask
    store_edge<TILE>(shared_base(), edge, {bits_of(c.exponent), bits_of(c.factor), bits_of(c.positive), 0});
    SYNC(E1, bar_sync());
    const E elements = E::of_this_thread();
    const Kept kept = scale_and_mask<TILE, KEPT>(x, elements, shared_base(), mask_of<TILE>(block, at, towers));

    // [4], [5]
    const float counted = counts_of(block, at);
    float dot = 0;
    differentiate(
        x, elements, kept, beta,
        [&](u32, u32, float, float g_row, float g_col, float from_row, float from_col) {
            dot = fma_rn(mul_rn(counted, g_col), from_col, fma_rn(g_row, from_row, dot));
        },
        [&](u32 i, u32 j, float left, float right) { stage_pair<TILE, A>(elements.row(i), elements.column(j), left, right); });
    for (u32 bit = 1; bit < WARP; bit *= 2) dot += shfl_sync_bfly(ALL_LANES, dot, bit);
    const shared_address parts = shared_base() + Staging<TILE, A>::DOTS;
    if (lane_id() == 0) st_shared_f32(parts + 4 * warp_id(), dot);
    SYNC(G1, bar_sync());

    // [6] store
    if (threadIdx.x == 0) {
        double all = 0;
        for (u32 warp = 0; warp < Shape<TILE>::THREADS / WARP; ++warp) all += static_cast<double>(ld_shared_f32(parts + 4 * warp));
        st_global_f64(dots + blockIdx.x, all);
    }
    unsigned char* matrix = gradients + block.gradient * Numbers<A>::BYTES;
    const u32 columns = block.col.tiles * TILE;
    copy_out<TILE, A, false>(matrix, plane, columns, at.row * TILE, at.col * TILE);
    if (block.triangle != 0 && at.row != at.col) copy_out<TILE, A, true>(matrix, plane, columns, at.col * TILE, at.row * TILE);
}

#define GRADIENT_TILE(name, TILE, arithmetic)                                                                                        \
    SHARED_BYTES(name, Shape<TILE>::STAGES* Shape<TILE>::STAGE);                                                                     \
    KERNEL(name, Shape<TILE>::THREADS, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta,              \
           const double* log_coefficients, const double* positive, const double* results, u32 row_count, unsigned char* gradients,   \
           u64 plane, double* dots, const u32* skipped) {                                                                            \
        gradient_tile<TILE, Arithmetic::arithmetic, false>(wave, towers, rows, beta, log_coefficients, positive, results, row_count, \
                                                           gradients, plane, dots, skipped, {});                                     \
    }
GRADIENT_TILE(gradient_tile_f16_64, 64, f16)
GRADIENT_TILE(gradient_tile_f16_128, 128, f16)
GRADIENT_TILE(gradient_tile_f16x2_64, 64, f16x2)
GRADIENT_TILE(gradient_tile_f16x2_128, 128, f16x2)
GRADIENT_TILE(gradient_tile_f16x3_64, 64, f16x3)
GRADIENT_TILE(gradient_tile_f16x3_128, 128, f16x3)
GRADIENT_TILE(gradient_tile_f32_64, 64, f32)

// Only the cosines distinguish f16x3 from f16x2, and here they are there already. So the kernels of f16x2 serve f16x3 as well.
#define GRADIENT_TILE_KEPT(name, TILE, arithmetic)                                                                                  \
    SHARED_BYTES(name, Staging<TILE, Arithmetic::arithmetic>::BYTES);                                                               \
    KERNEL(name, Shape<TILE>::THREADS, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta,             \
           const double* log_coefficients, const double* positive, const double* results, u32 row_count, unsigned char* gradients,  \
           u64 plane, double* dots, const u32* skipped, BY_VALUE(Cosines) cosines) {                                                \
        gradient_tile<TILE, Arithmetic::arithmetic, true>(wave, towers, rows, beta, log_coefficients, positive, results, row_count, \
                                                          gradients, plane, dots, skipped, cosines);                                \
    }
GRADIENT_TILE_KEPT(gradient_tile_kept_f16_64, 64, f16)
GRADIENT_TILE_KEPT(gradient_tile_kept_f16_128, 128, f16)
GRADIENT_TILE_KEPT(gradient_tile_kept_f16x2_64, 64, f16x2)
GRADIENT_TILE_KEPT(gradient_tile_kept_f16x2_128, 128, f16x2)
GRADIENT_TILE_KEPT(gradient_tile_kept_f32_64, 64, f32)
