// gradient_tile_sm80.cu: gradient of the loss with respect to tiles of cosines; mma.sync.
// Math     g_ij = exp(β s_ij)·([row i keeps j] a_i + [column j keeps i] b_j), with log a, log b from combine.cu, in units of 2^SHIFT.
//          ĝ_ij = g_ij·n_i·n_j with n = 2^12/‖packed row‖, so that products with packed rows need no other scale.
//          dots: Σ g (s − s⁺), where each part of g has the positive of its own anchor
// In/out   towers, rows, log_coefficients [4][rows_count], positive [rows_count], results (SHIFT), skipped (skipping.cuh). Kernels named
//          `kept` read no packed embeddings, but the cosines that logsumexp_sm80.cu kept (cosines.cuh) · gradients: for each
//          super-block a row-major matrix [row.tiles·TILE][col.tiles·TILE], f16, two planes of f16, or f32; dots: an f64 for each tile.
//          Kernels named `prefixes` read the stored cosines of one prefix after the other, from the longest on. The gradients of a prefix
//          are the sum of its own and of those of all longer ones, because its columns are theirs, too. radials: of each prefix but the
//          longest an f32 for each index and tile, Σ_j g_r (s − s⁺_r) + g_c s along a row and Σ_i g_c (s − s⁺_c) + g_r s down a column,
//          where g_r is the part of the row's anchor and g_c that of the column's. They lie as the sums of logsumexp_sm80.cu do
// Tiles    one tile per thread block, grid (tiles of the wave). Off the diagonal of a triangle, the thread block also writes the mirror
//          image of the tile. For a tile that is skipped it writes nothing but a dot of 0
// Threads  2·TILE; see product.cuh
// Shared   the stages of product.cuh, if the cosines are not kept. Afterwards
//            0           entries, 48 bytes each (epilogue.cuh). This pass adds exponent and factor of the coefficient, s⁺, and
//                        `Scales::step`
//            96·TILE     the tile, one plane after the other, in rows of TILE elements and 16 bytes of padding. The 16-byte chunk c of
//                        row r is at c ^ r / 8 % 8, so that both rows and columns of chunks lie in different banks
//            then        4 bytes for each warp: its part of the dot
//            then        with prefixes, radial sums of the warps: see `RadialSums`
// Sync     P1, P2, P3 product.cuh; E1 epilogue.cuh
//          G1 the whole tile, and all dots or radial sums, are written before they are read. With prefixes it also lets the next entries
//             be stored, and E1 then lets the next tile be staged
//          G2 with prefixes, all dots are written before they are read
// Numerics As logsumexp_sm80.cu. A coefficient is factor·2^exponent with a whole exponent. If no coefficient of a warp exceeds 2^60 times
//          the inverse of its largest exponential, one exponential serves both rows and columns. Else each is taken with its own. |g| ≤
//          2^14, so that it cannot leave f16. What lies below 2^-24 is lost, which is 2^-38 of the largest row. Kept cosines give the same
//          bits as recomputed ones: each product after [2] scale is mul_rn or fma_rn, so that no compiler fuses it in one kernel only
// Limits   as logsumexp_sm80.cu
#include "common/cosines.cuh"
#include "common/epilogue.cuh"
#include "common/skipping.cuh"

template <u32 TILE, Arithmetic A> struct Staging {
    static constexpr u32 ROW = TILE * Numbers<A>::BYTES + 16, PLANE = TILE * ROW, START = 2 * TILE * EDGE_BYTES,
                         DOTS = START + Numbers<A>::GRADIENT_PLANES * PLANE;
    static constexpr u32 BYTES = DOTS + Shape<TILE>::THREADS / WARP * 4; // of a kernel that has no stages
    static_assert(BYTES <= Shape<TILE>::STAGES * Shape<TILE>::STAGE, "fits the stages' memory");
};

// Loads the thread's cosines, or one part of them, as `keep` of logsumexp_sm80.cu stored them.
template <u32 TILE, u32 FRAGMENTS> SAMTONE_DEVICE void load_kept(float (&x)[FRAGMENTS][4][4], const float* tile, u32 part = 0) {
    UNROLL
    for (u32 v = 0; v < 4 * FRAGMENTS; ++v) {
        const f32x4 four = ld_global_f32x4(tile + 4 * ((part * (4 * FRAGMENTS) + v) * Shape<TILE>::THREADS + threadIdx.x));
        float(&to)[4] = x[v / 4][v % 4];
        to[0] = four.x;
        to[1] = four.y;
        to[2] = four.z;
        to[3] = four.w;
    }
}

