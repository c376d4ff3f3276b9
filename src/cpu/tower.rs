//! Raw embeddings as the passes read them: their norms, and panels of f32, which are copies only if need be.

use super::matmul::MatRef;
use super::simd::{widen_bf16, widen_f16};
use crate::batch::{Data, Embeddings, for_each_dtype};
use crate::call::ZeroNorm;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::tower::Tower;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::ops::Range;

/// If a norm is outside 2^±RANGE, f32 products of raw embeddings may lose bits or overflow. So the tower is scaled as it is read.
const RANGE: i32 = 30;

/// Norms of a tower: O(rows) numbers. They do not borrow the embeddings.
#[derive(Debug, Clone)]
pub(super) struct Norms {
    /// 1/‖x‖ of each row; 0 for a row of norm zero under [`ZeroNorm::ZeroGradient`].
    pub inverse: Vec<f64>,
    /// Exponent e of each row, which is read as x·2^−e; `None` if every row is read as it is.
    pub shift: Option<Vec<i32>>,
}

impl Norms {
    /// Norms of all rows. Squares are summed in f64, in which those of an f32 neither overflow nor underflow.
    pub(super) fn new(tower: Tower, x: Embeddings<'_>, policy: ZeroNorm) -> Result<Self> {
        let mut inverse = vec![0.0; x.rows()];
        inverse.par_iter_mut().enumerate().for_each(|(row, inverse)| *inverse = sum_of_squares(x, row));
        let mut wild = false;
        for (row, value) in inverse.iter_mut().enumerate() {
            if !value.is_finite() {
                // Squares of finite f32 numbers are finite in f64, so the row itself holds NaN or an infinity.
                let bad = x.row_to_f64(row)?.into_iter().enumerate().find(|(_, v)| !v.is_finite());
                let (column, value) = bad.unwrap_or((0, *value));
                return Err(Error::NonFinite { tower, row, column, value });
            }
            if *value == 0.0 {
                match policy {
                    ZeroNorm::Error => return Err(Error::ZeroNorm { tower, row }),
                    ZeroNorm::ZeroGradient => continue,
                }
            }
            let norm = value.sqrt();
            wild |= norm.log2().abs() > f64::from(RANGE);
            *value = 1.0 / norm;
        }
        let shift =
            wild.then(|| inverse.iter().map(|i| if *i == 0.0 { 0 } else { -i.log2().round() as i32 }).collect());
        Ok(Self { inverse, shift })
    }

    /// 1/‖x·2^−e‖ of a row. It scales products of panels to cosines.
    pub(super) fn panel_inverse(&self, row: usize) -> f32 {
        (self.inverse[row] * self.shift.as_ref().map_or(1.0, |s| f64::from(s[row]).exp2())) as f32
    }
}

fn sum_of_squares(x: Embeddings<'_>, row: usize) -> f64 {
    let range = row * x.row_stride()..row * x.row_stride() + x.dim();
    for_each_dtype!(Data, x.data(), d => lanes(d[range].iter(), |v| { let v = v.to_f64(); v * v }))
}

/// x_row · y_row in f64.
pub(super) fn dot(x: Embeddings<'_>, x_row: usize, y: Embeddings<'_>, y_row: usize) -> f64 {
    let range = |m: &Embeddings<'_>, row: usize| row * m.row_stride()..row * m.row_stride() + m.dim();
    let (x_range, y_range) = (range(&x, x_row), range(&y, y_row));
    match (x.data(), y.data()) {
        (Data::F32(a), Data::F32(b)) => {
            lanes(a[x_range].iter().zip(&b[y_range]), |(a, b)| f64::from(*a) * f64::from(*b))
        }
        _ => {
            let widened = |m: Embeddings<'_>, range: Range<usize>| -> Vec<f64> {
                for_each_dtype!(Data, m.data(), d => d[range].iter().map(|v| v.to_f64()).collect())
            };
            widened(x, x_range).iter().zip(widened(y, y_range)).map(|(a, b)| a * b).sum()
        }
    }
}

/// Σ f over the items, in eight running sums. Additions to a single one would have to wait for each other.
pub(super) fn lanes<T>(mut items: impl ExactSizeIterator<Item = T>, f: impl Fn(T) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    while items.len() >= sums.len() {
        for sum in &mut sums {
            *sum += items.next().map_or(0.0, &f);
        }
    }
    sums.iter().sum::<f64>() + items.map(f).sum::<f64>()
}

/// The embeddings of one tower, by the indices of its space.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub x: Embeddings<'a>,
    pub norms: &'a Norms,
    /// Row of `x` behind each index; `None` for the identity.
    pub order: Option<&'a [u32]>,
}

impl<'a> Panels<'a> {
    /// Whether panels are views of the caller's memory, not copies.
    pub(super) fn is_direct(&self) -> bool {
        matches!(self.x.data(), Data::F32(_)) && self.norms.shift.is_none() && self.order.is_none()
    }

    /// Rows `rows` (indices of the space) and columns `cols` as f32. It is a view if possible, else a copy in `scratch`.
    pub(super) fn panel<'s>(&self, rows: Range<usize>, cols: Range<usize>, scratch: &'s mut Vec<f32>) -> MatRef<'s>
    where
        'a: 's,
    {
        let stride = self.x.row_stride();
        if let (Data::F32(data), true) = (self.x.data(), self.is_direct()) {
            return MatRef::new(&data[rows.start * stride + cols.start..], rows.len(), cols.len(), stride);
        }
        scratch.resize(rows.len() * cols.len(), 0.0);
        for (out, index) in scratch.chunks_exact_mut(cols.len()).zip(rows.clone()) {
            let row = self.order.map_or(index, |o| o[index] as usize);
            let at = row * stride + cols.start..row * stride + cols.end;
            match self.x.data() {
                Data::F64(x) => out.iter_mut().zip(&x[at]).for_each(|(o, v)| *o = *v as f32),
                Data::F32(x) => out.copy_from_slice(&x[at]),
                Data::F16(x) => widen_f16(out, x[at].reinterpret_cast()),
                Data::BF16(x) => widen_bf16(out, x[at].reinterpret_cast()),
            }
            if let Some(shift) = &self.norms.shift {
                // This is in f64, because 2^−e of a subnormal row can be too large for f32.
                let scale = f64::from(-shift[row]).exp2();
                out.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
            }
        }
        MatRef::new(scratch, rows.len(), cols.len(), cols.len())
    }
}
