//! The inputs of a loss and all their validation. Whatever holds a [`Batch`] may rely on its shapes and indices.

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use half::{bf16, f16};
use std::fmt;

/// One of the two sides of a dual encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tower {
    /// The side of q.
    Query,
    /// The side of p.
    Passage,
}

impl fmt::Display for Tower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Query => "query",
            Self::Passage => "passage",
        })
    }
}

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

    /// Row `row` widened to f64. Panics if `row` is out of range, like slice indexing.
    pub fn row_to_f64(&self, row: usize) -> Vec<f64> {
        let range = row * self.row_stride..row * self.row_stride + self.dim;
        for_each_dtype!(Data, self.data, x => x[range].iter().map(|v| v.to_f64()).collect())
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

/// Who sees a hard negative that has an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scope {
    /// Every row.
    #[default]
    All,
    /// Only the row that owns it; in the blocks QP and PP the others drop it.
    Own,
}

/// A validated batch: M queries, N ≥ M passages, and who is whose positive, duplicate and hard negative.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    query: Embeddings<'a>,
    passage: Embeddings<'a>,
    positives: Option<&'a [u32]>,
    weights: Option<&'a [f32]>,
    query_ids: Option<&'a [i64]>,
    passage_ids: Option<&'a [i64]>,
    owners: Option<&'a [i32]>,
    scope: Scope,
}

impl<'a> Batch<'a> {
    /// q (M × d) against p (N × d), N ≥ M, both of one type; row i's positive is passage i, every other pair is a negative.
    pub fn new(query: Embeddings<'a>, passage: Embeddings<'a>) -> Result<Self> {
        if query.dim() != passage.dim() {
            return Err(Error::invalid(
                "passage",
                format!("embeddings of dimension {}", passage.dim()),
                format!("the dimension of the queries, {}", query.dim()),
            ));
        }
        if query.rows() > passage.rows() {
            return Err(Error::invalid(
                "passage",
                format!("{} rows", passage.rows()),
                format!("at least as many rows as there are queries, {}", query.rows()),
            ));
        }
        if query.dtype() != passage.dtype() {
            return Err(Error::invalid(
                "passage",
                format!("of type {}", passage.dtype()),
                format!("the type of the queries, {}", query.dtype()),
            ));
        }
        Ok(Self {
            query,
            passage,
            positives: None,
            weights: None,
            query_ids: None,
            passage_ids: None,
            owners: None,
            scope: Scope::All,
        })
    }

    fn check_len(argument: &'static str, len: usize, wanted: usize, what: &str) -> Result<()> {
        if len != wanted {
            return Err(Error::invalid(
                argument,
                format!("a slice of {len} elements"),
                format!("{wanted}, one for each {what}"),
            ));
        }
        Ok(())
    }

    /// π: for each row the passage of its positive, 0 ≤ π(i) < N. Several rows may share one.
    pub fn with_positives(mut self, positives: &'a [u32]) -> Result<Self> {
        Self::check_len("positives", positives.len(), self.rows(), "query")?;
        if let Some(i) = positives.iter().position(|&n| n as usize >= self.passages()) {
            return Err(Error::invalid(
                "positives",
                format!("{} at row {i}", positives[i]),
                format!("0 to {}, the rows of the passages", self.passages() - 1),
            ));
        }
        self.positives = Some(positives);
        Ok(self)
    }

    /// w: a weight ≥ 0 for each row, with a sum above 0; the loss uses w / Σw. A row of weight 0 still is a negative of the
    /// others.
    pub fn with_weights(mut self, weights: &'a [f32]) -> Result<Self> {
        Self::check_len("weights", weights.len(), self.rows(), "query")?;
        if let Some(i) = weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
            return Err(Error::invalid(
                "weights",
                format!("{} at row {i}", weights[i]),
                "finite numbers of at least 0",
            ));
        }
        if weights.iter().all(|&w| w == 0.0) {
            return Err(Error::invalid("weights", "0 in every row", "at least one weight above 0"));
        }
        self.weights = Some(weights);
        Ok(self)
    }

    /// An identity for each query; queries of equal id are never negatives of each other. Default: all different.
    pub fn with_query_ids(mut self, ids: &'a [i64]) -> Result<Self> {
        Self::check_len("query_ids", ids.len(), self.rows(), "query")?;
        self.query_ids = Some(ids);
        Ok(self)
    }

    /// An identity for each passage; passages of equal id are never negatives of each other, nor of each other's queries.
    /// Default: all different.
    pub fn with_passage_ids(mut self, ids: &'a [i64]) -> Result<Self> {
        Self::check_len("passage_ids", ids.len(), self.passages(), "passage")?;
        self.passage_ids = Some(ids);
        Ok(self)
    }

    /// For each passage the row whose hard negative it is, or −1 for everyone's; with [`Scope::Own`] the other rows drop it.
    pub fn with_hard_negative_owners(mut self, owners: &'a [i32], scope: Scope) -> Result<Self> {
        Self::check_len("owners", owners.len(), self.passages(), "passage")?;
        if let Some(n) = owners.iter().position(|&o| o < -1 || o as i64 >= self.rows() as i64) {
            return Err(Error::invalid(
                "owners",
                format!("{} at passage {n}", owners[n]),
                format!("-1 (everyone's) or a row, 0 to {}", self.rows() - 1),
            ));
        }
        self.owners = Some(owners);
        self.scope = scope;
        Ok(self)
    }

    /// q.
    pub fn query(&self) -> Embeddings<'a> {
        self.query
    }

    /// p.
    pub fn passage(&self) -> Embeddings<'a> {
        self.passage
    }

    /// M, the number of queries.
    pub fn rows(&self) -> usize {
        self.query.rows()
    }

    /// N, the number of passages.
    pub fn passages(&self) -> usize {
        self.passage.rows()
    }

    /// d.
    pub fn dim(&self) -> usize {
        self.query.dim()
    }

    /// Element type of both towers.
    pub fn dtype(&self) -> DType {
        self.query.dtype()
    }

    /// π(row).
    pub fn positive(&self, row: usize) -> usize {
        self.positives.map_or(row, |p| p[row] as usize)
    }

    /// Weight of `row` as given; 1 by default.
    pub fn weight(&self, row: usize) -> f64 {
        self.weights.map_or(1.0, |w| f64::from(w[row]))
    }

    /// w̃ = w / Σw.
    pub fn normalized_weights(&self) -> Vec<f64> {
        let total: f64 = (0..self.rows()).map(|i| self.weight(i)).sum();
        (0..self.rows()).map(|i| self.weight(i) / total).collect()
    }

    /// The ids of the queries, if any were given.
    pub fn query_ids(&self) -> Option<&'a [i64]> {
        self.query_ids
    }

    /// The ids of the passages, if any were given.
    pub fn passage_ids(&self) -> Option<&'a [i64]> {
        self.passage_ids
    }

    /// The owners of hard negatives, if any were given and only their owners see them.
    pub fn exclusive_owners(&self) -> Option<&'a [i32]> {
        match self.scope {
            Scope::All => None,
            Scope::Own => self.owners,
        }
    }

    /// One line for messages: `7 queries x 9 passages of dimension 5, f32`.
    pub(crate) fn describe(&self) -> String {
        format!("{} queries x {} passages of dimension {}, {}", self.rows(), self.passages(), self.dim(), self.dtype())
    }
}
