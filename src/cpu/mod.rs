//! The CPU backend: tiles of f32 matrix products over all cores, vectorised exponentials, bounded memory.
//!
//! ```text
//! State      norms, keys, thresholds                                 O((M+N)·d) work, O(M+N) memory     state.rs, tower.rs
//! Order      of the passages                                         O(M+N)                             ../order.rs
//! Regions    which indices meet, for whose sums and gradients                                           ../regions.rs
//! Plan       their tiles, stored or recomputed, workspace                                               plan.rs
//! [1] sums       products → scale → mask → exponential sums, ranks   3 B²d (one same-tower block)       sums.rs
//! [2] combine    loss, row losses, metrics, coefficients             O(M)                               ../combine.rs
//! [3] gradients  (products →) gradient tile → products with Q and P  6 B²d, 9 B²d if recomputed         gradient.rs
//! [4] project    diagonal, tangent, β, output type                   O((M+N)·d)                         project.rs
//! ```
//!
//! With K prefixes the passes 1 and 3 visit each tile once. A tile has its products up to each prefix, one after the other, and what
//! pass 3 makes of them (docs/loss.md). A plan stores the products of as many tiles as the workspace holds, and computes the others twice.
//!
//! Results have the same bits on every run, for any number of threads. Threads are those of the current rayon pool.

mod epilogue;
mod gradient;
mod matmul;
mod plan;
mod project;
mod side;
mod simd;
mod state;
mod sums;
mod tower;
mod workspace;

pub use plan::Plan;
pub use workspace::Workspace;

use crate::batch::{Batch, EmbeddingsMut};
use crate::combine::Combined;
use crate::error::{Error, Result};
use crate::memory::reserve;
use crate::output::{Evaluation, GradientBuffers, Gradients, LossAndGradients, TemperatureGradient, check_upstream};
use crate::partials::Partials;
use state::State;
use std::ops::Range;

/// Bound on the workspace if the call sets none: 512 MiB, as on CUDA. In SamToNe with negatives of one tower it holds the
/// products of 9,000 pairs, or of 4,000 pairs with five prefixes, so that no product is computed twice.
pub const DEFAULT_WORKSPACE_BYTES: usize = 512 << 20;

/// ∂L/∂q (M × d) and ∂L/∂p (N × d) as f32, row-major and contiguous, each where it is wanted.
pub type WantedGradients = [Option<Vec<f32>>; 2];

/// What every pass works on.
#[derive(Clone, Copy)]
struct Task<'a> {
    state: &'a State,
    batch: &'a Batch<'a>,
    plan: &'a Plan,
}

/// Loss, metrics and gradients in one call.
///
/// q is M × d, p is N × d, in f32, f16 or bf16; gradients come back as f32, multiplied by `upstream`.
///
/// # Errors
/// [`Error::Unsupported`] for f64, [`Error::NonFinite`] and
/// [`Error::ZeroNorm`] by row, [`Error::NoNegative`],
/// [`Error::WorkspaceTooSmall`], [`Error::OutOfMemory`], and
/// [`Error::InvalidArgument`] for an upstream gradient that is not finite.
pub fn loss_and_gradients(batch: &Batch<'_>, upstream: f64) -> Result<LossAndGradients> {
    let compute = |buffers: GradientBuffers<'_>| loss_and_gradients_into(batch, upstream, buffers);
    let (evaluation, gradients) = Gradients::computed(batch.rows(), batch, compute)?;
    Ok(LossAndGradients { evaluation, gradients })
}

/// [`loss_and_gradients`], into buffers of the caller, of any type and row stride. The gradient of a tower without a buffer is not
/// computed.
///
/// # Errors
/// As [`loss_and_gradients`], and [`Error::InvalidArgument`] for a buffer of another shape.
/// Buffers are written only when nothing can fail any more.
pub fn loss_and_gradients_into(
    batch: &Batch<'_>,
    upstream: f64,
    buffers: GradientBuffers<'_>,
) -> Result<(Evaluation, TemperatureGradient)> {
    Workspace::new().loss_and_gradients_into(batch, upstream, buffers)
}

impl Workspace {
    /// The function [`loss_and_gradients_into`], in the memory of earlier calls.
    ///
    /// # Errors
    /// As the function. The workspace can be used after an error, too.
    pub fn loss_and_gradients_into(
        &mut self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        check_upstream(upstream)?;
        buffers.expect_shapes(batch.rows(), batch)?;
        let state = State::new(batch, 0..batch.rows())?;
        let plan = Plan::of(&state, batch)?;
        let task = Task { state: &state, batch, plan: &plan };
        let combined = state.combine(&sums::partials(task, Some(&mut self.tiles), &self.pool)?)?;
        let temperature = self.backward(task, &combined, plan.stored, upstream, buffers)?;
        Ok((combined.evaluation, temperature))
    }

