// gradient_tile_prefixes_sm90a.cu: gradient_tile_sm90a.cu for calls with prefixes.
// Math     as gradient_tile_prefixes_sm80.cu
// In/out   as gradient_tile_prefixes_sm80.cu; gradients and dots as gradient_tile_sm90a.cu
// Tiles    a cluster visits squares of 256 x 256 in turn, and each of its thread blocks two tiles of a square: grid (2·clusters) for any
//          number of clusters. A thread block takes its two tiles one after the other, and in a tile all prefixes, the longest first. Off
//          the diagonal of a triangle, it also writes the mirror image of a tile
// Threads  384; see pipeline.cuh. Warps 1..3 load the entries
// Shared   the slots of pipeline.cuh: KEPT_STAGES of 32 KiB, each with half a tile of cosines. Then, from STAGING on
//            0              as gradient_tile_sm90a.cu
//            EDGES          entries of 128 rows and 128 columns, two sets in turn (pipeline.cuh). This pass adds exponent and factor of the
//                           coefficient, s⁺, and `Scales::step`
//            FACTORS        as gradient_tile_sm90a.cu
//            DOTS           likewise
//            COLUMNS        f32[2][8][128]: parts of the radial sums of the columns, by warp. Two places serve in turn
// Sync     P1 … P5, E1, E2, E3 pipeline.cuh; G1, G2, G3, G4 gradient_tile_sm90a.cu
//          G5 all warps' parts of the radial sums of the columns are written before they are added up. Those that took this place before
//             have been added up before it is written again, because their readers have been at the G5 between
// Numerics as gradient_tile_sm90a.cu. The sum over prefixes goes on in f32, and is rounded to f16 where it is stored
// Limits   as logsumexp_sm80.cu
#include "common/gradients_sm90a.cuh"

constexpr u32 FACTORS = EDGES + 2 * EDGES_IN_TURN_BYTES, DOTS = FACTORS + 2 * 4 * HALF,
              COLUMNS = DOTS + 2 * 4 * 16, COLUMNS_BYTES = 8 * 4 * HALF, PREFIXES_BYTES = COLUMNS + 2 * COLUMNS_BYTES;
static_assert(PREFIXES_BYTES <= 227 << 10, "the memory of a multiprocessor");

// What a thread adds up of a half in one prefix: its part of the dot, and the radial sums of its rows and columns.
struct HalfRadials {
    float dot, row[2], column[32];
};

// Adds the gradients of a prefix, times both scales, to those of the prefixes that are longer. The entries are those of the half alone.
template <bool CHECKED> SAMTONE_DEVICE void differentiate_prefix(HalfSums& total, HalfRadials& radials, HalfSums& x, const KeptSlots& kept,
                                                                 const Edges& edges, bool counted, const Beta& beta) {
    float row_dot[2] = {}, row_radial[2] = {}, column_dot = 0;
    for_each_gradient<CHECKED>(x, kept, edges, 0, beta, shared_base() + FACTORS, [&](u32 i, u32 j, const GradientOf& g) {
        const float s = element(x, i, j), of_column = mul_rn(g.by_column, s - g.positive);
        row_dot[i] = fma_rn(g.by_row, s - g.row_positive, row_dot[i]);
        row_radial[i] = fma_rn(g.by_column, s, row_radial[i]);
        column_dot += of_column;
        const float column = fma_rn(g.by_row, s, of_column);
        radials.column[j] = i == 0 ? column : radials.column[j] + column;
        element(total, i, j) = fma_rn(g.by_row + g.by_column, g.row_scale * g.scale, element(total, i, j));
    });
    UNROLL
    for (u32 i = 0; i < 2; ++i) radials.row[i] = row_dot[i] + row_radial[i];
    radials.dot = row_dot[0] + row_dot[1] + (counted ? column_dot : 0.0f);
}

