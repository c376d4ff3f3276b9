//! What a plan is made for, validated.

use crate::batch::Pairs;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::loss::Loss;
use crate::options::Options;
use std::ops::Range;

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

/// Where a tower's gradient goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GradientOutput {
    /// f32, f16 or bf16.
    pub dtype: DType,
    /// Elements from row to row, at least d.
    pub row_stride: usize,
}

/// Batches with fewer queries take gradients of logits with 22 bits for bf16, too: launches, not products, decide how long they
/// take, and few terms do not average rounding errors out.
const FEW_ROWS: usize = 256;

/// Everything that decides what a call launches, but no embedding.
#[derive(Debug, Clone)]
pub struct Problem<'a> {
    pub(super) loss: &'a Loss,
    pub(super) pairs: Pairs<'a>,
    pub(super) options: Options,
    pub(super) dtype: DType,
    pub(super) dim: usize,
    pub(super) row_strides: [usize; 2],
    pub(super) rows: Range<usize>,
    pub(super) gradients: [Option<GradientOutput>; 2],
    pub(super) arithmetic: Arithmetic,
    pub(super) tile: Option<Tile>,
    pub(super) upstream: f64,
    pub(super) device_upstream: bool,
}

impl<'a> Problem<'a> {
    /// Embeddings of type `dtype` (f32, f16 or bf16) and dimension `dim`, contiguous; gradients of both towers as contiguous f32.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for f64; [`Error::InvalidArgument`] for a dimension of 0 or above 2²⁰, or more than 2²⁶ passages.
    pub fn new(loss: &'a Loss, pairs: &Pairs<'a>, options: &Options, dtype: DType, dim: usize) -> Result<Self> {
        const MAX_DIM: usize = 1 << 20;
        const MAX_PASSAGES: usize = 1 << 26;
        let arithmetic = match dtype {
            DType::F64 => return Err(Error::dtype("cuda", DType::F64, "f32, f16 and bf16; the reference takes f64")),
            DType::F32 => Arithmetic::F16x3,
            DType::BF16 if pairs.rows() >= FEW_ROWS => Arithmetic::F16,
            DType::F16 | DType::BF16 => Arithmetic::F16x2,
        };
        if dim == 0 || dim > MAX_DIM {
            return Err(Error::invalid("dim", dim.to_string(), format!("1 to {MAX_DIM}")));
        }
        if pairs.passages() > MAX_PASSAGES {
            return Err(Error::invalid("passages", pairs.passages().to_string(), format!("at most {MAX_PASSAGES}")));
        }
        let gradient = Some(GradientOutput { dtype: DType::F32, row_stride: dim });
        Ok(Self {
            loss,
            pairs: *pairs,
            options: *options,
            dtype,
            dim,
            row_strides: [dim; 2],
            rows: 0..pairs.rows(),
            gradients: [gradient; 2],
            arithmetic,
            tile: None,
            upstream: 1.0,
            device_upstream: false,
        })
    }

    /// Rows of q and p that start so many elements apart.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stride below d or above 2³¹.
    pub fn with_row_strides(mut self, query: usize, passage: usize) -> Result<Self> {
        for (argument, stride) in [("query.row_stride", query), ("passage.row_stride", passage)] {
            self.check_stride(argument, stride)?;
        }
        self.row_strides = [query, passage];
        Ok(self)
    }

    fn check_stride(&self, argument: &'static str, stride: usize) -> Result<()> {
        if stride < self.dim || stride > 1 << 31 {
            let allowed = format!("{} to {} elements", self.dim, 1_u64 << 31);
            return Err(Error::invalid(argument, stride.to_string(), allowed));
        }
        Ok(())
    }

    /// A shard: these rows against all queries and all passages.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range that is empty or beyond the batch.
    pub fn with_rows(mut self, rows: Range<usize>) -> Result<Self> {
        if rows.start >= rows.end || rows.end > self.pairs.rows() {
            let allowed = format!("a non-empty range within 0..{}", self.pairs.rows());
            return Err(Error::invalid("rows", format!("{rows:?}"), allowed));
        }
        self.rows = rows;
        Ok(self)
    }

    /// Types and strides of the gradients; `None` for a frozen tower, whose share of the work is left out. ∂L/∂q has the rows of
    /// the shard, ∂L/∂p all passages.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for f64, [`Error::InvalidArgument`] for a stride below d or above 2³¹.
    pub fn with_gradients(mut self, query: Option<GradientOutput>, passage: Option<GradientOutput>) -> Result<Self> {
        for (argument, output) in [("gradients.query", query), ("gradients.passage", passage)] {
            let Some(output) = output else { continue };
            if output.dtype == DType::F64 {
                let (what, allowed) = (format!("`{argument}` of type f64"), "f32, f16 and bf16".into());
                return Err(Error::Unsupported { backend: "cuda", what, allowed });
            }
            self.check_stride(argument, output.row_stride)?;
        }
        self.gradients = [query, passage];
        Ok(self)
    }

    /// Another arithmetic than the default of the type: `F16x3` and `Exact` hold every type, `F16` and `F16x2` round f32.
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.arithmetic = arithmetic;
        self
    }

    /// Another tile than the plan would take.
    pub fn with_tile(mut self, tile: Tile) -> Self {
        self.tile = Some(tile);
        self
    }

    /// The upstream gradient, a factor of all gradients.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless it is finite.
    pub fn with_upstream(mut self, upstream: f64) -> Result<Self> {
        crate::output::check_upstream(upstream)?;
        self.upstream = upstream;
        Ok(self)
    }

    /// A further factor, one f32 in the slot [`Upstream`](super::Slot::Upstream), read when the backward call runs.
    pub fn with_device_upstream(mut self) -> Self {
        self.device_upstream = true;
        self
    }

    /// M, N, d.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.pairs.rows(), self.pairs.passages(), self.dim)
    }
}
