//! Element types of embeddings and gradients.

use half::{bf16, f16};
use std::fmt;

/// Element type of an embedding or gradient matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary64. Only the [`reference`](mod@crate::reference) takes it.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl DType {
    /// All types, widest first.
    pub const ALL: [Self; 4] = [Self::F64, Self::F32, Self::F16, Self::BF16];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// `TYPE_F32` and the others of the shaders and kernels, which take no f64.
    pub(crate) const fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::BF16 => 2,
            Self::F64 => u32::MAX, // problems refuse it
        }
    }

    /// Name as in Rust: `f64`, `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A type an embedding can be made of. Sealed: the four of [`DType`].
pub trait Element: sealed::Sealed + bytemuck::Pod + Send + Sync + fmt::Debug {
    /// The tag.
    const DTYPE: DType;
    /// Exact widening.
    fn to_f64(self) -> f64;
    /// Rounding to nearest even; overflow gives an infinity, as IEEE 754 says.
    fn from_f64(value: f64) -> Self;
}

macro_rules! element {
    ($($t:ident $tag:ident $to:expr, $from:expr;)*) => {$(
        impl sealed::Sealed for $t {}
        impl Element for $t {
            const DTYPE: DType = DType::$tag;
            #[inline(always)]
            fn to_f64(self) -> f64 { ($to)(self) }
            #[inline(always)]
            fn from_f64(value: f64) -> Self { ($from)(value) }
        }
    )*};
}

element! {
    f64 F64 |x: f64| x, |x: f64| x;
    f32 F32 f64::from, |x: f64| x as f32;
    f16 F16 f16::to_f64, |x| f16::from_f32(to_odd(x));
    bf16 BF16 bf16::to_f64, |x| bf16::from_f32(to_odd(x));
}

/// x as f32, rounded such that rounding it again to 16 bits gives what rounding x once would: where f32 does not hold x, to the
/// neighbour whose last bit is 1, which no tie of the second rounding can have.
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let bits = nearest.to_bits();
    if f64::from(nearest) == x || x.is_nan() || bits & 1 == 1 {
        return nearest;
    }
    f32::from_bits(if f64::from(nearest).abs() < x.abs() { bits + 1 } else { bits - 1 })
}

mod sealed {
    pub trait Sealed {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_looks_at_every_bit() {
        let (tie, hair) = (1.0 + 2_f64.powi(-8), 2_f64.powi(-45));
        assert_eq!(<bf16 as Element>::from_f64(tie).to_f64(), 1.0);
        assert_eq!(<bf16 as Element>::from_f64(tie + hair).to_f64(), 1.0 + 2_f64.powi(-7));
        assert_eq!(<bf16 as Element>::from_f64(-tie - hair).to_f64(), -1.0 - 2_f64.powi(-7));
        assert_eq!(<f16 as Element>::from_f64(1.0 + 2_f64.powi(-11) + hair).to_f64(), 1.0 + 2_f64.powi(-10));
        assert_eq!(<f16 as Element>::from_f64(1.0 + 3.0 * 2_f64.powi(-11) - hair).to_f64(), 1.0 + 2_f64.powi(-10));
        assert_eq!(<f16 as Element>::from_f64(1e300), f16::INFINITY);
        assert_eq!(<bf16 as Element>::from_f64(-f64::INFINITY), bf16::NEG_INFINITY);
        assert!(<f16 as Element>::from_f64(f64::NAN).is_nan());
        assert_eq!(<f16 as Element>::from_f64(1e-300).to_bits(), 0);
    }
}
