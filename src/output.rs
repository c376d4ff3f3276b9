//! What a call gives back.

use crate::batch::{Batch, EmbeddingsMut};
use crate::error::{Error, Result};
use crate::prefix::Prefix;
use crate::tower::Tower;

/// In-batch retrieval quality of one direction. rankᵢ is 1 + the number of kept negatives with a cosine above s⁺ᵢ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metrics {
    /// Σ w̃ᵢ [rankᵢ = 1].
    pub precision_at_1: f64,
    /// Σ w̃ᵢ / rankᵢ.
    pub mrr: f64,
}

impl Metrics {
    /// From both sums, added up in one order. Where they are equal, both metrics are 1: the one rule of every backend.
    ///
    /// Where every positive wins, each row adds the same to both, so the sums are equal; they need not be 1, for w̃ adds up to 1 only
    /// within some ulps. Conversely, a row of positive weight that loses adds w̃/rank to MRR alone, and rounded addition keeps order, so
    /// MRR is never below P@1. Then equal sums mean that rounding swallowed all that the losing rows add, at most 2⁻⁵² in each of M
    /// additions. With R the largest rank, such rows have weights of M·R·2⁻⁵² together, and P@1 is so near to 1; with M = R = 8192 that
    /// is 1.5e-8. Both sums 0 do not occur: some row has w̃ of 1/M or more, and adds at least 1/(M·R) to MRR.
    pub(crate) fn from_sums(precision_at_1: f64, mrr: f64) -> Self {
        if precision_at_1 == mrr { Self { precision_at_1: 1.0, mrr: 1.0 } } else { Self { precision_at_1, mrr } }
    }
}

/// Loss and metrics of one prefix: those that a call without prefixes gives for embeddings that end after `dim` entries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefixEvaluation {
    /// d_k.
    pub dim: usize,
    /// v_k.
    pub weight: f64,
    /// Its loss in nats, not multiplied by its weight.
    pub loss: f64,
    /// Ranks over block QP.
    pub query_to_passage: Metrics,
    /// Ranks over block PQ.
    pub passage_to_query: Metrics,
}

/// The forward results.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// L = Σ_g c_g Σᵢ w̃ᵢ (ℓ_gi − β s⁺ᵢ), in nats. With prefixes it is the sum of their losses, each times its weight.
    pub loss: f64,
    /// Σ_g c_g (ℓ_gi − β s⁺ᵢ) for each of the M rows, without its weight; 0 for a row of weight 0 whose softmax is empty.
    /// With prefixes these are sums, too.
    pub row_losses: Vec<f64>,
    /// Ranks over block QP. With prefixes, those of the longest.
    pub query_to_passage: Metrics,
    /// Ranks over block PQ. With prefixes, those of the longest.
    pub passage_to_query: Metrics,
    /// One entry for each prefix of weight above 0, shortest first; empty for a call without prefixes.
    pub prefixes: Vec<PrefixEvaluation>,
}

impl Evaluation {
    /// The results of a call from those of its `prefixes`, in their order. `named` says whether the call names prefixes at all.
    pub(crate) fn of_prefixes(parts: Vec<Self>, prefixes: &[Prefix], named: bool) -> Self {
        let of = |(part, prefix): (&Self, &Prefix)| PrefixEvaluation {
            dim: prefix.dim,
            weight: prefix.weight,
            loss: part.loss,
            query_to_passage: part.query_to_passage,
            passage_to_query: part.passage_to_query,
        };
        let listed = if named { parts.iter().zip(prefixes).map(of).collect() } else { Vec::new() };
        let weighted = parts.into_iter().zip(prefixes).map(|(mut part, prefix)| {
            part.loss *= prefix.weight;
            part.row_losses.iter_mut().for_each(|l| *l *= prefix.weight);
            part
        });
        let sum = weighted.reduce(|mut sum, part| {
            sum.loss += part.loss;
            sum.row_losses.iter_mut().zip(&part.row_losses).for_each(|(a, b)| *a += b);
            Self { query_to_passage: part.query_to_passage, passage_to_query: part.passage_to_query, ..sum }
        });
        // No list of prefixes is empty.
        let none = Metrics { precision_at_1: f64::NAN, mrr: f64::NAN };
        let empty = || Self::plain(f64::NAN, Vec::new(), [none; 2]);
        Self { prefixes: listed, ..sum.unwrap_or_else(empty) }
    }

