//! Sixteen f32 lanes as arrays. The compiler turns the loops into the vectors of the target. The arithmetic, and so every bit, is the same
//! on all targets with fused multiply-add.

/// Lanes of a chunk: one AVX-512 register, two AVX registers, four NEON registers.
pub(super) const LANES: usize = 16;
pub(super) type F = [f32; LANES];
pub(super) type U = [u32; LANES];

/// An array with the value of an expression for each lane. A macro, because a closure that is not inlined would be compiled
/// without the instruction set of its caller.
macro_rules! lanes {
    ($l:ident => $value:expr) => {{
        let mut out = [Default::default(); $crate::cpu::simd::LANES];
        let mut $l = 0;
        while $l < $crate::cpu::simd::LANES {
            out[$l] = $value;
            $l += 1;
        }
        out
    }};
}
pub(super) use lanes;

/// All bits are set if the condition is true, and none if it is false.
#[inline(always)]
pub(super) fn bits(condition: bool) -> u32 {
    u32::from(condition).wrapping_neg()
}

/// `x` where the mask is set, else `other`.
#[inline(always)]
pub(super) fn select(mask: &U, x: &F, other: f32) -> F {
    lanes!(l => f32::from_bits((x[l].to_bits() & mask[l]) | (other.to_bits() & !mask[l])))
}

#[inline(always)]
pub(super) fn load(x: &[f32], at: usize) -> F {
    let x = &x[at..at + LANES];
    lanes!(l => x[l])
}

#[inline(always)]
pub(super) fn load_keys(x: &[u32], at: usize) -> U {
    let x = &x[at..at + LANES];
    lanes!(l => x[l])
}

#[inline(always)]
fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// β·log₂e as two floats whose sum is exact to 2⁻⁴⁸. β must not be rounded to one f32, because a logit near 100 has a hundred times that
/// error.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beta {
    high: f32,
    low: f32,
}

impl Beta {
    pub(super) fn new(beta: f64) -> Self {
        let exact = beta * std::f64::consts::LOG2_E;
        let high = exact as f32;
        Self { high, low: (exact - f64::from(high)) as f32 }
    }

    /// The integer nearest to β·log₂e·cosine. As an offset of exponents, it is exact in f32.
    pub(super) fn exponent(self, cosine: f32) -> f32 {
        (self.high * cosine).round()
    }
}

/// 2^(s·β·log₂e − k) for whole numbers k, with a relative error below 4e-7. An exponent below −126.5 gives 0. One above 127 gives some
/// number from 2^126 to 2^128, which is finite. The exponent is split into a whole number n and a rest f in [−½, ½] before k is subtracted
/// from n, so no offset costs a digit. Fused multiply-add gives f without error. Then the only errors are those of the polynomial and the
/// rounding of s.
#[inline(always)]
pub(super) fn exp2_scaled<const FMA: bool>(s: &F, beta: Beta, k: &F) -> F {
    lanes!(l => {
        let n = mul_add::<FMA>(s[l], beta.high, ROUND) - ROUND;
        let f = mul_add::<FMA>(s[l], beta.low, mul_add::<FMA>(s[l], beta.high, -n));
        scaled_exp2::<FMA>(f, n - k[l])
    })
}

/// 1.5·2²³: adding it leaves the nearest integer in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// 2^f·2^n. A minimax polynomial of degree 6 on [−½, ½] gives the first factor, with a relative error of 1.9e-9 before rounding. Integer
/// arithmetic makes the second of the whole number n.
#[inline(always)]
fn scaled_exp2<const FMA: bool>(f: f32, n: f32) -> f32 {
    let mut p = 1.534_581_2e-4;
    p = mul_add::<FMA>(p, f, 1.339_993_1e-3);
    p = mul_add::<FMA>(p, f, 9.618_489e-3);
    p = mul_add::<FMA>(p, f, 5.550_328_8e-2);
    p = mul_add::<FMA>(p, f, 2.402_264_7e-1);
    p = mul_add::<FMA>(p, f, 6.931_472e-1);
    p = mul_add::<FMA>(p, f, 1.0);
    let shifted = n.clamp(-127.0, 127.0) + ROUND;
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// Defines `$name(args)` which runs `$body::<FMA>(args)` compiled for the best instruction set of this processor.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$(const $flag:ident),*>($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty = $body:ident) => {
        $(#[$doc])*
        $vis fn $name<$(const $flag: bool),*>($($arg: $ty),*) -> $ret {
            #[cfg(target_arch = "x86_64")]
            {
                #[cfg(feature = "avx512")]
                {
                    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,fma")]
                    unsafe fn avx512<$(const $flag: bool),*>($($arg: $ty),*) -> $ret { $body::<true, $($flag),*>($($arg),*) }
                    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("fma")
                    {
                        // SAFETY: the processor was just asked for every feature that the function enables.
                        return unsafe { avx512::<$($flag),*>($($arg),*) };
                    }
                }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2<$(const $flag: bool),*>($($arg: $ty),*) -> $ret { $body::<true, $($flag),*>($($arg),*) }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the processor was just asked for every feature that the function enables.
                    return unsafe { avx2::<$($flag),*>($($arg),*) };
                }
                $body::<false, $($flag),*>($($arg),*)
            }
            // Every aarch64 has fused multiply-add. Other targets may lack it, and in software it would be far slower than two roundings.
            #[cfg(not(target_arch = "x86_64"))]
            $body::<{ cfg!(target_arch = "aarch64") }, $($flag),*>($($arg),*)
        }
    };
}
pub(super) use dispatch;

