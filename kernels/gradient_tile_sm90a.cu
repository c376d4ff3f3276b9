// gradient_tile_sm90a.cu: gradient of the loss with respect to tiles of cosines; wgmma.
// Math     as gradient_tile_sm80.cu
// In/out   as gradient_tile_sm80.cu, with packed embeddings in panels, or cosines that logsumexp_sm90a.cu kept. gradients: for each
//          super-block and plane [col.tiles·2][row.tiles·128] rows of 64 columns, f16, swizzled as wgmma reads them. dots: an f64 for each
//          thread block and square
// Tiles    a cluster visits squares of 256 x 256 in turn, and each of its thread blocks two tiles of a square: grid (2·clusters) for any
//          number of clusters. Off the diagonal of a triangle, a thread block also writes the mirror image of a tile. For a square that is
//          skipped it writes nothing but a dot of 0
// Threads  384; see pipeline.cuh. Warps 1..3 load the entries
// Shared   the slots of pipeline.cuh. For kept cosines these are KEPT_STAGES slots of 32 KiB, each with half a tile. Then, from STAGING on
//            0              16 KiB for each warpgroup that multiplies: its part of a tile, as 64 rows of two panels or, mirrored, as 128
//                           rows of one panel
//            EDGES          entries (pipeline.cuh). This pass adds exponent and factor of the coefficient, and s⁺
//            FACTORS        f32[128] for each warpgroup: factors of the columns for the common exponent
//            DOTS           f32[2][2][8]: parts of the dot of two squares in turn, by half and warp
// Sync     P1 … P5, E1, E2, E3 pipeline.cuh
//          G1 the warpgroup's part of the tile is written before it is copied
//          G2 it has been copied before it is written again
//          G3 all warps' dots of a square are written before they are added up. Those of the square before the last have been added up
//             before their place is written again
//          G4 all factors of the columns are written before any is read
// Numerics As logsumexp_sm80.cu. A coefficient is factor·2^exponent with a whole exponent. If the warp's largest cosine and the largest
//          exponent among the warpgroup's rows and columns leave ROOM (below), one exponential serves both rows and columns. It is
//          multiplied by the power of two of the largest coefficient. What is lost then is below 2^-40. Else each is taken with its own.
//          |g| ≤ 2^14, as in gradient_tile_sm80.cu
// Limits   as logsumexp_sm80.cu
#include "common/gradients_sm90a.cuh"
#include "common/skipping.cuh"

constexpr u32 FACTORS = EDGES + EDGES_BYTES + 16, DOTS = FACTORS + 2 * 4 * HALF, GRADIENT_TILE_BYTES = DOTS + 2 * 4 * 16;
static_assert(GRADIENT_TILE_BYTES <= 227 << 10, "the memory of a multiprocessor");

template <bool CHECKED>
SAMTONE_DEVICE float differentiate(HalfSums& x, const KeptSlots& kept, const Edges& edges, u32 half, bool counted, const Beta& beta) {
    float row_dot = 0, column_dot = 0;
    for_each_gradient<CHECKED>(x, kept, edges, half, beta, shared_base() + FACTORS, [&](u32 i, u32 j, const GradientOf& g) {
        float& s = element(x, i, j);
        row_dot = fma_rn(g.by_row, s - g.row_positive, row_dot);
        column_dot = fma_rn(g.by_column, s - g.positive, column_dot);
        s = mul_rn(g.by_row + g.by_column, g.row_scale * g.scale);
    });
    return row_dot + (counted ? column_dot : 0.0f);
}

