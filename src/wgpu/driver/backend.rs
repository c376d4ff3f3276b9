//! The backend `wgpu` for batches in host memory. It copies them to the first device, and the results back.

use super::buffers::Buffers;
use super::engine::Engine;
use super::step::Step;
use crate::Problem;
use crate::backend::Backend;
use crate::batch::{Batch, Embeddings, EmbeddingsMut, copy_rows, for_each_dtype};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::output::{Evaluation, GradientBuffers, Gradients, LossAndGradients, TemperatureGradient, check_upstream};
use crate::problem::GradientOutput;
use crate::wgpu::{Capabilities, Plan, Slot};
use std::sync::{Mutex, PoisonError};

/// The backend `wgpu` for batches in host memory. It computes on the first device.
#[derive(Debug, Clone, Copy)]
pub struct Wgpu {
    name: &'static str,
    choose: Option<Choose>,
}

/// Says what is used of what a device allows; `None` if the device lacks what the backend is for.
type Choose = fn(Capabilities) -> Option<Capabilities>;

impl Wgpu {
    /// The backend with everything that the device has.
    pub const fn new() -> Self {
        Self { name: "wgpu", choose: None }
    }

    #[doc(hidden)]
    /// The backend with what `choose` leaves of the device's limits and features, under another name. It is for tests of variants and of
    /// smaller devices. If `choose` gives `None`, the backend is not available. It does not run another variant instead.
    pub const fn restricted(name: &'static str, choose: fn(Capabilities) -> Option<Capabilities>) -> Self {
        Self { name, choose: Some(choose) }
    }
}

impl Wgpu {
    fn capabilities(&self, engine: &Engine) -> Result<Capabilities> {
        let device = *engine.capabilities();
        let Some(choose) = self.choose else { return Ok(device) };
        choose(device).ok_or_else(|| Error::Unsupported {
            backend: self.name,
            what: "this device".into(),
            allowed: "devices with the features and limits of its variant".into(),
        })
    }
}

impl Default for Wgpu {
    fn default() -> Self {
        Self::new()
    }
}

/// The device of all calls. The first call finds it, and the others share it, so that shaders are compiled once. After it was lost, the
/// next call looks for one again. But if no device was found, no call looks again, because looking takes long.
static ENGINE: Mutex<Option<Result<Engine>>> = Mutex::new(None);

fn engine() -> Result<Engine> {
    ENGINE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Engine::first).clone()
}

/// Loss, metrics and gradients of a batch in host memory, in one call on the first device. [`mod@crate::reference`] has the formulas.
/// [`Step`] takes embeddings that are on a device.
///
/// q is M × d, p is N × d, in f32, f16 or bf16; gradients come back as f32, multiplied by `upstream`.
///
/// # Errors
/// [`Error::WgpuUnavailable`] if there is no device. [`Error::Wgpu`] if it was lost; the next call takes a new one. Otherwise as
/// [`cpu::loss_and_gradients`](crate::cpu::loss_and_gradients).
pub fn loss_and_gradients(batch: &Batch<'_>, upstream: f64) -> Result<LossAndGradients> {
    let backend = Wgpu::new();
    let compute = |buffers: GradientBuffers<'_>| backend.loss_and_gradients_into(batch, upstream, buffers);
    let (evaluation, gradients) = Gradients::computed(batch.rows(), batch, compute)?;
    Ok(LossAndGradients { evaluation, gradients })
}

