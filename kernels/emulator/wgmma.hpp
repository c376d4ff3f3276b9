// wgmma.hpp: operands of wgmma in shared memory, and the product.
#pragma once
#include "../common/platform.cuh"
#include <array>
#include <cstdint>
#include <string>

namespace emulator {

using i16 = std::int16_t;

// What a descriptor says: see common/hopper.cuh.
struct Operand {
    u64 descriptor;
    shared_address start;
    u32 leading, stride;
    bool transposed;

    // What is wrong with it for so many indices (m or n), or nothing.
    std::string wrong(u32 indices) const;
    // Where the 16 bytes lie that have this k and this index. They are eight of k of one index or, transposed, eight indices of one k.
    shared_address chunk(u32 index, u32 k) const {
        const u32 along = transposed ? index / 64 * leading + index % 64 * 2 : k * 2;
        const u32 row = transposed ? k : index;
        const shared_address at = start + row / 8 * stride + row % 8 * 128 + along;
        return (at ^ (at >> 7 & 7) << 4) & ~15u;
    }
};

Operand operand_of(u64 descriptor, bool transposed);

template <class F> void each_chunk(const Operand& operand, u32 indices, F&& f) {
    for (u32 index = 0; index < indices; index += operand.transposed ? 8 : 1)
        for (u32 k = 0; k < 16; k += operand.transposed ? 1 : 8) f(operand.chunk(index, k));
}

// A matrix of up to 256 indices. Its element (k, index) is numbers[k][index]. `exponents` has the powers of two, for 0 one below all
// others.
struct Matrix {
    float numbers[16][256];
    i16 exponents[16][256];
    bool finite;
};
void gather(Matrix& matrix, const Operand& operand, u32 indices, const unsigned char* shared);

// Sums of 64 x 128. Each of the 128 threads has 64 of them, one thread after the other.
using Sums = std::array<float, 64 * 128>;
// sums += a · b, for the 128 columns from `first` on.
void multiply(Sums& sums, const Matrix& a, const Matrix& b, u32 first);

} // namespace emulator
