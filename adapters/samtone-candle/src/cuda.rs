//! Calls on a CUDA device, on candle's own stream: enqueued, and waited for only if somebody wants to read results.

use crate::op::Computed;
use crate::temperature::Temperature;
use crate::view::{Rows, outside};
use crate::{invalid, refused};
use candle_core::backend::BackendStorage;
use candle_core::cuda::CudaDType;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, CudaView, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor};
use samtone::cuda::{Cosines, Device, DeviceBatch, GradientOutput, GradientSlices, Step};
use samtone::half::{bf16, f16};
use samtone::{Element, Evaluation, Pairs};
use std::sync::{Arc, Mutex, PoisonError};

/// What a call computes, apart from its embeddings.
pub(crate) struct Task<'a> {
    pub pairs: Pairs<'a>,
    pub temperature: Temperature<'a>,
    /// Which of ∂L/∂q, ∂L/∂p and the temperature's gradient.
    pub wanted: [bool; 3],
    /// Whether to wait for the evaluation.
    pub evaluate: bool,
}

/// Memory between calls, on one stream. A call takes it and puts it back, so that one at the same time makes its own.
pub(crate) type Shared = Mutex<Option<Step>>;

/// Both towers on the device, as [`readable`](crate::view::readable) gave them.
pub(crate) fn compute(
    task: &Task<'_>,
    [query, passage]: [(&CudaStorage, &Layout); 2],
    shared: &Shared,
) -> Result<(Option<Evaluation>, Computed)> {
    let [q, p] = [Rows::of(query.1)?, Rows::of(passage.1)?];
    if q.dim != p.dim {
        let allowed = format!("the dimension of the queries, {}", q.dim);
        return Err(invalid("passage", format!("embeddings of dimension {}", p.dim), allowed));
    }
    let [dtype, other] = [query, passage].map(|(storage, _)| storage.dtype());
    if dtype != other {
        let allowed = format!("the type of the queries, {}", dtype.as_str());
        return Err(invalid("passage", format!("of type {}", other.as_str()), allowed));
    }
    let [device, other] = [query, passage].map(|(storage, _)| &storage.device);
    if device.cuda_stream().cu_stream() != other.cuda_stream().cu_stream() {
        // Streams of different contexts, as candle's devices have them, do not wait for each other.
        return Err(invalid("passage", "on another stream of the device", "tensors of one candle device"));
    }
    let towers = [(query.0, q), (passage.0, p)];
    match dtype {
        DType::F32 => typed::<f32>(task, device, towers, shared),
        DType::F16 => typed::<f16>(task, device, towers, shared),
        DType::BF16 => typed::<bf16>(task, device, towers, shared),
        other => Err(invalid("query", format!("of type {}", other.as_str()), "f32, f16 or bf16")),
    }
}

fn typed<T: Element + CudaDType + DeviceRepr>(
    task: &Task<'_>,
    device: &CudaDevice,
    [query, passage]: [(&CudaStorage, Rows); 2],
    shared: &Shared,
) -> Result<(Option<Evaluation>, Computed)> {
    let dim = query.1.dim;
    let (q, p) = (view::<T>(query.0, &query.1)?, view::<T>(passage.0, &passage.1)?);
    let [rows, passages] = [task.pairs.rows(), task.pairs.passages()];
    let strides = [query.1.stride, passage.1.stride];
    let batch = DeviceBatch::with_row_strides(q, p, dim, strides, task.pairs).map_err(refused)?;
    let output = |wanted: bool| wanted.then_some(GradientOutput { dtype: samtone::DType::F32, row_stride: dim });
    let problem = batch
        .problem()
        .and_then(|problem| problem.with_gradients(output(task.wanted[0]), output(task.wanted[1])))
        .map_err(refused)?;
    let backward = task.wanted != [false; 3];
    // What the first pass keeps of cosines is for the gradient.
    let problem = if backward { problem } else { problem.with_cosines(Cosines::Recomputed) };

    let stream = device.cuda_stream();
    let mut step = match take(shared, &stream) {
        Some(mut step) => step.prepare(&problem).map(|()| step),
        None => Device::shared(stream.context().ordinal()).and_then(|device| Step::new(&device, &stream, &problem)),
    }
    .map_err(refused)?;
    let room = |wanted: bool, rows: usize| {
        // SAFETY: the backward call writes all of it before anything on this stream reads it, or fails and it is dropped.
        wanted.then(|| unsafe { device.alloc::<f32>(rows * dim) }).transpose()
    };
    let mut dq = room(task.wanted[0], rows)?;
    let mut dp = room(task.wanted[1], passages)?;
    if backward {
        let slices = GradientSlices {
            query: dq.as_mut().map(CudaSlice::as_view_mut),
            passage: dp.as_mut().map(CudaSlice::as_view_mut),
        };
        step.loss_and_gradients(batch.query(), batch.passage(), slices, 1.0).map_err(refused)?;
    } else {
        step.forward(batch.query(), batch.passage()).map_err(refused)?;
    }
    // Copies, because the next call has the step's memory.
    let loss = copy(device, &step.loss().map_err(refused)?)?.to_dtype(DType::F32)?;
    let temperature = match task.wanted[2] {
        true => {
            let both = step.temperature().map_err(refused)?;
            let at = usize::from(matches!(task.temperature, Temperature::LogBeta(_)));
            Some(copy(device, &both.try_slice(at..at + 1).ok_or_else(outside)?)?)
        }
        false => None,
    };
    let evaluation = task.evaluate.then(|| step.evaluation(batch.query(), batch.passage()));
    *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(step);
    let evaluation = evaluation.transpose().map_err(refused)?;
    let gradient = |slice: Option<CudaSlice<f32>>, rows| slice.map(|slice| tensor(device, slice, &[rows, dim]));
    let embeddings = [gradient(dq, rows), gradient(dp, passages)];
    Ok((evaluation, Computed { loss, embeddings, temperature }))
}

/// The step of an earlier call, unless it is of another stream.
fn take(shared: &Shared, stream: &Arc<CudaStream>) -> Option<Step> {
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    shared.take_if(|step| Arc::ptr_eq(step.stream(), stream))
}

fn view<'a, T: CudaDType>(storage: &'a CudaStorage, rows: &Rows) -> Result<CudaView<'a, T>> {
    storage.as_cuda_slice::<T>()?.try_slice(rows.range.clone()).ok_or_else(outside)
}

/// A scalar of its own.
fn copy(device: &CudaDevice, value: &CudaView<'_, f64>) -> Result<Tensor> {
    let copied = device.cuda_stream().clone_dtod(value).map_err(candle_core::Error::wrap)?;
    Ok(tensor(device, copied, &[]))
}

fn tensor<T: CudaDType>(device: &CudaDevice, slice: CudaSlice<T>, shape: &[usize]) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