// Where an element of the tile is staged, counted from the start of its plane.
template <u32 TILE, Arithmetic A> SAMTONE_DEVICE u32 staged_at(u32 row, u32 column) {
    return row * Staging<TILE, A>::ROW + ((column * Numbers<A>::BYTES) ^ (row / 8 % 8 * 16));
}

// Stages two neighbouring elements of the tile.
template <u32 TILE, Arithmetic A> SAMTONE_DEVICE void stage_pair(u32 row, u32 column, float low, float high) {
    const shared_address at = shared_base() + Staging<TILE, A>::START + staged_at<TILE, A>(row, column);
    if constexpr (Numbers<A>::TENSOR) {
        const u32 pair = cvt_rn_f16x2_f32(low, high);
        st_shared_u32(at, pair);
        if constexpr (Numbers<A>::GRADIENT_PLANES == 2) {
            const float rest_low = low - cvt_f32(f16{static_cast<u16>(pair & 0xffff)});
            const float rest_high = high - cvt_f32(f16{static_cast<u16>(pair >> 16)});
            st_shared_u32(at + Staging<TILE, A>::PLANE, cvt_rn_f16x2_f32(rest_low, rest_high));
        }
    } else {
        st_shared_f32x2(at, {low, high});
    }
}

// Copies the staged tile to the rows row0, … and the columns column0, … of a matrix. A row of the matrix has `columns` elements. If the
// threads take their row slots in PARTS, only the rows of this part are copied.
template <u32 TILE, Arithmetic A, bool MIRRORED, u32 PARTS = 1>
SAMTONE_DEVICE void copy_out(unsigned char* matrix, u64 plane, u32 columns, u32 row0, u32 column0, u32 part = 0) {
    using S = Staging<TILE, A>;
    constexpr u32 BYTES = Numbers<A>::BYTES, PER_CHUNK = 16 / BYTES, CHUNKS = TILE / PER_CHUNK, RUN = TILE / 2 / PARTS;
    // Of a tile's rows, or of its chunks of rows if it is mirrored, a part has every PARTS-th run, as the rows of warps have it.
    auto of_part = [part](u32 k, u32 run) { return PARTS == 1 ? k : (k / run * PARTS + part) * run + k % run; };
    constexpr u32 ROWS = MIRRORED ? TILE : TILE / PARTS, ROW_CHUNKS = MIRRORED ? CHUNKS / PARTS : CHUNKS;
    for (u32 p = 0; p < Numbers<A>::GRADIENT_PLANES; ++p) {
        const shared_address tile = shared_base() + S::START + p * S::PLANE;
        for (u32 k = threadIdx.x; k < ROWS * ROW_CHUNKS; k += Shape<TILE>::THREADS) {
            u32 row = k / ROW_CHUNKS, column = k % ROW_CHUNKS * PER_CHUNK;
            u32x4 chunk;
            if constexpr (!MIRRORED) {
                row = of_part(row, RUN);
                chunk = ld_shared_u32x4(tile + staged_at<TILE, A>(row, column));
            } else {
                column = of_part(k % ROW_CHUNKS, RUN / PER_CHUNK) * PER_CHUNK;
                auto word = [&](u32 i) { // two elements of column `row` of the tile
                    if constexpr (BYTES == 4) return ld_shared_u32(tile + staged_at<TILE, A>(column + i, row));
                    const u32 low = ld_shared_u16(tile + staged_at<TILE, A>(column + 2 * i, row));
                    return low | static_cast<u32>(ld_shared_u16(tile + staged_at<TILE, A>(column + 2 * i + 1, row))) << 16;
                };
                chunk = {word(0), word(1), word(2), word(3)};
            }
            const u64 element = static_cast<u64>(row0 + row) * columns + column0 + column;
            st_global_u32x4(matrix + p * plane + element * BYTES, chunk);
        }
    }
}

constexpr float NEVER = -1e9f; // an exponent that makes everything 0

