// gradient_tile_sm90a.cu: gradient of the loss with respect to tiles of cosines; wgmma.
// Math     as gradient_tile_sm80.cu
// In/out   as gradient_tile_sm80.cu, with packed embeddings in panels, or cosines that logsumexp_sm90a.cu kept. gradients: for each
//          super-block and plane [col.tiles·2][row.tiles·128] rows of 64 columns, f16, swizzled as wgmma reads them. dots: an f64 for each
//          thread block and square. With prefixes: cosines that were kept of each of them; gradients for each; radials: an f32 for each
//          row and each column of a tile in every prefix but the longest, where logsumexp_sm90a.cu has the partial sums
// Tiles    a cluster visits squares of 256 x 256 in turn, and each of its thread blocks two tiles of a square: grid (2·clusters) for any
//          number of clusters. With prefixes a thread block takes its two tiles one after the other, and in a tile all prefixes, the
//          longest first. Off the diagonal of a triangle, a thread block also writes the mirror image of a tile. For a square that is
//          skipped it writes nothing but a dot of 0
// Threads  384; see pipeline.cuh. Warps 1..3 load the entries
// Shared   the slots of pipeline.cuh. For kept cosines these are KEPT_STAGES slots of 32 KiB, each with half a tile. Then, from STAGING on
//            0              16 KiB for each warpgroup that multiplies: its part of a tile, as 64 rows of two panels or, mirrored, as 128
//                           rows of one panel
//            EDGES          entries (pipeline.cuh), with prefixes two sets in turn. This pass adds exponent and factor of the
//                           coefficient, s⁺, and `Scales::step`. The entries of a prefix are those of 128 rows and 128 columns
//            FACTORS        f32[128] for each warpgroup: factors of the columns for the common exponent
//            DOTS           f32[2][2][8]: parts of the dot of two squares in turn, by half and warp
//            COLUMNS        with prefixes f32[2][8][128]: parts of the radial sums of the columns, by warp. Two places serve in turn
// Sync     P1 … P5, E1, E2, E3 pipeline.cuh
//          G1 the warpgroup's part of the tile is written before it is copied
//          G2 it has been copied before it is written again
//          G3 all warps' dots of a square are written before they are added up. Those of the square before the last have been added up
//             before their place is written again
//          G4 all factors of the columns are written before any is read
//          G5 all warps' parts of the radial sums of the columns are written before they are added up. Those that took this place before
//             have been added up before it is written again, because their readers have been at the G5 between
// Numerics As logsumexp_sm80.cu. A coefficient is factor·2^exponent with a whole exponent. If the warp's largest cosine and the largest
//          exponent among the warpgroup's rows and columns leave ROOM (below), one exponential serves both rows and columns. It is
//          multiplied by the power of two of the largest coefficient. What is lost then is below 2^-40. Else each is taken with its own.
//          |g| ≤ 2^14, as in gradient_tile_sm80.cu. With prefixes their sum goes on in f32 from the longest to the shortest.
//          It is rounded to f16 only where it is stored
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
// With prefixes.
constexpr u32 PREFIX_FACTORS = EDGES + 2 * EDGES_IN_TURN_BYTES, PREFIX_DOTS = PREFIX_FACTORS + 2 * 4 * HALF,
              COLUMNS = PREFIX_DOTS + 2 * 4 * 16, COLUMNS_BYTES = 8 * 4 * HALF, PREFIXES_BYTES = COLUMNS + 2 * COLUMNS_BYTES;
static_assert(PREFIXES_BYTES <= 227 << 10, "the memory of a multiprocessor");

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

// What `for_each_gradient` knows of an element besides its cosine.
struct GradientOf {
    float by_row, by_column;      // its gradient as the row's anchor has it, and as the column's has it
    float row_positive, positive; // s⁺ of the row and of the column
    float row_scale, scale;       // likewise
};

