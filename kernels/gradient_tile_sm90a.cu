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
#include "common/pipeline.cuh"
#include "common/skipping.cuh"

constexpr u32 STAGES = 3;
constexpr u32 KEPT_STAGES = 4, KEPT_BYTES = 32 << 10; // a block's part of a square is on its way while the one before is computed
template <bool KEPT> struct RingOf {
    using Type = Ring<STAGES>;
};
template <> struct RingOf<true> {
    using Type = Ring<KEPT_STAGES, KEPT_BYTES, 1>;
};
constexpr u32 STAGING_BYTES = 128 * HALF;
static_assert(RingOf<true>::Type::END <= Ring<STAGES>::END, "both have the same memory behind the slots");
constexpr u32 STAGING = (Ring<STAGES>::END + 1023) / 1024 * 1024, EDGES = STAGING + 2 * STAGING_BYTES, FACTORS = EDGES + EDGES_BYTES + 16,
              DOTS = FACTORS + 2 * 4 * HALF, GRADIENT_TILE_BYTES = DOTS + 2 * 4 * 16;
static_assert(GRADIENT_TILE_BYTES <= 227 << 10, "the memory of a multiprocessor");

constexpr float NEVER = -1e9f; // an exponent that makes everything 0
// Exponentials are taken at 2^(β s + strongest), coefficients at 2^(exponent − strongest). Exponentials stay below 2^ROOM. They are near 1
// where gradients are, which keeps their digits. A coefficient becomes 0 only where the gradient is below 2^(ROOM − 126).
constexpr float ROOM = 86;

SAMTONE_DEVICE bool leads_warpgroup() { return threadIdx.x % WARPGROUP == 0; }
SAMTONE_DEVICE void sync_warpgroup(SAMTONE_SITE_ONLY) { bar_sync_named(2 + consumer(), WARPGROUP SAMTONE_EMULATED_AS(, site)); }

struct CoefficientOf {
    const double *log_coefficients, *positive, *results;
    u32 row_count;
};

// Exponent, factor and s⁺ of an entry.
SAMTONE_DEVICE void coefficient(float (&numbers)[3], const CoefficientOf& of, const EdgeEntry& entry, u32 block) {
    constexpr double LOG2_E = 1.44269504088896340735992468100;
    numbers[0] = NEVER;
    numbers[1] = numbers[2] = 0;
    if (entry.anchor.z == NONE) return;
    const double log = ld_global_f64(of.log_coefficients + static_cast<u64>(block) * of.row_count + entry.row);
    const double log2 = fma_rn(log, LOG2_E, -ld_global_f64(of.results + SHIFT)), whole = round_f64(log2);
    numbers[2] = static_cast<float>(ld_global_f64(of.positive + entry.row));
    if (log != minus_infinity()) { // −∞ is the logarithm of no coefficient. At small τ any other number may be a logarithm
        numbers[0] = static_cast<float>(whole);
        numbers[1] = ex2_approx(static_cast<float>(log2 - whole));
    }
}

