//! Raw embeddings as the passes read them: their norms, and panels of f32, which are copies only if need be.

use super::matmul::MatRef;
use super::simd::{widen_bf16, widen_f16};
use crate::batch::{Data, Embeddings, for_each_dtype};
use crate::call::{Call, ZeroNorm};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::prefix::Prefix;
use crate::tower::Tower;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::ops::Range;

/// If a norm is outside 2^±RANGE, f32 products of raw embeddings may lose bits or overflow. So the tower is scaled as it is read.
const RANGE: i32 = 30;
/// A panel of so few columns is copied if there is anything between its rows. The library of matrix products has a routine of its own for
/// such panels, which rounds another way for another row stride.
const NARROW: usize = 2;
/// The least square of a prefix's norm, where that of the longest prefix is 1. Gradients of logits are divided by the norms of both
/// embeddings, and f32 holds them down to norms of 2⁻⁴⁰ beside embeddings that are read with norms of 2^±RANGE.
const LEAST_SHARE: f64 = 1.0 / (1_u128 << 80) as f64;

/// Norms of a tower: O(rows) numbers. They do not borrow the embeddings.
#[derive(Debug, Clone)]
pub(super) struct Norms {
    /// By prefix: 1/‖x‖ of each row; 0 for a row of norm zero under [`ZeroNorm::ZeroGradient`].
    pub inverse: Vec<Vec<f64>>,
    /// Exponent e of each row, which is read as x·2^−e; `None` if every row is read as it is.
    pub shift: Option<Vec<i32>>,
}

impl Norms {
    /// Norms of all rows and prefixes. Squares are summed in f64, in which those of an f32 neither overflow nor underflow.
    pub(super) fn new(tower: Tower, x: Embeddings<'_>, prefixes: &[Prefix], call: &Call) -> Result<Self> {
        let mut inverse = vec![vec![0.0; x.rows()]; prefixes.len()];
        let mut start = 0;
        for (k, prefix) in prefixes.iter().enumerate() {
            let (shorter, rest) = inverse.split_at_mut(k);
            let shorter = shorter.last();
            rest[0].par_iter_mut().enumerate().for_each(|(row, sum)| {
                *sum = shorter.map_or(0.0, |s| s[row]) + sum_of_squares(x, row, start..prefix.dim);
            });
            start = prefix.dim;
        }
        let mut wild = false;
        for row in 0..x.rows() {
            let whole = inverse[prefixes.len() - 1][row];
            if !whole.is_finite() {
                // Squares of finite f32 numbers are finite in f64, so the row itself holds NaN or an infinity.
                let bad = x.cut(start).row_to_f64(row)?.into_iter().enumerate().find(|(_, v)| !v.is_finite());
                let (column, value) = bad.unwrap_or((0, whole));
                return Err(Error::NonFinite { tower, row, column, value });
            }
            for (of_prefix, prefix) in inverse.iter_mut().zip(prefixes) {
                let sum = of_prefix[row];
                if sum == 0.0 {
                    match call.zero_norm() {
                        ZeroNorm::Error => {
                            return Err(Error::ZeroNorm { tower, row, prefix: call.prefixes().map(|_| prefix.dim) });
                        }
                        ZeroNorm::ZeroGradient => continue,
                    }
                }
                if sum < LEAST_SHARE * whole {
                    let value = format!("an embedding in row {row} with a norm of {:e}", whole.sqrt());
                    let value = format!("{value}, and of {:e} in its first {} entries", sum.sqrt(), prefix.dim);
                    let argument = if tower == Tower::Query { "query" } else { "passage" };
                    let allowed = "a norm of 0, or at least 2^-40 of that of the longest prefix, in every prefix";
                    return Err(Error::invalid(argument, value, allowed));
                }
                let norm = sum.sqrt();
                wild |= norm.log2().abs() > f64::from(RANGE);
                of_prefix[row] = 1.0 / norm;
            }
        }
        let exponent = |i: &f64| if *i == 0.0 { 0 } else { -i.log2().round() as i32 };
        let shift = inverse.last().filter(|_| wild).map(|whole| whole.iter().map(exponent).collect());
        Ok(Self { inverse, shift })
    }

    /// 1/‖x·2^−e‖ of prefix `k` of a row. It scales products of panels to cosines.
    pub(super) fn panel_inverse(&self, k: usize, row: usize) -> f32 {
        (self.inverse[k][row] * self.shift.as_ref().map_or(1.0, |s| f64::from(s[row]).exp2())) as f32
    }
}

fn sum_of_squares(x: Embeddings<'_>, row: usize, columns: Range<usize>) -> f64 {
    let range = row * x.row_stride() + columns.start..row * x.row_stride() + columns.end;
    for_each_dtype!(Data, x.data(), d => lanes(d[range].iter(), |v| { let v = v.to_f64(); v * v }))
}

/// x_row · y_row in f64, over these columns.
pub(super) fn dot(x: Embeddings<'_>, x_row: usize, y: Embeddings<'_>, y_row: usize, columns: Range<usize>) -> f64 {
    let range =
        |m: &Embeddings<'_>, row: usize| row * m.row_stride() + columns.start..row * m.row_stride() + columns.end;
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
    /// Whether wide panels are views of the caller's memory.
    pub(super) fn is_direct(&self) -> bool {
        matches!(self.x.data(), Data::F32(_)) && self.norms.shift.is_none() && self.order.is_none()
    }

    /// Whether panels of so many columns are copies.
    pub(super) fn copies(&self, columns: usize) -> bool {
        !self.is_direct() || (columns <= NARROW && self.x.row_stride() != columns)
    }

    /// Rows `rows` (indices of the space) and columns `cols` as f32. It is a view if possible, else a copy in `scratch`.
    pub(super) fn panel<'s>(&self, rows: Range<usize>, cols: Range<usize>, scratch: &'s mut Vec<f32>) -> MatRef<'s>
    where
        'a: 's,
    {
        let stride = self.x.row_stride();
        if let (Data::F32(data), false) = (self.x.data(), self.copies(cols.len())) {
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
