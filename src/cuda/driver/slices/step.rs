//! A loss that is computed again and again in the same memory.

mod graph;
mod results;

pub use graph::{GraphBuffers, StepGraph};

use super::{Upstream, allocate, expect_context, failed, raw};
use crate::cuda::driver::arguments::{Pointers, Stream, check_slot_bytes};
use crate::cuda::driver::device::Device;
use crate::cuda::driver::readout::Readout;
use crate::cuda::{GradientOutput, Plan, Problem, Slot};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::partials::Partials;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice};
use std::fmt;
use std::sync::Arc;
use std::thread::{self, ThreadId};

/// Where gradients go on the device; `None` for a tower that the problem leaves out.
#[derive(Debug)]
pub struct GradientSlices<'a, G> {
    /// ∂L/∂q, the shard's rows × d.
    pub query: Option<CudaViewMut<'a, G>>,
    /// ∂L/∂p, N × d.
    pub passage: Option<CudaViewMut<'a, G>>,
}

impl<'a, G> GradientSlices<'a, G> {
    /// Gradients of both towers.
    pub fn both(query: &'a mut CudaSlice<G>, passage: &'a mut CudaSlice<G>) -> Self {
        Self { query: Some(query.as_view_mut()), passage: Some(passage.as_view_mut()) }
    }
}

/// What a step has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    /// The last `prepare` failed, so the side data are not those of the plan.
    Unprepared,
    /// The side data are on the device.
    Nothing,
    /// The state has the partial sums.
    Partials,
    /// The state has results and coefficients.
    Forward,
    /// The state has the temperature's gradient, too.
    Backward,
}

/// Memory that only this step uses, and only on its own stream. So the order of that stream is enough.
struct Memory<T = u8> {
    slice: CudaSlice<T>,
    address: u64,
}

impl<T: DeviceRepr> Memory<T> {
    fn new(stream: &Arc<CudaStream>, len: usize, purpose: &'static str) -> Result<Self> {
        // SAFETY: side data are copied there before any kernel runs. In other memory, kernels read only what kernels wrote.
        let slice = unsafe { allocate(stream, len, purpose) }?;
        let address = slice.device_ptr(stream).0;
        Ok(Self { slice, address })
    }
}

/// What callers can do instead of allocating during a capture.
const ALLOCATED_BEFORE: &str = "what a step needs is allocated beforehand";

/// In place of gradients, for a call without backward pass.
const NO_GRADIENTS: Option<(GradientSlices<'_, f32>, Upstream<'_>)> = None;

/// One of the calls of [`Device`] that take pointers.
type Call = unsafe fn(&Device, &Plan, &Pointers, Stream) -> Result<()>;

/// One step of training, ready to run: plan, side data, state and workspace on one stream. It can be used again and again. It neither
/// allocates nor waits until results are asked for.
///
/// [`Step::capture`] records a call as a CUDA graph. Callers may also capture [`Step::loss_and_gradients`] into a graph of their own.
/// They must turn cudarc's event tracking off before anything is allocated. Their graph uses the memory of this object and the addresses
/// of the slices of the captured call. So this object must outlive it, and must neither prepare another problem nor release its
/// workspace. Results are read after a launch of the graph as after a call.
///
/// Embeddings must not change between a forward call and its backward call, which reads them again and refuses those that have another norm:
/// see [`Step::backward`]. `wgpu::Step` differs there. It keeps a packed copy, and does not read them again.
///
/// If its stream is the default stream of a thread, a step that moves to another thread first waits for the whole context.
pub struct Step {
    side: Memory,
    state: Memory,
    /// `None` after [`Step::release_workspace`], until a call needs it.
    workspace: Option<Memory>,
    upstream: Memory<f32>,
    /// Whether the caller was given `upstream`, and so may have used it on another stream.
    upstream_lent: bool,
    plan: Plan,
    readout: Readout,
    outputs: [Option<GradientOutput>; 2],
    progress: Progress,
    /// Whether the workspace holds the packed embeddings of the forward call.
    packed: bool,
    /// It is reached when the side data were copied. Until then the driver may read them from the plan.
    side_copied: CudaEvent,
    stream: Arc<CudaStream>,
    /// The thread of the last call. The stream may be its default stream.
    thread: ThreadId,
    device: Device,
}

