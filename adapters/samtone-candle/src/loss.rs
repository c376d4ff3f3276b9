//! A call and the memory for it, and what computes.

use crate::op::Computed;
use crate::refused;
use crate::temperature::{Temperature, scalar};
use crate::view::{check_same_device, embeddings, readable};
#[cfg(feature = "cuda")]
use candle_core::Storage;
use candle_core::{Device, Result, Tensor};
use samtone::cpu::Workspace;
use samtone::{Batch, Call, Evaluation};
use std::sync::{Arc, Mutex};

/// A contrastive loss of two towers' embeddings: a [`Call`], which says everything but these, and memory.
///
/// Make one for a training run. In the loop, [`with`](Self::with) gives one for each batch:
///
/// ```
/// # use candle_core::{Device, Result, Tensor, Var};
/// # use samtone_candle::{Call, Loss, SamToNe, Temperature};
/// # fn main() -> Result<()> {
/// let samtone = SamToNe::new(Call::new(Loss::samtone_query(), 0.01)); // before the loop
/// # let q = Var::randn(0f32, 1.0, (4, 8), &Device::Cpu)?;
/// # let p = Var::randn(0f32, 1.0, (4, 8), &Device::Cpu)?;
/// let batch = samtone.with(|call| call.with_passage_ids([3, 7, 3, 9])); // in the loop
/// let loss = batch.forward(&q, &p, Temperature::Fixed)?;
/// let gradients = loss.backward()?;
/// # assert_eq!(gradients.get(&q).unwrap().dims(), [4, 8]);
/// # Ok(())
/// # }
/// ```
///
/// Clones, and what `with` gives, share the memory of their calls (up to [`Call::with_workspace_bytes`], and O((M + N)·d)), so that a
/// step allocates none of it again. Calls at the same time are right, too; all but one then take memory of their own. On a CUDA
/// device that memory is on candle's stream, and kept for one stream at a time.
///
/// A temperature that is learned is a tensor with a gradient, as the embeddings are, and so [`Temperature`] is an argument beside
/// them. A constant one is a number of the call.
#[derive(Debug, Clone)]
pub struct SamToNe {
    call: Call,
    workspace: Arc<Mutex<Workspace>>,
    #[cfg(feature = "cuda")]
    step: Arc<crate::cuda::Shared>,
}

impl SamToNe {
    /// This call, and no memory yet. What is wrong with the call is an error of [`forward`](Self::forward), or of [`Call::check`].
    pub fn new(call: Call) -> Self {
        Self {
            call,
            workspace: Arc::default(),
            #[cfg(feature = "cuda")]
            step: Arc::default(),
        }
    }

    /// One with another call and the same memory: for what a batch has of its own, such as ids.
    #[must_use = "the call of `self` stays as it is"]
    pub fn with(&self, change: impl FnOnce(Call) -> Call) -> Self {
        Self {
            call: change(self.call.clone()),
            workspace: self.workspace.clone(),
            #[cfg(feature = "cuda")]
            step: self.step.clone(),
        }
    }

    /// What is to be computed.
    pub fn call(&self) -> &Call {
        &self.call
    }

    /// The loss as a scalar tensor, f32, whose `backward` reaches `query`, `passage` and the tensor in `temperature`.
    ///
    /// `query` is M × d and `passage` N × d with N ≥ M, both f32, f16 or bf16 and on the CPU or, with the feature `cuda`, on one
    /// CUDA device. Tensors whose rows are contiguous are read in place, whatever lies between the rows; others are copied first.
    /// Gradients come in the type of what they belong to, rounded after the upstream gradient has been applied.
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
    pub fn forward(&self, query: &Tensor, passage: &Tensor, temperature: Temperature<'_>) -> Result<Tensor> {
        self.differentiable(query, passage, temperature, false).map(|(loss, _)| loss)
    }

    /// [`SamToNe::forward`], and the loss of every row, P@1 and MRR of the batch. They cost nothing more on the CPU; on a CUDA
    /// device they are waited for, and what is wrong with the embeddings is an error as on the CPU.
    ///
    /// # Errors
    /// As [`SamToNe::forward`].
    pub fn forward_with_metrics(
        &self,
        query: &Tensor,
        passage: &Tensor,
        temperature: Temperature<'_>,
    ) -> Result<(Tensor, Evaluation)> {
        let (loss, evaluation) = self.differentiable(query, passage, temperature, true)?;
        Ok((loss, evaluation.ok_or_else(unevaluated)?))
    }

