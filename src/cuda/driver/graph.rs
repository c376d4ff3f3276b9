//! A call recorded as a CUDA graph, which the driver launches at once.

use super::arguments::{Pointers, Stream};
use super::device::Device;
use super::entry::{Driver, Handle};
use crate::cuda::Plan;
use crate::error::Result;
use std::ffi::c_int;
use std::fmt;

/// `CU_STREAM_NON_BLOCKING`: the default stream has nothing to do with it.
const NON_BLOCKING: u32 = 1;
/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: what other threads do meanwhile is their own affair.
const OF_THIS_THREAD: c_int = 1;

/// All launches of a call, bound to its memory and to one stream, which one call of the driver enqueues. Made by
/// [`Device::capture`].
///
/// It holds a clone of its device, so that the kernels stay loaded. Dropping it waits for nothing: a launch that is still to be
/// done is done.
pub struct Graph {
    executable: Handle,
    stream: Stream,
    device: Device,
}

// SAFETY: any thread may use the handle, one at a time, which `&mut self` sees to.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("stream", &self.stream).field("device", &self.device).finish_non_exhaustive()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_current) = self.device.current() else { return };
        // SAFETY: made in `Device::capture`, destroyed nowhere else; the driver keeps what is still to be done. A failure means
        // that the context is lost, and the graph with it.
        let _ = unsafe { self.device.driver().cuGraphExecDestroy(self.executable) };
    }
}

/// A stream on which nothing ever runs, so that a capture takes up nothing of anybody else's, and its failure leaves nothing behind.
struct CaptureStream(&'static Driver, Handle);

impl CaptureStream {
    /// Of the current context.
    fn new(driver: &'static Driver) -> Result<Self> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: one handle is written.
        unsafe { driver.cuStreamCreate(&mut stream, NON_BLOCKING) }?;
        Ok(Self(driver, stream))
    }

    fn as_stream(&self) -> Stream {
        Stream::from_raw(self.1.addr() as u64)
    }
}

impl Drop for CaptureStream {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed nowhere else. A failure leaves an idle stream, and there is nobody to tell.
        let _ = unsafe { self.0.cuStreamDestroy_v2(self.1) };
    }
}

/// What a capture leaves, of which executables are made.
struct Template(&'static Driver, Handle);

impl Drop for Template {
    fn drop(&mut self) {
        if !self.1.is_null() {
            // SAFETY: it came from a capture, and is destroyed nowhere else; executables do not need it.
            let _ = unsafe { self.0.cuGraphDestroy(self.1) };
        }
    }
}

impl Device {
    /// Records [`Device::loss_and_gradients`] as a graph that is launched on `stream`; enqueues nothing of it. What is not part of
    /// the call, such as the copy of the side data, is enqueued before or between launches.
    ///
    /// # Errors
    /// As [`Device::forward`]; [`Error::InvalidArgument`](crate::Error::InvalidArgument) while `stream` is being captured. A
    /// capture that fails leaves the stream as it was.
    ///
    /// # Safety
    /// As [`Device::forward`], for as long as the graph is launched, and until the stream has done its last launch.
    pub unsafe fn capture(&self, plan: &Plan, pointers: &Pointers, stream: Stream) -> Result<Graph> {
        let _current = self.current()?;
        self.expect_no_capture(stream, "a call on a stream that is being captured is part of that graph")?;
        self.load(plan)?;
        let driver = self.driver();
        let capturing = CaptureStream::new(driver)?;
        // SAFETY: the stream is new and of this context.
        unsafe { driver.cuStreamBeginCapture_v2(capturing.1, OF_THIS_THREAD) }?;
        // SAFETY: the caller's promise; nothing runs before a launch.
        let enqueued = unsafe { self.loss_and_gradients(plan, pointers, capturing.as_stream()) };
        let mut template = Template(driver, std::ptr::null_mut());
        // SAFETY: one handle is written; the capture was begun above.
        let ended = unsafe { driver.cuStreamEndCapture(capturing.1, &mut template.1) };
        enqueued.and(ended)?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: one handle is written; the template came from the capture.
        unsafe { driver.cuGraphInstantiateWithFlags(&mut executable, template.1, 0) }?;
        let graph = Graph { executable, stream, device: self.clone() };
        // So that the first launch takes no longer than the others.
        // SAFETY: the executable was made above; the stream is alive, as the caller promises.
        unsafe { driver.cuGraphUpload(graph.executable, stream.handle()) }?;
        Ok(graph)
    }
}

impl Graph {
    /// Enqueues the call. Allocates nothing and waits for nothing; results are read as after [`Device::loss_and_gradients`].
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda).
    ///
    /// # Safety
    /// As [`Device::forward`], for the pointers and the stream of the capture. [`Stream::PER_THREAD`] is that of the thread which
    /// launches.
    pub unsafe fn launch(&mut self) -> Result<()> {
        let _current = self.device.current()?;
        // SAFETY: the executable is alive, and its kernels are loaded, as the device is here; the rest is the caller's promise.
        unsafe { self.device.driver().cuGraphLaunch(self.executable, self.stream.handle()) }
    }

    /// The stream that it is launched on.
    pub fn stream(&self) -> Stream {
        self.stream
    }
}
