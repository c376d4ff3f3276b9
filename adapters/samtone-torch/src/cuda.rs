//! A call on a CUDA device: plans, and launches on the caller's memory and stream. Nothing here allocates on the device or waits
//! for it, but `CudaPlan::check`.

use crate::annotations::Capsules;
use crate::dlpack::{Device as Place, Layout, Tensor, expect_apart};
use crate::errors::{Refusal, invalid};
use crate::settings::Settings;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCapsule};
use samtone::cuda::abi::{GRAD_LOG_BETA, GRAD_TAU, LOSS, MRR_PQ, MRR_QP, PRECISION_PQ, PRECISION_QP, RESULTS};
use samtone::cuda::{Cosines, Device, Plan, Pointers, Problem, Readout, Slot, Stream, check_slot_bytes};
use samtone::{DType, GradientOutput, Pairs};

// The Python package reads these in this order, see `CudaPlan::offsets`.
const _: () = assert!(LOSS == 0 && PRECISION_QP == 1 && MRR_QP == 2 && PRECISION_PQ == 3 && MRR_PQ == 4);

/// The ordinal of the device that a tensor is on.
fn ordinal_of(argument: &'static str, tensor: &Tensor) -> Result<usize, Refusal> {
    match tensor.device()? {
        Place::Cuda(ordinal) => Ok(ordinal),
        Place::Cpu => Err(invalid(argument, "on the CPU", "memory of a CUDA device, for this call")),
    }
}

/// What one call launches, made for shapes, types, strides, options and who belongs to whom; any embeddings will do.
///
/// Gradients come at once with the loss, or from a call of their own, later. The first pass of the former keeps cosines for them
/// where that pays; for the latter it would be in vain, since nobody keeps the workspace until then.
#[pyclass(frozen, module = "samtone._native")]
pub struct CudaPlan {
    device: Device,
    plan: Plan,
    readout: Readout,
    towers: [Layout; 2],
    gradients: [Layout; 2],
    at_once: bool,
    derivative: u64,
    results: u64,
    parts: u64,
    row_losses: u64,
}

#[pymethods]
impl CudaPlan {
    /// For embeddings of these shapes and places. `wanted` are the towers that get gradients: `at_once` by `loss_and_gradients`,
    /// as float32 and for an upstream gradient of 1; otherwise by `forward` and `backward`, in the type of the towers.
    #[new]
    fn new(
        settings: &Bound<'_, Settings>,
        query: &Bound<'_, PyCapsule>,
        passage: &Bound<'_, PyCapsule>,
        annotations: Capsules<'_>,
        wanted: (bool, bool),
        at_once: bool,
    ) -> PyResult<Self> {
        let settings = settings.get();
        let (query, passage) = (Tensor::import("query", query)?, Tensor::import("passage", passage)?);
        let ordinal = ordinal_of("query", &query)?;
        if ordinal_of("passage", &passage)? != ordinal {
            return Err(
                invalid("passage", "on another device", format!("CUDA device {ordinal}, as the queries")).into()
            );
        }
        let towers = [query.layout()?, passage.layout()?];
        let [q, p] = towers;
        if q.dim != p.dim {
            let allowed = format!("the dimension of the queries, {}", q.dim);
            return Err(invalid("passage", format!("embeddings of dimension {}", p.dim), allowed).into());
        }
        if q.dtype != p.dtype {
            let allowed = format!("the type of the queries, {}", q.dtype);
            return Err(invalid("passage", format!("of type {}", p.dtype), allowed).into());
        }
        let call = annotations.call(settings)?;
        let pairs = call.pairs(q.rows, p.rows).map_err(Refusal)?;
        Ok(Self::planned(settings, Device::shared(ordinal).map_err(Refusal)?, pairs, towers, wanted, at_once)?)
    }

    /// Bytes that `state` needs at the least.
    #[getter]
    fn state_bytes(&self) -> u64 {
        self.plan.slot_bytes(Slot::State)
    }

    /// Bytes that `workspace` needs at the least.
    #[getter]
    fn workspace_bytes(&self) -> u64 {
        self.plan.slot_bytes(Slot::Workspace)
    }

