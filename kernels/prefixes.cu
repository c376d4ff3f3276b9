// prefixes.cu: the O(M + N) steps that only calls with prefixes have.
// Math     join_prefixes  loss and row losses Σ_k v_k·(those of prefix k), SHIFT of the whole gradient, metrics of the longest prefix.
//                         F_i^s = Σ_{k≥s} D_i^k / (‖q_i^k‖ ‖p_π(i)^k‖): what a column of segment s gets from the positive of row i.
//                         What a positive adds to the radial parts of its two embeddings beside their Σ G (s − s⁺): src/combine.rs, `radial`
//          merge_radials  ρ of each index over its negatives: sums of the radial sums of gradient_tile_*.cu over tiles and super-blocks
//          join_radials   R_x^s = Σ_{k≥s} ρ_x^k / ‖x^k‖² over the prefixes but the longest, where ρ_x^k adds up those of all indices of x,
//                         and of all positives that x belongs to (docs/loss.md, "Prefixes")
// In/out   what combine.cu left of each prefix · row losses, results and status of the call, F, radial parts. D, radial parts and F are
//          times v_k
// Tiles    join_prefixes: grid (⌈rows / 256⌉). merge_radials: grid (⌈indices of both spaces / 256⌉, prefixes − 1). join_radials: grid
//          (⌈output rows of both spaces / 256⌉)
// Threads  256: one row, index or output row each. One thread makes the results
// Shared   none
// Sync     none
// Numerics f64 in one fixed order. Radial sums of tiles are f32. They cancel where all cosines are close, and so s⁺ is subtracted first
// Limits   none
#include "common/logarithms.cuh"
#include "common/reduce.cuh"

// Arrays of all prefixes have one prefix after the other.
ABI_STRUCT(Join, {
    const ExpSum* sums;
    const double *log_coefficients, *diagonal, *positive, *prefix_row_losses, *prefix_weights;
    const double* inverse_norm[2]; // of each space, [prefix][index]
    const u32* anchor_index;       // the index in the space of the passages of each row's positive; null for the identity
    double *row_losses, *factors;
    double* positive_radials[2]; // of the query and of the passage of each positive pair, [prefix][row]
    double* results;             // those of the call. Those of the prefixes follow
    u32* status;                 // likewise
});

SAMTONE_DEVICE void join_results(const Join& j, u32 prefixes) {
    double loss = 0, largest = minus_infinity(), shares = 0;
    for (u32 k = 0; k < prefixes; ++k) {
        const double* of_prefix = j.results + (1 + k) * RESULTS;
        loss = fma_rn(ld_global_nc_f64(j.prefix_weights + k), ld_global_f64(of_prefix + LOSS), loss);
        largest = Largest::of(ld_global_f64(of_prefix + LARGEST), largest);
    }
    for (u32 k = 0; k < prefixes; ++k)
        if (largest != minus_infinity()) shares += exp_f64(ld_global_f64(j.results + (1 + k) * RESULTS + LARGEST) - largest);
    const double share = largest == minus_infinity() ? largest : largest + log_f64(shares);
    st_global_f64(j.results + LOSS, loss);
    for (u32 metric = PRECISION_QP; metric <= MRR_PQ; ++metric)
        st_global_f64(j.results + metric, ld_global_f64(j.results + prefixes * RESULTS + metric));
    st_global_f64(j.results + SHIFT, shift_of(share));
    st_global_f64(j.results + LARGEST, share);
    // Faults of embeddings are the same for all prefixes. Of rows without negatives, those of the shortest prefix that has one are named.
    for (u32 word = 0; word < STATUS_WORDS; ++word) {
        u32 first = NONE;
        for (u32 k = prefixes; k-- > 0;) {
            const u32* of_prefix = j.status + (1 + k) * STATUS_WORDS;
            const bool counts = word < NO_NEGATIVE || ld_global_u32(of_prefix + NO_NEGATIVE) != NONE;
            if (counts) first = ld_global_u32(of_prefix + word);
        }
        st_global_u32(j.status + word, first);
    }
}

KERNEL(join_prefixes, REDUCE_THREADS, BY_VALUE(Join) j, BY_VALUE(Prefixes) prefixes) {
    begin_launch();
    if (blockIdx.x == 0 && threadIdx.x == 0) join_results(j, prefixes.count);
    const u32 row = blockIdx.x * REDUCE_THREADS + threadIdx.x;
    if (row >= prefixes.rows) return;
    const u32 index = j.anchor_index != nullptr ? ld_global_nc_u32(j.anchor_index + row) : row;
    double loss = 0, factor = 0;
    for (u32 k = prefixes.count; k-- > 0;) {
        const u64 at = static_cast<u64>(k) * prefixes.rows + row;
        loss = fma_rn(ld_global_nc_f64(j.prefix_weights + k), ld_global_f64(j.prefix_row_losses + at), loss);
        const double query = ld_global_f64(j.inverse_norm[0] + static_cast<u64>(k) * prefixes.indices[0] + row);
        const double passage = ld_global_f64(j.inverse_norm[1] + static_cast<u64>(k) * prefixes.indices[1] + index);
        factor = fma_rn(ld_global_f64(j.diagonal + at), query * passage, factor);
        st_global_f64(j.factors + at, factor);
        if (k + 1 == prefixes.count) continue;
        double share[BLOCKS]; // of each block in the gradient of the row
        UNROLL
        for (u32 b = 0; b < BLOCKS; ++b) {
            const u64 of_block = (static_cast<u64>(k) * BLOCKS + b) * prefixes.rows + row;
            share[b] = exp_f64(ld_global_f64(j.log_coefficients + of_block) + ln_of(ld_global_exp_sum(j.sums + of_block)));
        }
        const double positive = ld_global_f64(j.positive + at);
        st_global_f64(j.positive_radials[0] + at, -(share[PQ] + share[PP]) * positive);
        st_global_f64(j.positive_radials[1] + at, -(share[QP] + share[QQ]) * positive);
    }
    st_global_f64(j.row_losses + row, loss);
}

