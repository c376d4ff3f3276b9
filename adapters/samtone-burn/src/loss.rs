//! A call and the memory for it, and what computes.

use crate::route::Tensors;
use crate::{Call, Evaluation, Report, Result};
use burn::tensor::Tensor;
use samtone::cpu::Workspace;
use std::sync::{Arc, Mutex};

/// τ, which cosines are divided by, from 1e-6 to 1e6; SamToNe uses 0.01.
///
/// A tensor holds one number, in any float type, and gets its gradient in its own type.
pub type Temperature<T = Tensor<1>> = samtone::Temperature<T>;

/// A contrastive loss of two towers' embeddings: a [`Call`], which says everything but these, and memory.
///
/// Make one for a training run. In the loop, [`with`](Self::with) gives one for each batch:
///
/// ```
/// # use burn::tensor::{Device, Distribution, Tensor};
/// # use samtone_burn::{Call, Loss, Result, SamToNe, Temperature};
/// # fn main() -> Result<()> {
/// let samtone = SamToNe::new(Call::new(Loss::samtone_query(), 0.01)); // before the loop
/// # let device = Device::flex().autodiff();
/// # let q = Tensor::<2>::random([4, 8], Distribution::Default, &device).require_grad();
/// # let p = Tensor::<2>::random([4, 8], Distribution::Default, &device).require_grad();
/// let batch = samtone.with(|call| call.with_passage_ids([3, 7, 3, 9])); // in the loop
/// let loss = batch.forward(q.clone(), p.clone(), Temperature::Fixed)?;
/// let gradients = loss.backward();
/// # assert_eq!(q.grad(&gradients).unwrap().dims(), [4, 8]);
/// # Ok(())
/// # }
/// ```
///
/// On the CPU, clones, and what `with` gives, share the memory of their calls (up to [`Call::with_workspace_bytes`], and
/// O((M + N)·d)), so that a step allocates none of it again. Calls at the same time are right, too; all but one then take memory of
/// their own.
///
/// A temperature that is learned is a tensor with a gradient, as the embeddings are, and so [`Temperature`] is an argument beside
/// them. A constant one is a number of the call.
#[derive(Debug, Clone)]
pub struct SamToNe {
    call: Call,
    workspace: Arc<Mutex<Workspace>>,
}

impl SamToNe {
    /// This call, and no memory yet. What is wrong with the call is an error of [`forward`](Self::forward), or of [`Call::check`].
    pub fn new(call: Call) -> Self {
        Self { call, workspace: Arc::default() }
    }

    /// One with another call and the same memory: for what a batch has of its own, such as ids.
    #[must_use = "the call of `self` stays as it is"]
    pub fn with(&self, change: impl FnOnce(Call) -> Call) -> Self {
        Self { call: change(self.call.clone()), workspace: self.workspace.clone() }
    }

    /// What is to be computed.
    pub fn call(&self) -> &Call {
        &self.call
    }

    /// The loss as a tensor of shape \[1\], f32, whose `backward` reaches `query`, `passage` and the tensor in `temperature`.
    ///
    /// `query` is M × d and `passage` N × d with N ≥ M, both f32, f16 or bf16 and on one device: `Device::flex()`, or, with the
    /// features `wgpu` and `cuda`, `Device::wgpu` and `Device::cuda`. Tensors whose rows are contiguous are read in place, whatever
    /// lies between the rows; others are copied first. Gradients come in the type of what they belong to, rounded after the
    /// upstream gradient has been applied.
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
    pub fn forward(&self, query: Tensor<2>, passage: Tensor<2>, temperature: Temperature) -> Result<Tensor<1>> {
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
        temperature: Temperature,
    ) -> Result<(Tensor<1>, Report)> {
        let (query, passage) = (query.into_dispatch(), passage.into_dispatch());
        let temperature = temperature.try_map(|tensor| Result::Ok(tensor.into_dispatch()))?;
        Tensors { query, passage, temperature }.run(self)
    }

    /// Loss, row losses, P@1 and MRR without any gradient, be the tensors tracked or not: for validation. Waits for the device.
    ///
    /// # Errors
    /// As [`SamToNe::forward`], on every device.
    pub fn evaluate(&self, query: Tensor<2>, passage: Tensor<2>, temperature: Temperature) -> Result<Evaluation> {
        let temperature = temperature.try_map(|tensor| Result::Ok(tensor.detach()))?;
        self.forward_with_metrics(query.detach(), passage.detach(), temperature)?.1.evaluation()
    }

    pub(crate) fn workspace(&self) -> &Mutex<Workspace> {
        &self.workspace
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Loss;

    /// A program that makes one for each batch keeps its memory.
    #[test]
    fn another_call_has_the_same_memory() {
        let samtone = SamToNe::new(Call::new(Loss::samtone_query(), 0.01));
        let other = samtone.with(|call| call.with_temperature(0.02));
        assert!(Arc::ptr_eq(&samtone.workspace, &other.workspace));
        assert_eq!((samtone.call().temperature(), other.call().temperature()), (0.01, 0.02));
    }
}
