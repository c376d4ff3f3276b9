// wgmma.cpp: operands of wgmma in shared memory, and the product.
#include "wgmma.hpp"
#include <algorithm>
#include <cmath>
#include <memory>

namespace emulator {

namespace {
constexpr u32 ATOM = 1024, ROW = 128;

// The values of all 65536 bit patterns, and their powers of two.
struct Table {
    float values[1 << 16];
    i16 exponents[1 << 16];
};
const Table& f16_table() {
    static const auto table = [] {
        auto made = std::make_unique<Table>();
        for (u32 bits = 0; bits < 1 << 16; ++bits) {
            made->values[bits] = f32_of_f16(static_cast<u16>(bits));
            made->exponents[bits] = static_cast<i16>(exponent_of_factor(made->values[bits], -14));
        }
        return made;
    }();
    return *table;
}

// Vectors of 16 bytes, because every processor has registers for them.
using Pair = double __attribute__((vector_size(16)));
using PairBits = i64 __attribute__((vector_size(16)));
using FloatPair = float __attribute__((vector_size(8)));
using WholePair = i32 __attribute__((vector_size(8)));
using Four = float __attribute__((vector_size(16)));
using WholeFour = i32 __attribute__((vector_size(16)));
using Eight = i16 __attribute__((vector_size(16)));

template <class Vector, class T> Vector vector_at(const T* at) {
    Vector vector;
    std::memcpy(&vector, at, sizeof vector);
    return vector;
}

// Cuts towards zero, as tensor cores drop the bits that do not fit.
void cut(float* at, Pair x) {
    constexpr i64 KEPT = ~((1ll << 29) - 1);
    const FloatPair pair = __builtin_convertvector(reinterpret_cast<Pair>(reinterpret_cast<PairBits>(x) & KEPT), FloatPair);
    std::memcpy(at, &pair, sizeof pair);
}
} // namespace

Operand operand_of(u64 descriptor, bool transposed) {
    auto field = [&](u32 first) { return static_cast<u32>(descriptor >> first & 0x3fff) * 16; };
    return {descriptor, field(0), field(16), field(32), transposed};
}

std::string Operand::wrong(u32 indices) const {
    constexpr u64 FIELDS = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
    if (descriptor >> 62 != 1)
        return "is not in rows of 128 bytes with their swizzle: bits 62 and 63 are " + std::to_string(descriptor >> 62);
    if ((descriptor & ~FIELDS) != 0) return "has bits beside its start, its strides and its swizzle";
    if (start % ATOM >= ROW) return "starts within an atom of 1024 bytes: at " + std::to_string(start % ATOM);
    if (start % ROW + (transposed ? ROW : 32) > ROW)
        return "leaves its rows of 128 bytes: it starts at byte " + std::to_string(start % ROW);
    if (stride == 0 || stride % ATOM != 0) return "has a stride of " + std::to_string(stride) + " bytes: not a multiple of 1024 above 0";
    if (transposed && indices > 64 && (leading == 0 || leading % ATOM != 0))
        return "has a leading stride of " + std::to_string(leading) + " bytes: not a multiple of 1024 above 0";
    return {};
}

void gather(Matrix& matrix, const Operand& operand, u32 indices, const unsigned char* shared) {
    const Table& table = f16_table();
    const u32 step = operand.transposed ? 8 : 1, deep = operand.transposed ? 1 : 8;
    bool finite = true;
    for (u32 index = 0; index < indices; index += step) {
        for (u32 k = 0; k < 16; k += deep) {
            u16 eight[8];
            std::memcpy(eight, shared + (operand.chunk(index, k) - SHARED_BASE), sizeof eight);
            for (u32 i = 0; i < 8; ++i) {
                const u32 row = operand.transposed ? k : k + i, column = operand.transposed ? index + i : index;
                matrix.numbers[row][column] = table.values[eight[i]];
                matrix.exponents[row][column] = table.exponents[eight[i]];
                finite = finite && (eight[i] & 0x7c00) != 0x7c00;
            }
        }
    }
    matrix.finite = finite;
}

// The same as `fused_sum` of arithmetic.cpp, for eight columns at a time. It computes in f32, where products of two f16 and powers of two
// are exact.
void multiply(Sums& sums, const Matrix& a, const Matrix& b, u32 first) {
    constexpr u32 COLUMNS = 128, EIGHT = 8, OWN = 64;
    constexpr i32 LEAST = -100; // below it there are only zeros
    // Most rows and columns of small problems are padding. Products with zeros leave a sum as it is, except for the sign of a zero.
    const bool all_finite = a.finite && b.finite;
    bool nothing_in_row[64];
    for (u32 row = 0; row < 64; ++row) {
        nothing_in_row[row] = all_finite;
        for (u32 k = 0; k < 16; ++k) nothing_in_row[row] = nothing_in_row[row] && a.numbers[k][row] == 0;
    }
    auto stays = [](float sum) { return sum == 0 || (std::isfinite(sum) && std::fabs(sum) >= 0x1p-100f); };
    for (u32 column = 0; column < COLUMNS; column += EIGHT) {
        Four right[16][2];
        Eight right_exponents[16];
        bool nothing_in_columns = all_finite;
        for (u32 k = 0; k < 16; ++k)
            for (u32 i = 0; i < EIGHT; ++i) nothing_in_columns = nothing_in_columns && b.numbers[k][first + column + i] == 0;
        for (u32 k = 0; k < 16; ++k) {
            for (u32 i = 0; i < 2; ++i) right[k][i] = vector_at<Four>(&b.numbers[k][first + column + 4 * i]);
            right_exponents[k] = vector_at<Eight>(&b.exponents[k][first + column]);
        }
        for (u32 row = 0; row < 64; ++row) {
            // Four threads have a pair of columns each.
            float* const at = &sums[(row / 16 * WARP + row % 8 * 4) * OWN + column / 2 + row % 16 / 8 * 2];
            if (nothing_in_columns || nothing_in_row[row]) {
                bool all_stay = true;
                for (u32 i = 0; i < EIGHT; ++i) all_stay = all_stay && stays(at[i / 2 * OWN + i % 2]);
                if (all_stay) {
                    for (u32 i = 0; i < EIGHT; ++i) at[i / 2 * OWN + i % 2] += 0.0f;
                    continue;
                }
            }
            Eight highest;
            bool finite = all_finite;
            for (u32 i = 0; i < EIGHT; ++i) {
                const float sum = at[i / 2 * OWN + i % 2];
                highest[i] = static_cast<i16>(exponent_of_factor(sum, -126));
                finite = finite && std::isfinite(sum);
            }
            if (!finite) {
                for (u32 i = 0; i < EIGHT; ++i) {
                    float& sum = at[i / 2 * OWN + i % 2];
                    for (u32 k = 0; k < 16; ++k) sum += a.numbers[k][row] * b.numbers[k][first + column + i];
                }
                continue;
            }
            for (u32 k = 0; k < 16; ++k) {
                const Eight exponents = a.exponents[k][row] + right_exponents[k];
                highest = exponents > highest ? exponents : highest;
            }
            Four inverse[2];
            for (u32 i = 0; i < EIGHT; ++i) {
                const i32 last = std::max<i32>(highest[i], LEAST) - WGMMA_FRACTION_BITS;
                inverse[i / 4][i % 4] = float_of(static_cast<u32>(127 - last) << 23);
            }
            WholeFour terms[2] = {};
            for (u32 k = 0; k < 16; ++k) {
                const float left = a.numbers[k][row];
                for (u32 i = 0; i < 2; ++i) terms[i] += __builtin_convertvector(left * right[k][i] * inverse[i], WholeFour);
            }
            for (u32 i = 0; i < EIGHT / 2; ++i) {
                const Four scale = inverse[i / 2];
                const FloatPair pair{scale[i % 2 * 2], scale[i % 2 * 2 + 1]};
                const WholePair sum = __builtin_convertvector(vector_at<FloatPair>(at + i * OWN) * pair, WholePair);
                const WholePair of_products{terms[i / 2][i % 2 * 2], terms[i / 2][i % 2 * 2 + 1]};
                cut(at + i * OWN, (__builtin_convertvector(sum, Pair) + __builtin_convertvector(of_products, Pair)) /
                                      __builtin_convertvector(pair, Pair));
            }
        }
    }
}

} // namespace emulator
