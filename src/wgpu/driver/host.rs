//! Runs a plan on embeddings in host memory.

use super::buffers::Buffers;
use super::engine::Engine;
use super::step::Step;
use crate::batch::{Batch, Embeddings, EmbeddingsMut, copy_rows, for_each_dtype};
use crate::dtype::Element;
use crate::error::Result;
use crate::output::{Evaluation, GradientBuffers, TemperatureGradient};
use crate::wgpu::{Plan, Slot};

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