// [4], [5]: makes gradients, times both scales, of the cosines of a half, in place. Gives this thread's part of the dot.
template <bool CHECKED>
SAMTONE_DEVICE float differentiate(HalfSums& x, const KeptSlots& kept, const Edges& edges, u32 half, bool counted, const Beta& beta) {
    const u32 first = HALF + half * HALF; // the entry of the half's first column
    // [4] one exponential or two. The largest exponent is that of 64 rows and 128 columns, so that it is the same in all warps of the
    // warpgroup.
    float strongest = NEVER;
    UNROLL
    for (u32 k = 0; k < 2; ++k) strongest = max_f32(strongest, ld_shared_f32(edges.of_pass(0, consumer() * 64 + k * WARP + lane_id())));
    UNROLL
    for (u32 k = 0; k < 4; ++k) strongest = max_f32(strongest, ld_shared_f32(edges.of_pass(0, first + k * WARP + lane_id())));
    strongest = max_among(strongest, 1, 16);
    const bool together = fma_rn(beta.high, largest_of<CHECKED>(x, kept), strongest) < ROOM;
    const float common = -strongest;
    const shared_address factors = shared_base() + FACTORS + consumer() * (4 * HALF);
    const u32 own = threadIdx.x % WARPGROUP;
    st_shared_f32(factors + 4 * own,
                  ld_shared_f32(edges.of_pass(1, first + own)) * ex2_approx(ld_shared_f32(edges.of_pass(0, first + own)) + common));
    SYNC(G4, sync_warpgroup());

    // [5] gradients
    float row_scale[2], row_factor[2], row_exponent[2], row_positive[2], row_dot = 0, column_dot = 0;
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const u32 row = slot_row(i);
        row_scale[i] = ld_shared_f32(edges.scale(row));
        row_exponent[i] = ld_shared_f32(edges.of_pass(0, row));
        row_factor[i] = ld_shared_f32(edges.of_pass(1, row));
        row_positive[i] = ld_shared_f32(edges.of_pass(2, row));
        if (together) row_factor[i] *= ex2_approx(row_exponent[i] + common);
    }
    auto add = [&](u32 i, u32 j, float by_row, float by_column, float positive, float scale) {
        float& s = element(x, i, j);
        const float g_row = !CHECKED || is_kept_slot(kept.row, i, j) ? by_row : 0;
        const float g_column = !CHECKED || is_kept_slot(kept.col, i, j) ? by_column : 0;
        row_dot = fma_rn(g_row, s - row_positive[i], row_dot);
        column_dot = fma_rn(g_column, s - positive, column_dot);
        s = mul_rn(g_row + g_column, row_scale[i] * scale);
    };
    if (together) {
        UNROLL
        for (u32 j = 0; j < 32; j += 2) {
            const u32 column = slot_column(j);
            const f32x2 scale = ld_shared_f32x2(edges.scale(first + column)), factor = ld_shared_f32x2(factors + 4 * column);
            const f32x2 positive = ld_shared_f32x2(edges.of_pass(2, first + column));
            UNROLL
            for (u32 i = 0; i < 2; ++i) {
                const float left = exponential(element(x, i, j), beta, common), right = exponential(element(x, i, j + 1), beta, common);
                add(i, j, mul_rn(left, row_factor[i]), mul_rn(left, factor.x), positive.x, scale.x);
                add(i, j + 1, mul_rn(right, row_factor[i]), mul_rn(right, factor.y), positive.y, scale.y);
            }
        }
    } else {
        UNROLL
        for (u32 j = 0; j < 32; ++j) {
            const u32 entry = first + slot_column(j);
            const float scale = ld_shared_f32(edges.scale(entry)), exponent = ld_shared_f32(edges.of_pass(0, entry));
            const float factor = ld_shared_f32(edges.of_pass(1, entry)), positive = ld_shared_f32(edges.of_pass(2, entry));
            UNROLL
            for (u32 i = 0; i < 2; ++i) {
                const float s = element(x, i, j);
                const float by_row = mul_rn(exponential(s, beta, -row_exponent[i]), row_factor[i]);
                add(i, j, by_row, mul_rn(exponential(s, beta, -exponent), factor), positive, scale);
            }
        }
    }
    return row_dot + (counted ? column_dot : 0.0f);
}

// Writes this warp's part of a half, as f16, to the memory of its warpgroup: its rows in two panels, or its columns as rows in one panel.
template <bool MIRRORED> SAMTONE_DEVICE void stage_half(HalfSums& x) {
    const u32 matrix = lane_id() / 8, r = lane_id() % 8, warp = consumer_warp() % 4;
    const shared_address staging = shared_base() + STAGING + consumer() * STAGING_BYTES;
    UNROLL
    for (u32 group = 0; group < 16; group += 2) { // two groups of eight columns, and both row slots
        const u32 pairs[4] = {cvt_rn_f16x2_f32(x[4 * group], x[4 * group + 1]), cvt_rn_f16x2_f32(x[4 * group + 2], x[4 * group + 3]),
                              cvt_rn_f16x2_f32(x[4 * group + 4], x[4 * group + 5]), cvt_rn_f16x2_f32(x[4 * group + 6], x[4 * group + 7])};
        const u32 columns = group + matrix / 2, rows = warp * 2 + matrix % 2; // numbers of groups of eight
        if constexpr (MIRRORED) stmatrix_x4_trans(staging + (columns * 8 + r) * 128 + (rows ^ r) * 16, pairs);
        else stmatrix_x4(staging + columns / 8 * (64 * 128) + (rows * 8 + r) * 128 + (columns % 8 ^ r) * 16, pairs);
    }
}