dispatch! {
    /// Widens finite bfloat16 numbers, given as bits, without error. The bits are the upper half of an f32.
    pub(super) fn widen_bf16<>(out: &mut [f32], x: &[u16]) -> () = widen_bf16_body
}

#[inline(always)]
fn widen_bf16_body<const FMA: bool>(out: &mut [f32], x: &[u16]) {
    out.iter_mut().zip(x).for_each(|(o, bits)| *o = f32::from_bits(u32::from(*bits) << 16));
}

dispatch! {
    /// Widens finite binary16 numbers, given as bits, without error. Shifting puts exponent and mantissa where an f32 has them. Read as
    /// f32, this is the number times 2⁻¹¹², also if it is subnormal. A multiplication undoes that without rounding.
    pub(super) fn widen_f16<>(out: &mut [f32], x: &[u16]) -> () = widen_f16_body
}

#[inline(always)]
fn widen_f16_body<const FMA: bool>(out: &mut [f32], x: &[u16]) {
    const UNDO: f32 = f32::from_bits((127 + 112) << 23);
    for (o, bits) in out.iter_mut().zip(x) {
        let bits = u32::from(*bits);
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * UNDO;
        *o = f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16);
    }
}

/// The sum of the lanes in f64, in their order.
#[inline(always)]
pub(super) fn sum(x: &F) -> f64 {
    x.iter().map(|&v| f64::from(v)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_accurate_and_flush() {
        // β·log₂e is 1, so that cosines are exponents.
        let beta = Beta::new(std::f64::consts::LN_2);
        let exp2 = |x: f32, k: f32| {
            let (s, k) = ([x; LANES], [k; LANES]);
            [exp2_scaled::<true>(&s, beta, &k)[0], exp2_scaled::<false>(&s, beta, &k)[0]]
        };
        let mut worst = 0.0_f64;
        for i in -126_000..=126_000 {
            let x = i as f32 / 1000.0;
            for got in exp2(x, 0.0) {
                let want = f64::from(x).exp2();
                worst = worst.max((f64::from(got) - want).abs() / want);
            }
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!([exp2(-128.0, 0.0), exp2(-1e6, 0.0), exp2(0.0, 1e9)], [[0.0; 2]; 3]);
        assert_eq!(exp2(0.0, 0.0), [1.0; 2]);
        // An offset is a power of two, to the bit.
        for k in [-60.0_f32, -16.0, 3.0, 60.0] {
            for i in -500..500 {
                let x = i as f32 / 37.0;
                assert_eq!(exp2(x, k), exp2(x, 0.0).map(|e| e * (-k).exp2()), "{x}, {k}");
            }
        }
    }

    #[test]
    fn widening_is_exact_for_every_finite_number() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let mut wide = vec![0.0; all.len()];
        widen_f16(&mut wide, &all);
        for (bits, got) in all.iter().zip(&wide) {
            let want = half::f16::from_bits(*bits);
            assert!(!want.is_finite() || want.to_f32().to_bits() == got.to_bits(), "{bits:#x}: {got}");
        }
        widen_bf16(&mut wide, &all);
        for (bits, got) in all.iter().zip(&wide) {
            let want = half::bf16::from_bits(*bits);
            assert!(!want.is_finite() || want.to_f32().to_bits() == got.to_bits(), "{bits:#x}: {got}");
        }
    }

    #[test]
    fn large_logits_keep_their_digits() {
        // τ = 0.001: s·β·log₂e is near 1440, where one f32 ulp is 1.2e-4.
        let beta = Beta::new(1000.0);
        for i in 0..1000 {
            let s = 0.9 + i as f32 * 1e-4;
            let k = beta.exponent(s);
            let got = exp2_scaled::<true>(&[s; LANES], beta, &[k; LANES])[0];
            let want = (f64::from(s) * 1000.0 * std::f64::consts::LOG2_E - f64::from(k)).exp2();
            approx::assert_relative_eq!(f64::from(got), want, max_relative = 4e-7);
        }
    }
}
