//! A call on buffers with guards, which lie before and behind every range, and between its rows.

use super::text;
use crate::support::problem::{Buffer, Outputs, Problem};
use samtone::half::{bf16, f16};
use samtone::wgpu::wgpu::{BufferUsages, CommandEncoder, CommandEncoderDescriptor};
use samtone::wgpu::{ALIGNMENT, BufferRange, Buffers, Capabilities, Engine, Plan, Slot, Step, wgpu};
use samtone::{DType, GradientOutput};
use std::ops::Range;
use std::sync::OnceLock;

/// What every byte holds that nobody wrote: NaN in every type.
pub const GUARD: u8 = 0xff;
/// Bytes of guards in front of a range and behind it.
const MARGIN: u64 = ALIGNMENT;

/// The device of all checks but those that break theirs.
pub fn engine() -> Result<Engine, String> {
    static ENGINE: OnceLock<Result<Engine, String>> = OnceLock::new();
    ENGINE.get_or_init(|| Engine::first().map_err(text)).clone()
}

/// A range with guards around it.
pub struct Memory {
    engine: Engine,
    pub buffer: wgpu::Buffer,
    pub offset: u64,
    pub bytes: u64,
}

impl Memory {
    pub fn new(engine: &Engine, bytes: u64, usage: BufferUsages) -> Self {
        let usage = usage | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let size = MARGIN + bytes.next_multiple_of(4) + MARGIN;
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        let buffer = engine.device().create_buffer(&descriptor);
        engine.queue().write_buffer(&buffer, 0, &vec![GUARD; size as usize]);
        Self { engine: engine.clone(), buffer, offset: MARGIN, bytes }
    }

    pub fn storage(engine: &Engine, bytes: u64) -> Self {
        Self::new(engine, bytes, BufferUsages::STORAGE)
    }

    pub fn range(&self) -> BufferRange<'_> {
        BufferRange { buffer: &self.buffer, offset: self.offset, bytes: self.bytes }
    }

    /// From the start of the range on.
    pub fn write(&self, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(4), GUARD);
        self.engine.queue().write_buffer(&self.buffer, self.offset, &bytes);
    }

    /// The range; an error if a guard around it has changed.
    pub fn read(&self) -> Result<Vec<u8>, String> {
        let all = self.engine.read(&self.buffer, 0..self.buffer.size()).map_err(text)?;
        let (start, end) = (self.offset as usize, (self.offset + self.bytes) as usize);
        let changed = all.iter().enumerate().position(|(k, b)| !(start..end).contains(&k) && *b != GUARD);
        match changed {
            Some(at) => Err(format!("byte {at} was written, outside {start}..{end}")),
            None => Ok(all[start..end].to_vec()),
        }
    }
}

/// Rows of a matrix as they lie in memory, guards between them.
pub fn rows_to_bytes(x: &[f64], dim: usize, stride: usize, dtype: DType) -> Vec<u8> {
    let size = dtype.bytes();
    let mut bytes = vec![GUARD; ((x.len() / dim - 1) * stride + dim) * size];
    let values = match Buffer::new(dtype, x) {
        Buffer::F32(x) => x.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>(),
        Buffer::F16(x) => x.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Buffer::BF16(x) => x.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Buffer::F64(_) => Vec::new(), // no GPU backend takes it
    };
    for (k, row) in values.chunks(dim * size).enumerate() {
        bytes[k * stride * size..][..row.len()].copy_from_slice(row);
    }
    bytes
}

/// The reverse; an error if a guard between the rows has changed.
pub fn rows_of_bytes(bytes: &[u8], rows: usize, dim: usize, output: GradientOutput) -> Result<Vec<f64>, String> {
    let (size, stride) = (output.dtype.bytes(), output.row_stride);
    let mut values = Vec::new();
    for row in 0..rows {
        let start = row * stride * size;
        for value in bytes[start..start + dim * size].chunks(size) {
            values.push(match output.dtype {
                DType::F16 => f64::from(f16::from_le_bytes([value[0], value[1]])),
                DType::BF16 => f64::from(bf16::from_le_bytes([value[0], value[1]])),
                _ => f64::from(f32::from_le_bytes([value[0], value[1], value[2], value[3]])),
            });
        }
        let end = bytes.len().min(start + stride * size);
        if bytes[start + dim * size..end].iter().any(|b| *b != GUARD) {
            return Err(format!("something was written behind row {row} of a gradient"));
        }
    }
    Ok(values)
}

/// How a problem is asked for.
#[derive(Clone)]
pub struct Spec {
    pub dtype: DType,
    pub strides: [usize; 2],
    pub outputs: [Option<GradientOutput>; 2],
    pub rows: Range<usize>,
    pub upstream: f64,
    pub device_upstream: bool,
    pub capabilities: Option<Capabilities>,
}

pub fn f32_output(row_stride: usize) -> Option<GradientOutput> {
    Some(GradientOutput { dtype: DType::F32, row_stride })
}

impl Spec {
    /// Contiguous f32 gradients of everything.
    pub fn new(problem: &Problem, dtype: DType) -> Self {
        Self {
            dtype,
            strides: [problem.dim; 2],
            outputs: [f32_output(problem.dim); 2],
            rows: 0..problem.rows,
            upstream: 1.0,
            device_upstream: false,
            capabilities: None,
        }
    }

