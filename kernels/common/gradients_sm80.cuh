// gradients_sm80.cuh: what gradient_tile_sm80.cu and gradient_tile_prefixes_sm80.cu share: how gradients are made of the cosines of a tile,
// staged and stored. The headers of these files say what lies where in shared memory.
#pragma once
#include "cosines.cuh"
#include "epilogue.cuh"

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
