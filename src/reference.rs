//! The definition, computed as it is written: dense, in f64, without tiles. Every backend is judged by it.
//!
//! ```text
//! x̂ = x/‖x‖      s⁺ᵢ = q̂ᵢ·p̂_{π(i)}      β = 1/τ      w̃ = w/Σw
//! ℓ_gi = log( e_g·exp(β s⁺ᵢ) + Σ_{b∈B_g} Σ_{j kept} exp(β s^b_ij) )
//! L    = Σ_g c_g Σᵢ w̃ᵢ (ℓ_gi − β s⁺ᵢ)
//! ```
//!
//! With prefixes it computes each as a call of its own, and adds up what they give, times their weights.
//!
//! It takes up to 16·(M + N)² bytes beside O((M + N)·d), and a time of O((M + N)²·d): fine for some thousand rows. The
//! gradient follows the softmax probabilities, element by element, and deliberately not the factorised form that the fast
//! backends use.

use crate::batch::{Batch, Embeddings, EmbeddingsMut, for_each_dtype};
use crate::call::{Call, NoNegative, ZeroNorm};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::loss::Block;
use crate::mask::{COSINE_TIE, Key, Keys, threshold};
use crate::output::{Evaluation, GradientBuffers, Metrics, TemperatureGradient, check_upstream};
use crate::pairs::Pairs;
use crate::prefix::Prefix;
use crate::tower::Tower;
use rayon::prelude::*;

/// Everything the reference computes, in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferenceOutput {
    /// Loss, row losses, metrics.
    pub evaluation: Evaluation,
    /// ∂L/∂q times the upstream gradient, M × d, row-major and contiguous.
    pub grad_query: Vec<f64>,
    /// ∂L/∂p times the upstream gradient, N × d, row-major and contiguous.
    pub grad_passage: Vec<f64>,
    /// ∂L/∂τ and ∂L/∂log β, times the upstream gradient.
    pub temperature: TemperatureGradient,
}

/// Loss, metrics and gradients, the latter rounded into the caller's `buffers` (any type; f64 keeps every digit).
///
/// With G = ∂L/∂s over the cosines s, g = ∂L/∂x̂ is a sum of G times unit vectors, and ∂L/∂x = (g − x̂(x̂·g)) / ‖x‖.
/// All derivatives are multiplied by `upstream`. A buffer of a narrower type overflows to infinity as IEEE 754 says.
///
/// # Errors
/// As [`loss_and_gradients`], and [`Error::InvalidArgument`] for a buffer whose shape is not M × d (query) or N × d
/// (passage). On an error no buffer has been written to.
pub fn loss_and_gradients_into(
    batch: &Batch<'_>,
    upstream: f64,
    buffers: GradientBuffers<'_>,
) -> Result<(Evaluation, TemperatureGradient)> {
    buffers.expect_shapes(batch.rows(), batch)?;
    let output = loss_and_gradients(batch, upstream)?;
    for (buffer, gradient) in [(buffers.query, &output.grad_query), (buffers.passage, &output.grad_passage)] {
        if let Some(mut buffer) = buffer {
            write_rows(&mut buffer, gradient);
        }
    }
    Ok((output.evaluation, output.temperature))
}

/// Loss, metrics and gradients in f64, from embeddings of any type.
///
/// # Errors
/// [`Error::InvalidArgument`] for an `upstream` that is not finite; [`Error::NonFinite`] and [`Error::ZeroNorm`] for an
/// embedding without a direction; [`Error::NoNegative`] for a row of weight above 0 with an empty softmax
/// unless the options say [`NoNegative::Zero`];
/// [`Error::OutOfMemory`] where the dense matrices do not fit.
pub fn loss_and_gradients(batch: &Batch<'_>, upstream: f64) -> Result<ReferenceOutput> {
    check_upstream(upstream)?;
    let prefixes = batch.prefixes();
    let named = batch.call().prefixes().is_some();
    for (tower, x) in [(Tower::Query, batch.query()), (Tower::Passage, batch.passage())] {
        expect_directions(tower, x, &prefixes, batch.call())?;
    }
    let mut grad_query = Matrix::zeros(batch.rows(), batch.dim())?;
    let mut grad_passage = Matrix::zeros(batch.passages(), batch.dim())?;
    let (mut evaluations, mut grad_beta) = (Vec::new(), 0.0);
    for &Prefix { dim, weight } in &prefixes {
        let part = one_prefix(&batch.cut(dim), upstream * weight).map_err(|error| match error {
            Error::NoNegative { loss, group, row, .. } if named => {
                Error::NoNegative { loss, group, row, prefix: Some(dim) }
            }
            other => other,
        })?;
        grad_query.add_leading(&part.grad_query);
        grad_passage.add_leading(&part.grad_passage);
        grad_beta += part.grad_beta;
        evaluations.push(part.evaluation);
    }
    Ok(ReferenceOutput {
        evaluation: Evaluation::of_prefixes(evaluations, &prefixes, named),
        grad_query: grad_query.data,
        grad_passage: grad_passage.data,
        temperature: TemperatureGradient::from_beta(grad_beta, batch.call().beta()),
    })
}

