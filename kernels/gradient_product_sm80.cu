// gradient_product_sm80.cu: sums of gradients of logits times embeddings; mma.sync.
// Math     sums[i] (+)= Σ_j ĝ_ij x_j over the super-blocks of the wave whose rows have index i, where x are packed rows. For an index of
//          the columns it is Σ_i ĝ_ij x_i. A super-block on the diagonal of a triangle is a whole symmetric matrix, whose rows are enough
// In/out   gradients of gradient_tile_sm80.cu, towers, skipped (skipping.cuh) · sums of either space, f32, row-major with a stride
// Tiles    one TILE x TILE tile of a sum per thread block, grid (blocks of rows of both spaces · tiles along d). The blocks of rows of a
//          space begin at its cuts, so that a super-block has all rows of a block or none. Along k the product visits runs of tiles that
//          are not skipped
// Threads  2·TILE; see product.cuh
// Shared   the stages of product.cuh
// Sync     P1, P2, P3 product.cuh
// Numerics f32 sums as in product.cuh. Each sum has one writer, and the super-blocks are added in the order of the wave, so that every run
//          gives the same bits
// Limits   the stride is even, and the sums are aligned to 8 bytes
#include "common/outputs.cuh"
#include "common/product.cuh"
#include "common/skipping.cuh"

// The first tile of a line, from `from` on, that is computed, or that is not. Gives `count` if there is none. All lanes of a warp call
// this.
SAMTONE_DEVICE u32 next_tile(const Line& line, u32 from, bool computed SAMTONE_SITE) {
    while (from < line.count) {
        u32 bits = computed_from(line, from SAMTONE_EMULATED_AS(, site));
        if (!computed) bits = ~bits;
        if (bits == 0) {
            from += WARP;
            continue;
        }
        for (; (bits & 1) == 0; bits >>= 1) ++from;
        break;
    }
    return from < line.count ? from : line.count;
}

template <u32 TILE, Arithmetic A> SAMTONE_DEVICE void gradient_product(const Wave& wave, const Towers& towers,
                                                                       const unsigned char* gradients, u64 plane, const Product& product,
                                                                       const u32* skipped) {
    begin_launch();
    constexpr u32 BYTES = Numbers<A>::BYTES, SEGMENTS = Numbers<A>::GRADIENT_SEGMENTS;
    // [1] which sums
    const Columns columns = columns_of<TILE>(product, blockIdx.x % product.tiles_along_dim);
    const OutputRows rows = rows_of<TILE>(product, blockIdx.x / product.tiles_along_dim);
    const Outputs& outputs = product.of[rows.space];
    const u32 space = rows.space, begin = rows.begin, end = rows.end, column = columns.begin;
    gradients += columns.prefix * product.prefix_gradients;

    // [2] multiply
    float total[Shape<TILE>::FRAGMENTS][4][4] = {};
    bool any = false;
    for (u32 b = 0; b < wave.count; ++b) {
        const SuperBlock& block = wave.blocks[b];
        const unsigned char* matrix = gradients + block.gradient * BYTES;
        const u64 row_bytes = static_cast<u64>(block.col.tiles) * TILE * BYTES;
        for (u32 side = 0; side < 2; ++side) {
            const Edge &edge = side == 0 ? block.row : block.col, &other = side == 0 ? block.col : block.row;
            if (edge.gradients == 0 || edge.space != space || begin < edge.begin || begin >= edge.end) continue;
            const Tower& tower = tower_of(towers, other.space);
            const u32 own = begin - edge.begin;
            const Line line = line_of(skipped, block, side, own / TILE, 1);
            for (u32 from = 0; from < line.count;) {
                u32 to = line.count;
                if (line.skipped != nullptr) {
                    from = next_tile(line, from, true);
                    if (from == to) break;
                    to = next_tile(line, from, false);
                }
                const u32 steps = (to - from) * TILE / Numbers<A>::DEPTH;
                const Source x = by_depth<TILE, A>(tower.packed, towers.row_bytes, tower.plane, other.packed + from * TILE, column * BYTES);
                if (side == 0)
                    multiply<TILE, A, SEGMENTS, Layout::rows, Layout::depth>(
                        total, by_rows<TILE>(matrix + from * (TILE * BYTES), row_bytes, plane, own), x, steps);
                else
                    multiply<TILE, A, SEGMENTS, Layout::depth, Layout::depth>(
                        total, by_depth<TILE, A>(matrix, row_bytes, plane, from * TILE, own * BYTES), x, steps);
                from = to;
            }
            any = true;
        }
    }
    if (product.accumulate != 0 && !any) return;

    // [3] store
    const u32 row0 = begin + warp_row<TILE>() + lane_id() / 4, column0 = column + warp_column<TILE>() + lane_id() % 4 * 2;
    UNROLL
    for (u32 i = 0; i < 2 * Shape<TILE>::FRAGMENTS; ++i) {
        const u32 row = row0 + 8 * i;
        if (row >= end) continue;
        float* to = outputs.sums + row * outputs.stride;
        UNROLL
        for (u32 j = 0; j < 4; ++j) {
            store_sums(product, to, column0 + 8 * j, columns.end, total[i / 2][j][i % 2 * 2], total[i / 2][j][i % 2 * 2 + 1]);
        }
    }
}

#define GRADIENT_PRODUCT(name, TILE, arithmetic)                                                                                \
    SHARED_BYTES(name, Shape<TILE>::STAGES* Shape<TILE>::STAGE);                                                                \
    KERNEL(name, Shape<TILE>::THREADS, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const unsigned char* gradients, u64 plane, \
           BY_VALUE(Product) product, const u32* skipped) {                                                                     \
        gradient_product<TILE, Arithmetic::arithmetic>(wave, towers, gradients, plane, product, skipped);                       \
    }
GRADIENT_PRODUCT(gradient_product_f16_64, 64, f16)
GRADIENT_PRODUCT(gradient_product_f16_128, 128, f16)
GRADIENT_PRODUCT(gradient_product_f16x2_64, 64, f16x2)
GRADIENT_PRODUCT(gradient_product_f16x2_128, 128, f16x2)
GRADIENT_PRODUCT(gradient_product_f16x3_64, 64, f16x3)
GRADIENT_PRODUCT(gradient_product_f16x3_128, 128, f16x3)
GRADIENT_PRODUCT(gradient_product_f32_64, 64, f32)
