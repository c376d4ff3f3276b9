//! burn's GPU backends, all of which run on cubecl: on a wgpu device by samtone's WGSL shaders ([`wgsl`]), on a CUDA device by its
//! kernels for CUDA ([`cuda`]). Embeddings are read where they lie, and gradients are burn's own memory.

#[cfg(feature = "cuda")]
mod cuda;
mod fusion;
mod tensors;
#[cfg(feature = "wgpu")]
mod wgsl;

#[cfg(feature = "wgpu")]
pub(crate) use wgsl::OnDevice;

use crate::backend::{Inputs, Outputs, SamToNeBackend, Wanted};
use crate::{Result, SamToNe, Temperature, invalid};
use burn::backend::{DType, Shape};
use burn::cubecl::Device;
use burn::cubecl::prelude::Client;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use samtone::{GradientOutput, Problem};

/// Where a binding may begin on every device of wgpu. CUDA's kernels ask for less.
const ALIGNMENT: u64 = samtone::wgpu::ALIGNMENT;

/// What a call computes, all of it checked.
struct Task<'a> {
    problem: Problem<'a>,
    client: Client,
    towers: [CubeTensor; 2],
    wanted: Wanted,
    /// The temperature is given as log β: so is its gradient.
    by_log_beta: bool,
}

/// By which kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernels {
    #[cfg(feature = "wgpu")]
    Wgsl,
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

impl SamToNeBackend for CubeBackend {
    fn samtone(samtone: &SamToNe, inputs: Inputs<Self>, wanted: Wanted) -> Result<Outputs<Self>> {
        let client = inputs.query.client.clone();
        let kernels = Kernels::of(&inputs.query.device, client.name())?;
        #[cfg(feature = "cuda")]
        if let Kernels::Cuda(_) = kernels {
            cuda::expect_no_capture(&client)?;
        }
        let others = [("passage", Some(&inputs.passage)), ("temperature", inputs.temperature.tensor())];
        for (argument, tensor) in others {
            if let Some(device) = tensor.map(|tensor| &tensor.device).filter(|device| **device != inputs.query.device) {
                let allowed = format!("the device of `query`, {:?}", inputs.query.device);
                return Err(invalid(argument, format!("on {device:?}"), allowed));
            }
        }
        let by_log_beta = matches!(inputs.temperature, Temperature::LogBeta(_));
        let call = samtone.call().at(inputs.temperature.try_map(|tensor| tensors::scalar(&tensor))?)?;
        let alignment = client.properties().memory.alignment.min(ALIGNMENT);
        let q = tensors::readable("query", inputs.query, alignment)?;
        let p = tensors::readable("passage", inputs.passage, alignment)?;
        let ([rows, dim], [passages, other]) = (tensors::dims(&q), tensors::dims(&p));
        if dim != other {
            let value = format!("embeddings of dimension {other}");
            return Err(invalid("passage", value, format!("the dimension of the queries, {dim}")));
        }
        if q.dtype != p.dtype {
            let value = format!("of type {}", p.dtype.name());
            return Err(invalid("passage", value, format!("the type of the queries, {}", q.dtype.name())));
        }
        let output = |wanted: bool| wanted.then_some(GradientOutput { dtype: samtone::DType::F32, row_stride: dim });
        let problem = Problem::new(call.pairs(rows, passages)?, tensors::dtype(q.dtype), dim)?
            .with_row_strides(tensors::row_stride(&q), tensors::row_stride(&p))?
            .with_gradients(output(wanted.query), output(wanted.passage))?;
        let task = Task { problem, client, towers: [q, p], wanted, by_log_beta };
        match kernels {
            #[cfg(feature = "wgpu")]
            Kernels::Wgsl => wgsl::run(task),
            #[cfg(feature = "cuda")]
            Kernels::Cuda(ordinal) => cuda::run(task, ordinal),
        }
    }
}

impl Task<'_> {
    /// Memory for the gradients that are wanted, contiguous.
    fn gradients(&self) -> [Option<CubeTensor>; 2] {
        let wanted = [self.wanted.query, self.wanted.passage];
        std::array::from_fn(|tower| {
            wanted[tower].then(|| {
                let [rows, dim] = tensors::dims(&self.towers[tower]);
                let handle = self.client.empty(rows * dim * size_of::<f32>());
                let device = self.towers[tower].device.clone();
                CubeTensor::new_contiguous(self.client.clone(), device, Shape::from([rows, dim]), handle, DType::F32)
            })
        })
    }
}

impl Kernels {
    /// Those for a device whose runtime has this name, or an error.
    fn of(device: &Device, runtime: &str) -> Result<Self> {
        match device {
            #[cfg(feature = "wgpu")]
            Device::Wgpu(_) if runtime == "wgpu<wgsl>" => Ok(Self::Wgsl),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(device.index)),
            _ => {
                let value = format!("on a device of cubecl's runtime {runtime}");
                Err(invalid("query", value, crate::route::ALLOWED))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_without_kernels_are_refused_by_name() {
        let (wgpu, cuda) = (Device::Wgpu(Default::default()), Device::Cuda(Default::default()));
        let hip = Device::Hip(Default::default());
        assert_eq!(Kernels::of(&wgpu, "wgpu<wgsl>").is_ok(), cfg!(feature = "wgpu"));
        assert_eq!(Kernels::of(&cuda, "cuda").is_ok(), cfg!(feature = "cuda"));
        let refused =
            [(&wgpu, "wgpu<spirv>"), (&wgpu, "wgpu<msl>"), (&hip, "hip"), (&Device::Cpu(Default::default()), "cpu")];
        for (device, name) in refused {
            let error = Kernels::of(device, name).unwrap_err().to_string();
            let sentence = format!("argument `query` is on a device of cubecl's runtime {name}; allowed: tensors of");
            assert!(error.starts_with(&sentence), "{error}");
        }
    }
}