impl Drop for Step {
    fn drop(&mut self) {
        // A failure means that the context is lost, and with it all that was enqueued.
        let _ = self.wait_for_other_thread();
        let _ = self.side_copied.synchronize();
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plan, progress, device, .. } = self;
        f.debug_struct("Step")
            .field("device", device)
            .field("plan", plan)
            .field("progress", progress)
            .finish_non_exhaustive()
    }
}

impl Step {
    /// Makes the plan, allocates on the stream, compiles the kernels if that was not done yet, and copies the side data.
    ///
    /// # Errors
    /// As [`Plan::new`] and [`Device::load`]. [`Error::WrongDevice`] for a stream of another context. [`Error::OutOfMemory`].
    /// [`Error::InvalidArgument`] while the stream is being captured.
    pub fn new(device: &Device, stream: &Arc<CudaStream>, problem: &Problem<'_>) -> Result<Self> {
        expect_context(device, stream)?;
        let problem = problem.clone().with_device_upstream().on(device.architecture());
        let plan = Plan::new(&problem)?;
        let readout = Readout::new(&problem, &plan)?;
        device.expect_no_capture(raw(stream), ALLOCATED_BEFORE)?;
        device.load(&plan)?;
        let memory = |slot, purpose| Memory::new(stream, plan.slot_bytes(slot) as usize, purpose);
        let mut this = Self {
            side: memory(Slot::Side, "keys and weights")?,
            state: memory(Slot::State, "the state")?,
            workspace: Some(memory(Slot::Workspace, "the workspace")?),
            upstream: Memory::new(stream, 1, "the upstream gradient")?,
            upstream_lent: false,
            plan,
            readout,
            outputs: problem.gradients,
            progress: Progress::Unprepared,
            packed: false,
            side_copied: stream.context().new_event(None).map_err(failed("cuEventCreate"))?,
            stream: stream.clone(),
            thread: thread::current().id(),
            device: device.clone(),
        };
        this.copy_side_data()?;
        Ok(this)
    }

    /// Turns to another problem, such as a batch with other ids or positives. It must be called whenever anything but the embeddings
    /// changes. The step allocates only if its memory does not hold the new problem. This waits until the side data of the previous
    /// problem are copied, and so for everything that was enqueued before that copy.
    ///
    /// # Errors
    /// As [`Step::new`]. If there is no memory for side data or state, or during a capture, the step remains as it was.
    pub fn prepare(&mut self, problem: &Problem<'_>) -> Result<()> {
        let problem = problem.clone().with_device_upstream().on(self.device.architecture());
        let plan = Plan::new(&problem)?;
        let readout = Readout::new(&problem, &plan)?;
        self.expect_no_capture()?;
        self.device.load(&plan)?;
        self.follow_thread()?;
        let larger = |memory: &Memory, slot, purpose| {
            let needed = plan.slot_bytes(slot) as usize;
            (memory.slice.len() < needed).then(|| Memory::new(&self.stream, needed, purpose)).transpose()
        };
        let side = larger(&self.side, Slot::Side, "keys and weights")?;
        let state = larger(&self.state, Slot::State, "the state")?;
        self.side_copied.synchronize().map_err(failed("cuEventSynchronize"))?;
        // If something fails from here on, the step is prepared for neither problem.
        (self.progress, self.packed) = (Progress::Unprepared, false);
        (self.plan, self.readout, self.outputs) = (plan, readout, problem.gradients);
        for (memory, larger) in [(&mut self.side, side), (&mut self.state, state)] {
            if let Some(larger) = larger {
                *memory = larger;
            }
        }
        self.workspace.take_if(|memory| (memory.slice.len() as u64) < self.plan.slot_bytes(Slot::Workspace));
        self.copy_side_data()?;
        self.reserve_workspace().map(drop)
    }