    /// Loss, row losses, P@1 and MRR without any gradient, be the tensors tracked or not: for validation. Waits for a CUDA device.
    ///
    /// # Errors
    /// As [`SamToNe::forward`].
    pub fn evaluate(&self, query: &Tensor, passage: &Tensor, temperature: Temperature<'_>) -> Result<Evaluation> {
        let (evaluation, _) = self.compute(query, passage, temperature, false, true)?;
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
        let wanted = [tracked(query), tracked(passage), temperature.tensor().is_some_and(|tensor| tracked(tensor))];
        let (q, p) = (readable("query", query)?, readable("passage", passage)?);
        check_same_device(query, passage)?;
        let call = temperature.try_map(scalar).and_then(|number| self.call.at(number).map_err(refused))?;
        let ((q_storage, q_layout), (p_storage, p_layout)) = (q.storage_and_layout(), p.storage_and_layout());
        #[cfg(feature = "cuda")]
        if let (Storage::Cuda(q), Storage::Cuda(p)) = (&*q_storage, &*p_storage) {
            let pairs = call.pairs(query.dim(0)?, passage.dim(0)?).map_err(refused)?;
            let task = crate::cuda::Task { pairs, temperature, wanted, evaluate };
            return crate::cuda::compute(&task, [(q, q_layout), (p, p_layout)], &self.step);
        }
        let _ = evaluate;
        let (q, p) = (embeddings(&q_storage, q_layout)?, embeddings(&p_storage, p_layout)?);
        let batch = Batch::new(&call, q, p).map_err(refused)?;
        let (evaluation, computed) = self.on_cpu(&batch, temperature, wanted)?;
        Ok((Some(evaluation), computed))
    }

    fn on_cpu(
        &self,
        batch: &Batch<'_>,
        temperature: Temperature<'_>,
        wanted: [bool; 3],
    ) -> Result<(Evaluation, Computed)> {
        let scalar = |loss: f64| Tensor::new(loss as f32, &Device::Cpu);
        if wanted == [false; 3] {
            let evaluation = samtone::cpu::forward(batch).map_err(refused)?.evaluation().clone();
            let computed = Computed { loss: scalar(evaluation.loss)?, embeddings: [None, None], temperature: None };
            return Ok((evaluation, computed));
        }
        let (evaluation, [dq, dp], derivative) = {
            let mut own = Workspace::new();
            let mut shared = self.workspace.try_lock();
            let workspace = shared.as_deref_mut().unwrap_or(&mut own);
            workspace.loss_and_wanted_gradients(batch, [wanted[0], wanted[1]]).map_err(refused)?
        };
        let tensor = |gradient: Option<Vec<f32>>, rows| {
            gradient.map(|gradient| Tensor::from_vec(gradient, (rows, batch.dim()), &Device::Cpu)).transpose()
        };
        let computed = Computed {
            loss: scalar(evaluation.loss)?,
            embeddings: [tensor(dq, batch.rows())?, tensor(dp, batch.passages())?],
            temperature: wanted[2]
                .then(|| Tensor::new(temperature.derivative(derivative), &Device::Cpu))
                .transpose()?,
        };
        Ok((evaluation, computed))
    }
}

/// Cannot happen: whoever asks for an evaluation gets it.
fn unevaluated() -> candle_core::Error {
    candle_core::Error::msg("a call that was not evaluated")
}

#[cfg(test)]
mod tests {
    use super::*;
    use samtone::Loss;

    /// A program that makes one for each batch keeps its memory.
    #[test]
    fn another_call_has_the_same_memory() {
        let samtone = SamToNe::new(Call::new(Loss::samtone_query(), 0.01));
        let other = samtone.with(|call| call.with_temperature(0.02));
        assert!(Arc::ptr_eq(&samtone.workspace, &other.workspace));
        #[cfg(feature = "cuda")]
        assert!(Arc::ptr_eq(&samtone.step, &other.step));
        assert_eq!((samtone.call().temperature(), other.call().temperature()), (0.01, 0.02));
    }
}
