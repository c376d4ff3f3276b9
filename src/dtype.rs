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
    f16 F16 f16::to_f64, f16::from_f64;
    bf16 BF16 bf16::to_f64, bf16::from_f64;
}

mod sealed {
    pub trait Sealed {}
}
