//! burn's tensors as samtone reads them where they lie.

use crate::{Error, Result, invalid};
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::{DType, TensorMetadata};
use burn::cubecl::prelude::Client;
use burn::cubecl::server::Handle;
use burn_cubecl::tensor::CubeTensor;
use samtone::half::{bf16, f16};

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

/// A matrix that kernels can read where it lies: the tensor itself, or a copy of one with other strides or that begins at no
/// multiple of `alignment` bytes.
pub(super) fn readable(argument: &'static str, tensor: CubeTensor, alignment: u64) -> Result<CubeTensor> {
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
    let strides = tensor.meta.strides();
    let is_aligned = tensor.handle.offset_start.unwrap_or(0).is_multiple_of(alignment);
    if is_aligned && (dim == 1 || strides.last() == Some(&1)) && row_stride(&tensor) >= dim {
        return Ok(tensor);
    }
    let (client, device, dtype) = (tensor.client.clone(), tensor.device.clone(), tensor.dtype);
    let copy = burn::cubecl::std::tensor::into_contiguous(&client, tensor.binding(), dtype_to_storage_type(dtype));
    Ok(CubeTensor::new(client, copy.handle, *copy.metadata, device, dtype))
}

/// The sentence for what cubecl refuses.
pub(super) fn failed(call: &'static str, error: impl std::fmt::Display) -> Error {
    Error::Framework { framework: "burn", call, reason: error.to_string() }
}

/// What a handle has, when the device has done everything that was enqueued before.
pub(super) fn read(client: &Client, handle: Handle) -> Result<Vec<u8>> {
    let bytes = client.read_one(handle);
    bytes.map(|bytes| bytes.to_vec()).map_err(|error| failed("read", error))
}

/// The number that these bytes begin with.
fn element(bytes: &[u8], dtype: DType) -> Option<f64> {
    let bytes = bytes.get(..dtype.size())?;
    match dtype {
        DType::F64 => bytes.try_into().ok().map(f64::from_le_bytes),
        DType::F32 => bytes.try_into().ok().map(|x| f32::from_le_bytes(x).into()),
        DType::F16 => bytes.try_into().ok().map(|x| f16::from_le_bytes(x).into()),
        DType::BF16 => bytes.try_into().ok().map(|x| bf16::from_le_bytes(x).into()),
        _ => None,
    }
}

/// The number that a tensor of one element holds: waits for what the device still has to do.
pub(super) fn scalar(tensor: &CubeTensor) -> Result<f64> {
    const ARGUMENT: &str = "temperature";
    let (shape, dtype) = (tensor.shape(), tensor.dtype);
    let is_float = matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16);
    if shape.num_elements() != 1 || !is_float {
        let value = format!("a tensor of shape {:?} and type {}", shape.as_slice(), dtype.name());
        return Err(invalid(ARGUMENT, value, "one number, f64, f32, f16 or bf16"));
    }
    let bytes = read(&tensor.client, tensor.handle.clone())?;
    element(&bytes, dtype).ok_or_else(|| invalid(ARGUMENT, format!("{} bytes", bytes.len()), "one number"))
}