    /// The results of a call without prefixes: metrics of query → passage and of passage → query.
    pub(crate) fn plain(loss: f64, row_losses: Vec<f64>, [query_to_passage, passage_to_query]: [Metrics; 2]) -> Self {
        Self { loss, row_losses, query_to_passage, passage_to_query, prefixes: Vec::new() }
    }
}

/// Derivative of the loss with respect to the temperature, times the upstream gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TemperatureGradient {
    /// ∂L/∂τ = −β² ∂L/∂β.
    pub tau: f64,
    /// ∂L/∂log β = β ∂L/∂β, for trainers that learn a log-scale.
    pub log_beta: f64,
}

impl TemperatureGradient {
    /// From ∂L/∂β.
    pub(crate) fn from_beta(grad_beta: f64, beta: f64) -> Self {
        Self { tau: -beta * beta * grad_beta, log_beta: beta * grad_beta }
    }
}

/// Gradients with respect to the raw embeddings, f32, row-major and contiguous, times the upstream gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// ∂L/∂q, M × d.
    pub query: Vec<f32>,
    /// ∂L/∂p, N × d.
    pub passage: Vec<f32>,
    /// ∂L/∂τ and ∂L/∂log β.
    pub temperature: TemperatureGradient,
}

impl Gradients {
    /// Those that `compute` writes for a shard of `rows` rows of a batch, and what else it gives, into vectors made for them.
    pub(crate) fn computed<T>(
        rows: usize,
        batch: &Batch<'_>,
        compute: impl FnOnce(GradientBuffers<'_>) -> Result<(T, TemperatureGradient)>,
    ) -> Result<(T, Self)> {
        let vector = |rows: usize| {
            let mut vector = Vec::new();
            crate::memory::reserve(&mut vector, rows * batch.dim(), "the gradients").map(|()| vector)
        };
        let (mut query, mut passage) = (vector(rows)?, vector(batch.passages())?);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::new(&mut query, rows, batch.dim())?),
            passage: Some(EmbeddingsMut::new(&mut passage, batch.passages(), batch.dim())?),
        };
        let (result, temperature) = compute(buffers)?;
        Ok((result, Self { query, passage, temperature }))
    }
}

/// Everything at once.
#[derive(Debug, Clone, PartialEq)]
pub struct LossAndGradients {
    /// Loss, row losses, metrics.
    pub evaluation: Evaluation,
    /// Gradients.
    pub gradients: Gradients,
}

/// Where gradients go: buffers of the caller, of any type and row stride, or none for a frozen tower, whose share of the
/// work is then skipped.
#[derive(Debug, Default)]
pub struct GradientBuffers<'a> {
    /// ∂L/∂q, M × d.
    pub query: Option<EmbeddingsMut<'a>>,
    /// ∂L/∂p, N × d.
    pub passage: Option<EmbeddingsMut<'a>>,
}

impl GradientBuffers<'_> {
    /// An error unless each buffer has the shape of what it receives.
    pub(crate) fn expect_shapes(&self, query_rows: usize, batch: &Batch<'_>) -> Result<()> {
        self.expect_shape_of(Tower::Query, query_rows, batch.dim())?;
        self.expect_shape_of(Tower::Passage, batch.passages(), batch.dim())
    }

    /// An error unless the buffer of this tower, if there is one, has this shape.
    pub(crate) fn expect_shape_of(&self, tower: Tower, rows: usize, dim: usize) -> Result<()> {
        let (argument, buffer) = match tower {
            Tower::Query => ("gradients.query", &self.query),
            Tower::Passage => ("gradients.passage", &self.passage),
        };
        buffer.as_ref().map_or(Ok(()), |x| x.expect_shape(argument, rows, dim))
    }
}

/// An error unless the upstream gradient is a number that f32 holds: on a device it may be one.
pub(crate) fn check_upstream(upstream: f64) -> Result<()> {
    if !(upstream as f32).is_finite() {
        return Err(Error::invalid("upstream", format!("{upstream:?}"), "a finite number in the range of f32"));
    }
    Ok(())
}
