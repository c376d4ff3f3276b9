// gradient_product_sm90a.cu: sums of gradients of logits times embeddings; wgmma.
// Math     as gradient_product_sm80.cu
// In/out   gradients of gradient_tile_sm90a.cu, towers in panels, skipped (skipping.cuh) · sums as gradient_product_sm80.cu
// Tiles    a cluster visits squares of 256 rows x 256 columns of the sums in turn, and each of its thread blocks 128 of the rows: grid
//          (2·clusters) for any number of clusters. The blocks of rows of a part (common/outputs.cuh) have 256 rows. Along k the product
//          visits the squares that are not skipped. A square of sums that has at most 128 columns is computed as one half
// Threads  384; see pipeline.cuh
// Shared   the slots and mbarriers of pipeline.cuh. Where k runs along a row of the gradients, A is 128 rows of one panel. Where k runs
//          down their columns, A is 64 rows of two panels. B is 64 rows of four panels of the embeddings
// Sync     P1 … P5 pipeline.cuh
// Numerics f32 sums in tensor cores over all k of the wave, which cut (kernels/README.md). A cut loses less than 2^-20 of the sum, at
//          every 16 of k. In the mean over 16,384 terms that is 1.1e-4 if all have one sign, and 2e-5 if they cancel. In split f32 tensor
//          cores add up 16 terms, which are then added with rounding to nearest. Each sum has one writer, and the super-blocks are added
//          in the order of the wave, so that every run gives the same bits
// Limits   as gradient_product_sm80.cu
#include "common/outputs.cuh"
#include "common/pipeline.cuh"
#include "common/skipping.cuh"

constexpr u32 STAGES = 4;
static_assert(Ring<STAGES>::END <= 227 << 10, "the memory of a multiprocessor");

// A square of sums.
struct Square {
    OutputRows rows; // those of the cluster
    Columns columns;
};
SAMTONE_DEVICE Square square_of(const Product& product, u32 k) {
    return {rows_of<PAIR>(product, k / product.tiles_along_dim), columns_of<PAIR>(product, k % product.tiles_along_dim)};
}
// Whether there are columns of the first half only.
SAMTONE_DEVICE bool is_narrow(const Columns& columns) { return columns.end <= columns.begin + HALF; }

// Calls `visit(super-block, side)` for every matrix of the wave that adds to these rows, in order. For side 0 they are rows of the matrix.
template <class Visit> SAMTONE_DEVICE void for_each_matrix(const Wave& wave, const OutputRows& rows, Visit visit) {
    for (u32 b = 0; b < wave.count; ++b) {
        const SuperBlock& block = wave.blocks[b];
        for (u32 side = 0; side < 2; ++side) {
            const Edge& edge = side == 0 ? block.row : block.col;
            if (edge.gradients != 0 && edge.space == rows.space && rows.begin >= edge.begin && rows.begin < edge.end) visit(block, side);
        }
    }
}

// The squares of a matrix that a square of sums meets along k.
SAMTONE_DEVICE Line line_along(const u32* skipped, const SuperBlock& block, u32 side, const Square& square) {
    const Edge& edge = side == 0 ? block.row : block.col;
    return line_of(skipped, block, side, (square.rows.begin - edge.begin) / PAIR, 2);
}
constexpr u32 SLOTS_OF_SQUARE = PAIR / 64; // how many slots k takes in a square

