//! The loss in one call, or in two.

use super::step::{GradientSlices, Step};
use super::{DeviceBatch, Shape, Upstream, allocate};
use crate::cuda::driver::device::Device;
use crate::dtype::Element;
use crate::error::Result;
use crate::output::{Evaluation, TemperatureGradient};
use cudarc::driver::{CudaSlice, CudaStream, CudaView};
use std::sync::Arc;

/// Gradients on the device, f32, row-major and contiguous, times the upstream gradient. NaN if the call's inputs are refused.
#[derive(Debug)]
pub struct DeviceGradients {
    /// ∂L/∂q, M × d; of a shard, its rows × d.
    pub query: CudaSlice<f32>,
    /// ∂L/∂p, N × d.
    pub passage: CudaSlice<f32>,
}

impl DeviceGradients {
    /// Room for the gradients of `rows` queries and `passages` passages.
    pub(super) fn new(stream: &Arc<CudaStream>, rows: usize, passages: usize, dim: usize) -> Result<Self> {
        // SAFETY: the backward call writes all of it, or fails.
        let slice = |rows| unsafe { allocate(stream, rows * dim, "the gradients") };
        Ok(Self { query: slice(rows)?, passage: slice(passages)? })
    }

    pub(super) fn slices(&mut self) -> GradientSlices<'_, f32> {
        GradientSlices::both(&mut self.query, &mut self.passage)
    }
}

/// Loss, metrics and gradients of one call, enqueued but not waited for.
#[derive(Debug)]
pub struct DeviceLossAndGradients {
    /// ∂L/∂q and ∂L/∂p.
    pub gradients: DeviceGradients,
    step: Step,
    shape: Shape,
}

impl DeviceLossAndGradients {
    /// The loss on the device, NaN if the inputs are refused.
    ///
    /// # Errors
    /// None in practice.
    pub fn loss(&self) -> Result<CudaView<'_, f64>> {
        self.step.loss()
    }

    /// Waits, then gives loss, row losses, metrics and the gradient of the temperature. `batch` is that of the call.
    ///
    /// # Errors
    /// What was wrong with the embeddings, as [`Device::evaluation`]; [`Error::StateMismatch`](crate::Error::StateMismatch) for a
    /// batch of another shape or type.
    pub fn results<T: Element>(&self, batch: &DeviceBatch<'_, T>) -> Result<(Evaluation, TemperatureGradient)> {
        self.shape.expect(batch)?;
        self.step.results(&batch.query, &batch.passage)
    }
}

/// Loss, metrics and gradients in one call, enqueued on `stream` with memory taken from it. Embeddings are f32, f16 or bf16,
/// gradients f32, multiplied by `upstream`. To repeat it without allocating, use a [`Step`].
///
/// # Errors
/// As [`Step::new`] and [`Step::loss_and_gradients`]. What is wrong with the embeddings is found by
/// [`DeviceLossAndGradients::results`].
pub fn loss_and_gradients<T: Element>(
    device: &Device,
    stream: &Arc<CudaStream>,
    batch: &DeviceBatch<'_, T>,
    upstream: f64,
) -> Result<DeviceLossAndGradients> {
    // Not by way of the device's f32, so that nothing is rounded.
    let mut step = Step::new(device, stream, &batch.problem()?.with_upstream(upstream)?)?;
    let (rows, passages) = (batch.pairs.rows(), batch.pairs.passages());
    let mut gradients = DeviceGradients::new(stream, rows, passages, batch.dim)?;
    step.loss_and_gradients(&batch.query, &batch.passage, gradients.slices(), 1.0)?;
    step.release_workspace();
    Ok(DeviceLossAndGradients { gradients, step, shape: batch.shape() })
}

/// Loss and metrics now, enqueued on `stream`; gradients later.
///
/// # Errors
/// As [`Step::new`] and [`Step::forward`]. What is wrong with the embeddings is found by [`Forward::evaluation`].
pub fn forward<T: Element>(device: &Device, stream: &Arc<CudaStream>, batch: &DeviceBatch<'_, T>) -> Result<Forward> {
    let mut step = Step::new(device, stream, &batch.problem()?)?;
    step.forward(&batch.query, &batch.passage)?;
    step.release_workspace();
    Ok(Forward { step, shape: batch.shape() })
}

/// What a forward call keeps for its backward call: O(M + N) numbers, no embedding.
#[derive(Debug)]
pub struct Forward {
    step: Step,
    shape: Shape,
}

impl Forward {
    /// The loss on the device, NaN if the inputs are refused.
    ///
    /// # Errors
    /// None in practice.
    pub fn loss(&self) -> Result<CudaView<'_, f64>> {
        self.step.loss()
    }

    /// Waits, then gives loss, row losses and metrics. `batch` is that of the forward call.
    ///
    /// # Errors
    /// As [`DeviceLossAndGradients::results`].
    pub fn evaluation<T: Element>(&self, batch: &DeviceBatch<'_, T>) -> Result<Evaluation> {
        self.shape.expect(batch)?;
        self.step.evaluation(&batch.query, &batch.passage)
    }

    /// Enqueues the gradients for the batch of the forward call, unchanged since, times `upstream`, which may stay on the device. If an
    /// embedding has another norm than in the forward call, or is not finite, all gradients are NaN, and [`Forward::temperature`] and
    /// [`Forward::evaluation`] say which one.
    ///
    /// # Errors
    /// As [`Step::backward`], and [`Error::StateMismatch`](crate::Error::StateMismatch) for a batch of another shape or type.
    pub fn backward<'u, T: Element>(
        &mut self,
        batch: &DeviceBatch<'_, T>,
        upstream: impl Into<Upstream<'u>>,
    ) -> Result<DeviceGradients> {
        self.shape.expect(batch)?;
        self.step.expect_no_capture()?;
        let (rows, passages) = (batch.pairs.rows(), batch.pairs.passages());
        let mut gradients = DeviceGradients::new(self.step.stream(), rows, passages, batch.dim)?;
        self.backward_into(batch, gradients.slices(), upstream)?;
        Ok(gradients)
    }

    /// [`Forward::backward`] into slices of the caller.
    ///
    /// # Errors
    /// As [`Forward::backward`].
    pub fn backward_into<'u, T: Element>(
        &mut self,
        batch: &DeviceBatch<'_, T>,
        gradients: GradientSlices<'_, f32>,
        upstream: impl Into<Upstream<'u>>,
    ) -> Result<()> {
        self.shape.expect(batch)?;
        self.step.backward(&batch.query, &batch.passage, gradients, upstream)?;
        self.step.release_workspace();
        Ok(())
    }

    /// Waits, then gives the gradient of the temperature, after a backward call. `batch` is that of both calls.
    ///
    /// # Errors
    /// As [`Forward::evaluation`], for what either call found, and [`Error::StateMismatch`](crate::Error::StateMismatch) without a backward
    /// call.
    pub fn temperature<T: Element>(&self, batch: &DeviceBatch<'_, T>) -> Result<TemperatureGradient> {
        self.shape.expect(batch)?;
        self.step.results(&batch.query, &batch.passage).map(|(_, temperature)| temperature)
    }
}
