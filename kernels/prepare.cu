// prepare.cu: makes what the heavy passes read: packed embeddings, norms, cosines of the positives, keys of the anchors.
// Math     n = ‖x‖ (f64); packed = x·2^e with norm in [2^12, 2^13), as f16, two f16 or f32; inverse = 2^12/‖packed‖
//          s⁺ᵢ = q̂ᵢ·p̂_{π(i)} from the raw embeddings, in f64; thresholds of margin and rank
// In/out   raw embeddings of f32, f16 or bf16 with any row stride; order: the row behind each index, null for the identity · packed
//          rows with zeros up to 128 bytes, in either layout of problem.cuh; norms; faults of each index; anchor keys; 0 in the ticket
//          of combine.cu. If a backward call packs again: in the status, rows whose norm is not that of the forward call
// Tiles    grid (⌈rows of the packed queries / 8⌉ + ⌈rows of the packed passages / 8⌉)
// Threads  256: one warp per index. The warp of a query also reads its positive
// Shared   none
// Sync     none but exchanges within a warp
// Numerics f64 sums over lanes in a fixed order. A passage has the same norm wherever it is computed. A power of two changes no digit. f16
//          loses what lies 2^-37 below the norm of a row, which is far below the last bit of an f32 cosine. That holds for bf16 inputs
//          as well, so that they need no kernels of their own. A row that is not finite or has norm zero packs as zeros and leaves its
//          number among the faults. combine.cu makes the status of the faults, so that nothing has to be cleared before this launch
// Limits   raw rows are aligned to their elements
#include "common/packing.cuh"

KERNEL(prepare, REDUCE_THREADS, BY_VALUE(Prepare) all) {
    begin_launch();
    const Positives& positives = all.positives;
    if (blockIdx.x == 0 && threadIdx.x == 0) st_global_u32(positives.ticket, 0);
    const PackedRow at = packed_row_of(all);
    const Packing& p = all.of[at.space];
    const u32 space = at.space, index = at.index, row = at.row;
    const bool exists = at.exists, aligned = is_aligned(p.raw);
    const unsigned char* x = p.raw.data + row * p.raw.row_bytes;
    double scale = 0;
    if (exists) { // [1] norm, and of a query the cosine with its positive
        const bool pairs = space == 0 && positives.wanted != 0;
        const Raw& other = all.of[1].raw;
        const bool other_aligned = is_aligned(other);
        u32 positive = row;
        if (pairs && positives.positives != nullptr) positive = ld_global_nc_u32(positives.positives + row);
        const unsigned char* y = other.data + positive * other.row_bytes;
        double squares = 0, other_squares = 0, dot = 0;
        for (u32 column = 8 * lane_id(); column < p.raw.dim; column += 8 * WARP) {
            float v[8], w[8];
            load_eight(v, p.raw, x, column, aligned);
            if (pairs) load_eight(w, other, y, column, other_aligned);
            add_squares(squares, v);
            if (!pairs) continue;
            add_squares(other_squares, w);
            UNROLL
            for (u32 i = 0; i < 8; ++i) dot = fma_rn(static_cast<double>(v[i]), static_cast<double>(w[i]), dot);
        }
        squares = reduce_warp<Sum>(squares);
        const Norm norm = norm_of(squares);
        double inverse = 0;
        if (norm.norm > 0) {
            scale = power_of_two(power_for(norm.norm));
            inverse = 4096 / (norm.norm * scale);
        }
        if (lane_id() == 0) {
            st_global_f32(p.inverse + index, static_cast<float>(inverse));
            if (positives.wanted != 0) {
                st_global_u32x2(p.faults + index, {norm.finite ? NONE : row, squares == 0 ? row : NONE});
                st_global_f64(p.inverse_norm + index, norm.inverse);
            } else if (norm.inverse != ld_global_f64(p.inverse_norm + index) || !norm.finite) {
                // The status gets the lowest row, in whichever order they come.
                atom_global_min_u32(positives.status + (norm.finite ? REPACKED_QUERY : NON_FINITE_QUERY) + space, row);
            }
        }
        if (pairs) {
            other_squares = reduce_warp<Sum>(other_squares);
            dot = reduce_warp<Sum>(dot);
            if (lane_id() == 0) store_anchor(positives, row, row, dot * norm.inverse * norm_of(other_squares).inverse);
        }
    }
    // [2] pack
    const PackedAt out = packed_at(p, at.packed);
    const u32 columns = p.row_bytes / (p.format == PACK_F32 ? 4 : 2);
    for (u32 column = 8 * lane_id(); column < columns; column += 8 * WARP) {
        float v[8];
        UNROLL
        for (u32 i = 0; i < 8; ++i) v[i] = 0;
        if (scale > 0) load_eight(v, p.raw, x, column, aligned);
        UNROLL
        for (u32 i = 0; i < 8; ++i) v[i] = static_cast<float>(v[i] * scale); // in f64, because the power alone may exceed f32
        pack_eight(p, out, column, v);
    }
}
