//! A step as a CUDA graph, together with everything it reads and writes.

use super::{GradientSlices, Progress, Step, mismatch};
use crate::cuda::Plan;
use crate::cuda::driver::arguments::{Pointers, Stream};
use crate::cuda::driver::device::Device;
use crate::cuda::driver::graph::Graph;
use crate::cuda::driver::slices::{Upstream, failed, raw};
use crate::dtype::Element;
use crate::error::Result;
use crate::output::{Evaluation, TemperatureGradient};
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut};
use std::fmt;

/// Forward and backward of a step in one launch of a graph. [`Step::capture`] makes it. It pays for batches so small that the time for
/// enqueueing launches matters.
///
/// It borrows the step and every slice that it reads or writes. While it exists, [`StepGraph::buffers`] gives access to the slices. After
/// it is dropped, the caller can use slices and step as before.
///
/// Each launch waits for what other streams do with the slices, and they wait for it, as with cudarc's own calls. If one stream does
/// everything, cudarc's event tracking can be turned off, which saves the host more time.
///
/// ```no_run
/// # use samtone::cuda::{GradientSlices, Step, cudarc::driver::CudaSlice};
/// # fn train(step: &mut Step, q: &mut CudaSlice<f32>, p: &mut CudaSlice<f32>, dq: &mut CudaSlice<f32>, dp: &mut CudaSlice<f32>,
/// #     batches: &[[CudaSlice<f32>; 2]]) -> Result<(), Box<dyn std::error::Error>> {
/// let stream = step.stream().clone();
/// let mut graph = step.capture(q.as_view_mut(), p.as_view_mut(), GradientSlices::both(dq, dp), 1.0)?;
/// for [query, passage] in batches {
///     stream.memcpy_dtod(query, &mut graph.buffers().query)?;
///     stream.memcpy_dtod(passage, &mut graph.buffers().passage)?;
///     graph.launch()?;
/// }
/// println!("{}", graph.evaluation()?.loss);
/// # Ok(()) }
/// ```
///
/// The step cannot turn to another problem while the graph is used:
///
/// ```compile_fail,E0499
/// # use samtone::cuda::{GradientSlices, Problem, Step, cudarc::driver::CudaViewMut};
/// # fn late(step: &mut Step, q: CudaViewMut<'_, f32>, p: CudaViewMut<'_, f32>, out: GradientSlices<'_, f32>,
/// #     problem: &Problem<'_>) -> samtone::Result<()> {
/// let mut graph = step.capture(q, p, out, 1.0)?;
/// step.prepare(problem)?;
/// graph.launch()
/// # }
/// ```
pub struct StepGraph<'a, T, G> {
    graph: Graph,
    query: CudaViewMut<'a, T>,
    passage: CudaViewMut<'a, T>,
    gradients: GradientSlices<'a, G>,
    step: &'a mut Step,
}

/// What a graph reads and writes. The caller fills and uses it between launches.
#[derive(Debug)]
pub struct GraphBuffers<'g, T, G> {
    /// q, M × d.
    pub query: CudaViewMut<'g, T>,
    /// p, N × d.
    pub passage: CudaViewMut<'g, T>,
    /// ∂L/∂q and ∂L/∂p.
    pub gradients: GradientSlices<'g, G>,
    /// The upstream gradient, one f32.
    pub upstream: CudaViewMut<'g, f32>,
}

impl<T, G> fmt::Debug for StepGraph<'_, T, G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepGraph").field("graph", &self.graph).field("step", &self.step).finish_non_exhaustive()
    }
}

