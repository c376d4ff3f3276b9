// logsumexp_sm90a.cu: sums of exponentials of the rows and columns of tiles of cosines, and ranks; wgmma.
// Math     as logsumexp_sm80.cu; reference.rs: `Negatives::kept`
// In/out   as logsumexp_sm80.cu, with packed embeddings in panels. Tiles are 128 x 128, and both axes of a super-block have an even number
//          of them. The cosines of a tile below the diagonal of a triangle are not stored
// Tiles    a cluster visits squares of 256 x 256 in turn, and each of its thread blocks two tiles of a square: grid (2·clusters) for any
//          number of clusters
// Threads  384; see pipeline.cuh. Warps 1..3 load the entries
// Shared   the slots and mbarriers of pipeline.cuh. Then, from EDGES on
//            0              entries (pipeline.cuh). This pass adds s⁺ with slack
//            COLUMNS        [half][warp of 8][128] sums of the columns, f32; then as many words: exponent · 32 + count
// Sync     P1 … P5, E1, E2, E3 pipeline.cuh
//          L1 every warp's sums of the columns are written before they are added up
//          L2 they have been added up before those of the next square are written
// Numerics Cosines and exponentials are f32. Exponents are whole numbers. One exponential, under the exponent of the warp's largest cosine,
//          serves rows and columns. If that leaves a row or column with less than 2^-95, terms of it may be lost. Then the warp takes
//          each row and column of its part with the exponent of its own largest term. Every run gives the same bits: the order is
//          fixed, and there are no atomics
// Limits   as logsumexp_sm80.cu
#include "common/sums_sm90a.cuh"

using Whole = Memory<4, EDGES_BYTES + 16>;

template <Arithmetic A> SAMTONE_DEVICE void logsumexp(const Wave& wave, const Towers& towers, const AnchorKeys* rows, Beta beta,
                                                      Partial* partials, u32* counts, const Cosines& cosines) {
    begin_launch();
    Edges edges{shared_base() + Whole::EDGES, 0};
    start_pipeline<Whole::Slots>([&] { make_edges(edges); });
    Whole::Slots ring{0, 0};
    const u32 squares = squares_of(wave);
    if (warpgroup_id() == 0) {
        // [1] load
        setmaxnreg_dec<COPY_REGISTERS>();
        auto copy = [&](const SuperBlock& block, const TilePlace& at) { copy_square<A>(ring, block, at, towers, 0, towers.row_bytes); };
        load_squares(
            edges, wave, towers, rows, copy,
            [&](float(&numbers)[3], const EdgeEntry& entry, const Edge&) {
                numbers[0] = numbers[1] = numbers[2] = 0;
                if (entry.anchor.z != NONE) numbers[0] = float_of(ld_global_u32(reinterpret_cast<const u32*>(rows + entry.row) + 3));
            },
            [](const TilePlace&) { return false; });
    } else {
        setmaxnreg_inc<MULTIPLY_REGISTERS>();
        for (u32 k = cluster_id(); k < squares; k += clusters()) {
            const TilePlace at = square_of(wave, k);
            const SuperBlock& block = wave.blocks[at.block];
            HalfSums x[2] = {};
            multiply_cosines<A>(x, ring, Numbers<A>::COSINE_SEGMENTS * (towers.row_bytes / 128));
            wait_edges(edges);
            SYNC(L2, bar_sync_named(1, CONSUMERS));
            KEEP_LOOP // the second half moves to where the first was, so that one copy of the code serves both
            for (u32 half = 0; half < 2; ++half) {
                if (half == 1) move_half(x);
                if (is_mirrored(block, at, half)) continue;
                // [2] scale
                scale_half(x[0], edges, half);
                if (cosines.first[at.block] != NOT_KEPT) keep(x[0], kept_tile(cosines, block, at, half));
                sum_and_store_rows(x[0], shared_base() + Whole::COLUMNS, block, at, half, towers, edges, beta, partials, counts);
            }
            release_edges(edges);
            SYNC(L1, bar_sync_named(1, CONSUMERS));
            store_columns(shared_base() + Whole::COLUMNS, block, at, partials, counts);
        }
    }
    end_pipeline();
}

#define LOGSUMEXP(name, arithmetic)                                                                                                  \
    SHARED_BYTES(name, Whole::BYTES);                                                                                                \
    KERNEL_CLUSTER(name, PIPELINE_THREADS, CLUSTER, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const AnchorKeys* rows, Beta beta, \
                   Partial* partials, u32* counts, BY_VALUE(Cosines) cosines) {                                                      \
        logsumexp<Arithmetic::arithmetic>(wave, towers, rows, beta, partials, counts, cosines);                                      \
    }
LOGSUMEXP(logsumexp_f16_sm90a, f16)
LOGSUMEXP(logsumexp_f16x3_sm90a, f16x3)
