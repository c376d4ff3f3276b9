//! The loss in one call, or in two.

use super::step::{GradientSlices, Step};
use super::{DeviceBatch, Shape, Upstream, allocate};
use crate::cuda::driver::device::Device;
use crate::dtype::Element;
use crate::error::Result;
use crate::output::{Evaluation, TemperatureGradient};
use cudarc::driver::{CudaSlice, CudaStream, CudaView};
use std::sync::Arc;

/// Gradients on the device: f32, row-major, contiguous, and multiplied by the upstream gradient. They are NaN if the call's inputs are
/// refused.
#[derive(Debug)]
pub struct DeviceGradients {
    /// ∂L/∂q, M × d. That of a shard has the shard's rows only.
    pub query: CudaSlice<f32>,
    /// ∂L/∂p, N × d.
    pub passage: CudaSlice<f32>,
}

impl DeviceGradients {
    /// Room for the gradients of `rows` queries and `passages` passages.
    pub(super) fn new(stream: &Arc<CudaStream>, rows: usize, passages: usize, dim: usize) -> Result<Self> {
        // SAFETY: a backward call either writes all of it or fails.
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

    /// Waits, then gives loss, row losses, metrics and the gradient of the temperature. `batch` must be that of the call.
    ///
    /// # Errors
    /// What was wrong with the embeddings, as [`Device::evaluation`] says. [`Error::StateMismatch`](crate::Error::StateMismatch) for a
    /// batch of another shape or type.
    pub fn results<T: Element>(&self, batch: &DeviceBatch<'_, T>) -> Result<(Evaluation, TemperatureGradient)> {
        self.shape.expect(batch)?;
        self.step.results(&batch.query, &batch.passage)
    }
}

/// Enqueues loss, metrics and gradients on `stream`, in memory that is allocated on it. Embeddings are f32, f16 or bf16. Gradients are
/// f32, and are multiplied by `upstream`. A [`Step`] repeats a call without allocating.
///
/// # Errors
/// As [`Step::new`] and [`Step::loss_and_gradients`]. [`DeviceLossAndGradients::results`] says what is wrong with the embeddings.
pub fn loss_and_gradients<T: Element>(
    device: &Device,
    stream: &Arc<CudaStream>,
    batch: &DeviceBatch<'_, T>,
    upstream: f64,
) -> Result<DeviceLossAndGradients> {
    // The problem holds the upstream gradient as f64. The upstream gradient on the device is an f32, and would round it.
    let mut step = Step::new(device, stream, &batch.problem()?.with_upstream(upstream)?)?;
    let (rows, passages) = (batch.pairs.rows(), batch.pairs.passages());
    let mut gradients = DeviceGradients::new(stream, rows, passages, batch.dim)?;
    step.loss_and_gradients(&batch.query, &batch.passage, gradients.slices(), 1.0)?;
    step.release_workspace();
    Ok(DeviceLossAndGradients { gradients, step, shape: batch.shape() })
}

/// Enqueues loss and metrics on `stream`. [`Forward::backward`] enqueues the gradients later.
///
/// # Errors
/// As [`Step::new`] and [`Step::forward`]. [`Forward::evaluation`] says what is wrong with the embeddings.
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

    /// Waits, then gives loss, row losses and metrics. `batch` must be that of the forward call.
    ///
    /// # Errors
    /// As [`DeviceLossAndGradients::results`].
    pub fn evaluation<T: Element>(&self, batch: &DeviceBatch<'_, T>) -> Result<Evaluation> {
        self.shape.expect(batch)?;
        self.step.evaluation(&batch.query, &batch.passage)
    }

    /// Enqueues the gradients, multiplied by `upstream`, which may be on the device. `batch` must be that of the forward call, and its
    /// embeddings unchanged. If an embedding has another norm than in the forward call, or is not finite, all gradients are NaN, and
    /// [`Forward::temperature`] and [`Forward::evaluation`] name the embedding.
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

    /// [`Forward::backward`], into slices of the caller.
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

    /// Waits, then gives the gradient of the temperature, after a backward call. `batch` must be that of both calls.
    ///
    /// # Errors
    /// As [`Forward::evaluation`], for what either call found. [`Error::StateMismatch`](crate::Error::StateMismatch) without a backward
    /// call.
    pub fn temperature<T: Element>(&self, batch: &DeviceBatch<'_, T>) -> Result<TemperatureGradient> {
        self.shape.expect(batch)?;
        self.step.results(&batch.query, &batch.passage).map(|(_, temperature)| temperature)
    }
}