/// An error that names the first row of the tower with a number that is not finite, or, unless the call allows them, with a prefix of
/// norm zero.
fn expect_directions(tower: Tower, x: Embeddings<'_>, prefixes: &[Prefix], call: &Call) -> Result<()> {
    let longest = prefixes.last().map_or(0, |p| p.dim);
    for row in 0..x.rows() {
        let values = x.cut(longest).row_to_f64(row)?;
        if let Some(column) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::NonFinite { tower, row, column, value: values[column] });
        }
        let zero = prefixes.iter().find(|p| values[..p.dim].iter().all(|v| *v == 0.0));
        if let Some(prefix) = zero.filter(|_| call.zero_norm() == ZeroNorm::Error) {
            return Err(Error::ZeroNorm { tower, row, prefix: call.prefixes().map(|_| prefix.dim) });
        }
    }
    Ok(())
}

/// What one prefix gives: that of a call without prefixes.
struct Part {
    evaluation: Evaluation,
    grad_query: Matrix,
    grad_passage: Matrix,
    grad_beta: f64,
}

/// The loss of embeddings that are all there is of the prefix, and its derivatives, times `upstream`.
fn one_prefix(batch: &Batch<'_>, upstream: f64) -> Result<Part> {
    let (call, pairs) = (batch.call(), batch.pairs());
    let (loss, beta, weights) = (call.loss(), call.beta(), pairs.normalized_weights());

    // [1] Directions and norms.
    let query = Directions::new(batch.query())?;
    let passage = Directions::new(batch.passage())?;

    // [2] Cosines. The metrics need S whatever the loss.
    let cosines = [
        query.unit.times_transposed(&passage.unit)?,
        if loss.uses(Block::QQ) { query.unit.times_transposed(&query.unit)? } else { Matrix::zeros(0, 0)? },
        if loss.uses(Block::PP) { passage.unit.times_transposed(&passage.unit)? } else { Matrix::zeros(0, 0)? },
    ];

    // [3] Softmax of every row and group: row losses, ranks, and G = ∂L/∂s in the shape of the cosines.
    let negatives = Negatives { pairs, keys: Keys::new(pairs) };
    let mut gradient = [cosines[0].zeros_like()?, cosines[1].zeros_like()?, cosines[2].zeros_like()?];
    let mut grad_beta = 0.0;
    let mut evaluation =
        Evaluation::plain(0.0, vec![0.0; batch.rows()], [Metrics { precision_at_1: 0.0, mrr: 0.0 }; 2]);
    for (i, &weight) in weights.iter().enumerate() {
        let at_positive = (i, pairs.positive(i));
        let positive = cosines[S][at_positive];
        let kept = Block::ALL.map(|block| negatives.kept(block, i, positive, &cosines));

        for (block, metrics) in
            [(Block::QP, &mut evaluation.query_to_passage), (Block::PQ, &mut evaluation.passage_to_query)]
        {
            let above = kept[block.index()].iter().filter(|n| n.cosine > positive + COSINE_TIE).count();
            metrics.precision_at_1 += if above == 0 { weight } else { 0.0 };
            metrics.mrr += weight / (1 + above) as f64;
        }

        for (g, group) in loss.groups().iter().enumerate().filter(|(_, group)| group.coefficient() > 0.0) {
            let terms: Vec<Negative> = group.blocks().iter().flat_map(|b| &kept[b.index()]).copied().collect();
            let mut probabilities: Vec<f64> = terms.iter().map(|n| beta * (n.cosine - positive)).collect();
            let Some(row_loss) = softmax(&mut probabilities, group.positive_copies()) else {
                if weight > 0.0 && call.no_negative() == NoNegative::Error {
                    return Err(Error::NoNegative { loss: loss.name().into(), group: g, row: i, prefix: None });
                }
                continue;
            };
            evaluation.row_losses[i] += group.coefficient() * row_loss;

            // ∂(ℓ − β s⁺)/∂(β s) is the probability of a negative; at the positive it is minus the sum of those.
            let scale = upstream * group.coefficient() * weight;
            for (negative, probability) in terms.iter().zip(probabilities) {
                gradient[negative.matrix][negative.at] += beta * scale * probability;
                gradient[S][at_positive] -= beta * scale * probability;
                grad_beta += scale * probability * (negative.cosine - positive);
            }
        }
        evaluation.loss += weight * evaluation.row_losses[i];
    }
    for metrics in [&mut evaluation.query_to_passage, &mut evaluation.passage_to_query] {
        *metrics = Metrics::from_sums(metrics.precision_at_1, metrics.mrr);
    }
    drop(cosines); // the transposed gradients take its place in memory

    // [4] From cosines to directions: s = x̂·ŷ gives G·ŷ to x̂ and G·x̂ to ŷ.
    let [g_s, g_qq, g_pp] = gradient;
    let mut grad_query = g_s.times(&passage.unit)?;
    let mut grad_passage = g_s.transposed()?.times(&query.unit)?;
    if loss.uses(Block::QQ) {
        grad_query.add(&g_qq.times(&query.unit)?);
        grad_query.add(&g_qq.transposed()?.times(&query.unit)?);
    }
    if loss.uses(Block::PP) {
        grad_passage.add(&g_pp.times(&passage.unit)?);
        grad_passage.add(&g_pp.transposed()?.times(&passage.unit)?);
    }

    // [5] From directions to raw embeddings.
    query.project(&mut grad_query);
    passage.project(&mut grad_passage);
    Ok(Part { evaluation, grad_query, grad_passage, grad_beta })
}

