// skip_squares.cu: which squares of cosines may be left out of the gradient.
// Math     square_masses  U = max_i Σ_j exp(β s_ij) over the rows i of the square that anchor, where j are the columns that i keeps.
//                         V is the same for its columns
//          choose_skipped a square is skipped if both its rows and its columns allow it. The rows allow it if max_i a_i/|Dᵢ| · U <= η·J/C.
//                         a_i is the coefficient of their block, Dᵢ = ∂L/∂(β s⁺ᵢ), J is the number of candidates in the square, and C
//                         that of a row in all blocks. docs/skipping.md has the proof. A square on the diagonal of a triangle is never
//                         skipped
//          count_skipped  how many squares there are, and how many are skipped, without mirror images
// In/out   partials of the logsumexp pass · masses: U and V of each square · skipped: a word for each (common/skipping.cuh), results
// Tiles    square_masses, choose_skipped: one square per thread block, grid (squares of the wave, mirror images included). count_skipped:
//          one thread block
// Threads  256
// Shared   64 bytes (reduce.cuh)
// Sync     R1, R2 reduce.cuh
// Numerics The largest sum is found by whole numbers, exactly. Logarithms have base 2. Their error, and that of sums in f32, is within
//          SLACK. A comparison with NaN keeps the square in the gradient, and so does a row whose derivative by its positive is nearly 0
// Limits   squares have 256 rows and columns at most
#include "common/reduce.cuh"
#include "common/skipping.cuh"

// This is subtracted from the logarithm of what is allowed. It is 0.07% of it.
constexpr double SLACK = 0x1p-10;

// The largest sums among the rows and among the columns of a square. A sum of 0 says that no anchor has a negative there.
ABI_STRUCT(Masses, { Partial row, col; });

// Super-block and place of square k of a wave, counting only those that may be skipped.
struct Square {
    u32 block, row, col;
};
SAMTONE_DEVICE u32 squares_of(const SuperBlock& block, u32 together) {
    return block.first_square == NONE ? 0 : block.row.tiles / together * (block.col.tiles / together);
}
SAMTONE_DEVICE Square square_of(const Wave& wave, u32 k, u32 together) {
    u32 b = 0;
    for (u32 squares = squares_of(wave.blocks[0], together); k >= squares; squares = squares_of(wave.blocks[b], together)) {
        k -= squares;
        ++b;
    }
    const u32 cols = wave.blocks[b].col.tiles / together;
    return {b, k / cols, k % cols};
}
// Whether this square can be skipped, and is no mirror image of another one.
SAMTONE_DEVICE bool is_candidate(const SuperBlock& block, const Square& at) { return block.triangle == 0 || at.row < at.col; }

// A partial sum as a whole number, which f64 holds exactly. Larger sums have larger numbers, and an empty sum has −∞.
constexpr double OCTAVE = 0x1p23;
SAMTONE_DEVICE double order_of(const Partial& x) {
    return x.sum == 0 ? minus_infinity() : x.exponent * OCTAVE + static_cast<double>(bits_of(x.sum));
}

// The largest sum of the indices of one axis over `together` tiles. `first` is the partial sum of the square's first index in its first
// tile.
SAMTONE_DEVICE Partial largest_sum(const Edge& edge, const Partial* first, u32 indices, u32 tile, u32 together) {
    Partial mine{0, 0};
    for (u32 t = 0; edge.sums != 0 && threadIdx.x < indices && t < together; ++t) {
        const u32x2 words = ld_global_u32x2(first + static_cast<u64>(t) * (edge.tiles * tile) + threadIdx.x);
        const Partial more{float_of(words.x), static_cast<i32>(words.y)};
        if (more.sum == 0) continue;
        if (mine.sum == 0) {
            mine = more;
            continue;
        }
        const i32 top = mine.exponent > more.exponent ? mine.exponent : more.exponent;
        auto scaled = [top](const Partial& x) { return static_cast<double>(x.sum) * power_of_two(x.exponent - top); };
        mine = {static_cast<float>(scaled(mine) + scaled(more)), top};
    }
    const double order = order_of(mine), largest = reduce_block<Largest>(order);
    if (largest == minus_infinity()) return {0, 0};
    const i64 whole = static_cast<i64>(largest);
    constexpr i32 ONE = 127; // the biased exponent of 1
    return {float_of(static_cast<u32>(whole & 0x7fffff) | static_cast<u32>(ONE) << 23), static_cast<i32>(whole >> 23) - ONE};
}

SHARED_BYTES(square_masses, REDUCE_BYTES);
KERNEL(square_masses, REDUCE_THREADS, BY_VALUE(Wave) wave, const Partial* partials, Masses* masses, u32 tile, u32 together) {
    begin_launch();
    const Square at = square_of(wave, blockIdx.x, together);
    const SuperBlock& block = wave.blocks[at.block];
    if (!is_candidate(block, at)) return;
    const u32 step = tile * together, rows = block.row.end - block.row.begin, cols = block.col.end - block.col.begin;
    auto indices = [step](u32 from, u32 all) { return from >= all ? 0 : all - from < step ? all - from : step; };
    const Partial* row_partials = partials + block.row_partials + static_cast<u64>(at.col * together) * (block.row.tiles * tile);
    const Partial* col_partials = partials + block.col_partials + static_cast<u64>(at.row * together) * (block.col.tiles * tile);
    const Partial row = largest_sum(block.row, row_partials + at.row * step, indices(at.row * step, rows), tile, together);
    const Partial col = largest_sum(block.col, col_partials + at.col * step, indices(at.col * step, cols), tile, together);
    if (threadIdx.x != 0) return;
    unsigned char* to = reinterpret_cast<unsigned char*>(masses + square_entry(block, at.row, at.col, together));
    st_global_u32x4(to, {bits_of(row.sum), static_cast<u32>(row.exponent), bits_of(col.sum), static_cast<u32>(col.exponent)});
}

