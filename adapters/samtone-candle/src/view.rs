//! How samtone reads a tensor: in place where its rows are contiguous, whatever lies between them.

use crate::{invalid, refused};
use candle_core::{CpuStorage, DType, DeviceLocation, Layout, Result, Storage, Tensor};
use samtone::{Data, Embeddings};
use std::ops::Range;

/// An error unless tensors of this place can be read.
pub(crate) fn check_device(argument: &'static str, location: DeviceLocation) -> Result<()> {
    let cuda = cfg!(feature = "cuda");
    let allowed = match location {
        DeviceLocation::Cpu => return Ok(()),
        DeviceLocation::Cuda { .. } if cuda => return Ok(()),
        DeviceLocation::Cuda { .. } => "tensors on the CPU, or the feature `cuda` of samtone-candle",
        DeviceLocation::Metal { .. } if cuda => "tensors on the CPU or a CUDA device: `to_device` is differentiable",
        DeviceLocation::Metal { .. } => "tensors on the CPU: `to_device(&Device::Cpu)` is differentiable",
    };
    Err(invalid(argument, format!("on {}", place(location)), allowed))
}

/// An error unless both towers are in one place.
pub(crate) fn check_same_device(query: &Tensor, passage: &Tensor) -> Result<()> {
    let [query, passage] = [query, passage].map(|tensor| tensor.device().location());
    if query == passage {
        return Ok(());
    }
    Err(invalid("passage", format!("on {}", place(passage)), format!("the device of the queries, {}", place(query))))
}

fn place(location: DeviceLocation) -> String {
    match location {
        DeviceLocation::Cpu => "the CPU".into(),
        DeviceLocation::Cuda { gpu_id } => format!("CUDA device {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("Metal device {gpu_id}"),
    }
}

/// Elements from row to row, if samtone can read the matrix where it lies.
fn row_stride(layout: &Layout) -> Option<usize> {
    let (&[rows, dim], &[row, column]) = (layout.dims(), layout.stride()) else { return None };
    if rows <= 1 || dim == 0 {
        return (dim <= 1 || column == 1).then_some(dim); // nothing multiplies the stride of a single row
    }
    ((dim == 1 || column == 1) && row >= dim).then_some(row)
}

/// A matrix that can be read where it lies: the tensor itself, or a copy of one with other strides.
pub(crate) fn readable(argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
    check_device(argument, tensor.device().location())?;
    if tensor.rank() != 2 {
        return Err(invalid(argument, format!("a tensor of shape {:?}", tensor.dims()), "a matrix, rows x dim"));
    }
    if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(invalid(argument, format!("of type {}", tensor.dtype().as_str()), "f32, f16 or bf16"));
    }
    // Detached: the operation records the caller's tensor, and nothing differentiates through this one.
    let tensor = tensor.detach();
    if row_stride(tensor.layout()).is_some() { Ok(tensor) } else { tensor.contiguous() }
}

/// Where the rows of a matrix that [`readable`] gave are in its storage.
pub(crate) struct Rows {
    pub rows: usize,
    pub dim: usize,
    /// Elements from row to row.
    pub stride: usize,
    /// From the first element to behind the last.
    pub range: Range<usize>,
}

impl Rows {
    pub(crate) fn of(layout: &Layout) -> Result<Self> {
        let (rows, dim) = layout.shape().dims2()?;
        let stride = row_stride(layout).unwrap_or(dim);
        let start = layout.start_offset();
        let range = start..start + if rows == 0 || dim == 0 { 0 } else { (rows - 1) * stride + dim };
        Ok(Self { rows, dim, stride, range })
    }
}

/// The error for a layout that reaches beyond its storage.
pub(crate) fn outside() -> candle_core::Error {
    candle_core::Error::msg("a tensor lies outside of its storage")
}

/// What [`readable`] gave of the CPU, as samtone reads it.
pub(crate) fn embeddings<'a>(storage: &'a Storage, layout: &Layout) -> Result<Embeddings<'a>> {
    let Rows { rows, dim, stride, range } = Rows::of(layout)?;
    let data = match storage {
        Storage::Cpu(CpuStorage::F32(x)) => x.get(range).map(Data::F32),
        Storage::Cpu(CpuStorage::F16(x)) => x.get(range).map(Data::F16),
        Storage::Cpu(CpuStorage::BF16(x)) => x.get(range).map(Data::BF16),
        _ => None,
    };
    Embeddings::with_row_stride(data.ok_or_else(outside)?, rows, dim, stride).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn tensors_of_other_devices_are_refused_by_name() {
        let metal = DeviceLocation::Metal { gpu_id: 0 };
        let error = check_device("passage", metal).unwrap_err().to_string();
        assert!(error.starts_with("argument `passage` is on Metal device 0; allowed: tensors on the CPU"), "{error}");
        let cuda = check_device("query", DeviceLocation::Cuda { gpu_id: 1 });
        assert_eq!(cuda.is_ok(), cfg!(feature = "cuda"));
        if let Err(error) = cuda.map_err(|error| error.to_string()) {
            assert!(error.starts_with("argument `query` is on CUDA device 1; allowed: tensors on the CPU"), "{error}");
            assert!(error.contains("the feature `cuda`"), "{error}");
        }
        check_device("query", DeviceLocation::Cpu).unwrap();
    }

    /// Copies where it must and nowhere else: a copy has an offset of 0 and rows without gaps.
    #[test]
    fn only_strides_within_rows_are_copied() {
        let wide = Tensor::arange(0f32, 48.0, &Device::Cpu).unwrap().reshape((6, 8)).unwrap();
        for (in_place, tensor) in [
            (true, wide.clone()),
            (true, wide.narrow(0, 2, 3).unwrap()),
            (true, wide.narrow(1, 2, 5).unwrap()),
            (true, wide.narrow(1, 3, 1).unwrap()),
            (true, wide.narrow(0, 5, 1).unwrap()),
            (false, wide.t().unwrap()),
            (false, wide.narrow(0, 1, 1).unwrap().broadcast_as((4, 8)).unwrap()),
        ] {
            let read = readable("query", &tensor).unwrap();
            let copied =
                read.stride() != tensor.stride() || read.layout().start_offset() != tensor.layout().start_offset();
            assert_eq!(copied, !in_place, "{:?}", tensor.layout());
            let (storage, layout) = read.storage_and_layout();
            let rows = embeddings(&storage, layout).unwrap();
            for (i, row) in tensor.to_vec2::<f32>().unwrap().into_iter().enumerate() {
                assert_eq!(rows.row_to_f64(i).unwrap(), row.into_iter().map(f64::from).collect::<Vec<_>>());
            }
        }
    }
}