    /// What `side` is a copy of.
    fn side<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.plan.side_data())
    }

    /// Bytes in the state: of the results (float64: loss, P@1 and MRR of both directions, …), of the losses of the rows
    /// (float64), and of the derivative of what the temperature was given as (float64, once there are gradients).
    #[getter]
    fn offsets(&self) -> (u64, u64, u64) {
        (self.results, self.row_losses, self.derivative)
    }

    /// How often the state has results, and how many numbers lie from one to the next: those of the call, which `offsets` gives, and
    /// then those of each prefix. They are there once for a call whose only prefix is the whole embedding with weight 1.
    #[getter]
    fn results(&self) -> (u64, usize) {
        (self.parts, RESULTS)
    }

    /// Enqueues loss, row losses and metrics.
    fn forward(
        &self,
        py: Python<'_>,
        towers: (Bound<'_, PyCapsule>, Bound<'_, PyCapsule>),
        side: &Bound<'_, PyCapsule>,
        state: &Bound<'_, PyCapsule>,
        workspace: &Bound<'_, PyCapsule>,
        stream: u64,
    ) -> PyResult<()> {
        let memory = Launch::new(self, &towers, side, state, workspace, (None, None), None)?;
        // SAFETY: `Launch::new` has checked devices, sizes and that outputs are apart. The caller of the Python package passes
        // tensors of the current stream's allocator: memory that is given back after this call, when capsules are dropped, is
        // only used again by later work on the same stream, and the stream is PyTorch's current one, of the primary context.
        py.detach(|| unsafe { self.device.forward(&self.plan, &memory.pointers, Stream::from_raw(stream)) })
            .map_err(Refusal)?;
        Ok(())
    }

    /// Enqueues loss, row losses and metrics, and the gradients at once.
    #[allow(clippy::too_many_arguments)] // a call across a language border
    fn loss_and_gradients(
        &self,
        py: Python<'_>,
        towers: (Bound<'_, PyCapsule>, Bound<'_, PyCapsule>),
        side: &Bound<'_, PyCapsule>,
        state: &Bound<'_, PyCapsule>,
        workspace: &Bound<'_, PyCapsule>,
        gradients: (Option<Bound<'_, PyCapsule>>, Option<Bound<'_, PyCapsule>>),
        stream: u64,
    ) -> PyResult<()> {
        self.expect(true)?;
        let gradients = (gradients.0.as_ref(), gradients.1.as_ref());
        let memory = Launch::new(self, &towers, side, state, workspace, gradients, None)?;
        // SAFETY: as in `forward`, and nothing in state or workspace is read that this call has not written.
        py.detach(|| unsafe { self.device.loss_and_gradients(&self.plan, &memory.pointers, Stream::from_raw(stream)) })
            .map_err(Refusal)?;
        Ok(())
    }

    /// Enqueues the gradients, times the one float32 of `upstream`, after `forward` with the same state and embeddings.
    #[allow(clippy::too_many_arguments)] // a call across a language border
    fn backward(
        &self,
        py: Python<'_>,
        towers: (Bound<'_, PyCapsule>, Bound<'_, PyCapsule>),
        side: &Bound<'_, PyCapsule>,
        state: &Bound<'_, PyCapsule>,
        workspace: &Bound<'_, PyCapsule>,
        gradients: (Option<Bound<'_, PyCapsule>>, Option<Bound<'_, PyCapsule>>),
        upstream: &Bound<'_, PyCapsule>,
        stream: u64,
    ) -> PyResult<()> {
        self.expect(false)?;
        let gradients = (gradients.0.as_ref(), gradients.1.as_ref());
        let memory = Launch::new(self, &towers, side, state, workspace, gradients, Some(upstream))?;
        // SAFETY: as in `forward`; the state is that of a forward call of this plan, as autograd keeps it.
        py.detach(|| unsafe { self.device.backward_alone(&self.plan, &memory.pointers, Stream::from_raw(stream)) })
            .map_err(Refusal)?;
        Ok(())
    }

    /// Waits for the stream; an error if the call before, of the loss or of all, refused its embeddings.
    fn check(
        &self,
        py: Python<'_>,
        towers: (Bound<'_, PyCapsule>, Bound<'_, PyCapsule>),
        side: &Bound<'_, PyCapsule>,
        state: &Bound<'_, PyCapsule>,
        workspace: &Bound<'_, PyCapsule>,
        stream: u64,
    ) -> PyResult<()> {
        let memory = Launch::new(self, &towers, side, state, workspace, (None, None), None)?;
        // SAFETY: as in `forward`; that or `loss_and_gradients`, which begins with it, is enqueued on this stream.
        py.detach(|| unsafe { self.device.evaluation(&self.readout, &memory.pointers, Stream::from_raw(stream)) })
            .map_err(Refusal)?;
        Ok(())
    }

    fn __repr__(&self) -> String {
        self.plan.to_string()
    }
}

