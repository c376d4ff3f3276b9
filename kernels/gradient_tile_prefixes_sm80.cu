// gradient_tile_prefixes_sm80.cu: gradient_tile_sm80.cu for calls with prefixes.
// Math     ĝ of a prefix as in gradient_tile_sm80.cu. What is stored for a prefix is its own ĝ and those of all longer ones, because its
//          columns are theirs, too, in units of its segment. dots: as gradient_tile_sm80.cu, over all prefixes. radials: of each prefix
//          but the longest, Σ_j g_r (s − s⁺_r) + g_c s along a row and Σ_i g_c (s − s⁺_c) + g_r s down a column, where g_r is the part of
//          the row's anchor and g_c that of the column's
// In/out   stored cosines of each prefix, from the longest on; the rest as gradient_tile_sm80.cu, with a part for each prefix · radials: an
//          f32 for each index and tile, which lie as the sums of logsumexp_prefixes_sm80.cu do
// Tiles    as gradient_tile_sm80.cu. No tile is skipped
// Threads  2·TILE; see product.cuh. With tiles of 128, a thread takes its row slots in two parts
// Shared     0           entries, as gradient_tile_sm80.cu. They also have `Scales::step`
//            96·TILE     the tile and the dots, as gradient_tile_sm80.cu
//            then        radial sums of the warps: see `RadialSums`
// Sync     E1 epilogue.cuh. It also lets the next tile be staged
//          G1 the whole tile and all radial sums are written before they are read. It also lets the next entries be stored
//          G2 all dots are written before they are read
// Numerics as gradient_tile_sm80.cu. The sum over prefixes goes on in f32, and is rounded where it is stored
// Limits   as logsumexp_sm80.cu
#include "common/gradients_sm80.cuh"

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