    /// The same for the towers that are `wanted` (query, passage), into new vectors. Adapters make tensors of these.
    ///
    /// # Errors
    /// As the function. The workspace can be used after an error, too.
    pub fn loss_and_wanted_gradients(
        &mut self,
        batch: &Batch<'_>,
        wanted: [bool; 2],
    ) -> Result<(Evaluation, WantedGradients, TemperatureGradient)> {
        let (dim, rows) = (batch.dim(), [batch.rows(), batch.passages()]);
        let mut gradients = wanted.map(|wanted| wanted.then(Vec::new));
        for (gradient, rows) in gradients.iter_mut().zip(rows) {
            if let Some(gradient) = gradient {
                reserve(gradient, rows * dim, "the gradients")?;
            }
        }
        let [query, passage] = &mut gradients;
        let buffers = GradientBuffers {
            query: query.as_mut().map(|x| EmbeddingsMut::new(x, rows[0], dim)).transpose()?,
            passage: passage.as_mut().map(|x| EmbeddingsMut::new(x, rows[1], dim)).transpose()?,
        };
        let (evaluation, temperature) = self.loss_and_gradients_into(batch, 1.0, buffers)?;
        Ok((evaluation, gradients, temperature))
    }

    /// [`Forward::backward_into`], in the memory of earlier calls.
    ///
    /// # Errors
    /// As [`Forward::backward_into`]. The workspace can be used after an error, too.
    pub fn backward_into(
        &mut self,
        forward: &Forward,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<TemperatureGradient> {
        check_upstream(upstream)?;
        forward.state.expect_batch(batch)?;
        buffers.expect_shapes(batch.rows(), batch)?;
        let plan = Plan::of(&forward.state, batch)?;
        let task = Task { state: &forward.state, batch, plan: &plan };
        self.backward(task, &forward.combined, 0, upstream, buffers)
    }

    /// The partial sums of a shard. The workspace keeps cosines for [`Workspace::gradient_sums`].
    pub(crate) fn partials(&mut self, shard: &Shard<'_>) -> Result<Partials> {
        sums::partials(shard.task(), Some(&mut self.tiles), &self.pool)
    }

    /// What the gradients of a shard are made of, whose [`Workspace::partials`] were the last thing that this workspace was used for.
    pub(crate) fn gradient_sums(
        &mut self,
        shard: &Shard<'_>,
        combined: &Combined,
        wanted: [bool; 2],
    ) -> Result<ShardSums> {
        gradient::gradients(shard.task(), combined, shard.plan.stored, wanted, self).map(ShardSums)
    }

    /// Takes back the memory of the sums.
    pub(crate) fn take_back(&mut self, sums: ShardSums) {
        self.recycle(sums.0);
    }

    fn backward(
        &mut self,
        task: Task<'_>,
        combined: &Combined,
        stored: usize,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<TemperatureGradient> {
        let wanted = [buffers.query.is_some(), buffers.passage.is_some()];
        let sums = gradient::gradients(task, combined, stored, wanted, self)?;
        let beta = task.batch.call().beta();
        let temperature = TemperatureGradient::from_beta(upstream * sums.beta * sums.scale, beta);
        project::project(task, combined, &sums, upstream, buffers);
        self.recycle(sums);
        Ok(temperature)
    }
}

/// Loss and metrics. [`Forward::backward`] gives the gradients later.
///
/// # Errors
/// As [`loss_and_gradients`].
pub fn forward(batch: &Batch<'_>) -> Result<Forward> {
    let state = State::new(batch, 0..batch.rows())?;
    let plan = Plan::of(&state, batch)?;
    let task = Task { state: &state, batch, plan: &plan };
    let combined = state.combine(&sums::partials(task, None, &Workspace::new().pool)?)?;
    Ok(Forward { state, combined })
}

/// What a forward call keeps for its backward call: O(M + N) numbers, no embedding.
#[derive(Debug, Clone)]
pub struct Forward {
    state: State,
    combined: Combined,
}

impl Forward {
    /// Loss, row losses and metrics.
    pub fn evaluation(&self) -> &Evaluation {
        &self.combined.evaluation
    }

    /// Gradients, multiplied by `upstream`. `batch` must be that of the forward call, and its embeddings unchanged.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] for another batch, which names what differs. Otherwise as
    /// [`loss_and_gradients`].
    pub fn backward(&self, batch: &Batch<'_>, upstream: f64) -> Result<Gradients> {
        let compute = |buffers: GradientBuffers<'_>| Ok(((), self.backward_into(batch, upstream, buffers)?));
        Gradients::computed(batch.rows(), batch, compute).map(|((), gradients)| gradients)
    }

    /// [`Forward::backward`], into buffers of the caller.
    ///
    /// # Errors
    /// As [`Forward::backward`] and [`loss_and_gradients_into`].
    pub fn backward_into(
        &self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<TemperatureGradient> {
        Workspace::new().backward_into(self, batch, upstream, buffers)
    }
}

/// What the gradients of a shard are made of. Nothing can fail any more.
pub(crate) struct ShardSums(gradient::GradientSums);

impl ShardSums {
    /// The shard's part of the temperature gradient.
    pub(crate) fn temperature(&self, shard: &Shard<'_>, upstream: f64) -> TemperatureGradient {
        TemperatureGradient::from_beta(upstream * self.0.beta * self.0.scale, shard.batch.call().beta())
    }

    /// Writes the gradients into buffers of the right shape: those of the shard's rows, and the shard's part of those of all passages.
    pub(crate) fn write(&self, shard: &Shard<'_>, combined: &Combined, upstream: f64, buffers: GradientBuffers<'_>) {
        project::project(shard.task(), combined, &self.0, upstream, buffers);
    }
}

/// One shard of a larger batch: a range of its rows against all queries and all passages.
///
/// Shards that cover every row once give together what one device gives. The caller merges their [`Partials`], evaluates, and adds up
/// their passage and temperature gradients. Each shard holds the whole batch, because every row meets every candidate.
#[derive(Debug, Clone)]
pub struct Shard<'a> {
    state: State,
    batch: Batch<'a>,
    plan: Plan,
}

impl<'a> Shard<'a> {
    /// The shard of `rows`. `batch` is the whole batch.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range that is empty or beyond the batch. Otherwise as
    /// [`loss_and_gradients`].
    pub fn new(batch: &Batch<'a>, rows: Range<usize>) -> Result<Self> {
        if rows.start >= rows.end || rows.end > batch.rows() {
            let allowed = format!("a non-empty range within 0..{}", batch.rows());
            return Err(Error::invalid("rows", format!("{rows:?}"), allowed));
        }
        Self::of_rows(batch, rows)
    }

    /// [`Shard::new`], for rows of the batch, of which there may be none.
    pub(crate) fn of_rows(batch: &Batch<'a>, rows: Range<usize>) -> Result<Self> {
        let state = State::new(batch, rows)?;
        let plan = Plan::of(&state, batch)?;
        Ok(Self { state, batch: *batch, plan })
    }

    /// What the merged partial sums of all shards mean for loss and gradients.
    pub(crate) fn combine(&self, merged: &Partials) -> Result<Combined> {
        self.state.combine(merged)
    }

    fn task(&self) -> Task<'_> {
        Task { state: &self.state, batch: &self.batch, plan: &self.plan }
    }

    /// The shard's part of every row's sums, O(M) numbers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn partials(&self) -> Result<Partials> {
        sums::partials(self.task(), None, &Workspace::new().pool)
    }

    /// Loss, row losses and metrics of the whole batch, from the merged partial sums of all shards.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if they do not cover every row, and
    /// [`Error::NoNegative`].
    pub fn evaluate(&self, merged: &Partials) -> Result<Evaluation> {
        Ok(self.state.combine(merged)?.evaluation)
    }

    /// Gradients. Those of the queries are for the shard's rows only (rows.len() × d), and complete. Those of the passages (N × d) and of
    /// the temperature are parts that the caller adds up over the shards.
    ///
    /// # Errors
    /// As [`Shard::evaluate`] and [`loss_and_gradients`].
    pub fn gradients(&self, merged: &Partials, upstream: f64) -> Result<Gradients> {
        check_upstream(upstream)?;
        let combined = self.state.combine(merged)?;
        let rows = self.state.rows.len();
        let compute = |buffers: GradientBuffers<'_>| {
            Ok(((), Workspace::new().backward(self.task(), &combined, 0, upstream, buffers)?))
        };
        Gradients::computed(rows, &self.batch, compute).map(|((), gradients)| gradients)
    }
}
