//! burn's CPU backend: tensors are read where they lie, and gradients become tensors where they were computed.

use crate::backend::{Inputs, Outputs, SamToNeBackend, Wanted};
use crate::{Report, Result, SamToNe, invalid};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Bytes, DType, Flex, Shape, TensorMetadata};
use samtone::cpu::Workspace;
use samtone::half::{bf16, f16};
use samtone::{Batch, Data, Element, Embeddings};
use std::borrow::Cow;

impl SamToNeBackend for Flex {
    fn samtone(samtone: &SamToNe, inputs: Inputs<Self>, wanted: Wanted) -> Result<Outputs<Self>> {
        let temperature = inputs.temperature.try_map(|tensor| scalar(&tensor))?;
        let call = samtone.call().at(temperature)?;
        let (q, p) = (readable("query", &inputs.query)?, readable("passage", &inputs.passage)?);
        let batch = Batch::new(&call, embeddings("query", &q)?, embeddings("passage", &p)?)?;
        if wanted == Wanted::default() {
            let evaluation = samtone::cpu::forward(&batch)?.evaluation().clone();
            return Ok(outputs(evaluation, [None, None, None]));
        }

        let mut own = Workspace::new();
        let mut shared = samtone.workspace().try_lock();
        let workspace = shared.as_deref_mut().unwrap_or(&mut own);
        let (evaluation, [dq, dp], derivative) =
            workspace.loss_and_wanted_gradients(&batch, [wanted.query, wanted.passage])?;
        let [dq, dp] = [(dq, batch.rows()), (dp, batch.passages())]
            .map(|(gradient, rows)| gradient.map(|gradient| tensor(gradient, [rows, batch.dim()])));
        let dt = wanted.temperature.then(|| tensor(vec![temperature.derivative(derivative) as f32], [1]));
        Ok(outputs(evaluation, [dq, dp, dt]))
    }
}

fn outputs(evaluation: samtone::Evaluation, gradients: [Option<FlexTensor>; 3]) -> Outputs<Flex> {
    Outputs { loss: tensor(vec![evaluation.loss as f32], [1]), gradients, report: Report::known(evaluation) }
}

/// A tensor over the memory of a vector.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(Shape::from(shape)), DType::F32)
}

/// Elements from row to row, if samtone can read the matrix where it lies.
fn row_stride(layout: &Layout) -> Option<usize> {
    let (&[rows, dim], &[row, column]) = (layout.shape().as_slice(), layout.strides()) else { return None };
    if rows <= 1 || dim == 0 {
        return (dim <= 1 || column == 1).then_some(dim); // nothing multiplies the stride of a single row
    }
    let row = usize::try_from(row).ok()?; // negative where a tensor is flipped
    ((dim == 1 || column == 1) && row >= dim).then_some(row)
}

/// A matrix that can be read where it lies: the tensor itself, or a copy of one with other strides.
fn readable<'a>(argument: &'static str, tensor: &'a FlexTensor) -> Result<Cow<'a, FlexTensor>> {
    let shape = tensor.shape();
    if shape.num_dims() != 2 {
        return Err(invalid(argument, format!("a tensor of shape {:?}", shape.as_slice()), "a matrix, rows x dim"));
    }
    if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(invalid(argument, format!("of type {}", tensor.dtype().name()), "f32, f16 or bf16"));
    }
    let in_place = row_stride(tensor.layout()).is_some();
    Ok(if in_place { Cow::Borrowed(tensor) } else { Cow::Owned(tensor.to_contiguous()) })
}

/// What [`readable`] gave, as samtone reads it.
fn embeddings<'a>(argument: &'static str, tensor: &'a FlexTensor) -> Result<Embeddings<'a>> {
    let layout = tensor.layout();
    let &[rows, dim] = layout.shape().as_slice() else {
        return Err(invalid(argument, format!("a tensor of {} dimensions", layout.num_dims()), "a matrix"));
    };
    let stride = row_stride(layout).unwrap_or(dim);
    let len = if rows == 0 || dim == 0 { 0 } else { (rows - 1) * stride + dim };
    let start = layout.start_offset();
    let data = match tensor.dtype() {
        DType::F32 => Data::F32(elements(argument, tensor, start, len)?),
        DType::F16 => Data::F16(elements::<f16>(argument, tensor, start, len)?),
        DType::BF16 => Data::BF16(elements::<bf16>(argument, tensor, start, len)?),
        other => return Err(invalid(argument, format!("of type {}", other.name()), "f32, f16 or bf16")),
    };
    Embeddings::with_row_stride(data, rows, dim, stride)
}

fn elements<'a, T: Element>(
    argument: &'static str,
    tensor: &'a FlexTensor,
    start: usize,
    len: usize,
) -> Result<&'a [T]> {
    let all = bytemuck::try_cast_slice(tensor.bytes())
        .map_err(|error| invalid(argument, format!("stored as bytes that are no {}: {error}", T::DTYPE), "others"))?;
    all.get(start..start + len).ok_or_else(|| invalid(argument, "a tensor beyond its storage", "one within it"))
}

/// The number that a tensor of one element holds.
fn scalar(tensor: &FlexTensor) -> Result<f64> {
    let one = tensor.layout().num_elements() == 1;
    let start = tensor.layout().start_offset();
    const ARGUMENT: &str = "temperature";
    match tensor.dtype() {
        DType::F64 if one => elements(ARGUMENT, tensor, start, 1).map(|x: &[f64]| x[0]),
        DType::F32 if one => elements(ARGUMENT, tensor, start, 1).map(|x: &[f32]| x[0].into()),
        DType::F16 if one => elements(ARGUMENT, tensor, start, 1).map(|x: &[f16]| x[0].into()),
        DType::BF16 if one => elements(ARGUMENT, tensor, start, 1).map(|x: &[bf16]| x[0].into()),
        dtype => {
            let value = format!("a tensor of shape {:?} and type {}", tensor.shape().as_slice(), dtype.name());
            Err(invalid(ARGUMENT, value, "one number, f64, f32, f16 or bf16"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Copies where it must and nowhere else.
    #[test]
    fn only_strides_within_rows_are_copied() {
        let values: Vec<f32> = (0..48).map(|i| i as f32).collect();
        let wide = tensor(values, [6, 8]);
        for (in_place, tensor) in [
            (true, wide.clone()),
            (true, wide.narrow(0, 2, 3)),
            (true, wide.narrow(1, 2, 5)),
            (true, wide.narrow(1, 3, 1)),
            (true, wide.narrow(0, 5, 1)),
            (false, wide.transpose(0, 1)),
            (false, wide.clone().with_layout(wide.layout().flip(&[0]))),
            (false, wide.clone().with_layout(wide.layout().flip(&[1]))),
        ] {
            let read = readable("query", &tensor).unwrap();
            let rows = embeddings("query", &read).unwrap();
            let storage = wide.bytes().as_ptr_range();
            let is_there = matches!(rows.data(), Data::F32(data) if storage.contains(&data.as_ptr().cast()));
            assert_eq!(is_there, in_place, "{:?}", tensor.layout());
            let want: Vec<f32> = tensor.clone().into_data().try_to_vec().unwrap();
            let got: Vec<f32> = (0..rows.rows()).flat_map(|i| rows.row_to_f64(i).unwrap()).map(|x| x as f32).collect();
            assert_eq!(got, want, "{:?}", tensor.layout());
        }
    }
}