// [6] store: the radial sums of the rows and columns of a half. `radials` begins with those of the prefix. `turn` says which of two places
// the parts of the warps take. So a warp need not wait until those before have been added up.
SAMTONE_DEVICE void store_radials(HalfRadials& sums, float* radials, const SuperBlock& block, const TilePlace& at, u32 half, u32& turn) {
    sum_halving<2, 1, 1>(sums.row);
    const float row = sums.row[0] + shfl_sync_bfly(ALL_LANES, sums.row[0], 2);
    if ((lane_id() & 2) == 0)
        st_global_f32(radials + block.row_partials + static_cast<u64>(at.col + half) * (block.row.tiles * HALF) + at.row * HALF +
                          slot_row(lane_id() % 2),
                      row);
    if (block.triangle != 0 && at.col + half == at.row) return; // there the sums of the rows stand for both
    sum_halving<32, 4, 16>(sums.column);
    const shared_address columns = shared_base() + COLUMNS + turn * COLUMNS_BYTES;
    const u32 first = (lane_id() >> 2 & 1) * 16 + (lane_id() >> 3 & 1) * 8 + (lane_id() >> 4 & 1) * 4; // of the four that this lane has
    UNROLL
    for (u32 k = 0; k < 4; ++k) st_shared_f32(columns + 4 * (consumer_warp() * HALF + slot_column(first + k)), sums.column[k]);
    SYNC(G5, bar_sync_named(1, CONSUMERS));
    if (consumer() == turn) {
        const u32 column = threadIdx.x % HALF;
        float sum = 0;
        UNROLL
        for (u32 warp = 0; warp < 8; ++warp) sum += ld_shared_f32(columns + 4 * (warp * HALF + column));
        st_global_f32(radials + block.col_partials + static_cast<u64>(at.row) * (block.col.tiles * HALF) + (at.col + half) * HALF + column,
                      sum);
    }
    turn ^= 1;
}

// Calls `visit(half, prefix)` for the halves of a square that are computed, and for their prefixes, the longest first.
template <class Visit>
SAMTONE_DEVICE void for_each_prefix(const SuperBlock& block, const TilePlace& at, const Prefixes& prefixes, Visit visit) {
    for (u32 half = 0; half < 2; ++half) {
        if (is_mirrored(block, at, half)) continue;
        for (u32 prefix = prefixes.count; prefix-- > 0;) visit(half, prefix);
    }
}

