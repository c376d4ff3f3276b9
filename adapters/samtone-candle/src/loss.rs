//! The builder that holds loss and options, and the calls.

use crate::op::Computed;
use crate::refused;
use crate::temperature::Temperature;
use crate::view::{check_same_device, embeddings, readable};
#[cfg(feature = "cuda")]
use candle_core::Storage;
use candle_core::{Device, Result, Tensor};
use samtone::cpu::Workspace;
use samtone::{Batch, EmbeddingsMut, Evaluation, GradientBuffers, Loss, NoNegative, Options, Scope, ZeroNorm};
use std::sync::{Arc, Mutex};

/// A contrastive loss of two towers' embeddings, with everything about a batch but these.
///
/// One for each training run, and a clone with `query_ids` and the like for each batch:
///
/// ```
/// # use candle_core::{Device, Result, Tensor, Var};
/// # use samtone_candle::{Loss, SamToNe};
/// # fn main() -> Result<()> {
/// let samtone = SamToNe::new(Loss::samtone_query()); // before the loop
/// # let q = Var::randn(0f32, 1.0, (4, 8), &Device::Cpu)?;
/// # let p = Var::randn(0f32, 1.0, (4, 8), &Device::Cpu)?;
/// let loss = samtone.clone().passage_ids([3, 7, 3, 9]).forward(&q, &p, 0.01)?; // in the loop
/// let gradients = loss.backward()?;
/// # assert_eq!(gradients.get(&q).unwrap().dims(), [4, 8]);
/// # Ok(())
/// # }
/// ```
///
/// Clones share the memory of their calls (up to [`workspace_bytes`](Self::workspace_bytes), and O((M + N)·d)), so that a step
/// allocates none of it again. Calls at the same time are right, too; all but one then take memory of their own. On a CUDA device
/// that memory is on candle's stream, and kept for one stream at a time.
#[derive(Debug, Clone)]
pub struct SamToNe {
    loss: Loss,
    query_ids: Option<Vec<i64>>,
    passage_ids: Option<Vec<i64>>,
    shared_ids: bool,
    positives: Option<Vec<u32>>,
    owners: Option<(Vec<i32>, Scope)>,
    weights: Option<Vec<f32>>,
    margin: Option<f64>,
    zero_norm: ZeroNorm,
    no_negative: NoNegative,
    workspace_bytes: Option<usize>,
    tile_skipping: Option<f64>,
    workspace: Arc<Mutex<Workspace>>,
    #[cfg(feature = "cuda")]
    step: Arc<crate::cuda::Shared>,
}

/// The batch or the pairs, which have these methods in common, with what the builder holds.
macro_rules! annotated {
    ($of:expr, $plain:expr) => {
        (|| {
            let (of, mut annotated) = ($of, $plain);
            if let Some(positives) = &of.positives {
                annotated = annotated.with_positives(positives)?;
            }
            if let Some(weights) = &of.weights {
                annotated = annotated.with_weights(weights)?;
            }
            if let Some(ids) = &of.query_ids {
                annotated = annotated.with_query_ids(ids)?;
            }
            if let Some(ids) = &of.passage_ids {
                annotated = annotated.with_passage_ids(ids)?;
            }
            annotated = annotated.with_shared_ids(of.shared_ids)?;
            if let Some((owners, scope)) = &of.owners {
                annotated = annotated.with_hard_negative_owners(owners, *scope)?;
            }
            samtone::Result::Ok(annotated)
        })()
    };
}

impl SamToNe {
    /// `loss` with every option at its default: row i's positive is passage i, and every other pair is a negative.
    pub fn new(loss: Loss) -> Self {
        Self {
            loss,
            query_ids: None,
            passage_ids: None,
            shared_ids: false,
            positives: None,
            owners: None,
            weights: None,
            margin: None,
            zero_norm: ZeroNorm::default(),
            no_negative: NoNegative::default(),
            workspace_bytes: None,
            tile_skipping: None,
            workspace: Arc::default(),
            #[cfg(feature = "cuda")]
            step: Arc::default(),
        }
    }