// The warp that copies calls this, and one lane of it copies. The segments of planes are lo·x and hi·x, in split f32 lo·hi, hi·lo and
// hi·hi.
template <Arithmetic A> SAMTONE_DEVICE void copy_matrix(Ring<STAGES>& ring, const SuperBlock& block, u32 side, const Square& square,
                                                        const Towers& towers, const unsigned char* gradients, u64 plane,
                                                        const u32* skipped) {
    constexpr u32 SEGMENTS = Numbers<A>::GRADIENT_SEGMENTS;
    const Edge &edge = side == 0 ? block.row : block.col, &other = side == 0 ? block.col : block.row;
    const Tower& tower = tower_of(towers, other.space);
    const u64 panel = static_cast<u64>(block.row.tiles) * HALF * 128;
    const u32 row = square.rows.begin - edge.begin + cluster_rank() * HALF; // the first row of this block, along the axis
    const unsigned char* a_start = gradients + block.gradient * 2 + (side == 0 ? row * 128ull : row / 64 * panel);
    const u64 a_step = side == 0 ? panel : 64 * 128;
    // Beyond the last panel of the segment, the last one is copied again. It makes columns of sums that are not stored.
    const u32 last = (square.columns.end - 1) / 64, first = square.columns.begin / 64 + 2 * cluster_rank();
    const u32 panels[2] = {first < last ? first : last, first + 1 < last ? first + 1 : last};
    const u32 half = cluster_rank() * (B_BYTES / 2);
    const Line line = line_along(skipped, block, side, square);
    for (u32 segment = 0; segment < SEGMENTS; ++segment) {
        const unsigned char* a_segment = a_start + (SEGMENTS > 1 && segment == 0 ? plane : 0);
        const unsigned char* b_segment =
            tower.packed + static_cast<u64>(other.packed) * 128 + (SEGMENTS == 3 && segment == 1 ? tower.plane : 0);
        for (u32 from = 0; from < line.count; from += WARP) {
            u32 bits = computed_from(line, from);
            if (lane_id() != 0) continue;
            for (u32 at = from; bits != 0; bits >>= 1, ++at) {
                if ((bits & 1) == 0) continue;
                const unsigned char* a = a_segment + at * (SLOTS_OF_SQUARE * a_step);
                const unsigned char* b = b_segment + at * (SLOTS_OF_SQUARE * 64ull * 128);
                KEEP_LOOP
                for (u32 step = 0; step < SLOTS_OF_SQUARE; ++step) {
                    const shared_address slot = begin_stage(ring);
                    if (side == 0) {
                        cp_async_bulk_load(slot, a, A_BYTES, ring.full());
                    } else {
                        cp_async_bulk_load(slot, a, A_BYTES / 2, ring.full());
                        cp_async_bulk_load(slot + A_BYTES / 2, a + panel, A_BYTES / 2, ring.full());
                    }
                    UNROLL
                    for (u32 p = 0; p < 2; ++p)
                        cp_async_bulk_load_multicast(slot + A_BYTES + half + p * (B_BYTES / 4), b + panels[p] * tower.panel, B_BYTES / 4,
                                                     ring.full(), BOTH_BLOCKS);
                    ring.next();
                    a += a_step;
                    b += 64 * 128;
                }
            }
        }
    }
}

// The warps that multiply call this: how many slots one segment has.
SAMTONE_DEVICE u32 slots_of(const Line& line) {
    if (line.skipped == nullptr) return SLOTS_OF_SQUARE * line.count;
    u32 squares = 0;
    for (u32 from = 0; from < line.count; from += WARP)
        for (u32 bits = computed_from(line, from); bits != 0; bits &= bits - 1) ++squares;
    return SLOTS_OF_SQUARE * squares;
}

// What the products of one slot read: 64 of k. TRANSPOSED says that k runs down the columns of the gradients.
struct Operands {
    u64 gradients, embeddings;
};
SAMTONE_DEVICE Operands operands_of(const Ring<STAGES>& ring) {
    // This warpgroup reads 64 rows, or one panel of 64 columns. Both are 8 KiB.
    return {wgmma_operand(ring.stage() + consumer() * (A_BYTES / 2), 0, 1024), wgmma_operand(ring.stage() + A_BYTES, B_BYTES / 4, 1024)};
}
// The k-th 16 of k of the gradients, and of the embeddings of one half. From the first half on they may serve both halves.
template <bool TRANSPOSED> SAMTONE_DEVICE u64 gradients_at(const Operands& of, u32 k) {
    return advanced(of.gradients, (TRANSPOSED ? 16 * 128 : 32) * k);
}
SAMTONE_DEVICE u64 embeddings_at(const Operands& of, u32 k, u32 half) {
    return advanced(of.embeddings, half * (B_BYTES / 2) + 16 * 128 * k);
}

// Makes both halves at once, or the first one alone, added up in tensor cores. The products of a slot are under way while the next slot is
// waited for.
template <bool TRANSPOSED, bool NARROW>
SAMTONE_DEVICE void multiply_together(HalfSums (&total)[2], Ring<STAGES>& ring, u32 steps, bool& started) {
    Ring<STAGES> previous = ring;
    for (u32 step = 0; step < steps; ++step) {
        wait_full(ring);
        const Operands of = operands_of(ring);
        wgmma_fence();
        UNROLL
        for (u32 k = 0; k < 4; ++k) {
            const u64 a = gradients_at<TRANSPOSED>(of, k), b = embeddings_at(of, k, 0);
            if constexpr (NARROW) wgmma_m64n128k16_f16<TRANSPOSED, true>(total[0], a, b, started);
            else wgmma_m64n256k16_f16<TRANSPOSED, true>(total[0], total[1], a, b, started);
            started = true;
        }
        wgmma_commit_group();
        if (step > 0) {
            wgmma_wait_group<1>();
            release(previous);
        }
        previous = ring;
        ring.next();
    }
    wgmma_wait_group<0>();
    hold(total[0]);
    if constexpr (!NARROW) hold(total[1]);
    release(previous);
}