    pub fn plan(&self, problem: &Problem, engine: &Engine) -> samtone::Result<Plan> {
        let [query, passage] = [&problem.query, &problem.passage].map(|x| Buffer::new(self.dtype, x));
        let batch = problem.batch(&query, &passage)?;
        let mut planned = samtone::Problem::new(*batch.pairs(), self.dtype, problem.dim)?
            .with_row_strides(self.strides[0], self.strides[1])?
            .with_gradients(self.outputs[0], self.outputs[1])?
            .with_rows(self.rows.clone())?
            .with_upstream(self.upstream)?;
        if self.device_upstream {
            planned = planned.with_device_upstream();
        }
        Plan::new(&planned, &self.capabilities.unwrap_or(*engine.capabilities()))
    }
}

/// The slots of the caller.
pub const CALLERS: [Slot; 5] = [Slot::Query, Slot::Passage, Slot::QueryGradient, Slot::PassageGradient, Slot::Upstream];

/// A step with the caller's buffers.
pub struct Call {
    pub spec: Spec,
    pub engine: Engine,
    pub step: Step,
    shape: (usize, usize, usize),
    memory: Vec<(Slot, Memory)>,
}

impl Call {
    pub fn new(problem: &Problem, spec: Spec) -> Result<Self, String> {
        Self::on(&engine()?, problem, spec)
    }

    pub fn on(engine: &Engine, problem: &Problem, spec: Spec) -> Result<Self, String> {
        let plan = spec.plan(problem, engine).map_err(text)?;
        let step = Step::new(engine, plan).map_err(text)?;
        let used = CALLERS.into_iter().filter(|slot| step.plan().slot_bytes(*slot) > 0);
        let memory = used.map(|slot| (slot, Memory::storage(engine, step.plan().slot_bytes(slot)))).collect();
        let shape = (problem.rows, problem.passages, problem.dim);
        let call = Self { spec, engine: engine.clone(), step, shape, memory };
        call.write_embeddings(problem);
        Ok(call)
    }

    pub fn memory(&self, slot: Slot) -> Option<&Memory> {
        self.memory.iter().find(|(other, _)| *other == slot).map(|(_, memory)| memory)
    }

    pub fn write_embeddings(&self, problem: &Problem) {
        for (k, (slot, x)) in [(Slot::Query, &problem.query), (Slot::Passage, &problem.passage)].into_iter().enumerate()
        {
            let bytes = rows_to_bytes(x, problem.dim, self.spec.strides[k], self.spec.dtype);
            self.memory(slot).into_iter().for_each(|memory| memory.write(&bytes));
        }
    }

    pub fn write_upstream(&self, upstream: f32) {
        self.memory(Slot::Upstream).into_iter().for_each(|memory| memory.write(&upstream.to_le_bytes()));
    }

    pub fn buffers(&self) -> Buffers<'_> {
        self.memory.iter().fold(Buffers::new(), |buffers, (slot, memory)| buffers.with(*slot, memory.range()))
    }

    /// Those that a backward call writes.
    pub fn gradients_only(&self) -> Buffers<'_> {
        let written = |slot| matches!(slot, Slot::QueryGradient | Slot::PassageGradient);
        let memory = self.memory.iter().filter(|(slot, _)| written(*slot));
        memory.fold(Buffers::new(), |buffers, (slot, memory)| buffers.with(*slot, memory.range()))
    }

    /// Records with `record` and submits.
    pub fn submit(&self, record: impl FnOnce(&mut CommandEncoder) -> samtone::Result<()>) -> Result<(), String> {
        let mut encoder = self.engine.device().create_command_encoder(&CommandEncoderDescriptor::default());
        record(&mut encoder).map_err(text)?;
        self.engine.queue().submit([encoder.finish()]);
        Ok(())
    }

    pub fn forward(&self) -> Result<(), String> {
        self.submit(|encoder| self.step.forward(encoder, &self.buffers()))
    }

    pub fn backward(&self) -> Result<(), String> {
        self.submit(|encoder| self.step.backward(encoder, &self.buffers()))
    }

    pub fn run(&self) -> Result<(), String> {
        self.submit(|encoder| {
            self.step.forward(encoder, &self.buffers())?;
            self.step.backward(encoder, &self.buffers())
        })
    }

    /// Gradients; those of a frozen tower are empty. Guards are checked.
    pub fn gradients(&self) -> Result<[Vec<f64>; 2], String> {
        let (_, n, d) = self.shape;
        let slots = [(Slot::QueryGradient, self.spec.rows.len()), (Slot::PassageGradient, n)];
        let mut gradients = [Vec::new(), Vec::new()];
        for (k, (slot, rows)) in slots.into_iter().enumerate() {
            if let (Some(output), Some(memory)) = (self.spec.outputs[k], self.memory(slot)) {
                gradients[k] = rows_of_bytes(&memory.read()?, rows, d, output)?;
            }
        }
        Ok(gradients)
    }

    pub fn outputs(&self) -> Result<Outputs, String> {
        let (evaluation, temperature) = self.step.results(&self.buffers()).map_err(text)?;
        let [grad_query, grad_passage] = self.gradients()?;
        for slot in [Slot::Query, Slot::Passage, Slot::Upstream] {
            self.memory(slot).map_or(Ok(()), |memory| memory.read().map(drop))?;
        }
        Ok(Outputs { evaluation, grad_query, grad_passage, temperature })
    }

    /// Everything at once.
    pub fn outputs_of(problem: &Problem, spec: Spec) -> Result<Outputs, String> {
        let call = Self::new(problem, spec)?;
        call.run()?;
        call.outputs()
    }
}