    /// An identity for each of the M queries; queries of equal id are never negatives of each other, nor of each other's
    /// positives. Default: all different.
    pub fn query_ids(mut self, ids: impl Into<Vec<i64>>) -> Self {
        self.query_ids = Some(ids.into());
        self
    }

    /// An identity for each of the N passages; passages of equal id are never negatives of each other, nor of each other's
    /// queries. Default: all different.
    pub fn passage_ids(mut self, ids: impl Into<Vec<i64>>) -> Self {
        self.passage_ids = Some(ids.into());
        self
    }

    /// Whether query ids and passage ids name the same texts; then a passage with the id of a row's query, and a query with the id
    /// of its positive, are no negatives of the row either. For pairs of sentences, or queries that are other rows' passages. Wants
    /// the ids of both towers. Default: no.
    pub fn shared_ids(mut self, shared: bool) -> Self {
        self.shared_ids = shared;
        self
    }

    /// For each of the M queries the row of its positive among the passages, below N. Several may share one.
    /// Default: 0, 1, 2, …
    pub fn positives(mut self, positives: impl Into<Vec<u32>>) -> Self {
        self.positives = Some(positives.into());
        self
    }

    /// For each of the N passages the query whose hard negative it is, or −1 for everyone's; with [`Scope::Own`] the other
    /// queries drop it.
    pub fn hard_negative_owners(mut self, owners: impl Into<Vec<i32>>, scope: Scope) -> Self {
        self.owners = Some((owners.into(), scope));
        self
    }

    /// A weight ≥ 0 for each of the M queries; the loss uses w / Σw. Default: all equal.
    pub fn weights(mut self, weights: impl Into<Vec<f32>>) -> Self {
        self.weights = Some(weights.into());
        self
    }

    /// Drops every negative whose cosine exceeds that of the positive by more than this: a filter of false negatives. Of
    /// either sign; Qwen3 uses 0.1. Default: none.
    pub fn margin(mut self, margin: f64) -> Self {
        self.margin = Some(margin);
        self
    }

    /// What becomes of embeddings of norm zero. Default: an error that names the row.
    pub fn zero_norm(mut self, policy: ZeroNorm) -> Self {
        self.zero_norm = policy;
        self
    }

    /// What becomes of rows that have no negative left in a group without copies of the positive. Default: an error that names the
    /// row; [`NoNegative::Zero`] lets it contribute nothing.
    pub fn no_negative(mut self, policy: NoNegative) -> Self {
        self.no_negative = policy;
        self
    }

    /// Bound on the memory a call may take beyond O((M + N)·d); more saves computing cosines twice. Default:
    /// [`samtone::cpu::DEFAULT_WORKSPACE_BYTES`].
    pub fn workspace_bytes(mut self, bytes: usize) -> Self {
        self.workspace_bytes = Some(bytes);
        self
    }

    /// Lets a CUDA device leave out of the gradient what tiles of cosines with little softmax mass would add: of every row at
    /// most the share η of the softmax mass of its negatives, tile by tile, while loss and metrics keep every bit. Above 0 and
    /// below 1; see [`samtone::Options::with_tile_skipping`]. On the CPU the promise is kept by skipping nothing. Default: none.
    pub fn tile_skipping(mut self, share: f64) -> Self {
        self.tile_skipping = Some(share);
        self
    }

