//! On a CUDA device: the plan of [`samtone::cuda`], in burn's buffers.
//!
//! cubecl gives addresses to others, and keeps memory where it is while they are held, but it gives nobody its stream. So the call
//! has one of its own, and the host waits: for what burn has enqueued before it, and for the call itself.

use super::Task;
use super::tensors::failed;
use crate::backend::{Outputs, Wanted};
use crate::{Report, Result, invalid};
use burn::backend::{DType, Shape};
use burn::cubecl::cuda::CudaRuntime;
use burn::cubecl::future::block_on;
use burn::cubecl::prelude::Client;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl_runtime::runtime::Runtime;
use samtone::cuda::{self, Cosines, Device, Plan, Pointers, Readout, Slot, Stream, check_slot_bytes};
use samtone::{Evaluation, TemperatureGradient};

/// An error while burn captures a graph: the host could not wait, and waiting would end the capture.
pub(super) fn expect_no_capture(client: &Client) -> Result<()> {
    if !client.is_capturing() {
        return Ok(());
    }
    let value = "of a stream that is being captured into a graph";
    Err(invalid("query", value, "calls outside of captures: the host waits"))
}

pub(super) fn run(task: Task<'_>, ordinal: usize) -> Result<Outputs<CubeBackend>> {
    let gradients = task.gradients();
    let Task { problem, client, towers, wanted, by_log_beta } = task;
    let device = Device::shared(ordinal)?;
    let problem = cuda::Problem::from(problem).with_architecture(device.architecture());
    // What the first pass keeps of cosines is for the gradient.
    let problem = if wanted == Wanted::default() { problem.with_cosines(Cosines::Recomputed) } else { problem };
    let plan = Plan::new(&problem)?;
    let readout = Readout::new(&problem, &plan)?;

    let memory =
        |slot| Some(plan.slot_bytes(slot)).filter(|&bytes| bytes > 0).map(|bytes| client.empty(bytes as usize));
    let side = Some(plan.side_data()).filter(|data| !data.is_empty()).map(|data| client.create_from_slice(data));
    let [q, p] = towers.each_ref().map(|tensor| Some(tensor.handle.clone()));
    let [dq, dp] = gradients.each_ref().map(|tensor| tensor.as_ref().map(|tensor| tensor.handle.clone()));
    let handles = [
        (Slot::Query, q),
        (Slot::Passage, p),
        (Slot::Side, side),
        (Slot::State, memory(Slot::State)),
        (Slot::Workspace, memory(Slot::Workspace)),
        (Slot::QueryGradient, dq),
        (Slot::PassageGradient, dp),
    ];
    let mut held = Vec::new();
    let mut pointers = Pointers::default();
    for (slot, handle) in &handles {
        let Some(handle) = handle else { continue };
        let resource = client.get_resource::<<CudaRuntime as Runtime>::Server>(handle.clone());
        let resource = resource.map_err(|error| failed("get_resource", error))?;
        check_slot_bytes(&plan, *slot, resource.resource().size)?;
        pointers.set(*slot, resource.resource().ptr);
        held.push(resource);
    }
    block_on(client.sync_buffers(handles.iter().filter_map(|(_, handle)| handle.as_ref())))
        .map_err(|e| failed("sync", e))?;

    // SAFETY: each pointer is memory of the device's primary context, in which cubecl works, too, and of as many bytes as the plan
    // says. It stays where it is while `held` is there, which is until the stream has done everything. Side data and embeddings have
    // been written, since the host has waited for burn, and nobody else has handles of the rest. The stream is always there.
    let results = unsafe { enqueue(&device, &plan, &readout, &pointers, wanted) };
    if results.is_err() {
        // What was enqueued before the error still runs. If waiting fails, too, the context is lost.
        // SAFETY: the stream is always there.
        let _ = unsafe { device.synchronize(Stream::PER_THREAD) };
    }
    drop(held);
    let (evaluation, derivative) = results?;
    let scalar = |value: f64| {
        let handle = client.create_from_slice(&(value as f32).to_ne_bytes());
        CubeTensor::new_contiguous(client.clone(), towers[0].device.clone(), Shape::from([1]), handle, DType::F32)
    };
    let derivative = if by_log_beta { derivative.log_beta } else { derivative.tau };
    let [dq, dp] = gradients;
    Ok(Outputs {
        loss: scalar(evaluation.loss),
        gradients: [dq, dp, wanted.temperature.then(|| scalar(derivative))],
        report: Report::known(evaluation),
    })
}

/// Enqueues the call and waits for it.
///
/// # Safety
/// As [`Device::forward`], on this thread's default stream.
unsafe fn enqueue(
    device: &Device,
    plan: &Plan,
    readout: &Readout,
    pointers: &Pointers,
    wanted: Wanted,
) -> Result<(Evaluation, TemperatureGradient)> {
    // SAFETY: the caller's promise.
    unsafe {
        if wanted == Wanted::default() {
            device.forward(plan, pointers, Stream::PER_THREAD)?;
            let evaluation = device.evaluation(readout, pointers, Stream::PER_THREAD)?;
            return Ok((evaluation, TemperatureGradient { tau: f64::NAN, log_beta: f64::NAN }));
        }
        device.loss_and_gradients(plan, pointers, Stream::PER_THREAD)?;
        device.results(readout, pointers, Stream::PER_THREAD)
    }
}