// [6] store: copies the staged half to its place in one plane of the matrix of the super-block.
template <bool MIRRORED>
SAMTONE_DEVICE void store_half(HalfSums& x, unsigned char* gradients, u64 plane, const SuperBlock& block, const TilePlace& at, u32 half) {
    if (leads_warpgroup()) SYNC(G2, cp_async_bulk_wait_group_read<0>());
    SYNC(G2, sync_warpgroup());
    stage_half<MIRRORED>(x);
    fence_proxy_async();
    SYNC(G1, sync_warpgroup());
    if (leads_warpgroup()) {
        const shared_address staging = shared_base() + STAGING + consumer() * STAGING_BYTES;
        const u64 panel = static_cast<u64>(only_here(block.row.tiles)) * HALF * 128;
        const u32 row = only_here(at.row) * HALF + consumer() * 64, column = only_here(at.col + half) * HALF;
        unsigned char* matrix = gradients + block.gradient * 2 + plane;
        if constexpr (MIRRORED) {
            cp_async_bulk_store(matrix + row / 64 * panel + static_cast<u64>(column) * 128, staging, STAGING_BYTES);
        } else {
            unsigned char* to = matrix + column / 64 * panel + static_cast<u64>(row) * 128;
            cp_async_bulk_store(to, staging, STAGING_BYTES / 2);
            cp_async_bulk_store(to + panel, staging + STAGING_BYTES / 2, STAGING_BYTES / 2);
        }
        cp_async_bulk_commit_group();
    }
}

// The copying thread copies the kept cosines of this block's part of a square.
template <class R> SAMTONE_DEVICE void copy_kept(R& ring, const SuperBlock& block, const TilePlace& at, const Cosines& cosines) {
    for (u32 half = 0; half < 2; ++half) {
        if (is_mirrored(block, at, half)) continue;
        const float* tile = kept_tile(cosines, block, at, half);
        for (u32 part = 0; part < HALF * HALF * 4 / KEPT_BYTES; ++part) {
            const shared_address slot = begin_stage(ring);
            cp_async_bulk_load(slot, tile + part * (KEPT_BYTES / 4), KEPT_BYTES, ring.full());
            ring.next();
        }
    }
}

// The multiplying warpgroups load a half of them.
template <class R> SAMTONE_DEVICE void load_kept(HalfSums& x, R& ring) {
    constexpr u32 VECTORS = KEPT_BYTES / (16 * CONSUMERS);
    UNROLL
    for (u32 part = 0; part < 16 / VECTORS; ++part) {
        wait_full(ring);
        UNROLL
        for (u32 v = 0; v < VECTORS; ++v) {
            const f32x4 four = ld_shared_f32x4(ring.stage() + 16 * (v * CONSUMERS + threadIdx.x - WARPGROUP));
            float* to = x + 4 * (part * VECTORS + v);
            to[0] = four.x;
            to[1] = four.y;
            to[2] = four.z;
            to[3] = four.w;
        }
        release_loaded(ring);
        ring.next();
    }
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
            else copy_square<A>(ring, block, at, towers);
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
            if (threadIdx.x == WARPGROUP) {
                const shared_address parts = shared_base() + DOTS + (edges.parity ^ 1) * 64;
                double all = 0;
                for (u32 part = 0; part < 16; ++part) all += static_cast<double>(ld_shared_f32(parts + 4 * part));
                st_global_f64(dots + 2 * k + cluster_rank(), all);
            }
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
