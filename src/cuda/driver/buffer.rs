//! Device memory that the backend allocates itself, for callers whose data are on the host.

use super::arguments::Stream;
use super::device::{Device, allocation_error};
use crate::error::Result;

/// Memory on the device. Dropping it waits for whatever still uses it, and then frees it.
pub(super) struct Buffer<'a> {
    device: &'a Device,
    pointer: u64,
    bytes: usize,
}

impl<'a> Buffer<'a> {
    /// Uninitialised memory of at least one byte, because the driver allocates no empty memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), with `purpose`.
    pub(super) fn new(device: &'a Device, bytes: usize, purpose: &'static str) -> Result<Self> {
        let _current = device.current()?;
        let mut pointer = 0;
        // SAFETY: one address is written.
        let result = unsafe { device.driver().cuMemAlloc_v2(&mut pointer, bytes.max(1)) };
        result.map_err(|error| allocation_error(error, bytes, purpose))?;
        Ok(Self { device, pointer, bytes })
    }

    /// Its address.
    pub(super) fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Copies `from`, which is as long as the buffer or shorter, to its start.
    pub(super) fn upload(&self, from: &[u8]) -> Result<()> {
        let from = &from[..from.len().min(self.bytes)];
        // SAFETY: the buffer is at least as long as `from`. The stream always exists.
        unsafe { self.device.upload(self.pointer, from, Stream::PER_THREAD) }
    }

    /// Copies all of it to the host.
    pub(super) fn download(&self) -> Result<Vec<u8>> {
        // SAFETY: the buffer has that many bytes. The stream always exists.
        unsafe { self.device.download(self.pointer, self.bytes, Stream::PER_THREAD) }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let Ok(_current) = self.device.current() else { return };
        // SAFETY: the memory was allocated in `new` and is freed nowhere else. A failure means that the context is lost, and its memory
        // with it.
        let _ = unsafe { self.device.driver().cuMemFree_v2(self.pointer) };
    }
}