// Makes the halves one after the other, or the first one alone, 16 of k at a time.
template <bool TRANSPOSED> SAMTONE_DEVICE void multiply_apart(HalfSums (&total)[2], Ring<STAGES>& ring, u32 steps, bool narrow) {
    for (u32 step = 0; step < steps; ++step) {
        wait_full(ring);
        const Operands of = operands_of(ring);
        UNROLL
        for (u32 half = 0; half < 2; ++half) {
            if (half == 1 && narrow) continue;
            KEEP_LOOP
            for (u32 k = 0; k < 4; ++k) {
                HalfSums sums;
                wgmma_fence();
                wgmma_m64n128k16_f16<TRANSPOSED, true>(sums, gradients_at<TRANSPOSED>(of, k), embeddings_at(of, k, half), false);
                wgmma_commit_group();
                wgmma_wait_group<0>();
                hold(sums);
                UNROLL
                for (u32 i = 0; i < 64; ++i) total[half][i] += sums[i];
                hold(total[half]);
            }
        }
        release(ring);
        ring.next();
    }
}

template <Arithmetic A> SAMTONE_DEVICE void gradient_product(const Wave& wave, const Towers& towers, const unsigned char* gradients,
                                                             u64 plane, const Product& product, const u32* skipped) {
    begin_launch();
    start_pipeline<Ring<STAGES>>([] {});
    Ring<STAGES> ring{0, 0};
    const u32 squares = (product.of[0].blocks + product.of[1].blocks) * product.tiles_along_dim;
    if (warpgroup_id() == 0) {
        // [1] load
        setmaxnreg_dec<COPY_REGISTERS>();
        if (warp_id() == 0) {
            for (u32 k = cluster_id(); k < squares; k += clusters()) {
                const Square square = square_of(product, k);
                const unsigned char* of_prefix = gradients + square.columns.prefix * product.prefix_gradients;
                for_each_matrix(wave, square.rows, [&](const SuperBlock& block, u32 side) {
                    copy_matrix<A>(ring, block, side, square, towers, of_prefix, plane, skipped);
                });
            }
        }
    } else {
        setmaxnreg_inc<MULTIPLY_REGISTERS>();
        for (u32 k = cluster_id(); k < squares; k += clusters()) {
            const Square square = square_of(product, k);
            // [2] multiply
            HalfSums total[2] = {};
            bool started = false, any = false;
            const bool narrow = is_narrow(square.columns);
            for_each_matrix(wave, square.rows, [&](const SuperBlock& block, u32 side) {
                const u32 steps = Numbers<A>::GRADIENT_SEGMENTS * slots_of(line_along(skipped, block, side, square));
                any = true;
                if (steps == 0) return;
                if constexpr (Numbers<A>::SPLIT) {
                    if (side == 0) multiply_apart<false>(total, ring, steps, narrow);
                    else multiply_apart<true>(total, ring, steps, narrow);
                } else if (narrow) {
                    if (side == 0) multiply_together<false, true>(total, ring, steps, started);
                    else multiply_together<true, true>(total, ring, steps, started);
                } else {
                    if (side == 0) multiply_together<false, false>(total, ring, steps, started);
                    else multiply_together<true, false>(total, ring, steps, started);
                }
            });
            if (product.accumulate != 0 && !any) continue;

            // [3] store
            const Outputs& outputs = product.of[square.rows.space];
            UNROLL
            for (u32 i = 0; i < 2; ++i) {
                const u32 row = square.rows.begin + cluster_rank() * HALF + slot_row(i);
                if (row >= square.rows.end) continue;
                float* to = outputs.sums + row * outputs.stride;
                UNROLL
                for (u32 half = 0; half < 2; ++half) {
                    UNROLL
                    for (u32 j = 0; j < 32; j += 2)
                        store_sums(product, to, square.columns.begin + half * HALF + slot_column(j), square.columns.end,
                                   element(total[half], i, j), element(total[half], i, j + 1));
                }
            }
        }
    }
    end_pipeline();
}

#define GRADIENT_PRODUCT(name, arithmetic)                                                                                        \
    SHARED_BYTES(name, Ring<STAGES>::END);                                                                                        \
    KERNEL_CLUSTER(name, PIPELINE_THREADS, CLUSTER, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, const unsigned char* gradients, \
                   u64 plane, BY_VALUE(Product) product, const u32* skipped) {                                                    \
        gradient_product<Arithmetic::arithmetic>(wave, towers, gradients, plane, product, skipped);                               \
    }
GRADIENT_PRODUCT(gradient_product_f16_sm90a, f16)
GRADIENT_PRODUCT(gradient_product_f16x2_sm90a, f16x2)
GRADIENT_PRODUCT(gradient_product_f16x3_sm90a, f16x3)