// [4], [5]: calls `add(row slot, column slot, GradientOf)` for each element of a half, column by column. `factors` is the memory for those
// of all warpgroups.
template <bool CHECKED, class Add> SAMTONE_DEVICE void for_each_gradient(HalfSums& x, const KeptSlots& kept, const Edges& edges, u32 half,
                                                                         const Beta& beta, shared_address all_factors, Add add) {
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
    const shared_address factors = all_factors + consumer() * (4 * HALF);
    const u32 own = threadIdx.x % WARPGROUP;
    st_shared_f32(factors + 4 * own,
                  ld_shared_f32(edges.of_pass(1, first + own)) * ex2_approx(ld_shared_f32(edges.of_pass(0, first + own)) + common));
    SYNC(G4, sync_warpgroup());

    // [5] gradients
    float row_scale[2], row_factor[2], row_exponent[2], row_positive[2];
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const u32 row = slot_row(i);
        row_scale[i] = ld_shared_f32(edges.scale(row));
        row_exponent[i] = ld_shared_f32(edges.of_pass(0, row));
        row_factor[i] = ld_shared_f32(edges.of_pass(1, row));
        row_positive[i] = ld_shared_f32(edges.of_pass(2, row));
        if (together) row_factor[i] *= ex2_approx(row_exponent[i] + common);
    }
    auto of_kept = [&](u32 i, u32 j, float by_row, float by_column, float positive, float scale) {
        add(i, j,
            GradientOf{!CHECKED || is_kept_slot(kept.row, i, j) ? by_row : 0, !CHECKED || is_kept_slot(kept.col, i, j) ? by_column : 0,
                       row_positive[i], positive, row_scale[i], scale});
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
                of_kept(i, j, mul_rn(left, row_factor[i]), mul_rn(left, factor.x), positive.x, scale.x);
                of_kept(i, j + 1, mul_rn(right, row_factor[i]), mul_rn(right, factor.y), positive.y, scale.y);
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
                of_kept(i, j, by_row, mul_rn(exponential(s, beta, -exponent), factor), positive, scale);
            }
        }
    }
}

// Makes gradients, times both scales, of the cosines of a half, in place. Gives this thread's part of the dot.
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

// What a thread adds up of a half in one prefix: its part of the dot, and the radial sums of its rows and columns.
struct HalfRadials {
    float dot, row[2], column[32];
};

// Adds the gradients of a prefix, times both scales, to those of the prefixes that are longer. The entries are those of the half alone.
template <bool CHECKED> SAMTONE_DEVICE void differentiate_prefix(HalfSums& total, HalfRadials& radials, HalfSums& x, const KeptSlots& kept,
                                                                 const Edges& edges, bool counted, const Beta& beta) {
    float row_dot[2] = {}, row_radial[2] = {}, column_dot = 0;
    for_each_gradient<CHECKED>(x, kept, edges, 0, beta, shared_base() + PREFIX_FACTORS, [&](u32 i, u32 j, const GradientOf& g) {
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

// The copying thread copies the kept cosines of a tile.
template <class R> SAMTONE_DEVICE void copy_kept_half(R& ring, const float* tile) {
    for (u32 part = 0; part < HALF * HALF * 4 / KEPT_BYTES; ++part) {
        const shared_address slot = begin_stage(ring);
        cp_async_bulk_load(slot, tile + part * (KEPT_BYTES / 4), KEPT_BYTES, ring.full());
        ring.next();
    }
}

// The copying thread copies the kept cosines of this block's part of a square.
template <class R> SAMTONE_DEVICE void copy_kept(R& ring, const SuperBlock& block, const TilePlace& at, const Cosines& cosines) {
    for (u32 half = 0; half < 2; ++half) {
        if (is_mirrored(block, at, half)) continue;
        copy_kept_half(ring, kept_tile(cosines, block, at, half));
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

// Adds up the parts of the dot of a square, and stores it.
SAMTONE_DEVICE void store_dot(shared_address parts, double* dots, u32 square) {
    if (threadIdx.x == WARPGROUP) {
        double all = 0;
        for (u32 part = 0; part < 16; ++part) all += static_cast<double>(ld_shared_f32(parts + 4 * part));
        st_global_f64(dots + 2 * square + cluster_rank(), all);
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
            const shared_address parts = shared_base() + PREFIX_DOTS + square_turn * 64;
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