    /// Frees the workspace, which is all but O(M + N) of the memory, until the next call needs one. A backward call after that packs the
    /// embeddings again.
    ///
    /// During a capture the workspace stays. The graph uses it, and freeing it would invalidate the capture.
    pub fn release_workspace(&mut self) {
        if self.expect_no_capture().is_ok() {
            (self.workspace, self.packed) = (None, false);
        }
    }

    fn reserve_workspace(&mut self) -> Result<u64> {
        let memory = match self.workspace.take() {
            Some(memory) => memory,
            None => {
                self.expect_no_capture()?;
                Memory::new(&self.stream, self.plan.slot_bytes(Slot::Workspace) as usize, "the workspace")?
            }
        };
        Ok(self.workspace.insert(memory).address)
    }

    /// An error while the stream is being captured. Memory that is allocated then would belong to the graph.
    pub(super) fn expect_no_capture(&self) -> Result<()> {
        self.device.expect_no_capture(raw(&self.stream), ALLOCATED_BEFORE)
    }

    /// Waits for all streams of the context if the stream is [`Stream::PER_THREAD`] and the last call was made by another thread, whose
    /// default stream is another one.
    fn wait_for_other_thread(&self) -> Result<()> {
        if raw(&self.stream) != Stream::PER_THREAD || self.thread == thread::current().id() {
            return Ok(());
        }
        self.expect_no_capture()?;
        self.stream.context().synchronize().map_err(failed("cuCtxSynchronize"))
    }

    fn follow_thread(&mut self) -> Result<()> {
        self.wait_for_other_thread()?;
        self.thread = thread::current().id();
        Ok(())
    }

    fn copy_side_data(&mut self) -> Result<()> {
        let content = self.plan.side_data();
        check_slot_bytes(&self.plan, Slot::Side, self.side.slice.len() as u64)?;
        if self.side.slice.len() < content.len() {
            return Err(Error::invalid(
                "side",
                format!("{} bytes", self.side.slice.len()),
                format!("{}", content.len()),
            ));
        }
        // Earlier calls read the old content before this copy, because they are on the same stream. The driver may read the new content
        // from the plan after the call returns, although most drivers copy pageable memory at once.
        let copied = self.stream.memcpy_htod(content, &mut self.side.slice);
        let recorded = copied.and_then(|()| self.side_copied.record(&self.stream));
        if recorded.is_err() {
            let _ = self.stream.synchronize();
        }
        recorded.map_err(failed("cuMemcpyHtoDAsync"))?;
        self.progress = Progress::Nothing;
        Ok(())
    }

    /// What this step launches.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The stream that the step runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Enqueues loss, metrics and coefficients. q is M × d, p is N × d, with the row strides of the problem.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another element type than the problem's. [`Error::InvalidArgument`] for a slice that is too short.
    /// [`Error::WrongDevice`], [`Error::Misaligned`], [`Error::Cuda`]. Reading the results tells what is wrong with the embeddings
    /// themselves.
    pub fn forward<T: Element>(&mut self, query: &impl DevicePtr<T>, passage: &impl DevicePtr<T>) -> Result<()> {
        self.enqueue(Device::forward, query, passage, NO_GRADIENTS, Progress::Nothing)?;
        (self.progress, self.packed) = (Progress::Forward, true);
        Ok(())
    }

