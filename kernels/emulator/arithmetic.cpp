// arithmetic.cpp: conversions exactly as PTX rounds them, and approximate instructions with the error that they may have.
#include "../common/platform.cuh"
#include <algorithm>
#include <cmath>
#include <limits>

namespace emulator {

namespace {
constexpr float INF = std::numeric_limits<float>::infinity();

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Keeps 22 of the 23 bits after the point. So a result is as coarse as an error of 2^-22 may make it. An exact power of two stays exact, as
// it does in hardware.
float coarse(float x) {
    u32 bits = bits_of(x);
    if (!std::isfinite(x) || (bits & 1) == 0) return x;
    return float_of((bits & 2) != 0 ? bits + 1 : bits - 1);
}
} // namespace

u32 bits_of(float x) {
    u32 bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float float_of(u32 bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

u64 bits_of(double x) {
    u64 bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

double double_of(u64 bits) {
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float round_f32(float x) { return std::nearbyint(x); }
double round_f64(double x) { return std::nearbyint(x); }

float ex2_approx(float x) { return coarse(flushed(static_cast<float>(std::exp2(static_cast<double>(flushed(x)))))); }

float lg2_approx(float x) { return coarse(flushed(static_cast<float>(std::log2(static_cast<double>(flushed(x)))))); }

float rcp_approx(float x) {
    x = flushed(x);
    return x == 0 ? std::copysign(INF, x) : flushed(static_cast<float>(1.0 / static_cast<double>(x)));
}

float sqrt_rn(float x) { return std::sqrt(x); }
double sqrt_rn(double x) { return std::sqrt(x); }
float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
double fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// fmax and fmin do not serve: they may give a NaN for a signalling one, and either zero for two of different sign.
float max_f32(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    return a > b || (a == b && std::signbit(b)) ? a : b;
}
float min_f32(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
}

u16 bf16_of(float x) {
    u32 bits = bits_of(x);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

u16 f16_of(float x) {
    if (std::isnan(x)) return 0x7fff;
    u32 bits = bits_of(x);
    u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return static_cast<u16>(sign | 0x7c00); // 65536 and above
    if (magnitude >= 0x38800000) {                                       // normal: the bias of the exponent goes from 127 to 15
        u32 rebased = magnitude - (112u << 23);
        return static_cast<u16>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
    }
    u32 exponent = magnitude >> 23;
    if (exponent < 102) return static_cast<u16>(sign); // below half of the smallest subnormal number, 2^-25
    u32 mantissa = (magnitude & 0x7fffff) | 0x800000, shift = 126 - exponent;
    u32 quotient = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
    if (rest > half || (rest == half && (quotient & 1) != 0)) ++quotient;
    return static_cast<u16>(sign | quotient);
}

float f32_of_f16(u16 bits) {
    u32 sign = static_cast<u32>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 0) {
        float magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return sign != 0 ? -magnitude : magnitude;
    }
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

i32 exponent_of_factor(float x, i32 least) {
    constexpr i32 OF_ZERO = -1000;
    const u32 magnitude = bits_of(x) & 0x7fffffff;
    return magnitude == 0 ? OF_ZERO : std::max(static_cast<i32>(magnitude >> 23) - 127, least);
}

// Every term is cut at the same place, which the largest one decides. What is left of the terms adds up exactly, and the sum is cut to f32.
// The power of two of a product counts as the sum of those of its factors, though the product may reach the next one.
float fused_sum(float sum, const double* products, const i32* exponents, u32 count, i32 fraction_bits) {
    i32 highest = exponent_of_factor(sum, -126);
    bool finite = std::isfinite(sum);
    for (u32 k = 0; k < count; ++k) {
        highest = std::max(highest, exponents[k]);
        finite = finite && std::isfinite(products[k]);
    }
    if (!finite) {
        for (u32 k = 0; k < count; ++k) sum += static_cast<float>(products[k]);
        return sum;
    }
    const i32 last = std::max(highest, -400) - fraction_bits;
    const double unit = double_of(static_cast<u64>(1023 + last) << 52), inverse = double_of(static_cast<u64>(1023 - last) << 52);
    auto units = [inverse](double x) { return static_cast<double>(static_cast<i32>(x * inverse)); };
    double all = units(sum);
    for (u32 k = 0; k < count; ++k) all += units(products[k]);
    const double exact = all * unit;
    const float nearest = static_cast<float>(exact);
    const bool beyond = std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(exact);
    return beyond ? float_of(bits_of(nearest) - 1) : nearest;
}

} // namespace emulator
