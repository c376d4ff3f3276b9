//! Copies between the host and a device, in the order of a stream, and what a call left in the state as results or an error.

use super::{Fault, Readout};
use crate::cuda::driver::arguments::{Pointers, Stream};
use crate::cuda::driver::device::Device;
use crate::cuda::{Plan, Slot};
use crate::error::{Error, Result};
use crate::output::{Evaluation, TemperatureGradient};
use crate::partials::{Partials, SAME_COSINE, expect_positives};
use crate::tower::Tower;
use std::ffi::c_int;
use std::ops::Range;

impl Device {
    /// Waits for the stream, then gives loss, row losses and metrics of the forward call that was enqueued there.
    ///
    /// # Errors
    /// What the call found wrong with its inputs: [`Error::NonFinite`], [`Error::ZeroNorm`], [`Error::NoNegative`].
    /// [`Error::InvalidArgument`] while the stream is being captured, [`Error::Cuda`] for whatever failed meanwhile.
    ///
    /// # Safety
    /// As [`Device::forward`], for the state and the embeddings. A forward call with these pointers must be enqueued on this stream, or
    /// done, and nothing may have changed state or embeddings since.
    pub unsafe fn evaluation(&self, readout: &Readout, pointers: &Pointers, stream: Stream) -> Result<Evaluation> {
        // SAFETY: the caller's promise.
        let head = unsafe { self.head(readout, Readout::fault, pointers, stream) }?;
        Ok(readout.evaluation(&head))
    }

    /// [`Device::evaluation`], and the temperature's gradient of the backward call that followed.
    ///
    /// # Errors
    /// As [`Device::evaluation`]. [`Error::NonFinite`] or [`Error::StateMismatch`] for an embedding that the backward call found to be
    /// another one than in the forward call: see [`Device::backward`].
    ///
    /// # Safety
    /// As [`Device::evaluation`], with forward and backward.
    pub unsafe fn results(
        &self,
        readout: &Readout,
        pointers: &Pointers,
        stream: Stream,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        // SAFETY: the caller's promise.
        let head = unsafe { self.head(readout, Readout::fault, pointers, stream) }?;
        Ok((readout.evaluation(&head), readout.temperature(&head)))
    }

    /// Waits for the stream, then gives the sums that [`Device::partials`] left. The caller merges them with those of the other shards.
    ///
    /// # Errors
    /// As [`Device::evaluation`], but not yet [`Error::NoNegative`].
    ///
    /// # Safety
    /// As [`Device::evaluation`], with [`Device::partials`] in place of forward.
    pub unsafe fn read_partials(&self, readout: &Readout, pointers: &Pointers, stream: Stream) -> Result<Partials> {
        // SAFETY: the caller's promise.
        unsafe {
            self.head(readout, Readout::fault_of_partials, pointers, stream)?;
            let array = |range: &Range<usize>| self.download(pointers.state + range.start as u64, range.len(), stream);
            Ok(readout.partials(&array(&readout.sums)?, &array(&readout.above)?, &array(&readout.positive)?))
        }
    }

    /// Puts merged sums into the state, for [`Device::combine`] on the same stream. Waits for the stream.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] for partial sums of another problem or of other embeddings, which have other cosines of positives.
    /// [`Error::InvalidArgument`] if they do not cover every row, or while the stream is being captured. [`Error::Cuda`].
    ///
    /// # Safety
    /// As [`Device::evaluation`], with [`Device::partials`] in place of forward.
    pub unsafe fn write_partials(
        &self,
        readout: &Readout,
        merged: &Partials,
        pointers: &Pointers,
        stream: Stream,
    ) -> Result<()> {
        merged.expect_problem(&readout.identity)?;
        merged.expect_complete()?;
        let (sums, above) = readout.encode(merged);
        // SAFETY: the caller's promise. The three arrays are in the state.
        unsafe {
            let positive = pointers.state + readout.positive.start as u64;
            let positive = self.download(positive, readout.positive.len(), stream)?;
            for (saved, given) in merged.prefixes.iter().zip(readout.positives(&positive)) {
                expect_positives(&saved.positive, &given, SAME_COSINE)?;
            }
            self.upload(pointers.state + readout.sums.start as u64, &sums, stream)?;
            self.upload(pointers.state + readout.above.start as u64, &above, stream)
        }
    }

