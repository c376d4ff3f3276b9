//! A call recorded as a CUDA graph, which the driver launches at once.

use super::arguments::{Pointers, Stream};
use super::device::Device;
use super::entry::{Driver, Handle};
use crate::cuda::Plan;
use crate::error::Result;
use std::ffi::c_int;
use std::fmt;

/// `CU_STREAM_NON_BLOCKING`: the stream and the default stream do not wait for each other.
const NON_BLOCKING: u32 = 1;
/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: calls of other threads during the capture do not break it.
const OF_THIS_THREAD: c_int = 1;

/// All launches of a call, for fixed memory and one stream. One call of the driver enqueues them. [`Device::capture`] makes it.
///
/// It holds a clone of its device, so that the kernels stay loaded. Dropping it does not wait. A launch that is already enqueued still
/// runs.
pub struct Graph {
    executable: Handle,
    stream: Stream,
    device: Device,
}

// SAFETY: any thread may use the handle, but only one at a time, which `&mut self` ensures.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("stream", &self.stream).field("device", &self.device).finish_non_exhaustive()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_current) = self.device.current() else { return };
        // SAFETY: it was made in `Device::capture` and is destroyed nowhere else. The driver keeps what enqueued launches need. A failure
        // means that the context is lost, and the graph with it.
        let _ = unsafe { self.device.driver().cuGraphExecDestroy(self.executable) };
    }
}

/// A stream that serves a capture alone. Nothing ever runs on it. So the capture records nothing that others enqueue, and one that fails
/// leaves the caller's stream as it was.
struct CaptureStream(&'static Driver, Handle);

impl CaptureStream {
    /// A stream of the current context.
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
        // SAFETY: it was created in `new` and is destroyed nowhere else. A destructor cannot report a failure, which leaves an idle
        // stream.
        let _ = unsafe { self.0.cuStreamDestroy_v2(self.1) };
    }
}

/// The graph that a capture leaves. An executable graph is made from it.
struct Template(&'static Driver, Handle);

impl Drop for Template {
    fn drop(&mut self) {
        if !self.1.is_null() {
            // SAFETY: it came from a capture and is destroyed nowhere else. The executable does not need it any more.
            let _ = unsafe { self.0.cuGraphDestroy(self.1) };
        }
    }
}

impl Device {
    /// Records [`Device::loss_and_gradients`] as a graph that is launched on `stream`. Nothing of it runs before the first launch. What is
    /// not part of the call, such as the copy of the side data, must be enqueued before the launches or between them.
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
        // SAFETY: the caller's promise. Nothing runs before a launch.
        let enqueued = unsafe { self.loss_and_gradients(plan, pointers, capturing.as_stream()) };
        let mut template = Template(driver, std::ptr::null_mut());
        // SAFETY: one handle is written; the capture was begun above.
        let ended = unsafe { driver.cuStreamEndCapture(capturing.1, &mut template.1) };
        enqueued.and(ended)?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: one handle is written; the template came from the capture.
        unsafe { driver.cuGraphInstantiateWithFlags(&mut executable, template.1, 0) }?;
        let graph = Graph { executable, stream, device: self.clone() };
        // The upload spares the first launch the time that it would take longer than the others.
        // SAFETY: the executable was made above. The stream is alive, as the caller promises.
        unsafe { driver.cuGraphUpload(graph.executable, stream.handle()) }?;
        Ok(graph)
    }
}

impl Graph {
    /// Enqueues the call. It neither allocates nor waits. Results are read as after [`Device::loss_and_gradients`].
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda).
    ///
    /// # Safety
    /// As [`Device::forward`], for the pointers and the stream of the capture. [`Stream::PER_THREAD`] means the default stream of the
    /// thread that launches.
    pub unsafe fn launch(&mut self) -> Result<()> {
        let _current = self.device.current()?;
        // SAFETY: the executable is alive. Its kernels are loaded, because `self` holds the device. The rest is the caller's promise.
        unsafe { self.device.driver().cuGraphLaunch(self.executable, self.stream.handle()) }
    }

    /// The stream that it is launched on.
    pub fn stream(&self) -> Stream {
        self.stream
    }
}