// The same for every prefix of the embeddings, of kept cosines. A half of a square is differentiated in all prefixes, the longest first,
// before the other half. So registers hold the sums of one half only.
template <Arithmetic A> SAMTONE_DEVICE void gradient_tile_prefixes(const Wave& wave, const Towers& towers, const AnchorKeys* rows,
                                                                   Beta beta, const CoefficientOf& of, unsigned char* gradients, u64 plane,
                                                                   double* dots, const Cosines& cosines, const Prefixes& prefixes,
                                                                   float* radials) {
    begin_launch();
    using Slots = RingOf<true>::Type;
    EdgesInTurn in_turn{shared_base() + EDGES, 0};
    start_pipeline<Slots>([&] { make_edges(in_turn); });
    Slots ring{0, 0};
    if (warpgroup_id() == 0) {
        // [1] load
        setmaxnreg_dec<COPY_REGISTERS>();
        load_squares(
            wave,
            [&](const SuperBlock& block, const TilePlace& at) {
                for_each_prefix(block, at, prefixes, [&](u32 half, u32 prefix) {
                    copy_kept_half(ring, kept_tile(cosines, block, at, half) + prefix * prefixes.cosines);
                });
            },
            [&](const SuperBlock& block, const TilePlace& at) {
                for_each_prefix(block, at, prefixes, [&](u32 half, u32 prefix) {
                    const AnchorKeys* of_prefix = rows + static_cast<u64>(prefix) * prefixes.rows;
                    load_edges<HALF>(in_turn, block, {at.block, at.row, at.col + half}, towers, of_prefix, prefixes, prefix,
                                     [&](float(&numbers)[3], const PrefixEntry& entry, const Edge& edge) {
                                         const u64 first = static_cast<u64>(only_here(prefix)) * of.row_count;
                                         const double *log_coefficients = of.log_coefficients + BLOCKS * first,
                                                      *positive = of.positive + first;
                                         coefficient(numbers, {log_coefficients, positive, of.results, of.row_count}, entry.of, edge.block);
                                         return entry.scales.step;
                                     });
                });
            });
    } else {
        setmaxnreg_inc<MULTIPLY_REGISTERS>();
        const u32 squares = squares_of(wave);
        u32 square_turn = 0, turn = 0;
        for (u32 k = cluster_id(); k < squares; k += clusters()) {
            const TilePlace at = square_of(wave, k);
            const SuperBlock& block = wave.blocks[at.block];
            const shared_address parts = shared_base() + DOTS + square_turn * 64;
            KEEP_LOOP
            for (u32 half = 0; half < 2; ++half) {
                const shared_address part = parts + 4 * (half * 8 + consumer_warp());
                if (is_mirrored(block, at, half)) {
                    if (lane_id() == 0) st_shared_f32(part, 0);
                    continue;
                }
                HalfSums total = {};
                float dot = 0;
                KEEP_LOOP
                for (u32 prefix = prefixes.count; prefix-- > 0;) {
                    HalfSums x;
                    wait_edges(in_turn.set());
                    const Edges edges{only_here(in_turn.set().at), 0};
                    // [2] scale: only the gradients, because the cosines are kept
                    load_kept(x, ring);
                    change_units(total, edges, 0);
                    // [3] mask
                    const TileMask tile = mask_of_half(block, at, half, towers);
                    const bool mirrored = block.triangle != 0 && at.col + half > at.row;
                    const bool counted = block.counted != 0 && (block.triangle == 0 || mirrored);
                    HalfRadials sums;
                    if (needs_mask(tile)) differentiate_prefix<true>(total, sums, x, mask_half(x, edges, 0, tile), edges, counted, beta);
                    else differentiate_prefix<false>(total, sums, x, {{~0u, ~0u}, {~0u, ~0u}}, edges, counted, beta);
                    release_edges(in_turn);
                    dot += sums.dot;
                    if (prefix + 1 < prefixes.count) store_radials(sums, radials + prefix * prefixes.partials, block, at, half, turn);

                    // [6] store
                    const u64 of_prefix = prefix * prefixes.gradients;
                    store_half<false>(total, gradients, of_prefix, block, at, half);
                    if (mirrored) store_half<true>(total, gradients, of_prefix, block, at, half);
                    if constexpr (Numbers<A>::GRADIENT_PLANES == 2) {
                        UNROLL
                        for (u32 i = 0; i < 64; ++i) x[i] = total[i] - cvt_f32(cvt_rn_f16_f32(total[i]));
                        store_half<false>(x, gradients, of_prefix + plane, block, at, half);
                        if (mirrored) store_half<true>(x, gradients, of_prefix + plane, block, at, half);
                    }
                }
                for (u32 bit = 1; bit < WARP; bit *= 2) dot += shfl_sync_bfly(ALL_LANES, dot, bit);
                if (lane_id() == 0) st_shared_f32(part, dot);
            }
            SYNC(G3, bar_sync_named(1, CONSUMERS));
            store_dot(parts, dots, k);
            square_turn ^= 1;
        }
        if (leads_warpgroup()) cp_async_bulk_wait_group<0>();
    }
    end_pipeline();
}

#define GRADIENT_TILE_PREFIXES(name, arithmetic)                                                                                           \
    SHARED_BYTES(name, PREFIXES_BYTES);                                                                                                    \
    KERNEL_CLUSTER(name, PIPELINE_THREADS, CLUSTER, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta,       \
                   const double* log_coefficients, const double* positive, const double* results, u32 row_count, unsigned char* gradients, \
                   u64 plane, double* dots, const u32* skipped, BY_VALUE(Cosines) cosines, BY_VALUE(Prefixes) prefixes, float* radials) {  \
        static_cast<void>(skipped); /* it is null, because no square is skipped */                                                         \
        gradient_tile_prefixes<Arithmetic::arithmetic>(wave, towers, rows, beta, {log_coefficients, positive, results, row_count},         \
                                                       gradients, plane, dots, cosines, prefixes, radials);                                \
    }
GRADIENT_TILE_PREFIXES(gradient_tile_prefixes_f16_sm90a, f16)
GRADIENT_TILE_PREFIXES(gradient_tile_prefixes_f16x2_sm90a, f16x2)