impl CudaPlan {
    fn planned(
        settings: &Settings,
        device: Device,
        pairs: Pairs<'_>,
        towers: [Layout; 2],
        wanted: (bool, bool),
        at_once: bool,
    ) -> Result<Self, Refusal> {
        let [q, p] = towers;
        // Those that come at once are yet to be multiplied by the upstream gradient, and rounded after it.
        let dtype = if at_once { DType::F32 } else { q.dtype };
        let gradients = towers.map(|tower| Layout { dtype, row_stride: tower.dim, ..tower });
        let output = |wanted: bool| wanted.then_some(GradientOutput { dtype, row_stride: q.dim });
        let problem = Problem::new(pairs, q.dtype, q.dim)?
            .with_row_strides(q.row_stride, p.row_stride)?
            .with_gradients(output(wanted.0), output(wanted.1))?
            .with_architecture(device.architecture());
        let problem = if at_once { problem } else { problem.with_device_upstream().with_cosines(Cosines::Recomputed) };
        let plan = Plan::new(&problem)?;
        let readout = Readout::new(&problem, &plan)?;
        let offset = |name: &str| plan.array(name).map_or(0, |array| array.offset);
        let (results, row_losses) = (offset("results"), offset("row_losses"));
        let parts = plan.array("results").map_or(1, |array| array.bytes / (8 * RESULTS as u64));
        let derivative = results + 8 * if settings.is_log_beta() { GRAD_LOG_BETA } else { GRAD_TAU } as u64;
        Ok(Self { device, plan, readout, towers, gradients, at_once, derivative, results, parts, row_losses })
    }

    /// An error unless the plan was made for gradients at once, or for a call of their own.
    fn expect(&self, at_once: bool) -> Result<(), Refusal> {
        if self.at_once == at_once {
            return Ok(());
        }
        let what =
            |at_once| if at_once { "gradients at once with the loss" } else { "gradients in a call of their own" };
        Err(invalid("plan", format!("made for {}", what(self.at_once)), format!("one for {}", what(at_once))))
    }
}

/// The memory of one call, kept until it is enqueued.
struct Launch {
    pointers: Pointers,
    /// Where the addresses are from.
    _memory: Vec<Tensor>,
}

impl Launch {
    fn new(
        plan: &CudaPlan,
        towers: &(Bound<'_, PyCapsule>, Bound<'_, PyCapsule>),
        side: &Bound<'_, PyCapsule>,
        state: &Bound<'_, PyCapsule>,
        workspace: &Bound<'_, PyCapsule>,
        gradients: (Option<&Bound<'_, PyCapsule>>, Option<&Bound<'_, PyCapsule>>),
        upstream: Option<&Bound<'_, PyCapsule>>,
    ) -> PyResult<Self> {
        let all = [
            (Slot::Query, Some(&towers.0)),
            (Slot::Passage, Some(&towers.1)),
            (Slot::Side, Some(side)),
            (Slot::Upstream, upstream),
            (Slot::State, Some(state)),
            (Slot::Workspace, Some(workspace)),
            (Slot::QueryGradient, gradients.0),
            (Slot::PassageGradient, gradients.1),
        ];
        let mut memory = Vec::new();
        let mut pointers = Pointers::default();
        let mut inputs = 0;
        for (slot, capsule) in all {
            let Some(capsule) = capsule else { continue };
            let tensor = Tensor::import(slot.name(), capsule)?;
            let ordinal = ordinal_of(slot.name(), &tensor)?;
            if ordinal != plan.device.ordinal() {
                let allowed = format!("CUDA device {}, that of the plan", plan.device.ordinal());
                return Err(invalid(slot.name(), format!("on CUDA device {ordinal}"), allowed).into());
            }
            match slot {
                Slot::Query => expect_layout(slot, &tensor, plan.towers[0])?,
                Slot::Passage => expect_layout(slot, &tensor, plan.towers[1])?,
                Slot::QueryGradient => expect_layout(slot, &tensor, plan.gradients[0])?,
                Slot::PassageGradient => expect_layout(slot, &tensor, plan.gradients[1])?,
                _ => check_slot_bytes(&plan.plan, slot, tensor.bytes()? as u64).map_err(Refusal)?,
            }
            pointers.set(slot, tensor.address() as u64);
            inputs += usize::from(matches!(slot, Slot::Query | Slot::Passage | Slot::Side | Slot::Upstream));
            memory.push(tensor);
        }
        let (inputs, outputs) = memory.split_at(inputs);
        expect_apart(&inputs.iter().collect::<Vec<_>>(), &outputs.iter().collect::<Vec<_>>())?;
        Ok(Self { pointers, _memory: memory })
    }
}

fn expect_layout(slot: Slot, tensor: &Tensor, wanted: Layout) -> Result<(), Refusal> {
    let found = tensor.layout()?;
    if found == wanted {
        return Ok(());
    }
    let describe = |l: Layout| format!("{} x {} of {} with a row stride of {}", l.rows, l.dim, l.dtype, l.row_stride);
    Err(invalid(slot.name(), describe(found), format!("{}, as the plan was made for", describe(wanted))))
}
