//! On a wgpu device: the plan of [`samtone::wgpu`] as launches of cubecl, in burn's buffers and in the order of burn's own kernels.
//! Nothing is read back but a temperature that is a tensor.
//!
//! cubecl owns device and queue, and gives neither to others unless they made them. What it does take is a kernel of given WGSL
//! ([`shader`]), which then shares its pipelines, its memory and its order. So a plan is replayed as data, as pages in browsers do;
//! `samtone::wgpu`'s own driver, and the wgpu behind it, are not in this build.

mod launch;
mod results;
mod shader;

pub(crate) use results::OnDevice;

use super::Task;
use crate::backend::{Outputs, Wanted};
use crate::{Report, Result};
use burn::backend::ops::FloatTensorOps;
use burn::backend::{DType, Shape};
use burn::cubecl::ir::{ElemType, FloatKind};
use burn::cubecl::prelude::Client;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use launch::Buffers;
use samtone::wgpu::results::{FIRST_BYTE, GRAD_LOG_BETA, GRAD_TAU, LOSS};
use samtone::wgpu::{Capabilities, Plan, Products, Slot};

pub(super) fn run(task: Task<'_>) -> Result<Outputs<CubeBackend>> {
    let plan = Plan::new(&task.problem, &capabilities(&task.client))?;
    let [dq, dp] = task.gradients();
    let Task { client, towers: [q, p], wanted, by_log_beta, .. } = task;
    let mut buffers = Buffers::new(&client, &plan);
    for (slot, tensor) in [
        (Slot::Query, Some(&q)),
        (Slot::Passage, Some(&p)),
        (Slot::QueryGradient, dq.as_ref()),
        (Slot::PassageGradient, dp.as_ref()),
    ] {
        if let Some(tensor) = tensor {
            buffers.set(slot, tensor.handle.clone());
        }
    }
    buffers.launch(&client, &plan, plan.forward())?;
    if wanted != Wanted::default() {
        buffers.launch(&client, &plan, plan.backward())?;
    }

    let state = buffers.get(Slot::State)?.clone();
    const WORDS: usize = GRAD_LOG_BETA + 1;
    let after = state.size_in_used() - FIRST_BYTE - 4 * WORDS as u64;
    let results = CubeTensor::new_contiguous(
        client.clone(),
        q.device.clone(),
        Shape::from([WORDS]),
        state.clone().offset_start(FIRST_BYTE).offset_end(after),
        DType::F32,
    );
    // Copies: views of the state would have to begin where no device lets a binding begin, and would keep it.
    let result = |word: usize| {
        CubeBackend::float_add_scalar(CubeBackend::float_slice(results.clone(), &[(word..word + 1).into()]), 0.0.into())
    };
    let of_temperature = wanted.temperature.then(|| result(if by_log_beta { GRAD_LOG_BETA } else { GRAD_TAU }));
    let loss = result(LOSS);
    Ok(Outputs {
        loss,
        gradients: [dq, dp, of_temperature],
        report: Report::on_device(OnDevice::new(client, plan, state, [q, p])),
    })
}

fn capabilities(client: &Client) -> Capabilities {
    let properties = client.properties();
    let hardware = &properties.hardware;
    Capabilities {
        max_binding_bytes: properties.memory.max_page_size,
        max_buffer_bytes: properties.memory.max_page_size,
        max_workgroups: hardware.max_cube_count.0.min(hardware.max_cube_count.1),
        workgroup_bytes: hardware.max_shared_memory_size.try_into().unwrap_or(u32::MAX),
        f16: properties.supports_type(ElemType::Float(FloatKind::F16)),
        // They speed up sums over rows, not products, and cubecl offers none on the software devices on which this is tested.
        subgroups: false,
        products: Products::Fma,
        ..Capabilities::default()
    }
}