// What an anchor's part of a gradient is: factor·2^exponent·exp(β s). And its s⁺.
struct Coefficient {
    float exponent, factor, positive;
};
SAMTONE_DEVICE Coefficient coefficient_of(const double* log_coefficients, const double* positive, const double* results, u32 row_count,
                                          u32 block, const EdgeEntry& edge) {
    constexpr double LOG2_E = 1.44269504088896340735992468100;
    Coefficient c{NEVER, 0, 0};
    if (edge.anchor.z == NONE) return c;
    const double log = ld_global_f64(log_coefficients + static_cast<u64>(block) * row_count + edge.row);
    const double log2 = fma_rn(log, LOG2_E, -ld_global_f64(results + SHIFT)), whole = round_f64(log2);
    c.positive = static_cast<float>(ld_global_f64(positive + edge.row));
    if (log != minus_infinity()) { // −∞ is the logarithm of no coefficient. At small τ any other number may be a logarithm
        c.exponent = static_cast<float>(whole);
        c.factor = ex2_approx(static_cast<float>(log2 - whole));
    }
    return c;
}

// [4], [5]: the gradients of this thread's cosines, row slot by row slot. Calls `parts(i, j, s, part of the row's anchor, part of the
// column's anchor, s − s⁺ of the row, s − s⁺ of the column)` for each element, and `pair(i, j, ĝ, ĝ of the next column)` for each two.
template <u32 TILE, u32 PARTS, class Parts, class Pair>
SAMTONE_DEVICE void differentiate(typename Elements<TILE, PARTS>::Array& x, const Elements<TILE, PARTS>& elements, const Kept& kept,
                                  const Beta& beta, Parts parts, Pair pair) {
    using E = Elements<TILE, PARTS>;
    // [4] one exponential or two
    const shared_address row_edges = shared_base() + 32, col_edges = row_edges + TILE * EDGE_BYTES;
    float largest = NO_COSINE, strongest = NEVER, col_exponent[E::COLS], col_factor[E::COLS], col_positive[E::COLS];
    UNROLL
    for (u32 j = 0; j < E::COLS; ++j) {
        const u32x4 of_column = ld_shared_u32x4(col_edges + elements.column(j) * EDGE_BYTES);
        col_exponent[j] = float_of(of_column.x);
        col_factor[j] = float_of(of_column.y);
        col_positive[j] = float_of(of_column.z);
        strongest = max_f32(strongest, col_exponent[j]);
    }
    UNROLL
    for (u32 i = 0; i < E::ROWS; ++i) {
        strongest = max_f32(strongest, ld_shared_f32(row_edges + elements.row(i) * EDGE_BYTES));
        UNROLL
        for (u32 j = 0; j < E::COLS; ++j)
            if (is_kept(kept.row | kept.col, i, j)) largest = max_f32(largest, element(x, i, j));
    }
    largest = max_among(largest, 1, 16);
    strongest = max_among(strongest, 1, 16);
    const float common = largest > NO_COSINE ? round_f32(beta.high * largest) : 0;
    const bool together = common + strongest < 60.0f;
    if (together) {
        UNROLL
        for (u32 j = 0; j < E::COLS; ++j) col_factor[j] *= ex2_approx(common + col_exponent[j]);
    }

    // [5] gradients
    UNROLL
    for (u32 i = 0; i < E::ROWS; ++i) {
        const u32 row = elements.row(i);
        const u32x4 of_row = ld_shared_u32x4(row_edges + row * EDGE_BYTES);
        const float row_exponent = float_of(of_row.x), row_positive = float_of(of_row.z);
        float row_factor = float_of(of_row.y);
        if (together) row_factor *= ex2_approx(common + row_exponent);
        const float row_scale = ld_shared_f32(shared_base() + row * EDGE_BYTES + 12);
        UNROLL
        for (u32 j = 0; j < E::COLS; j += 2) {
            float out[2];
            UNROLL
            for (u32 side = 0; side < 2; ++side) {
                const u32 c = j + side;
                const float s = element(x, i, c);
                const float shared = together ? exponential(s, beta, common) : 0;
                const float by_row = together ? shared : exponential(s, beta, -row_exponent);
                const float by_col = together ? shared : exponential(s, beta, -col_exponent[c]);
                const float g_row = is_kept(kept.row, i, c) ? mul_rn(by_row, row_factor) : 0;
                const float g_col = is_kept(kept.col, i, c) ? mul_rn(by_col, col_factor[c]) : 0;
                parts(i, c, s, g_row, g_col, s - row_positive, s - col_positive[c]);
                const float col_scale = ld_shared_f32(shared_base() + (TILE + elements.column(c)) * EDGE_BYTES + 12);
                out[side] = mul_rn(mul_rn(g_row + g_col, row_scale), col_scale);
            }
            pair(i, j, out[0], out[1]);
        }
    }
}