ABI_STRUCT(Choice, {
    const double *log_coefficients, *diagonal;
    const Masses* masses;
    u32* skipped;
    double log2_share; // of η/C
    u32 rows, step, together, padding;
});

// log2 of a positive number, with an error up to 2^-21.
SAMTONE_DEVICE double log2_of(double x) {
    const u64 bits = bits_of(x);
    const double fraction = double_of((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
    return static_cast<double>(static_cast<i32>(bits >> 52) - 1023) + lg2_approx(static_cast<float>(fraction));
}

// log2 of a_i/|Dᵢ|, the largest among the anchors of the axis in the square. It is −∞ if none has a coefficient.
SAMTONE_DEVICE double largest_demand(const Choice& c, const Edge& edge, u32 begin, const Towers& towers) {
    constexpr double LOG2_E = 1.44269504088896340735992468100, SMALLEST = 1e-300;
    double demand = minus_infinity();
    const u32 index = begin + threadIdx.x;
    if (threadIdx.x < c.step && index < edge.end && edge.anchors != 0) {
        const u32 row = ld_global_nc_u32x4(tower_of(towers, edge.space).candidates + index).w;
        if (row != NONE) {
            const double log = ld_global_f64(c.log_coefficients + static_cast<u64>(edge.block) * c.rows + row);
            const double derivative = -ld_global_f64(c.diagonal + row);
            if (log != minus_infinity()) demand = derivative > SMALLEST ? log * LOG2_E - log2_of(derivative) : infinity();
        }
    }
    return reduce_block<Largest>(demand);
}

// Whether the anchors of an axis can do without the square.
SAMTONE_DEVICE bool spares(const Partial& mass, double demand, u32 candidates, double log2_share) {
    if (mass.sum == 0 || demand == minus_infinity()) return true;
    const double share = demand + mass.exponent + lg2_approx(mass.sum);
    return share + SLACK <= log2_share + lg2_approx(static_cast<float>(candidates));
}

SHARED_BYTES(choose_skipped, REDUCE_BYTES);
KERNEL(choose_skipped, REDUCE_THREADS, BY_VALUE(Wave) wave, BY_VALUE(Towers) towers, BY_VALUE(Choice) c) {
    begin_launch();
    const Square at = square_of(wave, blockIdx.x, c.together);
    const SuperBlock& block = wave.blocks[at.block];
    const u32 entry = square_entry(block, at.row, at.col, c.together);
    if (!is_candidate(block, at)) {
        if (at.row == at.col && threadIdx.x == 0) st_global_u32(c.skipped + entry, 0);
        return;
    }
    const u32 row = block.row.begin + at.row * c.step, col = block.col.begin + at.col * c.step;
    const double row_demand = largest_demand(c, block.row, row, towers), col_demand = largest_demand(c, block.col, col, towers);
    if (threadIdx.x != 0) return;
    const u32x4 words = ld_global_u32x4(c.masses + entry);
    const Partial row_mass{float_of(words.x), static_cast<i32>(words.y)}, col_mass{float_of(words.z), static_cast<i32>(words.w)};
    auto live = [&](const Edge& edge, u32 begin) { return begin >= edge.end ? 0 : edge.end - begin < c.step ? edge.end - begin : c.step; };
    const bool skipped = spares(row_mass, row_demand, live(block.col, col), c.log2_share) &&
                         spares(col_mass, col_demand, live(block.row, row), c.log2_share);
    st_global_u32(c.skipped + entry, skipped ? 1 : 0);
    if (block.triangle != 0) st_global_u32(c.skipped + square_entry(block, at.col, at.row, c.together), skipped ? 1 : 0);
}

// SQUARES and SKIPPED ← (first ? 0 : what they were) + those of the wave.
SHARED_BYTES(count_skipped, REDUCE_BYTES);
KERNEL(count_skipped, REDUCE_THREADS, BY_VALUE(Wave) wave, const u32* skipped, double* results, u32 together, u32 first) {
    begin_launch();
    double squares = 0, count = 0;
    for (u32 b = 0; b < wave.count; ++b) {
        const SuperBlock& block = wave.blocks[b];
        const u32 rows = block.row.tiles / together, cols = block.col.tiles / together;
        for (u32 k = threadIdx.x; k < rows * cols; k += REDUCE_THREADS) {
            if (block.triangle != 0 && k / cols > k % cols) continue;
            squares += 1;
            if (is_skipped(skipped, block, k / cols, k % cols, together)) count += 1;
        }
    }
    squares = reduce_block<Sum>(squares);
    count = reduce_block<Sum>(count);
    if (threadIdx.x != 0) return;
    st_global_f64(results + SQUARES, (first != 0 ? 0 : ld_global_f64(results + SQUARES)) + squares);
    st_global_f64(results + SKIPPED, (first != 0 ? 0 : ld_global_f64(results + SKIPPED)) + count);
}
