//! The inputs of a loss and all their validation. Whatever holds a [`Batch`] may rely on its shapes and indices.

use crate::call::Call;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::pairs::Pairs;
use crate::prefix::{self, Prefix};
use half::{bf16, f16};

/// Borrowed elements of any supported type.
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// binary64; only the reference takes it.
    F64(&'a [f64]),
    /// binary32.
    F32(&'a [f32]),
    /// binary16.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
}

/// Mutably borrowed elements of any supported type.
#[derive(Debug)]
pub enum DataMut<'a> {
    /// binary64.
    F64(&'a mut [f64]),
    /// binary32.
    F32(&'a mut [f32]),
    /// binary16.
    F16(&'a mut [f16]),
    /// bfloat16.
    BF16(&'a mut [bf16]),
}

/// Evaluates `$body` with `$x` bound to the slice inside a [`Data`] or [`DataMut`], whatever its type.
macro_rules! for_each_dtype {
    ($enum:ident, $value:expr, $x:ident => $body:expr) => {
        match $value {
            $crate::batch::$enum::F64($x) => $body,
            $crate::batch::$enum::F32($x) => $body,
            $crate::batch::$enum::F16($x) => $body,
            $crate::batch::$enum::BF16($x) => $body,
        }
    };
}
pub(crate) use for_each_dtype;

macro_rules! conversions {
    ($($t:ty, $tag:ident;)*) => {$(
        impl<'a> From<&'a [$t]> for Data<'a> {
            fn from(x: &'a [$t]) -> Self { Self::$tag(x) }
        }
        impl<'a> From<&'a Vec<$t>> for Data<'a> {
            fn from(x: &'a Vec<$t>) -> Self { Self::$tag(x) }
        }
        impl<'a> From<&'a mut [$t]> for DataMut<'a> {
            fn from(x: &'a mut [$t]) -> Self { Self::$tag(x) }
        }
        impl<'a> From<&'a mut Vec<$t>> for DataMut<'a> {
            fn from(x: &'a mut Vec<$t>) -> Self { Self::$tag(x) }
        }
    )*};
}

conversions! { f64, F64; f32, F32; f16, F16; bf16, BF16; }

fn dtype_of<T: Element>(_: &[T]) -> DType {
    T::DTYPE
}

/// Rejects a shape that the slice cannot hold, or that no index type can address.
fn check_shape(len: usize, rows: usize, dim: usize, row_stride: usize) -> Result<()> {
    if rows == 0 || rows > i32::MAX as usize {
        return Err(Error::invalid("rows", rows.to_string(), format!("1 to {}", i32::MAX)));
    }
    if dim == 0 || dim > i32::MAX as usize {
        return Err(Error::invalid("dim", dim.to_string(), format!("1 to {}", i32::MAX)));
    }
    if row_stride < dim {
        return Err(Error::invalid("row_stride", row_stride.to_string(), format!("at least dim = {dim} elements")));
    }
    let needed = (rows - 1).checked_mul(row_stride).and_then(|x| x.checked_add(dim));
    match needed {
        // Strides only ever multiply rows, so this also bounds every byte offset used later; the stride of a single row, which
        // nothing multiplies, still has to be a signed number for the matrix products.
        Some(needed) if needed.max(row_stride) <= isize::MAX as usize / 8 => {
            // A contiguous matrix must match exactly: a longer slice there is a shape error in the caller.
            let fits = if row_stride == dim { len == needed } else { len >= needed };
            if fits {
                return Ok(());
            }
            let allowed = if row_stride == dim { "exactly" } else { "at least" };
            Err(Error::invalid(
                "data",
                format!("a slice of {len} elements"),
                format!("{allowed} {needed} elements for {rows} rows of {dim} with a row stride of {row_stride}"),
            ))
        }
        _ => Err(Error::invalid(
            "row_stride",
            row_stride.to_string(),
            format!("strides whose {rows} rows stay below {} elements", isize::MAX as usize / 8),
        )),
    }
}

/// A borrowed row-major matrix of embeddings, rows × dim.
#[derive(Debug, Clone, Copy)]
pub struct Embeddings<'a> {
    data: Data<'a>,
    rows: usize,
    dim: usize,
    row_stride: usize,
}

impl<'a> Embeddings<'a> {
    /// A contiguous matrix: `data` holds exactly rows·dim elements.
    pub fn new(data: impl Into<Data<'a>>, rows: usize, dim: usize) -> Result<Self> {
        Self::with_row_stride(data, rows, dim, dim)
    }

    /// A matrix whose rows start `row_stride` ≥ dim elements apart; `data` holds at least
    /// (rows − 1)·row_stride + dim elements.
    pub fn with_row_stride(data: impl Into<Data<'a>>, rows: usize, dim: usize, row_stride: usize) -> Result<Self> {
        let data = data.into();
        check_shape(for_each_dtype!(Data, data, x => x.len()), rows, dim, row_stride)?;
        Ok(Self { data, rows, dim, row_stride })
    }

    /// The elements, as given.
    pub fn data(&self) -> Data<'a> {
        self.data
    }

    /// Number of embeddings.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of an embedding.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Elements from the start of one row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        for_each_dtype!(Data, self.data, x => dtype_of(x))
    }

    /// The same rows, cut off after their first `dim` entries, of which they have at least that many.
    pub(crate) fn cut(&self, dim: usize) -> Self {
        Self { dim, ..*self }
    }

    /// Row `row` widened to f64.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a row that the matrix does not have.
    pub fn row_to_f64(&self, row: usize) -> Result<Vec<f64>> {
        if row >= self.rows {
            return Err(Error::invalid("row", row.to_string(), format!("0 to {}", self.rows - 1)));
        }
        let range = row * self.row_stride..row * self.row_stride + self.dim;
        Ok(for_each_dtype!(Data, self.data, x => x[range].iter().map(|v| v.to_f64()).collect()))
    }
}

/// A mutably borrowed row-major matrix that receives gradients, rows × dim.
#[derive(Debug)]
pub struct EmbeddingsMut<'a> {
    data: DataMut<'a>,
    rows: usize,
    dim: usize,
    row_stride: usize,
}

