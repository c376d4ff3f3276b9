//! The builder that holds loss and options, and the calls.

use crate::route::Call;
use crate::temperature::Temperature;
use crate::{Evaluation, Loss, NoNegative, Report, Result, Scope, ZeroNorm};
use burn::tensor::Tensor;
use samtone::cpu::Workspace;
use samtone::{Batch, Options};
use std::sync::{Arc, Mutex};

/// A batch or pairs, which have the same methods, with everything that was given.
macro_rules! annotated {
    ($samtone:ident, $pairs:ident) => {{
        let mut pairs = $pairs;
        if let Some(positives) = &$samtone.positives {
            pairs = pairs.with_positives(positives)?;
        }
        if let Some(weights) = &$samtone.weights {
            pairs = pairs.with_weights(weights)?;
        }
        if let Some(ids) = &$samtone.query_ids {
            pairs = pairs.with_query_ids(ids)?;
        }
        if let Some(ids) = &$samtone.passage_ids {
            pairs = pairs.with_passage_ids(ids)?;
        }
        pairs = pairs.with_shared_ids($samtone.shared_ids)?;
        if let Some((owners, scope)) = &$samtone.owners {
            pairs = pairs.with_hard_negative_owners(owners, *scope)?;
        }
        Ok(pairs)
    }};
}

