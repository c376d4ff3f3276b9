//! Last pass: adds the term of the positives (the diagonal), projects onto the tangent of each embedding, multiplies by β, and rounds to
//! the output type.
//!
//! Let u be the sum over negatives from the gradient pass, which is divided by ‖x‖ already. Then ∂L/∂x = β (I − x̂x̂ᵀ)(u + Σ D_i ŷ/‖x‖).
//! The sum is over the rows i whose query or positive is x, and ŷ is the direction of the row's other embedding.

use super::Task;
use super::gradient::{Accumulator, GradientSums};
use super::tower::{Norms, lanes};
use crate::batch::{Embeddings, EmbeddingsMut, for_each_dtype};
use crate::combine::Combined;
use crate::dtype::Element;
use crate::order::{Occurrences, Space};
use crate::output::GradientBuffers;
use rayon::prelude::*;

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
    if let (Some(out), Some(sums)) = (buffers.query, &sums.query) {
        let (own, other) = (&state.query_norms, &state.passage_norms);
        write(out, |row, gradient| {
            let i = state.rows.start + row;
            add_sum(gradient, sums, i, scale, own.shift.as_ref().map_or(0, |s| s[i]));
            let n = batch.pairs().positive(i);
            add_scaled(gradient, batch.passage(), n, combined.diagonal[i] * other.inverse[n] * own.inverse[i]);
            tangent(gradient, batch.query(), i, own, factor);
        });
    }
    if let (Some(out), Some(sums)) = (buffers.passage, &sums.passage) {
        let (own, other) = (&state.passage_norms, &state.query_norms);
        let occurrences = Occurrences::new(&state.order);
        write(out, |n, gradient| {
            for &index in occurrences.of(n) {
                let index = index as usize;
                add_sum(gradient, sums, index, scale, own.shift.as_ref().map_or(0, |s| s[n]));
                let i = state.anchor_row(Space::Passage, index);
                if state.rows.contains(&i) {
                    add_scaled(gradient, batch.query(), i, combined.diagonal[i] * other.inverse[i] * own.inverse[n]);
                }
            }
            tangent(gradient, batch.passage(), n, own, factor);
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

/// Adds an embedding times a number.
fn add_scaled(gradient: &mut [f64], x: Embeddings<'_>, row: usize, scale: f64) {
    let range = row * x.row_stride()..row * x.row_stride() + x.dim();
    for_each_dtype!(Data, x.data(), d => gradient.iter_mut().zip(&d[range]).for_each(|(g, v)| *g += scale * v.to_f64()));
}

/// Projects onto the tangent of an embedding, and multiplies by `factor`.
fn tangent(gradient: &mut [f64], x: Embeddings<'_>, row: usize, norms: &Norms, factor: f64) {
    let inverse = norms.inverse[row];
    if inverse == 0.0 {
        return gradient.fill(0.0); // a row without a direction, under `ZeroNorm::ZeroGradient`
    }
    let range = row * x.row_stride()..row * x.row_stride() + x.dim();
    for_each_dtype!(Data, x.data(), d => {
        let x = &d[range];
        let along = lanes(gradient.iter().zip(x), |(g, v)| g * v.to_f64()) * inverse * inverse;
        gradient.iter_mut().zip(x).for_each(|(g, v)| *g = factor * (*g - along * v.to_f64()));
    });
}