    /// The beginning of the state, or the error for the fault that `fault` finds in its status.
    ///
    /// # Safety
    /// As [`Device::evaluation`].
    unsafe fn head(
        &self,
        readout: &Readout,
        fault: fn(&Readout, &[u8]) -> Option<Fault>,
        pointers: &Pointers,
        stream: Stream,
    ) -> Result<Vec<u8>> {
        // SAFETY: the caller's promise. The state is at least as long.
        let head = unsafe { self.download(pointers.state, readout.head(), stream) }?;
        let fault = fault(readout, &head[readout.status.clone()]);
        fault.map_or(Ok(()), |fault| readout.expect_row(fault))?;
        let row_bytes = |tower: Tower, row: usize| {
            let (start, row_bytes) = match tower {
                Tower::Query => (pointers.query, readout.row_bytes[0]),
                Tower::Passage => (pointers.passage, readout.row_bytes[1]),
            };
            let bytes = readout.entries() * readout.dtype.bytes();
            // SAFETY: the caller's promise. The row is one of the embeddings.
            unsafe { self.download(start + row as u64 * row_bytes, bytes, stream) }
        };
        match fault {
            None => Ok(head),
            Some(Fault::Refused(refusal)) => {
                let prefixes = readout.named.then_some(readout.prefixes.as_slice());
                Err(refusal.error(readout.loss.name(), readout.dtype, prefixes, row_bytes))
            }
            Some(Fault::Changed(tower, row)) => Err(readout.changed(tower, row, &row_bytes(tower, row)?)),
        }
    }

    /// Copies from the device, after everything that is enqueued. Waits for the copy.
    ///
    /// # Safety
    /// That many bytes at `from` can be read, and `stream` is as [`Device::forward`] says.
    pub(in crate::cuda::driver) unsafe fn download(&self, from: u64, bytes: usize, stream: Stream) -> Result<Vec<u8>> {
        let _current = self.current()?;
        self.expect_no_capture(stream, "memory can be read and written after a replay")?;
        let mut to = vec![0; bytes];
        // SAFETY: `to` has that many bytes. It stays until the copy is done, because the stream is waited for even if the copy is refused.
        let (copied, waited) = unsafe {
            let driver = self.driver();
            let copied = driver.cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, bytes, stream.handle());
            (copied, driver.cuStreamSynchronize(stream.handle()))
        };
        copied.and(waited).map(|()| to)
    }

    /// Copies to the device, after everything that is enqueued. Waits for the copy.
    ///
    /// # Safety
    /// All of `from` can be written at `to`, and `stream` is as [`Device::forward`] says.
    pub(in crate::cuda::driver) unsafe fn upload(&self, to: u64, from: &[u8], stream: Stream) -> Result<()> {
        let _current = self.current()?;
        self.expect_no_capture(stream, "memory can be read and written after a replay")?;
        // SAFETY: `from` stays until the copy is done, because the stream is waited for even if the copy is refused.
        let (copied, waited) = unsafe {
            let driver = self.driver();
            let copied = driver.cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), stream.handle());
            (copied, driver.cuStreamSynchronize(stream.handle()))
        };
        copied.and(waited)
    }

    /// Enqueues that the upstream gradient on the device becomes `value`. The plan must be of a problem
    /// [`with_device_upstream`](crate::cuda::Problem::with_device_upstream). This can be captured.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] and [`Error::Misaligned`] for the pointer, [`Error::Cuda`].
    ///
    /// # Safety
    /// As [`Device::forward`], for the pointer `upstream`.
    pub unsafe fn set_upstream(&self, plan: &Plan, pointers: &Pointers, value: f32, stream: Stream) -> Result<()> {
        pointers.check_slot(plan, Slot::Upstream)?;
        let _current = self.current()?;
        // SAFETY: the caller's promise. The driver takes the value itself, so no memory of the host has to stay.
        unsafe { self.driver().cuMemsetD32Async(pointers.upstream, value.to_bits(), 1, stream.handle()) }
    }

    /// An error while the stream is being captured, because waiting, allocating or loading would invalidate the capture. `instead` says
    /// what the caller can do.
    pub(in crate::cuda::driver) fn expect_no_capture(&self, stream: Stream, instead: &str) -> Result<()> {
        let _current = self.current()?;
        let mut status: c_int = 0;
        // SAFETY: one number is written; the stream is alive, as every caller promises.
        unsafe { self.driver().cuStreamIsCapturing(stream.handle(), &mut status) }?;
        if status != 0 {
            let allowed = format!("a stream outside of a capture; {instead}");
            return Err(Error::invalid("stream", "being captured into a graph", allowed));
        }
        Ok(())
    }
}
