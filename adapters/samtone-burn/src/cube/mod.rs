//! burn's wgpu backend: the plan of [`samtone::wgpu`] as launches of cubecl, on burn's device, in burn's buffers and in the order of
//! burn's own kernels. Nothing is read back but a temperature that is a tensor.
//!
//! cubecl owns device and queue, and gives neither to others unless they made them. What it does take is a kernel of given WGSL
//! ([`shader`]), which then shares its pipelines, its memory and its order. So a plan is replayed as data, as pages in browsers do;
//! `samtone::wgpu`'s own driver, and the wgpu behind it, are not in this build.

mod fusion;
mod launch;
mod read;
mod shader;

pub(crate) use read::OnDevice;

use crate::backend::{Inputs, Outputs, SamToNeBackend, Wanted};
use crate::{Report, Result, SamToNe, invalid};
use burn::backend::ops::FloatTensorOps;
use burn::backend::{DType, Shape};
use burn::cubecl::ir::{ElemType, FloatKind};
use burn::cubecl::prelude::Client;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use launch::Buffers;
use samtone::wgpu::{Capabilities, Plan, Products, Slot};
use samtone::{GradientOutput, Pairs, Problem};

/// First byte of the results in the state, on which an f32 is the loss; ∂L/∂τ and ∂L/∂log β are the sixth and seventh.
const RESULTS: u64 = 256;
const RESULT_WORDS: usize = 7;
const OF_TAU: usize = 5;
const OF_LOG_BETA: usize = 6;

impl SamToNeBackend for CubeBackend {
    fn samtone(samtone: &SamToNe, inputs: Inputs<Self>, wanted: Wanted) -> Result<Outputs<Self>> {
        let client = inputs.query.client.clone();
        check_runtime(client.name())?;
        let others = [("passage", Some(&inputs.passage)), ("temperature", inputs.temperature.tensor())];
        for (argument, tensor) in others {
            if let Some(device) = tensor.map(|tensor| &tensor.device).filter(|device| **device != inputs.query.device) {
                let allowed = format!("the device of `query`, {:?}", inputs.query.device);
                return Err(invalid(argument, format!("on {device:?}"), allowed));
            }
        }
        let by_log_beta = matches!(inputs.temperature, crate::Temperature::LogBeta(_));
        let options = samtone.options(&inputs.temperature.try_map(|tensor| read::scalar(&tensor))?)?;
        let (q, p) = (launch::readable("query", inputs.query)?, launch::readable("passage", inputs.passage)?);
        let ([rows, dim], [passages, other]) = (launch::dims(&q), launch::dims(&p));
        if dim != other {
            let value = format!("embeddings of dimension {other}");
            return Err(invalid("passage", value, format!("the dimension of the queries, {dim}")));
        }
        if q.dtype != p.dtype {
            let value = format!("of type {}", p.dtype.name());
            return Err(invalid("passage", value, format!("the type of the queries, {}", q.dtype.name())));
        }
        let pairs = samtone.paired(Pairs::new(rows, passages)?)?;
        let output = |wanted: bool| wanted.then_some(GradientOutput { dtype: samtone::DType::F32, row_stride: dim });
        let problem = Problem::new(samtone.loss(), &pairs, &options, launch::dtype(q.dtype), dim)?
            .with_row_strides(launch::row_stride(&q), launch::row_stride(&p))?
            .with_gradients(output(wanted.query), output(wanted.passage))?;
        let plan = Plan::new(&problem, &capabilities(&client))?;

        let gradient = |wanted: bool, rows: usize| {
            wanted.then(|| {
                let handle = client.empty(rows * dim * size_of::<f32>());
                let shape = Shape::from([rows, dim]);
                CubeTensor::new_contiguous(client.clone(), q.device.clone(), shape, handle, DType::F32)
            })
        };
        let (dq, dp) = (gradient(wanted.query, rows), gradient(wanted.passage, passages));
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
        let after = state.size_in_used() - RESULTS - 4 * RESULT_WORDS as u64;
        let results = CubeTensor::new_contiguous(
            client.clone(),
            q.device.clone(),
            Shape::from([RESULT_WORDS]),
            state.clone().offset_start(RESULTS).offset_end(after),
            DType::F32,
        );
        // Copies: views of the state would have to begin where no device lets a binding begin, and would keep it.
        let result = |word: usize| {
            CubeBackend::float_add_scalar(
                CubeBackend::float_slice(results.clone(), &[(word..word + 1).into()]),
                0.0.into(),
            )
        };
        let of_temperature = wanted.temperature.then(|| result(if by_log_beta { OF_LOG_BETA } else { OF_TAU }));
        let loss = result(0);
        Ok(Outputs {
            loss,
            gradients: [dq, dp, of_temperature],
            report: Report::on_device(OnDevice::new(client, plan, state, [q, p])),
        })
    }
}

/// An error unless the tensors' device, whose runtime has this name, takes WGSL.
fn check_runtime(name: &str) -> Result<()> {
    if name == "wgpu<wgsl>" {
        return Ok(());
    }
    let allowed = "tensors of `Device::flex()`, or of `Device::wgpu` where burn compiles WGSL, that is without its features `vulkan` \
                   and `metal`: `to_device` is differentiable";
    Err(invalid("query", format!("on a device of cubecl's runtime {name}"), allowed))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_without_wgsl_are_refused_by_name() {
        check_runtime("wgpu<wgsl>").unwrap();
        for name in ["wgpu<spirv>", "wgpu<msl>", "cuda", "hip", "cpu"] {
            let error = check_runtime(name).unwrap_err().to_string();
            let sentence = format!("argument `query` is on a device of cubecl's runtime {name}; allowed: tensors of");
            assert!(error.starts_with(&sentence), "{error}");
        }
    }
}