impl<'a> EmbeddingsMut<'a> {
    /// A contiguous matrix: `data` holds exactly rows·dim elements.
    pub fn new(data: impl Into<DataMut<'a>>, rows: usize, dim: usize) -> Result<Self> {
        Self::with_row_stride(data, rows, dim, dim)
    }

    /// A matrix whose rows start `row_stride` ≥ dim elements apart. Elements between rows are never written.
    pub fn with_row_stride(data: impl Into<DataMut<'a>>, rows: usize, dim: usize, row_stride: usize) -> Result<Self> {
        let data = data.into();
        check_shape(for_each_dtype!(DataMut, &data, x => x.len()), rows, dim, row_stride)?;
        Ok(Self { data, rows, dim, row_stride })
    }

    /// The elements.
    pub fn data_mut(&mut self) -> &mut DataMut<'a> {
        &mut self.data
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Elements from the start of one row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        for_each_dtype!(DataMut, &self.data, x => dtype_of(x))
    }

    /// An error unless the matrix has this shape; `argument` names it in the sentence.
    pub(crate) fn expect_shape(&self, argument: &'static str, rows: usize, dim: usize) -> Result<()> {
        if (self.rows, self.dim) != (rows, dim) {
            return Err(Error::invalid(argument, format!("{} x {}", self.rows, self.dim), format!("{rows} x {dim}")));
        }
        Ok(())
    }
}

/// Numbers of contiguous rows into rows of `dim` elements, `row_stride` apart; what is between rows stays as it is.
pub(crate) fn copy_rows<T>(values: impl Iterator<Item = T>, to: &mut [T], dim: usize, row_stride: usize) {
    to.chunks_mut(row_stride).flat_map(|row| row.iter_mut().take(dim)).zip(values).for_each(|(to, value)| *to = value);
}

/// A validated batch: the embeddings of M queries and N ≥ M passages, joined with the [`Call`] that says what is to be computed.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    query: Embeddings<'a>,
    passage: Embeddings<'a>,
    pairs: Pairs<'a>,
}

impl<'a> Batch<'a> {
    /// q (M × d) against p (N × d), N ≥ M, both of one type.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for towers that do not fit together, and for whatever is wrong with `call`.
    pub fn new(call: &'a Call, query: Embeddings<'a>, passage: Embeddings<'a>) -> Result<Self> {
        Self::expect_like(&query, &passage)?;
        let pairs = call.pairs(query.rows(), passage.rows())?;
        prefix::of(call, query.dim())?;
        Ok(Self { query, passage, pairs })
    }

    /// An error unless both towers have one dimension and one type.
    pub(crate) fn expect_like(query: &Embeddings<'_>, passage: &Embeddings<'_>) -> Result<()> {
        if query.dim() != passage.dim() {
            return Err(Error::invalid(
                "passage",
                format!("embeddings of dimension {}", passage.dim()),
                format!("the dimension of the queries, {}", query.dim()),
            ));
        }
        if query.dtype() != passage.dtype() {
            return Err(Error::invalid(
                "passage",
                format!("of type {}", passage.dtype()),
                format!("the type of the queries, {}", query.dtype()),
            ));
        }
        Ok(())
    }

    /// What is to be computed.
    pub fn call(&self) -> &'a Call {
        self.pairs.call()
    }

    /// Who belongs to whom.
    pub fn pairs(&self) -> &Pairs<'a> {
        &self.pairs
    }

    /// M, the number of queries.
    pub fn rows(&self) -> usize {
        self.query.rows()
    }

    /// N, the number of passages.
    pub fn passages(&self) -> usize {
        self.passage.rows()
    }

    /// q.
    pub fn query(&self) -> Embeddings<'a> {
        self.query
    }

    /// p.
    pub fn passage(&self) -> Embeddings<'a> {
        self.passage
    }

    /// d.
    pub fn dim(&self) -> usize {
        self.query.dim()
    }

    /// The prefixes of weight above 0, shortest first; the whole embedding with weight 1 if the call has none.
    pub fn prefixes(&self) -> Vec<Prefix> {
        prefix::of(self.call(), self.dim()).unwrap_or_default() // checked when the batch was made
    }

    /// The same rows, cut off after their first `dim` entries.
    pub(crate) fn cut(&self, dim: usize) -> Self {
        Self { query: self.query.cut(dim), passage: self.passage.cut(dim), ..*self }
    }

    /// Element type of both towers.
    pub fn dtype(&self) -> DType {
        self.query.dtype()
    }
}