/// A contrastive loss of two towers' embeddings, with everything about a batch but these.
///
/// One for each training run, and a clone with `query_ids` and the like for each batch:
///
/// ```
/// # use burn::tensor::{Device, Distribution, Tensor};
/// # use samtone_burn::{Loss, Result, SamToNe};
/// # fn main() -> Result<()> {
/// let samtone = SamToNe::new(Loss::samtone_query()); // before the loop
/// # let device = Device::flex().autodiff();
/// # let q = Tensor::<2>::random([4, 8], Distribution::Default, &device).require_grad();
/// # let p = Tensor::<2>::random([4, 8], Distribution::Default, &device).require_grad();
/// let loss = samtone.clone().passage_ids([3, 7, 3, 9]).forward(q.clone(), p.clone(), 0.01)?; // in the loop
/// let gradients = loss.backward();
/// # assert_eq!(q.grad(&gradients).unwrap().dims(), [4, 8]);
/// # Ok(())
/// # }
/// ```
///
/// On the CPU, clones share the memory of their calls (up to [`workspace_bytes`](Self::workspace_bytes), and O((M + N)·d)), so that a step
/// allocates none of it again. Calls at the same time are right, too; all but one then take memory of their own.
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
    /// [`samtone::cpu::DEFAULT_WORKSPACE_BYTES`], on a wgpu device [`samtone::wgpu::DEFAULT_WORKSPACE_BYTES`], on a CUDA device
    /// `samtone::cuda::DEFAULT_WORKSPACE_BYTES`.
    pub fn workspace_bytes(mut self, bytes: usize) -> Self {
        self.workspace_bytes = Some(bytes);
        self
    }

    /// Lets a backend leave out of the gradient what tiles of cosines with little softmax mass would add: of every row at most
    /// the share η of the softmax mass of its negatives, tile by tile, while loss and metrics keep every bit. Above 0 and below
    /// 1; see [`samtone::Options::with_tile_skipping`]. Only samtone's CUDA backend skips, that is on `Device::cuda`: on the others the
    /// promise is kept by skipping nothing. Default: none.
    pub fn tile_skipping(mut self, share: f64) -> Self {
        self.tile_skipping = Some(share);
        self
    }

    /// The loss as a tensor of shape \[1\], f32, whose `backward` reaches `query`, `passage` and the tensor in `temperature`.
    ///
    /// `query` is M × d and `passage` N × d with N ≥ M, both f32, f16 or bf16 and on one device: `Device::flex()`, or, with the
    /// features `wgpu` and `cuda`, `Device::wgpu` and `Device::cuda`. Tensors whose rows are contiguous are read in place, whatever lies between the rows; others
    /// are copied first. Gradients come in the type of what they belong to, rounded after the upstream gradient has been
    /// applied.
    ///
    /// Gradients are computed here, together with the loss, and only those of tensors that autodiff tracks: a frozen tower costs
    /// nothing, and without any tracked tensor this is a forward pass. They are constants to autodiff: there are no second
    /// derivatives.
    ///
    /// On a wgpu device nothing waits for the device: loss and gradients are computed in the order of burn's own operations, in
    /// memory that burn manages. A tensor as temperature is the exception, because the host plans with τ: its number is read
    /// back, which waits for what computes it, such as the optimizer's last step. On a CUDA device the host waits for what burn has
    /// enqueued before, and for the loss and its gradients, because burn gives nobody its stream.
    ///
    /// # Errors
    /// A sentence that names the argument, its value and what is allowed: for shapes, types and devices; for ids and
    /// the like of another length than the batch; for embeddings that are not finite or, by default, of norm zero, by
    /// row; for a row without any negative if the loss needs one; for a workspace below the smallest plan.
    ///
    /// On a wgpu device, the rows that are wrong are found by the device: the loss and the gradients are NaN then, and
    /// [`Report::evaluation`] has the sentence. burn's `backward` has no errors: an upstream gradient that is not finite makes
    /// gradients that are not.
    pub fn forward(
        &self,
        query: Tensor<2>,
        passage: Tensor<2>,
        temperature: impl Into<Temperature>,
    ) -> Result<Tensor<1>> {
        self.forward_with_metrics(query, passage, temperature).map(|(loss, _)| loss)
    }

    /// [`SamToNe::forward`], and a report with the loss of every row, P@1 and MRR of the batch. On the CPU and on CUDA it costs nothing
    /// more; on a wgpu device it is read back only when it is asked for.
    ///
    /// # Errors
    /// As [`SamToNe::forward`].
    pub fn forward_with_metrics(
        &self,
        query: Tensor<2>,
        passage: Tensor<2>,
        temperature: impl Into<Temperature>,
    ) -> Result<(Tensor<1>, Report)> {
        let (query, passage) = (query.into_dispatch(), passage.into_dispatch());
        let temperature = temperature.into().try_map(|tensor| Ok(tensor.into_dispatch()))?;
        Call { query, passage, temperature }.run(self)
    }

    /// Loss, row losses, P@1 and MRR without any gradient, be the tensors tracked or not: for validation. Waits for the device.
    ///
    /// # Errors
    /// As [`SamToNe::forward`], on every device.
    pub fn evaluate(
        &self,
        query: Tensor<2>,
        passage: Tensor<2>,
        temperature: impl Into<Temperature>,
    ) -> Result<Evaluation> {
        let temperature = temperature.into().try_map(|tensor| Ok(tensor.detach()))?;
        self.forward_with_metrics(query.detach(), passage.detach(), temperature)?.1.evaluation()
    }

    pub(crate) fn loss(&self) -> &Loss {
        &self.loss
    }

    pub(crate) fn workspace(&self) -> &Mutex<Workspace> {
        &self.workspace
    }

    pub(crate) fn options(&self, temperature: &Temperature<f64>) -> Result<Options> {
        let mut options = temperature.options()?.with_zero_norm(self.zero_norm).with_no_negative(self.no_negative);
        if let Some(margin) = self.margin {
            options = options.with_margin(margin)?;
        }
        if let Some(share) = self.tile_skipping {
            options = options.with_tile_skipping(share)?;
        }
        Ok(self.workspace_bytes.map_or(options, |bytes| options.with_workspace_bytes(bytes)))
    }

    pub(crate) fn annotated<'a>(&'a self, batch: Batch<'a>) -> Result<Batch<'a>> {
        annotated!(self, batch)
    }

    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub(crate) fn paired<'a>(&'a self, pairs: samtone::Pairs<'a>) -> Result<samtone::Pairs<'a>> {
        annotated!(self, pairs)
    }
}