/// Positions in the arrays of cosine matrices: S = Q̂P̂ᵀ (M × N), Q̂Q̂ᵀ (M × M), P̂P̂ᵀ (N × N).
const S: usize = 0;
const QQ: usize = 1;
const PP: usize = 2;

/// A kept negative of a row: its cosine, and where that lives.
#[derive(Clone, Copy)]
struct Negative {
    matrix: usize,
    at: (usize, usize),
    cosine: f64,
}

/// The mask rule applied to one row at a time.
struct Negatives<'a> {
    pairs: &'a Pairs<'a>,
    keys: Keys,
}

impl Negatives<'_> {
    /// The negatives that row `i` keeps in `block`; none in a block that neither the loss nor the metrics need.
    fn kept(&self, block: Block, i: usize, positive: f64, cosines: &[Matrix; 3]) -> Vec<Negative> {
        let ranked = matches!(block, Block::QP | Block::PQ);
        if !ranked && !self.pairs.call().loss().uses(block) {
            return Vec::new();
        }
        let own = self.pairs.positive(i);
        let passages = block.candidates_are_passages();
        let candidates = if passages { &self.keys.passages } else { &self.keys.rows };
        let drops = if passages { Key::drops_passage } else { Key::drops_query };
        let owners = self.pairs.exclusive_owners().filter(|_| passages);
        let highest = threshold(positive, self.pairs.call().margin());
        let negative = |j: usize| {
            let (matrix, at) = match block {
                Block::QP => (S, (i, j)),
                Block::PQ => (S, (j, own)),
                Block::QQ => (QQ, (i, j)),
                Block::PP => (PP, (own, j)),
            };
            let cosine = cosines[matrix][at];
            let of_another_row = owners.is_some_and(|o| o[j] >= 0 && o[j] as usize != i);
            let kept = !drops(self.keys.rows[i], candidates[j]) && !of_another_row && cosine <= highest;
            kept.then_some(Negative { matrix, at, cosine })
        };
        (0..candidates.len()).filter_map(negative).collect()
    }
}

/// Turns the exponents x = β(s − s⁺) of the negatives into their probabilities, beside `copies` of the positive (whose
/// exponent is 0), and returns ℓ − β s⁺ = log(copies + Σ exp x). None if there is no term at all.
fn softmax(exponents: &mut [f64], copies: u8) -> Option<f64> {
    let copies = f64::from(copies);
    let start = if copies > 0.0 { 0.0 } else { f64::NEG_INFINITY };
    let max = exponents.iter().fold(start, |max, x| max.max(*x));
    if max == f64::NEG_INFINITY {
        return None;
    }
    let negatives: f64 = exponents.iter().map(|x| (x - max).exp()).sum();
    let positive = if copies > 0.0 { copies * (-max).exp() } else { 0.0 }; // exp alone overflows when no positive bounds max
    let total = negatives + positive;
    exponents.iter_mut().for_each(|x| *x = (*x - max).exp() / total);
    // With the positive on top the sum is often far below 1, and log1p keeps its digits.
    Some(if max == 0.0 && copies > 0.0 { copies.ln() + (negatives / copies).ln_1p() } else { max + total.ln() })
}

