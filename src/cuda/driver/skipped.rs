//! What tile skipping left out of a call.

use super::arguments::{Pointers, Stream};
use super::device::Device;
use crate::cuda::abi::{SKIPPED, SQUARES};
use crate::cuda::{Plan, Slot};
use crate::error::{Error, Result};

/// Numbers of squares of cosines that have gradients. Of a triangle, mirror images do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SkippedSquares {
    /// All that have gradients.
    pub squares: u64,
    /// Those that were left out of the gradient.
    pub skipped: u64,
}

impl Device {
    /// Waits for the stream, then says how many squares of cosines the call that was enqueued there leaves out of its gradient. The call
    /// must have asked for [tile skipping](crate::Call::with_tile_skipping). The forward call already decides the numbers.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] for a plan without tile skipping, or a state that no call has written. [`Error::InvalidArgument`] while
    /// the stream is being captured. [`Error::Cuda`] for whatever failed meanwhile.
    ///
    /// # Safety
    /// As [`Device::evaluation`], for the state.
    pub unsafe fn skipped_squares(&self, plan: &Plan, pointers: &Pointers, stream: Stream) -> Result<SkippedSquares> {
        let mismatch =
            |saved: &str| Error::StateMismatch { saved: saved.into(), given: "a question what was skipped".into() };
        let asked = plan.array("square_masses").and(plan.array("results")).filter(|a| a.slot == Slot::State);
        let results = asked.ok_or_else(|| mismatch("a plan without tile skipping"))?;
        // SAFETY: the caller's promise; the array is part of the state.
        let bytes = unsafe { self.download(pointers.state + results.offset, results.bytes as usize, stream) }?;
        let number = |at: usize| bytemuck::pod_read_unaligned::<f64>(&bytes[8 * at..][..8]);
        let (squares, skipped) = (number(SQUARES), number(SKIPPED));
        if !(squares >= 1.0 && (0.0..=squares).contains(&skipped)) {
            return Err(mismatch("no call that has run"));
        }
        Ok(SkippedSquares { squares: squares as u64, skipped: skipped as u64 })
    }
}