impl Backend for Wgpu {
    fn name(&self) -> &'static str {
        self.name
    }

    fn dtypes(&self) -> &'static [DType] {
        &[DType::F32, DType::F16, DType::BF16]
    }

    fn available(&self) -> Result<()> {
        self.capabilities(&engine()?).map(drop)
    }

    fn loss_and_gradients_into(
        &self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        check_upstream(upstream)?;
        buffers.expect_shapes(batch.rows(), batch)?;
        let GradientBuffers { query, passage } = buffers;
        // Gradients come back as f32 and are rounded here. Gradients of 16 bits from the device would need even row strides.
        let output = |x: &Option<EmbeddingsMut<'_>>| {
            x.as_ref().map(|x| GradientOutput { dtype: DType::F32, row_stride: x.dim() })
        };
        let problem = Problem::new(*batch.pairs(), batch.dtype(), batch.dim())?
            .with_row_strides(batch.query().row_stride(), batch.passage().row_stride())?
            .with_gradients(output(&query), output(&passage))?
            .with_upstream(upstream)?;
        let engine = engine()?;
        let plan = Plan::new(&problem, &self.capabilities(&engine)?)?;
        let result = run(&engine, plan, batch, GradientBuffers { query, passage });
        if let Err(Error::Wgpu { .. }) = result {
            *ENGINE.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        result
    }
}

/// One call of `plan`, whose gradients are contiguous f32, on embeddings in host memory.
pub(super) fn run(
    engine: &Engine,
    plan: Plan,
    batch: &Batch<'_>,
    GradientBuffers { query, passage }: GradientBuffers<'_>,
) -> Result<(Evaluation, TemperatureGradient)> {
    let step = Step::new(engine, plan)?;

    let bytes = |slot| step.plan().slot_bytes(slot);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    let memory = |slot: Slot| engine.allocate(slot.name(), bytes(slot), usage);
    let slots = [Slot::Query, Slot::Passage, Slot::QueryGradient, Slot::PassageGradient];
    let [q, p, grad_q, grad_p] = slots.map(memory);
    let (q, p, grad_q, grad_p) = (q?, p?, grad_q?, grad_p?);
    upload(engine, &q, batch.query())?;
    upload(engine, &p, batch.passage())?;
    let callers = [&q, &p, &grad_q, &grad_p].into_iter().zip(slots);
    let callers = callers.fold(Buffers::new(), |buffers, (buffer, slot)| buffers.with(slot, buffer));
    let mut encoder = engine.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    step.forward(&mut encoder, &callers)?;
    step.backward(&mut encoder, &callers)?;
    engine.guarded("submit", None, || engine.queue().submit([encoder.finish()]))?;
    let results = step.results(&callers)?;
    // Both gradients must be on the host before one is written to the caller's buffer, so that an error changes neither.
    let download = |wanted: bool, slot, buffer| {
        if wanted { engine.read(buffer, 0..bytes(slot)) } else { Ok(Vec::new()) }
    };
    let of_query = download(query.is_some(), Slot::QueryGradient, &grad_q)?;
    let of_passage = download(passage.is_some(), Slot::PassageGradient, &grad_p)?;
    for (buffer, bytes) in [(query, of_query), (passage, of_passage)] {
        if let Some(buffer) = buffer {
            scatter(&bytes, buffer);
        }
    }
    Ok(results)
}

/// Copies rows as they lie in memory, together with what lies between them.
fn upload(engine: &Engine, buffer: &wgpu::Buffer, x: Embeddings<'_>) -> Result<()> {
    let used = (x.rows() - 1) * x.row_stride() + x.dim();
    let mut bytes = for_each_dtype!(Data, x.data(), data => bytemuck::cast_slice::<_, u8>(&data[..used]).to_vec());
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    engine.guarded("write_buffer", None, || engine.queue().write_buffer(buffer, 0, &bytes))
}

/// Copies contiguous rows of f32 into a buffer of any type and row stride.
fn scatter(bytes: &[u8], mut buffer: EmbeddingsMut<'_>) {
    fn values<T: Element>(bytes: &[u8]) -> impl Iterator<Item = T> {
        bytes.chunks_exact(4).map(|x| T::from_f64(f64::from(bytemuck::pod_read_unaligned::<f32>(x))))
    }
    let (dim, stride) = (buffer.dim(), buffer.row_stride());
    for_each_dtype!(DataMut, buffer.data_mut(), to => copy_rows(values(bytes), to, dim, stride));
}
