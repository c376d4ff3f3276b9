//! Last pass: adds the term of the positives (the diagonal), projects onto the tangent of each embedding, multiplies by β, and rounds to
//! the output type.
//!
//! Let u be the sum over negatives from the gradient pass, which is divided by ‖x‖ already. Then ∂L/∂x = β (I − x̂x̂ᵀ)(u + Σ D_i ŷ/‖x‖).
//! The sum is over the rows i whose query or positive is x, and ŷ is the direction of the row's other embedding.
//!
//! With prefixes u is already the sum over them: in each column, over the prefixes that have it. The projection of each prefix takes its
//! own ρ = x̂·∂L/∂x̂ along its own part of x. From u alone these could not be told apart, so the gradient pass leaves them.

use super::Task;
use super::gradient::{Accumulator, GradientSums};
use super::tower::{Norms, lanes};
use crate::batch::{Embeddings, EmbeddingsMut, for_each_dtype};
use crate::combine::Combined;
use crate::dtype::Element;
use crate::order::{Occurrences, Space};
use crate::output::GradientBuffers;
use crate::prefix::Prefix;
use rayon::prelude::*;
use std::ops::Range;

/// Writes the gradients. Nothing can fail any more.
pub(super) fn project(
    task: Task<'_>,
    combined: &Combined,
    sums: &GradientSums,
    upstream: f64,
    buffers: GradientBuffers<'_>,
) {
    let Task { state, batch, .. } = task;
    let factor = upstream * batch.call().beta();
    let scale = sums.scale;
    let towers = [Space::Query, Space::Passage];
    if let (Some(out), Some(accumulator)) = (buffers.query, &sums.query) {
        let own = &state.query_norms;
        write(out, |row, gradient| {
            let i = state.rows.start + row;
            add_sum(gradient, accumulator, i, scale, own.shift.as_ref().map_or(0, |s| s[i]));
            add_positive(gradient, task, combined, towers, i);
            let radial = |k: usize| scale * sums.radial[k][0][i] + combined.prefixes[k].radial[0][i];
            subtract_radial(gradient, batch.query(), i, own, &state.prefixes, radial);
            tangent(gradient, batch.query(), i, own, state.dim(), factor);
        });
    }
    if let (Some(out), Some(accumulator)) = (buffers.passage, &sums.passage) {
        let own = &state.passage_norms;
        let occurrences = Occurrences::new(&state.order);
        write(out, |n, gradient| {
            let mut rows = Vec::new(); // of the shard, whose positive this is
            for &index in occurrences.of(n) {
                let index = index as usize;
                add_sum(gradient, accumulator, index, scale, own.shift.as_ref().map_or(0, |s| s[n]));
                let i = state.anchor_row(Space::Passage, index);
                if state.rows.contains(&i) {
                    add_positive(gradient, task, combined, [Space::Passage, Space::Query], i);
                    rows.push(i);
                }
            }
            let radial = |k: usize| {
                let of_tiles: f64 = occurrences.of(n).iter().map(|&index| sums.radial[k][1][index as usize]).sum();
                scale * of_tiles + rows.iter().map(|&i| combined.prefixes[k].radial[1][i]).sum::<f64>()
            };
            subtract_radial(gradient, batch.passage(), n, own, &state.prefixes, radial);
            tangent(gradient, batch.passage(), n, own, state.dim(), factor);
        });
    }
}

/// Calls `f(row, zeros)` for every row. Rounds what it leaves there once, and stores it.
fn write(mut out: EmbeddingsMut<'_>, f: impl Fn(usize, &mut [f64]) + Sync) {
    let (rows, dim, stride) = (out.rows(), out.dim(), out.row_stride());
    for_each_dtype!(DataMut, out.data_mut(), data => {
        data.par_chunks_mut(stride).take(rows).enumerate().for_each_init(|| vec![0.0; dim], |gradient, (row, out)| {
            gradient.fill(0.0);
            f(row, gradient);
            out[..dim].iter_mut().zip(gradient.iter()).for_each(|(o, g)| *o = Element::from_f64(*g));
        });
    });
}

