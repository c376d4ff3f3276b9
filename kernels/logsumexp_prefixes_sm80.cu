// logsumexp_prefixes_sm80.cu: logsumexp_sm80.cu for calls with prefixes.
// Math     as logsumexp_sm80.cu, for one prefix after the other. Products run on from segment to segment
// In/out   as logsumexp_sm80.cu. Anchor keys, partial sums, counts and cosines have a part for each prefix. Without partial sums, cosines
//          alone are stored
// Tiles    as logsumexp_sm80.cu
// Threads  2·TILE; see product.cuh
// Shared   as logsumexp_sm80.cu. The entries also have `Scales::next`
// Sync     P1, P2, P3 product.cuh; E1 epilogue.cuh; L1 logsumexp_sm80.cu
//          L2 all threads have read entries and sums of a prefix before the stages of the next segment take their place
// Numerics as logsumexp_sm80.cu. Before the next segment is added, products are made of the cosines again, because there are no registers
//          for both. That rounds four times
// Limits   as logsumexp_sm80.cu
#include "common/sums_sm80.cuh"

constexpr u32 NEXT = 36; // where an entry has `Scales::next`

template <u32 TILE, Arithmetic A>
SAMTONE_DEVICE void logsumexp_prefixes(const Wave& wave, const Towers& towers, const AnchorKeys* rows, Beta beta, Partial* partials,
                                       u32* counts, const Cosines& cosines, const Prefixes& prefixes) {
    begin_launch();
    const TilePlace at = place_of(wave, blockIdx.x);
    const SuperBlock& block = wave.blocks[at.block];
    const Tower &left = tower_of(towers, block.row.space), &right = tower_of(towers, block.col.space);
    float x[Shape<TILE>::FRAGMENTS][4][4] = {};
    u32 begin = 0;
    KEEP_LOOP
    for (u32 k = 0; k < prefixes.count; ++k) {
        // [1] load
        Scales scales;
        const EdgeEntry edge = load_edge_of_prefix<TILE>(scales, block, at, towers, rows, prefixes, k);
        float bar = 0;
        if (edge.anchor.z != NONE) {
            const AnchorKeys* keys = rows + static_cast<u64>(k) * prefixes.rows + edge.row;
            bar = float_of(ld_global_u32(reinterpret_cast<const u32*>(keys) + 3));
        }
        const u32 end = ld_global_nc_u32(prefixes.segments + k);
        multiply<TILE, A, Numbers<A>::COSINE_SEGMENTS, Layout::rows, Layout::rows>(
            x, by_rows<TILE>(left.packed + begin, towers.row_bytes, left.plane, block.row.packed + at.row * TILE),
            by_rows<TILE>(right.packed + begin, towers.row_bytes, right.plane, block.col.packed + at.col * TILE), (end - begin) / 128);
        begin = end;

        // [2] scale, [3] mask
        store_edge<TILE>(shared_base(), edge, {bits_of(bar), bits_of(scales.next), 0, 0});
        SYNC(E1, bar_sync());
        const Elements<TILE> elements = Elements<TILE>::of_this_thread();
        const bool sums = partials != nullptr; // without sums no mask is needed
        const Kept kept = scale_and_mask<TILE, false>(x, elements, shared_base(),
                                                      sums ? mask_of<TILE>(block, at, towers) : TileMask{false, false, false, TILE, TILE});
        if (cosines.first[at.block] != NOT_KEPT)
            keep<TILE>(x, kept_square(cosines, block, at.block, at.row, at.col, 1, TILE * TILE) + k * prefixes.cosines);
        if (sums) store_sums<TILE>(x, kept, block, at, beta, partials + k * prefixes.partials, counts + k * prefixes.partials);
        // Makes of the cosines what the products of the next segment are added to.
        if (k + 1 < prefixes.count) multiply_by_entries(x, elements, NEXT);
        SYNC(L2, bar_sync());
    }
}

#define LOGSUMEXP_PREFIXES(name, TILE, arithmetic)                                                                                         \
    SHARED_BYTES(name, Shape<TILE>::STAGES* Shape<TILE>::STAGE);                                                                           \
    KERNEL(name, Shape<TILE>::THREADS, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta, Partial* partials, \
           u32* counts, BY_VALUE(Cosines) cosines, BY_VALUE(Prefixes) prefixes) {                                                          \
        logsumexp_prefixes<TILE, Arithmetic::arithmetic>(wave, towers, rows, beta, partials, counts, cosines, prefixes);                   \
    }
LOGSUMEXP_PREFIXES(logsumexp_prefixes_f16_64, 64, f16)
LOGSUMEXP_PREFIXES(logsumexp_prefixes_f16_128, 128, f16)
LOGSUMEXP_PREFIXES(logsumexp_prefixes_f16x3_64, 64, f16x3)
LOGSUMEXP_PREFIXES(logsumexp_prefixes_f16x3_128, 128, f16x3)
LOGSUMEXP_PREFIXES(logsumexp_prefixes_f32_64, 64, f32)
