// numbers.wgsl: what f32, the only float of WGSL, does not hold: more digits (Pair), more range (Scaled), and exponentials and logarithms
// whose error is known. Every module that includes this has a uniform `params` whose member `zero` is 0.

const NONE = 0xffffffffu;
const NO_COSINE = -4.0; // below every cosine
const LN_2 = 0.6931471805599453;
const LN_2_HEAD = 0.693115234375; // it has 15 bits, so that it is exact times a whole number below 2^9
const LN_2_TAIL = 3.1946184945309e-5;

// Gives x. An optimiser that may reassociate sums cannot know that, and so it stops here.
fn opaque(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) ^ params.zero);
}

// The first 12 bits of x. The product of two such numbers is exact.
fn head(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) & 0xfffff000u);
}

// 2^n. Below the normal range it is 0, and above it the largest power.
fn power_of_two(n: i32) -> f32 {
    return select(bitcast<f32>(u32(min(n, 127) + 127) << 23u), 0.0, n < -126);
}

// floor(log2 |x|) of a normal number.
fn exponent_of(x: f32) -> i32 {
    return i32((bitcast<u32>(x) >> 23u) & 255u) - 127;
}

// ---- Pair: a sum of two numbers that is not evaluated. It has about 46 bits

struct Pair {
    high: f32,
    low: f32,
}

fn two_sum(a: f32, b: f32) -> Pair {
    let sum = opaque(a + b);
    let of_b = opaque(sum - a);
    return Pair(sum, (a - opaque(sum - of_b)) + (b - of_b));
}

// For |a| ≥ |b|.
fn quick_two_sum(a: f32, b: f32) -> Pair {
    let sum = opaque(a + b);
    return Pair(sum, b - opaque(sum - a));
}

fn two_product(a: f32, b: f32) -> Pair {
    let product = opaque(a * b);
    let a0 = head(a);
    let b0 = head(b);
    let a1 = a - a0;
    let b1 = b - b0;
    return Pair(product, ((a0 * b0 - product) + a0 * b1 + a1 * b0) + a1 * b1);
}

fn pair_sum(a: Pair, b: Pair) -> Pair {
    let sum = two_sum(a.high, b.high);
    return quick_two_sum(sum.high, sum.low + a.low + b.low);
}

fn pair_product(a: Pair, b: Pair) -> Pair {
    let product = two_product(a.high, b.high);
    return quick_two_sum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

fn pair_times(a: Pair, factor: f32) -> Pair {
    return pair_product(a, Pair(factor, 0.0));
}

// ---- Scaled: part·2^exponent, where 1 ≤ |part| < 2, or 0

struct Scaled {
    part: f32,
    exponent: i32,
}

const ZERO = Scaled(0.0, 0);

fn scaled(part: f32, exponent: i32) -> Scaled {
    if abs(part) < 1.1754944e-38 {
        return ZERO;
    }
    let bits = bitcast<u32>(part);
    return Scaled(bitcast<f32>((bits & 0x807fffffu) | 0x3f800000u), exponent + exponent_of(part));
}

fn scaled_sum(a: Scaled, b: Scaled) -> Scaled {
    if a.part == 0.0 {
        return b;
    }
    if b.part == 0.0 {
        return a;
    }
    let top = max(a.exponent, b.exponent);
    return scaled(a.part * power_of_two(a.exponent - top) + b.part * power_of_two(b.exponent - top), top);
}

fn scaled_product(a: Scaled, b: Scaled) -> Scaled {
    return scaled(a.part * b.part, a.exponent + b.exponent);
}

fn scaled_quotient(a: Scaled, b: Scaled) -> Scaled {
    return scaled(a.part / b.part, a.exponent - b.exponent);
}

// As f32. Below its range this gives 0, and above it the largest numbers.
fn value_of(x: Scaled) -> f32 {
    return times_power_of_two(x.part, x.exponent);
}

// x·2^n, where 2^n alone may leave the range of f32.
fn times_power_of_two(x: f32, n: i32) -> f32 {
    let half = n / 2;
    return x * power_of_two(half) * power_of_two(n - half);
}

// ---- exponentials and logarithms

// 2^x for x ≤ 127, with an error of 1e-7. Below 2^-125 it is 0. The scalar below takes one of four, which compilers see.
fn exp2_of_four(x: vec4<f32>) -> vec4<f32> {
    let whole = round(max(x, vec4<f32>(-200.0)));
    let f = x - whole;
    var p = vec4<f32>(1.5461444854736328e-4);
    p = fma(p, f, vec4<f32>(1.3400427997112274e-3));
    p = fma(p, f, vec4<f32>(9.618056938052177e-3));
    p = fma(p, f, vec4<f32>(5.550327152013779e-2));
    p = fma(p, f, vec4<f32>(2.4022650718688965e-1));
    p = fma(p, f, vec4<f32>(6.931471824645996e-1));
    p = fma(p, f, vec4<f32>(1.0));
    let shifted = bitcast<vec4<f32>>(bitcast<vec4<i32>>(p) + (vec4<i32>(whole) << vec4<u32>(23u)));
    return select(vec4<f32>(), shifted, whole > vec4<f32>(-126.0));
}

fn exp2_of(x: f32) -> f32 {
    return exp2_of_four(vec4<f32>(x)).x;
}

// 2·atanh(z) for |z| ≤ 0.172.
fn twice_atanh(z: f32) -> f32 {
    let y = z * z;
    return z * fma(y, fma(y, fma(y, fma(y, 2.0 / 9.0, 2.0 / 7.0), 2.0 / 5.0), 2.0 / 3.0), 2.0);
}

// Natural logarithm of x > 0.
fn log_of(x: Scaled) -> f32 {
    var part = x.part;
    var exponent = x.exponent;
    if part > 1.4142135 {
        part = part * 0.5;
        exponent = exponent + 1;
    }
    let rest = twice_atanh((part - 1.0) / (part + 1.0));
    return f32(exponent) * LN_2_HEAD + (f32(exponent) * LN_2_TAIL + rest);
}

// log(1 + x) for x ≥ 0. It keeps the digits of a tiny x.
fn log_1p(x: Scaled) -> Scaled {
    if x.part == 0.0 || x.exponent < -26 {
        return x;
    }
    if x.exponent > 26 {
        return scaled(log_of(x), 0);
    }
    let v = value_of(x);
    if v <= 0.4 {
        return scaled(twice_atanh(v / (2.0 + v)), 0);
    }
    return scaled(log_of(scaled(1.0 + v, 0)), 0);
}