// 1 if the columns' part of the dot is added in this tile, else 0.
SAMTONE_DEVICE float counts_of(const SuperBlock& block, const TilePlace& at) {
    return block.counted != 0 && !(block.triangle != 0 && at.row == at.col) ? 1.0f : 0.0f;
}

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

constexpr u32 STEP = 44; // where an entry has `Scales::step`

// What the kernels with prefixes have in shared memory behind the staged tile: for each column of warps TILE radial sums of the rows, then
// for each row of warps those of the columns.
template <u32 TILE, Arithmetic A> struct RadialSums {
    static constexpr u32 START = Staging<TILE, A>::BYTES, BYTES = START + (TILE / 32 + 2) * 4 * TILE;
    SAMTONE_MEMBER static shared_address of_rows(u32 warp_col) { return shared_base() + START + warp_col * (4 * TILE); }
    SAMTONE_MEMBER static shared_address of_cols(u32 warp_row) { return of_rows(TILE / 32) + warp_row * (4 * TILE); }
};

template <u32 TILE, Arithmetic A>
SAMTONE_DEVICE void gradient_tile_prefixes(const Wave& wave, const Towers& towers, const AnchorKeys* rows, Beta beta,
                                           const double* log_coefficients, const double* positive, const double* results, u32 row_count,
                                           unsigned char* gradients, u64 plane, double* dots, const Cosines& cosines,
                                           const Prefixes& prefixes, float* radials) {
    begin_launch();
    constexpr u32 PARTS = TILE / 64; // because cosines and gradients take a register each
    using E = Elements<TILE, PARTS>;
    using R = RadialSums<TILE, A>;
    const TilePlace at = place_of(wave, blockIdx.x);
    const SuperBlock& block = wave.blocks[at.block];
    const u32 axis_block = holds_row<TILE>() ? block.row.block : block.col.block;
    const bool mirrored = block.triangle != 0 && at.row != at.col;
    const float counted = counts_of(block, at);
    float dot = 0;
    KEEP_LOOP
    for (u32 part = 0; part < PARTS; ++part) {
        const E elements = E::of_this_thread(part);
        typename E::Array joint = {}; // the gradients of this prefix and of all longer ones, in units of its segment
        KEEP_LOOP
        for (u32 k = prefixes.count; k-- > 0;) {
            // [1] load
            typename E::Array x;
            load_kept<TILE>(x, kept_square(cosines, block, at.block, at.row, at.col, 1, TILE * TILE) + k * prefixes.cosines, part);
            Scales scales;
            const EdgeEntry edge = load_edge_of_prefix<TILE>(scales, block, at, towers, rows, prefixes, k);
            const u64 first_row = static_cast<u64>(k) * row_count;
            const Coefficient c =
                coefficient_of(log_coefficients + BLOCKS * first_row, positive + first_row, results, row_count, axis_block, edge);

            // [2] scale what is there, [3] mask
            store_edge<TILE>(shared_base(), edge, {bits_of(c.exponent), bits_of(c.factor), bits_of(c.positive), bits_of(scales.step)});
            SYNC(E1, bar_sync());
            multiply_by_entries(joint, elements, STEP);
            const Kept kept = scale_and_mask<TILE, true>(x, elements, shared_base(), mask_of<TILE>(block, at, towers));

            // [4], [5], with sums of g_r (s − s⁺_r) and of g_c s along the row slots, of g_c (s − s⁺_c) and of g_r s down the column slots
            float row_radial[E::ROWS] = {}, col_radial[E::COLS] = {};
            differentiate(
                x, elements, kept, beta,
                [&](u32 i, u32 j, float s, float g_row, float g_col, float from_row, float from_col) {
                    dot = fma_rn(mul_rn(counted, g_col), from_col, fma_rn(g_row, from_row, dot));
                    row_radial[i] = fma_rn(g_row, from_row, fma_rn(g_col, s, row_radial[i]));
                    col_radial[j] = fma_rn(g_col, from_col, fma_rn(g_row, s, col_radial[j]));
                },
                [&](u32 i, u32 j, float left, float right) {
                    float &first = element(joint, i, j), &second = element(joint, i, j + 1);
                    first += left;
                    second += right;
                    stage_pair<TILE, A>(elements.row(i), elements.column(j), first, second);
                });
            sum_halving<E::ROWS, 1, 2>(row_radial);
            sum_halving<E::COLS, 4, 16>(col_radial);
            UNROLL
            for (u32 i = 0; i < E::ROWS / 4; ++i)
                st_shared_f32(R::of_rows(warp_id() % (TILE / 32)) + 4 * elements.row(first_row_slot<E::ROWS>() + i), row_radial[i]);
            st_shared_f32(R::of_cols(warp_id() / (TILE / 32)) + 4 * elements.column(column_slot()), col_radial[0]);
            SYNC(G1, bar_sync());

            // [6] store
            unsigned char* matrix = gradients + k * prefixes.gradients + block.gradient * Numbers<A>::BYTES;
            const u32 columns = block.col.tiles * TILE, index = threadIdx.x % TILE;
            copy_out<TILE, A, false, PARTS>(matrix, plane, columns, at.row * TILE, at.col * TILE, part);
            if (mirrored) copy_out<TILE, A, true, PARTS>(matrix, plane, columns, at.col * TILE, at.row * TILE, part);
            if (k + 1 == prefixes.count) continue; // of the longest prefix nobody needs radial sums
            float* to = radials + k * prefixes.partials + index;
            if (holds_row<TILE>()) {
                if (index / (TILE / 2 / PARTS) % PARTS != part) continue;
                float all = 0;
                for (u32 warp_col = 0; warp_col < TILE / 32; ++warp_col) all += ld_shared_f32(R::of_rows(warp_col) + 4 * index);
                st_global_f32(to + block.row_partials + static_cast<u64>(at.col) * (block.row.tiles * TILE) + at.row * TILE, all);
            } else if (block.triangle == 0 || mirrored) { // on the diagonal, the sums of the rows stand for both
                to += block.col_partials + static_cast<u64>(at.row) * (block.col.tiles * TILE) + at.col * TILE;
                const float before = part > 0 ? ld_global_f32(to) : 0;
                st_global_f32(to, before + (ld_shared_f32(R::of_cols(0) + 4 * index) + ld_shared_f32(R::of_cols(1) + 4 * index)));
            }
        }
    }
    for (u32 bit = 1; bit < WARP; bit *= 2) dot += shfl_sync_bfly(ALL_LANES, dot, bit);
    const shared_address parts = shared_base() + Staging<TILE, A>::DOTS;
    if (lane_id() == 0) st_shared_f32(parts + 4 * warp_id(), dot);
    SYNC(G2, bar_sync());
    if (threadIdx.x != 0) return;
    double all = 0;
    for (u32 warp = 0; warp < Shape<TILE>::THREADS / WARP; ++warp) all += static_cast<double>(ld_shared_f32(parts + 4 * warp));
    st_global_f64(dots + blockIdx.x, all);
}

