//! What a step gives: numbers that stay on the device, or results that are read from it.

use super::super::raw;
use super::{Progress, Step, mismatch};
use crate::cuda::driver::arguments::Pointers;
use crate::dtype::Element;
use crate::error::Result;
use crate::output::{Evaluation, TemperatureGradient};
use cudarc::driver::{CudaView, DevicePtr};

impl Step {
    /// The loss on the device. It is valid once the stream is done with the step. It is NaN if the inputs are refused.
    ///
    /// # Errors
    /// [`Error::StateMismatch`](crate::Error::StateMismatch) without a forward call.
    pub fn loss(&self) -> Result<CudaView<'_, f64>> {
        self.expect(Progress::Forward)?;
        self.numbers(self.readout.loss_offset(), 1)
    }

    /// ∂L/∂τ and ∂L/∂log β on the device, multiplied by the upstream gradient. They are valid once the stream is done with the step. They
    /// are NaN if the inputs are refused.
    ///
    /// # Errors
    /// [`Error::StateMismatch`](crate::Error::StateMismatch) without a backward call.
    pub fn temperature(&self) -> Result<CudaView<'_, f64>> {
        self.expect(Progress::Backward)?;
        self.numbers(self.readout.temperature_offset(), 2)
    }

    /// `count` numbers of the state, from the byte `offset` on.
    fn numbers(&self, offset: usize, count: usize) -> Result<CudaView<'_, f64>> {
        let bytes = self.state.slice.try_slice(offset..offset + count * size_of::<f64>());
        // SAFETY: any bits are an f64. Arrays of the state are aligned to more than the 8 bytes of an f64.
        let view = bytes.and_then(|bytes| unsafe { bytes.transmute(count) });
        view.ok_or_else(|| mismatch("a state without these results"))
    }

    /// Waits for the stream, then gives loss, row losses and metrics. The embeddings must be those of the forward call. The error for an
    /// element that is not finite looks its value up there.
    ///
    /// # Errors
    /// As [`Device::evaluation`](crate::cuda::Device::evaluation), and [`Error::StateMismatch`](crate::Error::StateMismatch) without a
    /// forward call.
    pub fn evaluation<T: Element>(&self, query: &impl DevicePtr<T>, passage: &impl DevicePtr<T>) -> Result<Evaluation> {
        self.expect(Progress::Forward)?;
        self.check_inputs(query, passage)?;
        let ((query, _q), (passage, _p)) = (query.device_ptr(&self.stream), passage.device_ptr(&self.stream));
        let pointers = Pointers { query, passage, state: self.state.address, ..Pointers::default() };
        self.wait_for_other_thread()?;
        // SAFETY: state and embeddings are as long as the plan says, and alive. The forward call was enqueued on this stream.
        unsafe { self.device.evaluation(&self.readout, &pointers, raw(&self.stream)) }
    }

    /// [`Step::evaluation`], and the gradient of the temperature.
    ///
    /// # Errors
    /// As [`Device::evaluation`](crate::cuda::Device::evaluation), and [`Error::StateMismatch`](crate::Error::StateMismatch) without a
    /// backward call.
    pub fn results<T: Element>(
        &self,
        query: &impl DevicePtr<T>,
        passage: &impl DevicePtr<T>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        self.expect(Progress::Backward)?;
        self.check_inputs(query, passage)?;
        let ((query, _q), (passage, _p)) = (query.device_ptr(&self.stream), passage.device_ptr(&self.stream));
        let pointers = Pointers { query, passage, state: self.state.address, ..Pointers::default() };
        self.wait_for_other_thread()?;
        // SAFETY: as in `evaluation`. The backward call was enqueued on this stream.
        unsafe { self.device.results(&self.readout, &pointers, raw(&self.stream)) }
    }
}
