//! What is particular to CUDA in a problem: what multiplies, and in tiles of which size.

use crate::dtype::DType;
use crate::problem::Problem;

/// What multiplies. Sums of products are f32, rounded to nearest at least every 64 terms, whatever multiplies them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Tensor cores on f16. Every row is scaled by a power of two to a norm near 2¹², so bf16 inputs, too, are exact down to 2⁻³⁷
    /// of their norm. Gradients of logits are rounded to f16, 11 bits: up to 2.7e-4 of the gradients on the golden files, on the
    /// emulator. The default for bf16 from 256 queries on.
    F16,
    /// As `F16`, but gradients of logits are sums of two f16, 22 bits: 18 B²d operations instead of 12. The default for f16, and for
    /// fewer queries in bf16.
    F16x2,
    /// Tensor cores on sums of two f16, 22 bits, by three products: 36 B²d operations. The default for f32.
    F16x3,
    /// Fused multiply-add on f32: slow, for checking the others.
    Exact,
}

impl Arithmetic {
    /// As in the names of kernels.
    pub(super) const fn suffix(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F16x2 => "f16x2",
            Self::F16x3 => "f16x3",
            Self::Exact => "f32",
        }
    }

    /// The one that computes the same cosines.
    pub(super) const fn of_cosines(self) -> Self {
        match self {
            Self::F16x2 => Self::F16,
            Self::F16 | Self::F16x3 | Self::Exact => self,
        }
    }

    /// Bytes of an element.
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::F16x2 | Self::F16x3 => 2,
            Self::Exact => 4,
        }
    }

    /// Planes of packed embeddings.
    pub(super) const fn planes(self) -> usize {
        match self {
            Self::F16 | Self::F16x2 | Self::Exact => 1,
            Self::F16x3 => 2,
        }
    }

    /// Planes of gradients of logits.
    pub(super) const fn gradient_planes(self) -> usize {
        match self {
            Self::F16 | Self::Exact => 1,
            Self::F16x2 | Self::F16x3 => 2,
        }
    }
}

/// Edge of a tile of cosines, which one block of threads computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tile {
    /// 64: more blocks for small batches.
    Small,
    /// 128: half the traffic for each product.
    Large,
}

impl Tile {
    /// In rows and columns.
    pub const fn edge(self) -> usize {
        match self {
            Self::Small => 64,
            Self::Large => 128,
        }
    }

    /// Threads of a block.
    pub(super) const fn threads(self) -> u32 {
        2 * self.edge() as u32
    }

    /// Three stages of both operands, 128 bytes of each row.
    pub(super) const fn shared_bytes(self) -> u32 {
        3 * 2 * 128 * self.edge() as u32
    }
}

/// What a caller may choose; the plan does otherwise.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Choice {
    arithmetic: Option<Arithmetic>,
    tile: Option<Tile>,
}

/// How the CUDA backend computes it.
impl Problem<'_> {
    /// Another arithmetic than the default of the type: `F16x3` and `Exact` hold every type, `F16` and `F16x2` round f32.
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.cuda.arithmetic = Some(arithmetic);
        self
    }

    /// Another tile than the plan would take.
    pub fn with_tile(mut self, tile: Tile) -> Self {
        self.cuda.tile = Some(tile);
        self
    }

    pub(super) fn arithmetic(&self) -> Arithmetic {
        self.cuda.arithmetic.unwrap_or(match self.dtype {
            DType::F32 | DType::F64 => Arithmetic::F16x3, // problems refuse f64
            DType::BF16 if self.averages_rounding() => Arithmetic::F16,
            DType::F16 | DType::BF16 => Arithmetic::F16x2,
        })
    }

    pub(super) fn tile(&self) -> Option<Tile> {
        self.cuda.tile
    }
}