ABI_STRUCT(Radials, {
    const float* partials; // of the wave, in the places of the partial sums (problem.cuh)
    double* sums[2];       // of each space, [prefix][index]; null where nobody wants its gradients
    u32 tile;
    u32 first; // starts from nothing, instead of adding to what is there
});

KERNEL(merge_radials, REDUCE_THREADS, BY_VALUE(Wave) wave, BY_VALUE(Radials) r, BY_VALUE(Prefixes) prefixes) {
    begin_launch();
    u32 index = blockIdx.x * REDUCE_THREADS + threadIdx.x;
    const u32 space = index < prefixes.indices[0] ? 0 : 1;
    if (space == 1) index -= prefixes.indices[0];
    if (index >= prefixes.indices[space] || r.sums[space] == nullptr) return;
    const float* partials = r.partials + blockIdx.y * prefixes.partials;
    double* to = r.sums[space] + static_cast<u64>(blockIdx.y) * prefixes.indices[space] + index;
    double all = r.first != 0 ? 0 : ld_global_f64(to);
    for (u32 b = 0; b < wave.count; ++b) {
        const SuperBlock& s = wave.blocks[b];
        for (u32 side = 0; side < 2; ++side) {
            const Edge &edge = side == 0 ? s.row : s.col, &other = side == 0 ? s.col : s.row;
            // The products of a triangle are those of its rows with the whole square.
            const bool wanted = s.triangle != 0 ? s.row.gradients != 0 : edge.gradients != 0;
            if (!wanted || edge.space != space || index < edge.begin || index >= edge.end) continue;
            const u32 local = index - edge.begin;
            // In a triangle, the tiles right of the diagonal have sums of rows, and the tiles above it sums of columns.
            const u32 begin = s.triangle != 0 && side == 0 ? local / r.tile : 0;
            const u32 end = s.triangle != 0 && side == 1 ? local / r.tile : other.tiles;
            const float* first = partials + (side == 0 ? s.row_partials : s.col_partials) + local;
            for (u32 t = begin; t < end; ++t) all += static_cast<double>(ld_global_f32(first + static_cast<u64>(t) * (edge.tiles * r.tile)));
        }
    }
    st_global_f64(to, all);
}

ABI_STRUCT(JoinRadials, {
    const double* sums[2];             // of `merge_radials`
    const double* positive_radials[2]; // of `join_prefixes`
    const double* inverse_norm[2];
    double* radials[2]; // R, [prefix][output row]
    const double* results;
    const u32 *occurrence_start, *occurrences, *anchor_row; // as in projection.cuh
    u32 rows[2];                                            // of the outputs
    u32 row_begin, row_end;                                 // the rows of the shard, which are the output rows of the queries
});

KERNEL(join_radials, REDUCE_THREADS, BY_VALUE(JoinRadials) j, BY_VALUE(Prefixes) prefixes) {
    begin_launch();
    u32 out_row = blockIdx.x * REDUCE_THREADS + threadIdx.x;
    const u32 space = out_row < j.rows[0] ? 0 : 1;
    if (space == 1) out_row -= j.rows[0];
    if (out_row >= j.rows[space]) return;
    const u32 row = space == 0 ? j.row_begin + out_row : out_row, indices = prefixes.indices[space];
    const bool listed = space == 1 && j.occurrence_start != nullptr;
    u32 first = row, last = row + 1;
    if (listed) {
        first = ld_global_nc_u32(j.occurrence_start + row);
        last = ld_global_nc_u32(j.occurrence_start + row + 1);
    }
    const double unit = exp2_f64(ld_global_f64(j.results + SHIFT));
    double all = 0;
    for (u32 k = prefixes.count - 1; k-- > 0;) {
        double radial = 0;
        u32 index = row;
        for (u32 occurrence = first; occurrence < last; ++occurrence) {
            index = listed ? ld_global_nc_u32(j.occurrences + occurrence) : occurrence;
            radial = fma_rn(unit, ld_global_f64(j.sums[space] + static_cast<u64>(k) * indices + index), radial);
            const u32 anchored = space == 0 ? row : ld_global_nc_u32(j.anchor_row + index);
            if (anchored >= j.row_begin && anchored < j.row_end) // not if it is NONE
                radial += ld_global_f64(j.positive_radials[space] + static_cast<u64>(k) * prefixes.rows + anchored);
        }
        const double inverse = ld_global_f64(j.inverse_norm[space] + static_cast<u64>(k) * indices + index);
        all = fma_rn(radial, inverse * inverse, all);
        st_global_f64(j.radials[space] + static_cast<u64>(k) * j.rows[space] + out_row, all);
    }
}