/// Adds the sum over negatives of an index.
fn add_sum(gradient: &mut [f64], sums: &Accumulator, index: usize, scale: f64, shift: i32) {
    // The gradient pass read this embedding as x·2^−shift, and divided by the norm of that.
    let scale = scale * f64::from(-shift).exp2();
    for (start, values) in sums.row(index) {
        gradient[start..start + values.len()].iter_mut().zip(values).for_each(|(g, v)| *g += scale * f64::from(*v));
    }
}

/// Adds the term of row `i`'s positive to the gradient of one of its two embeddings, that of `own`: Σ_k D_i ŷ/‖x‖ over the prefixes k that
/// have the column.
fn add_positive(gradient: &mut [f64], task: Task<'_>, combined: &Combined, [own, other]: [Space; 2], i: usize) {
    let Task { state, batch, .. } = task;
    let n = batch.pairs().positive(i);
    let of = |space: Space| match space {
        Space::Query => (batch.query(), &state.query_norms, i),
        Space::Passage => (batch.passage(), &state.passage_norms, n),
    };
    let ((_, own, own_row), (x, other, row)) = (of(own), of(other));
    let factor = |k: usize| combined.prefixes[k].diagonal[i] * other.inverse[k][row] * own.inverse[k][own_row];
    let mut sum = 0.0;
    for (k, columns) in columns(&state.prefixes).rev() {
        sum += factor(k);
        add_scaled(gradient, x, row, columns, sum);
    }
}

/// The columns that each prefix has beyond the one before.
fn columns(prefixes: &[Prefix]) -> impl DoubleEndedIterator<Item = (usize, Range<usize>)> {
    let start = |k: usize| if k == 0 { 0 } else { prefixes[k - 1].dim };
    (0..prefixes.len()).map(move |k| (k, start(k)..prefixes[k].dim))
}

/// Subtracts x·ρ/‖x‖² of every prefix but the longest, where ρ = `radial(k)` is x̂ times the derivative with respect to x̂. For the longest
/// [`tangent`] does that. Its ρ is what is left along the embedding.
fn subtract_radial(
    gradient: &mut [f64],
    x: Embeddings<'_>,
    row: usize,
    norms: &Norms,
    prefixes: &[Prefix],
    radial: impl Fn(usize) -> f64,
) {
    let mut sum = 0.0;
    for (k, columns) in columns(prefixes).rev().skip(1) {
        sum -= radial(k) * norms.inverse[k][row] * norms.inverse[k][row];
        add_scaled(gradient, x, row, columns, sum);
    }
}

/// Adds these columns of an embedding times a number.
fn add_scaled(gradient: &mut [f64], x: Embeddings<'_>, row: usize, columns: Range<usize>, scale: f64) {
    let range = row * x.row_stride() + columns.start..row * x.row_stride() + columns.end;
    let gradient = &mut gradient[columns];
    for_each_dtype!(Data, x.data(), d => gradient.iter_mut().zip(&d[range]).for_each(|(g, v)| *g += scale * v.to_f64()));
}

/// Projects the first `dim` entries onto the tangent of the embedding's, and multiplies by `factor`. Further entries stay 0.
fn tangent(gradient: &mut [f64], x: Embeddings<'_>, row: usize, norms: &Norms, dim: usize, factor: f64) {
    let inverse = norms.inverse.last().map_or(0.0, |whole| whole[row]);
    if inverse == 0.0 {
        return gradient.fill(0.0); // a row without a direction, under `ZeroNorm::ZeroGradient`
    }
    let range = row * x.row_stride()..row * x.row_stride() + dim;
    for_each_dtype!(Data, x.data(), d => {
        let x = &d[range];
        let along = lanes(gradient.iter().zip(x), |(g, v)| g * v.to_f64()) * inverse * inverse;
        gradient.iter_mut().zip(x).for_each(|(g, v)| *g = factor * (*g - along * v.to_f64()));
    });
}
