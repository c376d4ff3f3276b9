//! What a GPU backend plans for, validated: everything but the embeddings.

use crate::call::Call;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::identity::Identity;
use crate::mask::Keys;
use crate::pairs::Pairs;
use crate::prefix::{self, Prefix};
use std::ops::Range;

/// Where a tower's gradient goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GradientOutput {
    /// f32, f16 or bf16.
    pub dtype: DType,
    /// Elements from row to row, at least d.
    pub row_stride: usize,
}

/// Everything that decides what a call launches, but no embedding. `Choices` are what one backend alone lets its callers choose, as
/// [`cuda::Problem`](crate::cuda::Problem) does.
#[derive(Debug, Clone)]
pub struct Problem<'a, Choices> {
    pub(crate) pairs: Pairs<'a>,
    pub(crate) dtype: DType,
    pub(crate) dim: usize,
    /// Those of weight above 0, shortest first.
    pub(crate) prefixes: Vec<Prefix>,
    pub(crate) row_strides: [usize; 2],
    pub(crate) rows: Range<usize>,
    pub(crate) gradients: [Option<GradientOutput>; 2],
    pub(crate) upstream: f64,
    pub(crate) device_upstream: bool,
    /// That of the call, unless CUDA's `with_room_for` raised it.
    pub(crate) workspace_bytes: Option<usize>,
    pub(crate) choices: Choices,
}

impl<'a, Choices: Default> Problem<'a, Choices> {
    /// What [`Call::pairs`] gives, on embeddings of type `dtype` (f32, f16 or bf16) and dimension `dim`, contiguous; gradients of
    /// both towers as contiguous f32.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for f64; [`Error::InvalidArgument`] for a dimension of 0 or above 2²⁰, more than 2²⁶ passages, more than 2⁴⁰
    /// numbers in them, or a prefix longer than the embeddings.
    pub fn new(pairs: Pairs<'a>, dtype: DType, dim: usize) -> Result<Self> {
        const MAX_DIM: usize = 1 << 20;
        const MAX_PASSAGES: usize = 1 << 26;
        const MAX_NUMBERS: usize = 1 << 40;
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 => {}
            DType::F64 => return Err(Error::dtype("cuda, wgpu", dtype, "f32, f16 and bf16; the reference takes f64")),
        }
        if dim == 0 || dim > MAX_DIM {
            return Err(Error::invalid("dim", dim.to_string(), format!("1 to {MAX_DIM}")));
        }
        if pairs.passages() > MAX_PASSAGES {
            return Err(Error::invalid("passages", pairs.passages().to_string(), format!("at most {MAX_PASSAGES}")));
        }
        if pairs.passages() * dim > MAX_NUMBERS {
            let allowed = format!("at most {} for {} passages", MAX_NUMBERS / pairs.passages(), pairs.passages());
            return Err(Error::invalid("dim", dim.to_string(), allowed));
        }
        let prefixes = prefix::of(pairs.call(), dim)?;
        let gradient = Some(GradientOutput { dtype: DType::F32, row_stride: dim });
        Ok(Self {
            pairs,
            dtype,
            dim,
            prefixes,
            row_strides: [dim; 2],
            rows: 0..pairs.rows(),
            gradients: [gradient; 2],
            upstream: 1.0,
            device_upstream: false,
            workspace_bytes: pairs.call().workspace_bytes(),
            choices: Choices::default(),
        })
    }
}

impl<'a, Choices> Problem<'a, Choices> {
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
                return Err(Error::Unsupported { backend: "cuda, wgpu", what, allowed });
            }
            self.check_stride(argument, output.row_stride)?;
        }
        self.gradients = [query, passage];
        Ok(self)
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

    /// A further factor, one f32 in the slot `Upstream`, read when the backward call runs.
    pub fn with_device_upstream(mut self) -> Self {
        self.device_upstream = true;
        self
    }

    /// What results of this problem must have in common with those of another to be of the same. O(M + N).
    pub(crate) fn identity(&self) -> Identity {
        Identity::new(&self.pairs, &Keys::new(&self.pairs), self.dtype, self.dim)
    }

    /// What is to be computed.
    pub(crate) fn call(&self) -> &'a Call {
        self.pairs.call()
    }

    /// M, N, d.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.pairs.rows(), self.pairs.passages(), self.dim)
    }
}
