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

// Of numbers that the compiler keeps in registers.
using Four = double __attribute__((vector_size(32)));
using FourBits = i64 __attribute__((vector_size(32)));
using FourFloats = float __attribute__((vector_size(16)));

// Towards zero, as tensor cores drop the bits that do not fit.
FourFloats cut(Four x) {
    constexpr i64 KEPT = ~((1ll << 29) - 1);
    return __builtin_convertvector(reinterpret_cast<Four>(reinterpret_cast<FourBits>(x) & KEPT), FourFloats);
}
} // namespace

Operand operand_of(u64 descriptor, bool transposed) {
    auto field = [&](u32 first) { return static_cast<u32>(descriptor >> first & 0x3fff) * 16; };
    return {descriptor, field(0), field(16), field(32), transposed};
}

std::string Operand::wrong(u32 indices) const {
    constexpr u64 FIELDS = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
    if (descriptor >> 62 != 1) return "is not in rows of 128 bytes with their swizzle: bits 62 and 63 are " + std::to_string(descriptor >> 62);
    if ((descriptor & ~FIELDS) != 0) return "has bits beside its start, its strides and its swizzle";
    if (start % ATOM >= ROW) return "starts within an atom of 1024 bytes: at " + std::to_string(start % ATOM);
    if (start % ROW + (transposed ? ROW : 32) > ROW) return "leaves its rows of 128 bytes: it starts at byte " + std::to_string(start % ROW);
    if (stride == 0 || stride % ATOM != 0) return "has a stride of " + std::to_string(stride) + " bytes: not a multiple of 1024 above 0";
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
            for (u32 i = 0; i < 8; ++i) matrix.numbers[operand.transposed ? k : k + i][operand.transposed ? index + i : index] = values[eight[i]];
        }
    }
}

// Products are exact; sixteen and the accumulator are added up in f64, and cut to f32.
void multiply(Sums& sums, const Matrix& a, const Matrix& b, u32 first) {
    constexpr u32 COLUMNS = 128, BLOCK = 8;
    for (u32 column = 0; column < COLUMNS; column += BLOCK) {
        Four right[16][2];
        for (u32 k = 0; k < 16; ++k)
            for (u32 i = 0; i < 2; ++i) {
                FourFloats four;
                std::memcpy(&four, &b.numbers[k][first + column + 4 * i], sizeof four);
                right[k][i] = __builtin_convertvector(four, Four);
            }
        for (u32 row = 0; row < 64; ++row) {
            float* const at = &sums[row * COLUMNS + column];
            FourFloats low, high;
            std::memcpy(&low, at, sizeof low);
            std::memcpy(&high, at + 4, sizeof high);
            Four sum[2] = {__builtin_convertvector(low, Four), __builtin_convertvector(high, Four)};
            for (u32 k = 0; k < 16; ++k) {
                const double left = a.numbers[k][row];
                sum[0] += left * right[k][0];
                sum[1] += left * right[k][1];
            }
            low = cut(sum[0]);
            high = cut(sum[1]);
            std::memcpy(at, &low, sizeof low);
            std::memcpy(at + 4, &high, sizeof high);
        }
    }
}

} // namespace emulator