    /// Enqueues the gradients, multiplied by `upstream`. The embeddings must be those of the forward call, unchanged. If one has another
    /// norm, gradients are NaN, and reading the results is an error. [`Device::backward`] says which gradients; after
    /// [`Step::release_workspace`], [`Device::backward_alone`] does.
    ///
    /// # Errors
    /// As [`Step::forward`]. [`Error::StateMismatch`] without a forward call. [`Error::InvalidArgument`] for gradients that are not those
    /// of the problem, or for an upstream gradient that is not finite.
    pub fn backward<'u, T: Element, G: Element>(
        &mut self,
        query: &impl DevicePtr<T>,
        passage: &impl DevicePtr<T>,
        gradients: GradientSlices<'_, G>,
        upstream: impl Into<Upstream<'u>>,
    ) -> Result<()> {
        self.expect(Progress::Forward)?;
        let call: Call = if self.packed { Device::backward } else { Device::backward_alone };
        self.enqueue(call, query, passage, Some((gradients, upstream.into())), Progress::Forward)?;
        (self.progress, self.packed) = (Progress::Backward, true);
        Ok(())
    }

    /// Enqueues loss, metrics and gradients. The gradients are multiplied by `upstream`.
    ///
    /// # Errors
    /// As [`Step::forward`] and [`Step::backward`].
    pub fn loss_and_gradients<'u, T: Element, G: Element>(
        &mut self,
        query: &impl DevicePtr<T>,
        passage: &impl DevicePtr<T>,
        gradients: GradientSlices<'_, G>,
        upstream: impl Into<Upstream<'u>>,
    ) -> Result<()> {
        let backward = Some((gradients, upstream.into()));
        self.enqueue(Device::loss_and_gradients, query, passage, backward, Progress::Nothing)?;
        (self.progress, self.packed) = (Progress::Backward, true);
        Ok(())
    }

    /// Computes the partial sums of a shard, waits, and gives them.
    pub(super) fn partials<T: Element>(
        &mut self,
        query: &impl DevicePtr<T>,
        passage: &impl DevicePtr<T>,
    ) -> Result<Partials> {
        self.enqueue_partials(query, passage)?;
        let ((query, _q), (passage, _p)) = (query.device_ptr(&self.stream), passage.device_ptr(&self.stream));
        let pointers = Pointers { query, passage, state: self.state.address, ..Pointers::default() };
        // SAFETY: as in `evaluation`. The sums were enqueued on this stream.
        unsafe { self.device.read_partials(&self.readout, &pointers, raw(&self.stream)) }
    }

    /// Enqueues loss, metrics and coefficients from merged sums. If the step has not computed its own sums yet, it does so first, because
    /// the same launches leave norms and cosines of the positives in the state.
    pub(super) fn combine<T: Element>(
        &mut self,
        query: &impl DevicePtr<T>,
        passage: &impl DevicePtr<T>,
        merged: &Partials,
    ) -> Result<()> {
        if self.progress < Progress::Partials {
            self.enqueue_partials(query, passage)?;
        }
        self.follow_thread()?;
        let pointers = Pointers { state: self.state.address, ..Pointers::default() };
        // SAFETY: the state is as long as the plan says. The sums were enqueued on this stream.
        unsafe { self.device.write_partials(&self.readout, merged, &pointers, raw(&self.stream)) }?;
        self.enqueue(Device::combine, query, passage, NO_GRADIENTS, Progress::Partials)?;
        self.progress = Progress::Forward;
        Ok(())
    }

    fn enqueue_partials<T: Element>(&mut self, query: &impl DevicePtr<T>, passage: &impl DevicePtr<T>) -> Result<()> {
        self.enqueue(Device::partials, query, passage, NO_GRADIENTS, Progress::Nothing)?;
        (self.progress, self.packed) = (Progress::Partials, true);
        Ok(())
    }

    /// Checks slices and upstream gradient, gathers addresses, and calls. If only a part of the call was enqueued, `remains` is the
    /// progress of the step.
    fn enqueue<T: Element, G: Element>(
        &mut self,
        call: Call,
        query: &impl DevicePtr<T>,
        passage: &impl DevicePtr<T>,
        backward: Option<(GradientSlices<'_, G>, Upstream<'_>)>,
        remains: Progress,
    ) -> Result<()> {
        if self.progress == Progress::Unprepared {
            return Err(mismatch("a step whose last `prepare` failed"));
        }
        self.check_inputs(query, passage)?;
        if let Some((gradients, upstream)) = &backward {
            self.check_outputs(gradients)?;
            upstream.check()?;
        }
        self.follow_thread()?;
        let workspace = self.reserve_workspace()?;
        let Self { side, state, upstream: own_upstream, upstream_lent: lent, plan, stream, device, progress, .. } =
            self;
        let (mut gradients, upstream) = match backward {
            Some((GradientSlices { query, passage }, upstream)) => ([query, passage], Some(upstream)),
            None => ([None, None], None),
        };
        // cudarc makes the stream wait for each slice here. A guard comes with each address. When it is dropped, after the launches,
        // cudarc records that the slice was used.
        let ((query, _q), (passage, _p)) = (query.device_ptr(stream), passage.device_ptr(stream));
        let (state, _state) = state.slice.device_ptr_mut(stream);
        let outputs = gradients.each_mut().map(|view| view.as_mut().map(|view| view.device_ptr_mut(stream)));
        let [query_gradient, passage_gradient] = outputs.each_ref().map(|output| output.as_ref().map_or(0, |o| o.0));
        let (upstream, _upstream) = match upstream {
            Some(Upstream::Device(view)) => {
                expect_context(device, view.stream())?;
                let (address, guard) = view.view_ptr(stream);
                (address, Some(guard))
            }
            Some(Upstream::Host(value)) => {
                let guard = std::mem::take(lent).then(|| own_upstream.slice.device_ptr_mut(stream).1);
                let pointers = Pointers { upstream: own_upstream.address, ..Pointers::default() };
                // SAFETY: the pointer is memory of this step, and the stream is the step's.
                unsafe { device.set_upstream(plan, &pointers, value as f32, raw(stream)) }?;
                (own_upstream.address, guard)
            }
            None => (0, None),
        };
        // cudarc only notes that a wait failed. Then the slices may not hold yet what the call would read.
        stream.context().check_err().map_err(failed("cuStreamWaitEvent"))?;
        let pointers = Pointers {
            query,
            passage,
            side: side.address,
            state,
            workspace,
            query_gradient,
            passage_gradient,
            upstream,
        };
        // SAFETY: the slices are as long as the plan says. Gradients are borrowed mutably, so they overlap nothing. cudarc frees no slice
        // before the stream is done with it. The side data were copied on this stream, which is of the device's context.
        let called = unsafe { call(device, plan, &pointers, raw(stream)) };
        if matches!(called, Err(Error::Cuda { .. })) {
            *progress = remains;
        }
        called
    }

    fn check_inputs<T: Element>(&self, query: &impl DevicePtr<T>, passage: &impl DevicePtr<T>) -> Result<()> {
        if T::DTYPE != self.readout.dtype() {
            return Err(Error::dtype("cuda", T::DTYPE, &format!("{}, the type of the step", self.readout.dtype())));
        }
        expect_context(&self.device, query.stream())?;
        expect_context(&self.device, passage.stream())?;
        check_slot_bytes(&self.plan, Slot::Query, query.num_bytes() as u64)?;
        check_slot_bytes(&self.plan, Slot::Passage, passage.num_bytes() as u64)
    }

    fn check_outputs<G: Element>(&self, gradients: &GradientSlices<'_, G>) -> Result<()> {
        let towers = [(Slot::QueryGradient, &gradients.query), (Slot::PassageGradient, &gradients.passage)];
        for ((slot, view), wanted) in towers.into_iter().zip(self.outputs) {
            match (view, wanted) {
                (None, None) => {}
                (Some(view), Some(wanted)) if wanted.dtype == G::DTYPE => {
                    expect_context(&self.device, view.stream())?;
                    check_slot_bytes(&self.plan, slot, view.num_bytes() as u64)?;
                }
                (view, wanted) => {
                    let describe =
                        |dtype: Option<crate::DType>| dtype.map_or("none".into(), |d| format!("a slice of {d}"));
                    let (given, wanted) = (view.as_ref().map(|_| G::DTYPE), wanted.map(|w| w.dtype));
                    return Err(Error::invalid(
                        slot.name(),
                        describe(given),
                        format!("{}, as in the problem", describe(wanted)),
                    ));
                }
            }
        }
        Ok(())
    }

    fn expect(&self, needed: Progress) -> Result<()> {
        if self.progress < needed {
            let call = if needed == Progress::Backward { "a backward call" } else { "a forward call" };
            return Err(mismatch(&format!("a step that had no {}", call.trim_start_matches("a "))));
        }
        Ok(())
    }
}

fn mismatch(saved: &str) -> Error {
    Error::StateMismatch { saved: saved.into(), given: "a call that needs its results".into() }
}
