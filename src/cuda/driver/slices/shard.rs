//! A range of rows of a batch that several devices share.

use super::calls::DeviceGradients;
use super::step::Step;
use super::{DeviceBatch, Upstream};
use crate::cuda::driver::device::Device;
use crate::dtype::Element;
use crate::error::Result;
use crate::output::{Evaluation, TemperatureGradient};
use crate::partials::Partials;
use cudarc::driver::CudaStream;
use std::ops::Range;
use std::sync::Arc;

/// One shard of a larger batch: a range of its rows against all queries and all passages, as [`cpu::Shard`](crate::cpu::Shard).
///
/// Shards that cover every row once give together what one device gives. The caller merges their [`Partials`], evaluates, and adds up
/// their passage and temperature gradients. Each device holds the whole batch. Partial sums of shards on a CPU may be merged with these.
#[derive(Debug)]
pub struct Shard<'a, T> {
    step: Step,
    batch: &'a DeviceBatch<'a, T>,
    rows: Range<usize>,
}

impl<'a, T: Element> Shard<'a, T> {
    /// The shard of `rows`, on one device. `batch` is the whole batch, in the memory of that device.
    ///
    /// # Errors
    /// As [`Step::new`], and [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a range that is empty or beyond the
    /// batch.
    pub fn new(
        device: &Device,
        stream: &Arc<CudaStream>,
        batch: &'a DeviceBatch<'a, T>,
        rows: Range<usize>,
    ) -> Result<Self> {
        let problem = batch.problem()?.with_rows(rows.clone())?;
        Ok(Self { step: Step::new(device, stream, &problem)?, batch, rows })
    }

    /// Computes the shard's part of every row's sums, O(M) numbers. Waits for the device.
    ///
    /// # Errors
    /// As [`Step::forward`]. [`Error::NonFinite`](crate::Error::NonFinite) and [`Error::ZeroNorm`](crate::Error::ZeroNorm), which name the
    /// row.
    pub fn partials(&mut self) -> Result<Partials> {
        self.step.partials(&self.batch.query, &self.batch.passage)
    }

    /// Loss, row losses and metrics of the whole batch, from the merged partial sums of all shards. Waits for the device.
    ///
    /// # Errors
    /// As [`Shard::partials`]; [`Error::StateMismatch`](crate::Error::StateMismatch) for partials of other inputs,
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if they do not cover every row, and
    /// [`Error::NoNegative`](crate::Error::NoNegative).
    pub fn evaluate(&mut self, merged: &Partials) -> Result<Evaluation> {
        self.step.combine(&self.batch.query, &self.batch.passage, merged)?;
        self.step.evaluation(&self.batch.query, &self.batch.passage)
    }

    /// Gradients. Those of the queries are for the shard's rows only (rows.len() × d), and complete. Those of the passages (N × d) and of
    /// the temperature are parts that the caller adds up over the shards. Waits for the device.
    ///
    /// # Errors
    /// As [`Shard::evaluate`] and [`Step::backward`].
    pub fn gradients<'u>(
        &mut self,
        merged: &Partials,
        upstream: impl Into<Upstream<'u>>,
    ) -> Result<(DeviceGradients, TemperatureGradient)> {
        let DeviceBatch { query, passage, dim, pairs, .. } = self.batch;
        self.step.combine(query, passage, merged)?;
        let mut gradients = DeviceGradients::new(self.step.stream(), self.rows.len(), pairs.passages(), *dim)?;
        self.step.backward(query, passage, gradients.slices(), upstream)?;
        let (_, temperature) = self.step.results(query, passage)?;
        Ok((gradients, temperature))
    }
}
