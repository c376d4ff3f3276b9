// logsumexp_prefixes_sm90a.cu: logsumexp_sm90a.cu for calls with prefixes.
// Math     as logsumexp_prefixes_sm80.cu
// In/out   as logsumexp_prefixes_sm80.cu, with packed embeddings in panels; the rest as logsumexp_sm90a.cu
// Tiles    as logsumexp_sm90a.cu. The products of a square stop at the end of every segment, and its sums are taken there
// Threads  384; see pipeline.cuh. Warps 1..3 load the entries
// Shared   as logsumexp_sm90a.cu with one slot less, and with two sets of entries, which serve in turn. They also have `Scales::next`
// Sync     P1 … P5, E1, E2, E3 pipeline.cuh; L1, L2 logsumexp_sm90a.cu, for one prefix after the other
// Numerics as logsumexp_sm90a.cu. Before the next segment is added, products are made of the cosines again, because there are no registers
//          for both. That rounds four times
// Limits   as logsumexp_sm80.cu
#include "common/sums_sm90a.cuh"

using InTurn = Memory<3, 2 * EDGES_IN_TURN_BYTES>;

// The same for every prefix of the embeddings. After the sums of one prefix its cosines become products again, in the units of the next
// segment, whose products are added to them.
template <Arithmetic A> SAMTONE_DEVICE void logsumexp_prefixes(const Wave& wave, const Towers& towers, const AnchorKeys* rows, Beta beta,
                                                               Partial* partials, u32* counts, const Cosines& cosines,
                                                               const Prefixes& prefixes) {
    begin_launch();
    EdgesInTurn in_turn{shared_base() + InTurn::EDGES, 0};
    start_pipeline<InTurn::Slots>([&] { make_edges(in_turn); });
    InTurn::Slots ring{0, 0};
    const bool sums = partials != nullptr;
    if (warpgroup_id() == 0) {
        // [1] load
        setmaxnreg_dec<COPY_REGISTERS>();
        load_squares(
            wave,
            [&](const SuperBlock& block, const TilePlace& at) {
                u32 begin = 0;
                for (u32 prefix = 0; prefix < prefixes.count; ++prefix) {
                    const u32 end = ld_global_nc_u32(prefixes.segments + prefix);
                    copy_square<A>(ring, block, at, towers, begin, end);
                    begin = end;
                }
            },
            [&](const SuperBlock& block, const TilePlace& at) {
                for (u32 prefix = 0; prefix < prefixes.count; ++prefix) {
                    const AnchorKeys* of_prefix = sums ? rows + static_cast<u64>(prefix) * prefixes.rows : nullptr;
                    load_edges<PAIR>(in_turn, block, at, towers, of_prefix, prefixes, prefix,
                                     [](float(&numbers)[3], const PrefixEntry& entry, const Edge&) {
                                         numbers[0] = entry.bar;
                                         numbers[1] = numbers[2] = 0;
                                         return entry.scales.next;
                                     });
                }
            });
    } else {
        setmaxnreg_inc<MULTIPLY_REGISTERS>();
        const u32 squares = squares_of(wave);
        for (u32 k = cluster_id(); k < squares; k += clusters()) {
            const TilePlace place = square_of(wave, k);
            HalfSums x[2] = {};
            KEEP_LOOP
            for (u32 prefix = 0; prefix < prefixes.count; ++prefix) {
                const u32 begin = prefix == 0 ? 0 : ld_global_nc_u32(prefixes.segments + prefix - 1);
                const u32 end = ld_global_nc_u32(prefixes.segments + prefix);
                multiply_cosines<A>(x, ring, Numbers<A>::COSINE_SEGMENTS * ((end - begin) / 128), prefix % 2);
                wait_edges(in_turn.set());
                if (sums) SYNC(L2, bar_sync_named(1, CONSUMERS));
                KEEP_LOOP // the halves change places once in every prefix, so that one copy of the code serves both
                for (u32 turn = 0; turn < 2; ++turn) {
                    if (turn == 1) {
                        exchange_halves(x);
                        hold(x[0]); // makes a branch of this. Else both turns would take selects
                    }
                    const u32 half = only_here(prefix) % 2 ^ turn;
                    const TilePlace at{only_here(place.block), only_here(place.row), only_here(place.col)};
                    const SuperBlock& block = wave.blocks[at.block];
                    if (is_mirrored(block, at, half)) continue;
                    const Edges edges{only_here(in_turn.set().at), 0};
                    const u32 plane = only_here(prefix);
                    // [2] scale
                    scale_half(x[0], edges, half);
                    if (cosines.first[at.block] != NOT_KEPT) keep(x[0], kept_tile(cosines, block, at, half) + plane * prefixes.cosines);
                    if (sums)
                        sum_and_store_rows(x[0], shared_base() + InTurn::COLUMNS, block, at, half, towers, edges, beta,
                                           partials + plane * prefixes.partials, counts + plane * prefixes.partials);
                    if (prefix + 1 < prefixes.count) change_units(x[0], edges, half);
                }
                release_edges(in_turn);
                if (sums) {
                    SYNC(L1, bar_sync_named(1, CONSUMERS));
                    const TilePlace at{only_here(place.block), only_here(place.row), only_here(place.col)};
                    const u64 plane = prefix * prefixes.partials;
                    store_columns(shared_base() + InTurn::COLUMNS, wave.blocks[at.block], at, partials + plane, counts + plane);
                }
            }
        }
    }
    end_pipeline();
}

#define LOGSUMEXP_PREFIXES(name, arithmetic)                                                                                         \
    SHARED_BYTES(name, InTurn::BYTES);                                                                                               \
    KERNEL_CLUSTER(name, PIPELINE_THREADS, CLUSTER, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta, \
                   Partial* partials, u32* counts, BY_VALUE(Cosines) cosines, BY_VALUE(Prefixes) prefixes) {                         \
        logsumexp_prefixes<Arithmetic::arithmetic>(wave, towers, rows, beta, partials, counts, cosines, prefixes);                   \
    }
LOGSUMEXP_PREFIXES(logsumexp_prefixes_f16_sm90a, f16)
LOGSUMEXP_PREFIXES(logsumexp_prefixes_f16x3_sm90a, f16x3)