impl Step {
    /// Records [`Step::loss_and_gradients`] as a graph. Each launch of it reads these embeddings and writes these gradients. Nothing runs
    /// before the first launch. `upstream` can be changed between launches.
    ///
    /// The capture has a stream of its own. So cudarc's event tracking may be on, and the step's stream may be a default stream.
    ///
    /// # Errors
    /// As [`Step::loss_and_gradients`], and [`Error::InvalidArgument`](crate::Error::InvalidArgument) while the stream is being
    /// captured. A capture that fails leaves stream and step as they were.
    pub fn capture<'a, T: Element, G: Element>(
        &'a mut self,
        mut query: CudaViewMut<'a, T>,
        mut passage: CudaViewMut<'a, T>,
        mut gradients: GradientSlices<'a, G>,
        upstream: f64,
    ) -> Result<StepGraph<'a, T, G>> {
        if self.progress == Progress::Unprepared {
            return Err(mismatch("a step whose last `prepare` failed"));
        }
        self.check_inputs(&query, &passage)?;
        self.check_outputs(&gradients)?;
        self.expect_no_capture()?;
        self.follow_thread()?;
        self.reserve_workspace()?;
        self.write_upstream(upstream)?;
        // SAFETY: the slices are as long as the plan says. The graph borrows them, and the step with its memory and stream, for as long as
        // it can be launched. cudarc frees no slice before the stream is done with it. The side data were copied on this stream. Safe code
        // writes to these slices through `StepGraph::buffers` alone, and cudarc orders that.
        let graph =
            self.with_pointers(&mut query, &mut passage, &mut gradients, |device, plan, pointers, stream| unsafe {
                device.capture(plan, pointers, stream)
            })?;
        Ok(StepGraph { graph, query, passage, gradients, step: self })
    }

    /// Enqueues that the step's own upstream gradient becomes this number.
    fn write_upstream(&mut self, value: f64) -> Result<()> {
        Upstream::Host(value).check()?;
        let Self { upstream, plan, stream, device, .. } = self;
        let (address, _guard) = upstream.slice.device_ptr_mut(stream);
        let pointers = Pointers { upstream: address, ..Pointers::default() };
        // SAFETY: the pointer is memory of this step, and the stream is the step's.
        unsafe { device.set_upstream(plan, &pointers, value as f32, raw(stream)) }
    }

    /// Calls `call` with the addresses of these slices and of the step's memory. Before it, cudarc makes the stream wait for each slice.
    /// After it, cudarc records their use.
    fn with_pointers<T: Element, G: Element, R>(
        &mut self,
        query: &mut CudaViewMut<'_, T>,
        passage: &mut CudaViewMut<'_, T>,
        gradients: &mut GradientSlices<'_, G>,
        call: impl FnOnce(&Device, &Plan, &Pointers, Stream) -> Result<R>,
    ) -> Result<R> {
        let Self { side, state, workspace, upstream, plan, stream, device, .. } = self;
        let ((query, _q), (passage, _p)) = (query.device_ptr(stream), passage.device_ptr(stream));
        let (state, _state) = state.slice.device_ptr_mut(stream);
        let (upstream, _upstream) = upstream.slice.device_ptr(stream);
        let outputs = [&mut gradients.query, &mut gradients.passage]
            .map(|view| view.as_mut().map(|view| view.device_ptr_mut(stream)));
        let [query_gradient, passage_gradient] = outputs.each_ref().map(|output| output.as_ref().map_or(0, |o| o.0));
        stream.context().check_err().map_err(failed("cuStreamWaitEvent"))?;
        let workspace = workspace.as_ref().map_or(0, |memory| memory.address);
        let side = side.address;
        let pointers = Pointers { query, passage, side, state, workspace, query_gradient, passage_gradient, upstream };
        call(device, plan, &pointers, raw(stream))
    }
}

impl<T: Element, G: Element> StepGraph<'_, T, G> {
    /// Enqueues forward and backward for what the buffers will hold when the stream gets there. It neither allocates nor waits.
    ///
    /// But if its stream is the default stream of a thread, a graph that moved to another thread first waits for the whole context.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda). Reading the results tells what is wrong with the embeddings.
    pub fn launch(&mut self) -> Result<()> {
        let Self { graph, query, passage, gradients, step } = self;
        step.follow_thread()?;
        // SAFETY: as in `Step::capture`. Step and slices have been borrowed since then, and the step's memory is the same.
        step.with_pointers(query, passage, gradients, |_, _, _, _| unsafe { graph.launch() })?;
        (step.progress, step.packed) = (Progress::Backward, true);
        Ok(())
    }

    /// What the graph reads and writes. Work on it that is enqueued on the step's stream, or on another stream with cudarc's event
    /// tracking, is done after earlier launches and before the next one.
    pub fn buffers(&mut self) -> GraphBuffers<'_, T, G> {
        let Self { query, passage, gradients: GradientSlices { query: of_query, passage: of_passage }, step, .. } =
            self;
        step.upstream_lent = true;
        GraphBuffers {
            query: query.slice_mut(..),
            passage: passage.slice_mut(..),
            gradients: GradientSlices {
                query: of_query.as_mut().map(|view| view.slice_mut(..)),
                passage: of_passage.as_mut().map(|view| view.slice_mut(..)),
            },
            upstream: step.upstream.slice.as_view_mut(),
        }
    }

    /// Enqueues that the gradients of later launches are multiplied by `upstream`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a number that is not finite as f32,
    /// [`Error::Cuda`](crate::Error::Cuda).
    pub fn set_upstream(&mut self, upstream: f64) -> Result<()> {
        self.step.follow_thread()?;
        self.step.write_upstream(upstream)
    }

    /// The step. Its results are those of the last launch; before the first launch, those of its last call.
    pub fn step(&self) -> &Step {
        self.step
    }

    /// [`Step::loss`].
    ///
    /// # Errors
    /// [`Error::StateMismatch`](crate::Error::StateMismatch) before the first launch.
    pub fn loss(&self) -> Result<CudaView<'_, f64>> {
        self.step.loss()
    }

    /// [`Step::evaluation`] of the last launch. The buffers must still hold its embeddings.
    ///
    /// # Errors
    /// As [`Step::evaluation`].
    pub fn evaluation(&self) -> Result<Evaluation> {
        self.step.evaluation(&self.query, &self.passage)
    }

    /// [`Step::results`] of the last launch. The buffers must still hold its embeddings.
    ///
    /// # Errors
    /// As [`Step::results`].
    pub fn results(&self) -> Result<(Evaluation, TemperatureGradient)> {
        self.step.results(&self.query, &self.passage)
    }
}