/// x̂ = x/‖x‖ of one tower, and ‖x‖ as a product scale·root so that neither 1e300 nor a subnormal leaves the range.
struct Directions {
    unit: Matrix,
    norms: Vec<(f64, f64)>,
}

impl Directions {
    /// Of finite numbers: see [`expect_directions`].
    fn new(x: Embeddings<'_>) -> Result<Self> {
        let mut unit = Matrix::zeros(x.rows(), x.dim())?;
        let mut norms = Vec::with_capacity(x.rows());
        for row in 0..x.rows() {
            let values = x.row_to_f64(row)?;
            let scale = values.iter().fold(0.0_f64, |max, v| max.max(v.abs()));
            let root = values.iter().map(|v| (v / scale).powi(2)).sum::<f64>().sqrt();
            if scale > 0.0 {
                unit.row_mut(row).iter_mut().zip(values).for_each(|(u, v)| *u = v / scale / root);
            }
            norms.push((scale, root));
        }
        Ok(Self { unit, norms })
    }

    /// g ← (g − x̂(x̂·g)) / ‖x‖ for every row; 0 where the norm is.
    fn project(&self, gradient: &mut Matrix) {
        for (row, &(scale, root)) in self.norms.iter().enumerate() {
            let (unit, gradient) = (self.unit.row(row), gradient.row_mut(row));
            let radial: f64 = unit.iter().zip(&*gradient).map(|(u, g)| u * g).sum();
            for (g, u) in gradient.iter_mut().zip(unit) {
                *g = if scale > 0.0 { (*g - radial * u) / root / scale } else { 0.0 };
            }
        }
    }
}

/// A row-major f64 matrix.
struct Matrix {
    rows: usize,
    columns: usize,
    data: Vec<f64>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Result<Self> {
        let len = rows.saturating_mul(columns);
        let mut data = Vec::new();
        data.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
            bytes: len.saturating_mul(8),
            purpose: "the dense matrices of the reference",
        })?;
        data.resize(len, 0.0);
        Ok(Self { rows, columns, data })
    }

    fn zeros_like(&self) -> Result<Self> {
        Self::zeros(self.rows, self.columns)
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.columns..][..self.columns]
    }

    fn row_mut(&mut self, i: usize) -> &mut [f64] {
        &mut self.data[i * self.columns..][..self.columns]
    }

    fn transposed(&self) -> Result<Self> {
        let mut out = Self::zeros(self.columns, self.rows)?;
        for i in 0..self.rows {
            self.row(i).iter().enumerate().for_each(|(j, x)| out[(j, i)] = *x);
        }
        Ok(out)
    }

    /// self · other. Each element is summed in the order of the inner index, so equal rows give equal bits.
    fn times(&self, other: &Self) -> Result<Self> {
        let mut out = Self::zeros(self.rows, other.columns)?;
        out.data.par_chunks_mut(other.columns).enumerate().for_each(|(i, out)| {
            for (k, factor) in self.row(i).iter().enumerate() {
                out.iter_mut().zip(other.row(k)).for_each(|(o, x)| *o += factor * x);
            }
        });
        Ok(out)
    }

    /// self · otherᵀ.
    fn times_transposed(&self, other: &Self) -> Result<Self> {
        self.times(&other.transposed()?)
    }

    /// Adds a matrix of as many rows, none longer than those of `self`, to their first entries.
    fn add_leading(&mut self, other: &Self) {
        for i in 0..self.rows {
            self.row_mut(i).iter_mut().zip(other.row(i)).for_each(|(x, y)| *x += y);
        }
    }

    fn add(&mut self, other: &Self) {
        self.data.iter_mut().zip(&other.data).for_each(|(x, y)| *x += y);
    }
}

impl std::ops::Index<(usize, usize)> for Matrix {
    type Output = f64;
    fn index(&self, (i, j): (usize, usize)) -> &f64 {
        &self.row(i)[j]
    }
}

impl std::ops::IndexMut<(usize, usize)> for Matrix {
    fn index_mut(&mut self, (i, j): (usize, usize)) -> &mut f64 {
        &mut self.row_mut(i)[j]
    }
}

fn write_rows(buffer: &mut EmbeddingsMut<'_>, gradient: &[f64]) {
    fn write<T: Element>(out: &mut [T], dim: usize, row_stride: usize, gradient: &[f64]) {
        for (row, values) in gradient.chunks(dim).enumerate() {
            out[row * row_stride..][..dim].iter_mut().zip(values).for_each(|(o, g)| *o = T::from_f64(*g));
        }
    }
    let (dim, row_stride) = (buffer.dim(), buffer.row_stride());
    for_each_dtype!(DataMut, buffer.data_mut(), out => write(out, dim, row_stride, gradient));
}
