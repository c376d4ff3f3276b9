//! A plan's slots as buffers of cubecl, and its dispatches as launches.

use super::shader::Shader;
use crate::{Error, Result, invalid};
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::{DType, TensorMetadata};
use burn::cubecl::prelude::{Client, CubeCount};
use burn::cubecl::server::{Handle, KernelArguments, MetadataBindingInfo};
use burn_cubecl::tensor::CubeTensor;
use samtone::wgpu::{ALIGNMENT, Binding, Dispatch, Plan, Slot};

/// What the slots of a plan are.
pub(super) struct Buffers([Option<Handle>; Slot::ALL.len()]);

impl Buffers {
    /// The plan's own slots. Parameters are none of them: they go with each launch.
    pub(super) fn new(client: &Client, plan: &Plan) -> Self {
        Self(Slot::ALL.map(|slot| match (slot, plan.slot_bytes(slot)) {
            (_, 0) | (Slot::Uniforms, _) => None,
            (slot, _) if slot.is_callers() => None,
            (Slot::Side, _) => Some(client.create_from_slice(plan.side_data())),
            (Slot::State, bytes) => Some(client.empty(bytes.max(plan.state_bytes()) as usize)),
            (_, bytes) => Some(client.empty(bytes as usize)),
        }))
    }

    pub(super) fn set(&mut self, slot: Slot, handle: Handle) {
        self.0[slot as usize] = Some(handle);
    }

    pub(super) fn get(&self, slot: Slot) -> Result<&Handle> {
        let missing = || Error::Wgpu { call: "launch", reason: format!("the plan has no buffer `{}`", slot.name()) };
        self.0[slot as usize].as_ref().ok_or_else(missing)
    }

    pub(super) fn launch<'d>(
        &self,
        client: &Client,
        plan: &Plan,
        dispatches: impl IntoIterator<Item = &'d Dispatch>,
    ) -> Result<()> {
        for dispatch in dispatches {
            let mut arguments = KernelArguments::new();
            for binding in &dispatch.bindings {
                if binding.slot == Slot::Uniforms {
                    arguments.info = MetadataBindingInfo::custom(words(plan, binding));
                } else {
                    let handle = self.get(binding.slot)?.clone();
                    let beyond = handle.size_in_used().saturating_sub(binding.offset + binding.bytes);
                    arguments = arguments.with_buffer(handle.offset_start(binding.offset).offset_end(beyond).binding());
                }
            }
            let [x, y] = dispatch.workgroups;
            client.launch(Box::new(Shader::of(dispatch, plan.variant())), CubeCount::Static(x, y, 1), arguments);
        }
        Ok(())
    }
}

/// The parameters of a dispatch.
fn words(plan: &Plan, binding: &Binding) -> Vec<u64> {
    let bytes = plan.uniforms().get(binding.offset as usize..).unwrap_or_default();
    let bytes = bytes.get(..binding.bytes as usize).unwrap_or(bytes);
    bytes.chunks_exact(8).map(bytemuck::pod_read_unaligned).collect()
}

/// The two dimensions of what [`readable`] gave.
pub(super) fn dims(tensor: &CubeTensor) -> [usize; 2] {
    let shape = tensor.shape();
    [shape.first().copied().unwrap_or(0), shape.last().copied().unwrap_or(0)]
}

pub(super) fn row_stride(tensor: &CubeTensor) -> usize {
    let [rows, dim] = dims(tensor);
    let stride = tensor.meta.strides().first().copied().unwrap_or(dim);
    if rows > 1 { stride } else { dim } // nothing multiplies the stride of a single row
}

pub(super) fn dtype(dtype: DType) -> samtone::DType {
    match dtype {
        DType::F16 => samtone::DType::F16,
        DType::BF16 => samtone::DType::BF16,
        _ => samtone::DType::F32,
    }
}

/// A matrix that shaders can read where it lies: the tensor itself, or a copy of one with other strides or where no binding may
/// begin.
pub(super) fn readable(argument: &'static str, tensor: CubeTensor) -> Result<CubeTensor> {
    let shape = tensor.shape();
    if shape.num_dims() != 2 {
        return Err(invalid(argument, format!("a tensor of shape {:?}", shape.as_slice()), "a matrix, rows x dim"));
    }
    if !matches!(tensor.dtype, DType::F32 | DType::F16 | DType::BF16) || tensor.qparams.is_some() {
        return Err(invalid(argument, format!("of type {}", tensor.dtype.name()), "f32, f16 or bf16"));
    }
    let [rows, dim] = dims(&tensor);
    if rows == 0 || dim == 0 {
        let name = if rows == 0 { "rows" } else { "dim" };
        return Err(invalid(name, "0", format!("1 to {}", i32::MAX)));
    }
    let tensor = burn_cubecl::kernel::untile(tensor);
    let alignment = tensor.client.properties().memory.alignment.min(ALIGNMENT);
    let strides = tensor.meta.strides();
    let is_aligned = tensor.handle.offset_start.unwrap_or(0).is_multiple_of(alignment);
    if is_aligned && (dim == 1 || strides.last() == Some(&1)) && row_stride(&tensor) >= dim {
        return Ok(tensor);
    }
    let (client, device, dtype) = (tensor.client.clone(), tensor.device.clone(), tensor.dtype);
    let copy = burn::cubecl::std::tensor::into_contiguous(&client, tensor.binding(), dtype_to_storage_type(dtype));
    Ok(CubeTensor::new(client, copy.handle, *copy.metadata, device, dtype))
}