    /// The loss as a scalar tensor, f32, whose `backward` reaches `query`, `passage` and the tensor in `temperature`.
    ///
    /// `query` is M × d and `passage` N × d with N ≥ M, both f32, f16 or bf16 and on the CPU or, with the feature `cuda`, on one
    /// CUDA device. Tensors whose rows are contiguous
    /// are read in place, whatever lies between the rows; others are copied first. Gradients come in the type of what
    /// they belong to, rounded after the upstream gradient has been applied.
    ///
    /// Gradients are computed here, together with the loss, and only those of tensors that candle tracks: a frozen tower costs
    /// nothing, and without any tracked tensor this is a forward pass. They are constants to candle: there are no second
    /// derivatives.
    ///
    /// On a CUDA device all of it is enqueued on candle's stream. The call waits for none of it, but for what was enqueued before
    /// the call before it, whose ids and weights must have been copied; and for a temperature that is on a device: see
    /// [`Temperature`]. So what is wrong with the embeddings themselves, or an upstream gradient that is not finite, is no error
    /// there but NaN: in the loss and all gradients, or in the gradients. [`SamToNe::evaluate`] has the sentence.
    ///
    /// # Errors
    /// A sentence that names the argument, its value and what is allowed: for shapes, types and devices; for ids and
    /// the like of another length than the batch; for embeddings that are not finite or, by default, of norm zero, by
    /// row; for a row without any negative if the loss needs one; for a workspace below the smallest plan; and from
    /// `backward` for an upstream gradient that is not finite.
    pub fn forward<'t>(
        &self,
        query: &Tensor,
        passage: &Tensor,
        temperature: impl Into<Temperature<'t>>,
    ) -> Result<Tensor> {
        self.differentiable(query, passage, temperature.into(), false).map(|(loss, _)| loss)
    }

    /// [`SamToNe::forward`], and the loss of every row, P@1 and MRR of the batch. They cost nothing more on the CPU; on a CUDA
    /// device they are waited for, and what is wrong with the embeddings is an error as on the CPU.
    ///
    /// # Errors
    /// As [`SamToNe::forward`].
    pub fn forward_with_metrics<'t>(
        &self,
        query: &Tensor,
        passage: &Tensor,
        temperature: impl Into<Temperature<'t>>,
    ) -> Result<(Tensor, Evaluation)> {
        let (loss, evaluation) = self.differentiable(query, passage, temperature.into(), true)?;
        Ok((loss, evaluation.ok_or_else(unevaluated)?))
    }

    /// Loss, row losses, P@1 and MRR without any gradient, be the tensors tracked or not: for validation. Waits for a CUDA device.
    ///
    /// # Errors
    /// As [`SamToNe::forward`].
    pub fn evaluate<'t>(
        &self,
        query: &Tensor,
        passage: &Tensor,
        temperature: impl Into<Temperature<'t>>,
    ) -> Result<Evaluation> {
        let (evaluation, _) = self.compute(query, passage, temperature.into(), false, true)?;
        evaluation.ok_or_else(unevaluated)
    }

    fn differentiable(
        &self,
        query: &Tensor,
        passage: &Tensor,
        temperature: Temperature<'_>,
        evaluate: bool,
    ) -> Result<(Tensor, Option<Evaluation>)> {
        let (evaluation, computed) = self.compute(query, passage, temperature, true, evaluate)?;
        let loss = match temperature.tensor() {
            // Differentiably moved to the towers, because candle's operations are on one device.
            Some(tensor) if computed.temperature.is_some() => {
                query.apply_op3(passage, &tensor.to_device(query.device())?, computed)?
            }
            _ => query.apply_op2(passage, computed)?,
        };
        Ok((loss, evaluation))
    }

    fn options(&self, temperature: Temperature<'_>) -> Result<Options> {
        let mut options = temperature.options()?.with_zero_norm(self.zero_norm).with_no_negative(self.no_negative);
        if let Some(margin) = self.margin {
            options = options.with_margin(margin).map_err(refused)?;
        }
        if let Some(share) = self.tile_skipping {
            options = options.with_tile_skipping(share).map_err(refused)?;
        }
        Ok(self.workspace_bytes.map_or(options, |bytes| options.with_workspace_bytes(bytes)))
    }

    /// Everything, with the gradients of what candle tracks if `differentiate`. On the CPU there always is an evaluation; on a
    /// device only if `evaluate`, because it waits.
    fn compute(
        &self,
        query: &Tensor,
        passage: &Tensor,
        temperature: Temperature<'_>,
        differentiate: bool,
        evaluate: bool,
    ) -> Result<(Option<Evaluation>, Computed)> {
        let tracked = |tensor: &Tensor| differentiate && tensor.track_op();
        let wanted = [tracked(query), tracked(passage), temperature.tensor().is_some_and(tracked)];
        let (q, p) = (readable("query", query)?, readable("passage", passage)?);
        check_same_device(query, passage)?;
        let options = self.options(temperature)?;
        let ((q_storage, q_layout), (p_storage, p_layout)) = (q.storage_and_layout(), p.storage_and_layout());
        #[cfg(feature = "cuda")]
        if let (Storage::Cuda(q), Storage::Cuda(p)) = (&*q_storage, &*p_storage) {
            let pairs = samtone::Pairs::new(query.dim(0)?, passage.dim(0)?);
            let pairs = pairs.and_then(|pairs| annotated!(self, pairs)).map_err(refused)?;
            let call = crate::cuda::Call { loss: &self.loss, options: &options, temperature, wanted, evaluate };
            return crate::cuda::compute(&call, [(q, q_layout), (p, p_layout)], pairs, &self.step);
        }
        let _ = evaluate;
        let batch = Batch::new(embeddings(&q_storage, q_layout)?, embeddings(&p_storage, p_layout)?);
        let batch = batch.and_then(|batch| annotated!(self, batch)).map_err(refused)?;
        let (evaluation, computed) = self.on_cpu(&batch, &options, temperature, wanted)?;
        Ok((Some(evaluation), computed))
    }

    fn on_cpu(
        &self,
        batch: &Batch<'_>,
        options: &Options,
        temperature: Temperature<'_>,
        wanted: [bool; 3],
    ) -> Result<(Evaluation, Computed)> {
        let scalar = |loss: f64| Tensor::new(loss as f32, &Device::Cpu);
        if wanted == [false; 3] {
            let forward = samtone::cpu::forward(&self.loss, batch, options).map_err(refused)?;
            let evaluation = forward.evaluation().clone();
            let computed = Computed { loss: scalar(evaluation.loss)?, embeddings: [None, None], temperature: None };
            return Ok((evaluation, computed));
        }
        let dim = batch.dim();
        let rows = [batch.rows(), batch.passages()];
        let mut gradients = [gradient(wanted[0], rows[0] * dim)?, gradient(wanted[1], rows[1] * dim)?];
        let (evaluation, derivative) = {
            let [dq, dp] = &mut gradients;
            let buffers = GradientBuffers {
                query: buffer(dq, rows[0], dim).map_err(refused)?,
                passage: buffer(dp, rows[1], dim).map_err(refused)?,
            };
            let mut own = Workspace::new();
            let mut shared = self.workspace.try_lock();
            let workspace = shared.as_deref_mut().unwrap_or(&mut own);
            workspace.loss_and_gradients_into(&self.loss, batch, options, 1.0, buffers).map_err(refused)?
        };
        let [dq, dp] = gradients;
        let tensor = |gradient: Option<Vec<f32>>, rows| {
            gradient.map(|gradient| Tensor::from_vec(gradient, (rows, dim), &Device::Cpu)).transpose()
        };
        let computed = Computed {
            loss: scalar(evaluation.loss)?,
            embeddings: [tensor(dq, rows[0])?, tensor(dp, rows[1])?],
            temperature: wanted[2].then(|| Tensor::new(temperature.gradient(derivative), &Device::Cpu)).transpose()?,
        };
        Ok((evaluation, computed))
    }
}

/// Cannot happen: whoever asks for an evaluation gets it.
fn unevaluated() -> candle_core::Error {
    candle_core::Error::msg("a call that was not evaluated")
}

fn buffer(gradient: &mut Option<Vec<f32>>, rows: usize, dim: usize) -> samtone::Result<Option<EmbeddingsMut<'_>>> {
    gradient.as_mut().map(|gradient| EmbeddingsMut::new(gradient, rows, dim)).transpose()
}

/// Room for a gradient of `len` numbers, if wanted, or an error instead of an abort.
fn gradient(wanted: bool, len: usize) -> Result<Option<Vec<f32>>> {
    if !wanted {
        return Ok(None);
    }
    let mut gradient = Vec::new();
    let bytes = len.saturating_mul(size_of::<f32>());
    gradient
        .try_reserve_exact(len)
        .map_err(|_| refused(samtone::Error::OutOfMemory { bytes, purpose: "the gradients" }))?;
    gradient.resize(len, 0.0);
    Ok(Some(gradient))
}
