// wgmma.cpp: operands of wgmma in shared memory, and the product.
#include "wgmma.hpp"
#include <memory>

namespace emulator {

namespace {
constexpr u32 ATOM = 1024, ROW = 128;

// Values of all 65536 bit patterns.
const float* f16_table() {
    static const auto table = [] {
        auto values = std::make_unique<float[]>(1 << 16);
        for (u32 bits = 0; bits < 1 << 16; ++bits) values[bits] = f32_of_f16(static_cast<u16>(bits));
        return values;
    }();
    return table.get();
}

// Pairs, since every processor has registers for them.
using Pair = double __attribute__((vector_size(16)));
using PairBits = i64 __attribute__((vector_size(16)));
using FloatPair = float __attribute__((vector_size(8)));

Pair pair_at(const float* at) {
    FloatPair pair;
    std::memcpy(&pair, at, sizeof pair);
    return __builtin_convertvector(pair, Pair);
}

// Towards zero, as tensor cores drop the bits that do not fit.
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
    if (stride == 0 || stride % ATOM != 0)
        return "has a stride of " + std::to_string(stride) + " bytes: not a multiple of 1024 above 0";
    if (transposed && indices > 64 && (leading == 0 || leading % ATOM != 0))
        return "has a leading stride of " + std::to_string(leading) + " bytes: not a multiple of 1024 above 0";
    return {};
}

void gather(Matrix& matrix, const Operand& operand, u32 indices, const unsigned char* shared) {
    const float* const values = f16_table();
    const u32 step = operand.transposed ? 8 : 1, deep = operand.transposed ? 1 : 8;
    for (u32 index = 0; index < indices; index += step) {
        for (u32 k = 0; k < 16; k += deep) {
            u16 eight[8];
            std::memcpy(eight, shared + (operand.chunk(index, k) - SHARED_BASE), sizeof eight);
            for (u32 i = 0; i < 8; ++i)
                matrix.numbers[operand.transposed ? k : k + i][operand.transposed ? index + i : index] = values[eight[i]];
        }
    }
}

// Products are exact; sixteen and the accumulator are added up in f64, and cut to f32.
void multiply(Sums& sums, const Matrix& a, const Matrix& b, u32 first) {
    constexpr u32 COLUMNS = 128, PAIRS = 4, OWN = 64;
    for (u32 column = 0; column < COLUMNS; column += 2 * PAIRS) {
        Pair right[16][PAIRS];
        for (u32 k = 0; k < 16; ++k)
            for (u32 i = 0; i < PAIRS; ++i) right[k][i] = pair_at(&b.numbers[k][first + column + 2 * i]);
        for (u32 row = 0; row < 64; ++row) {
            // A pair of columns each for four threads.
            float* const at = &sums[(row / 16 * WARP + row % 8 * 4) * OWN + column / 2 + row % 16 / 8 * 2];
            Pair s0 = pair_at(at), s1 = pair_at(at + OWN), s2 = pair_at(at + 2 * OWN), s3 = pair_at(at + 3 * OWN);
            for (u32 k = 0; k < 16; ++k) {
                const double left = a.numbers[k][row];
                s0 += left * right[k][0];
                s1 += left * right[k][1];
                s2 += left * right[k][2];
                s3 += left * right[k][3];
            }
            cut(at, s0);
            cut(at + OWN, s1);
            cut(at + 2 * OWN, s2);
            cut(at + 3 * OWN, s3);
        }
    }
}

} // namespace emulator