// Only the cosines distinguish f16x3 from f16x2 here, too.
#define GRADIENT_TILE_PREFIXES(name, TILE, arithmetic)                                                                                      \
    SHARED_BYTES(name, RadialSums<TILE, Arithmetic::arithmetic>::BYTES);                                                                        \
    KERNEL(name, Shape<TILE>::THREADS, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta,                     \
           const double* log_coefficients, const double* positive, const double* results, u32 row_count, unsigned char* gradients,          \
           u64 plane, double* dots, const u32* skipped, BY_VALUE(Cosines) cosines, BY_VALUE(Prefixes) prefixes, float* radials) {           \
        static_cast<void>(skipped);                                                                                                         \
        gradient_tile_prefixes<TILE, Arithmetic::arithmetic>(wave, towers, rows, beta, log_coefficients, positive, results, row_count,      \
                                                             gradients, plane, dots, cosines, prefixes, radials);                           \
    }
GRADIENT_TILE_PREFIXES(gradient_tile_prefixes_f16_64, 64, f16)
GRADIENT_TILE_PREFIXES(gradient_tile_prefixes_f16_128, 128, f16)
GRADIENT_TILE_PREFIXES(gradient_tile_prefixes_f16x2_64, 64, f16x2)
GRADIENT_TILE_PREFIXES(gradient_tile_prefixes_f16x2_128, 128, f16x2)
GRADIENT_TILE_PREFIXES(gradient_tile_prefixes_f32_64, 64, f32)