template <Arithmetic A, bool KEPT> SAMTONE_DEVICE void gradient_tile(const Wave& wave, const Towers& towers, const AnchorKeys* rows,
                                                                     Beta beta, const CoefficientOf& of, unsigned char* gradients,
                                                                     u64 plane, double* dots, const u32* skipped, const Cosines& cosines) {
    begin_launch();
    using Slots = typename RingOf<KEPT>::Type;
    Edges edges{shared_base() + EDGES, 0};
    start_pipeline<Slots>([&] { make_edges(edges); });
    Slots ring{0, 0};
    const u32 squares = squares_of(wave);
    auto left_out = [&](const TilePlace& at) { return is_skipped(skipped, wave.blocks[at.block], at.row / 2, at.col / 2, 2); };
    if (warpgroup_id() == 0) {
        // [1] load
        setmaxnreg_dec<COPY_REGISTERS>();
        auto copy = [&](const SuperBlock& block, const TilePlace& at) {
            if constexpr (KEPT) copy_kept(ring, block, at, cosines);
            else copy_square<A>(ring, block, at, towers, 0, towers.row_bytes);
        };
        load_squares(
            edges, wave, towers, rows, copy,
            [&](float(&numbers)[3], const EdgeEntry& entry, const Edge& edge) { coefficient(numbers, of, entry, edge.block); }, left_out);
    } else {
        setmaxnreg_inc<MULTIPLY_REGISTERS>();
        for (u32 k = cluster_id(); k < squares; k += clusters()) {
            const TilePlace at = square_of(wave, k);
            if (left_out(at)) {
                if (threadIdx.x == WARPGROUP) st_global_f64(dots + 2 * k + cluster_rank(), 0);
                continue;
            }
            const SuperBlock& block = wave.blocks[at.block];
            HalfSums x[KEPT ? 1 : 2] = {};
            if constexpr (!KEPT) multiply_cosines<A>(x, ring, Numbers<A>::COSINE_SEGMENTS * (towers.row_bytes / 128));
            wait_edges(edges);
            KEEP_LOOP // the second half moves to where the first was, so that one copy of the code serves both
            for (u32 half = 0; half < 2; ++half) {
                if constexpr (!KEPT) {
                    if (half == 1) move_half(x);
                }
                const shared_address part = shared_base() + DOTS + edges.parity * 64 + 4 * (half * 8 + consumer_warp());
                if (is_mirrored(block, at, half)) {
                    if (lane_id() == 0) st_shared_f32(part, 0);
                    continue;
                }
                // [2] scale, [3] mask
                if constexpr (KEPT) load_kept(x[0], ring);
                else scale_half(x[0], edges, half);
                const TileMask tile = mask_of_half(block, at, half, towers);
                const bool mirrored = block.triangle != 0 && at.col + half > at.row;
                const bool counted = block.counted != 0 && (block.triangle == 0 || mirrored);
                float dot;
                if (needs_mask(tile)) dot = differentiate<true>(x[0], mask_half(x[0], edges, half, tile), edges, half, counted, beta);
                else dot = differentiate<false>(x[0], {{~0u, ~0u}, {~0u, ~0u}}, edges, half, counted, beta);
                for (u32 bit = 1; bit < WARP; bit *= 2) dot += shfl_sync_bfly(ALL_LANES, dot, bit);
                if (lane_id() == 0) st_shared_f32(part, dot);

                // [6] store
                UNROLL
                for (u32 p = 0; p < Numbers<A>::GRADIENT_PLANES; ++p) {
                    if (p == 1) {
                        UNROLL
                        for (u32 i = 0; i < 64; ++i) x[0][i] -= cvt_f32(cvt_rn_f16_f32(x[0][i]));
                    }
                    store_half<false>(x[0], gradients, p * plane, block, at, half);
                    if (mirrored) store_half<true>(x[0], gradients, p * plane, block, at, half);
                }
            }
            release_edges(edges);
            SYNC(G3, bar_sync_named(1, CONSUMERS));
            store_dot(shared_base() + DOTS + (edges.parity ^ 1) * 64, dots, k);
        }
        if (leads_warpgroup()) cp_async_bulk_wait_group<0>();
    }
    end_pipeline();
}

#define GRADIENT_TILE(name, arithmetic)                                                                                                    \
    SHARED_BYTES(name, GRADIENT_TILE_BYTES);                                                                                               \
    KERNEL_CLUSTER(name, PIPELINE_THREADS, CLUSTER, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta,       \
                   const double* log_coefficients, const double* positive, const double* results, u32 row_count, unsigned char* gradients, \
                   u64 plane, double* dots, const u32* skipped) {                                                                          \
        gradient_tile<Arithmetic::arithmetic, false>(wave, towers, rows, beta, {log_coefficients, positive, results, row_count},           \
                                                     gradients, plane, dots, skipped, {});                                                 \
    }
GRADIENT_TILE(gradient_tile_f16_sm90a, f16)
GRADIENT_TILE(gradient_tile_f16x2_sm90a, f16x2)
GRADIENT_TILE(gradient_tile_f16x3_sm90a, f16x3)

// Only the cosines distinguish f16x3 from f16x2, and here they are there already. So the kernels of f16x2 serve f16x3 as well.
#define GRADIENT_TILE_KEPT(name, arithmetic)                                                                                               \
    SHARED_BYTES(name, GRADIENT_TILE_BYTES);                                                                                               \
    KERNEL_CLUSTER(name, PIPELINE_THREADS, CLUSTER, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta,       \
                   const double* log_coefficients, const double* positive, const double* results, u32 row_count, unsigned char* gradients, \
                   u64 plane, double* dots, const u32* skipped, BY_VALUE(Cosines) cosines) {                                               \
        gradient_tile<Arithmetic::arithmetic, true>(wave, towers, rows, beta, {log_coefficients, positive, results, row_count}, gradients, \
                                                    plane, dots, skipped, cosines);                                                        \
    }
GRADIENT_TILE_KEPT(gradient_tile_kept_f16_sm90a, f16)
GRADIENT_TILE_KEPT(gradient_tile_kept_f16x2_sm90a, f16x2)
