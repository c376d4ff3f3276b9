// gradients_sm90a.cuh: what gradient_tile_sm90a.cu and gradient_tile_prefixes_sm90a.cu share: how gradients are made of the cosines of a half,
// staged and stored. The headers of these files say what lies where in shared memory, and what G1, G2 and G4 are.
#pragma once
#include "pipeline.cuh"

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
constexpr u32 STAGING = (Ring<STAGES>::END + 1023) / 1024 * 1024, EDGES = STAGING + 2 * STAGING_BYTES;

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
