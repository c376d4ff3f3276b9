//! One plan with all of its buffers on a wgpu device, and how long its steps take there.

use crate::inputs::Towers;
use anyhow::{Context, Result};
use samtone::half::{bf16, f16};
use samtone::wgpu::wgpu::{self, BufferUsages};
use samtone::wgpu::{Buffers, Engine, Plan, Slot, Variant};
use samtone::{Call, DType, Element, Evaluation, Loss, Problem};
use std::time::{Duration, Instant};

/// Most steps that are enqueued without waiting.
const MOST: usize = 32;
const TEMPERATURE: f64 = 0.01;
const SEED: u64 = 1;

/// samtone_query at τ = 0.01, gradients of both towers as f32.
pub struct Runs {
    engine: Engine,
    plan: Plan,
    slots: Vec<(Slot, wgpu::Buffer)>,
    /// Two timestamps for each step, and where they are resolved to; none where the device has no timestamps.
    timestamps: Option<(wgpu::QuerySet, wgpu::Buffer)>,
}

/// How long one step took.
#[derive(Clone, Copy)]
pub struct Time {
    /// Between the timestamps of its compute pass.
    pub device: Option<Duration>,
    /// Its share of what passed from recording to the end of all steps.
    pub wall: Duration,
}

/// The plan for so many pairs; the variant that suits the device if none is given.
pub fn plan(engine: &Engine, rows: usize, dim: usize, dtype: DType, variant: Option<Variant>) -> Result<Plan> {
    let call = Call::new(Loss::samtone_query(), TEMPERATURE);
    let problem = Problem::new(call.pairs(rows, rows)?, dtype, dim)?;
    Ok(match variant {
        Some(variant) => Plan::with_variant(&problem, engine.capabilities(), variant)?,
        None => Plan::new(&problem, engine.capabilities())?,
    })
}

/// Rows of both towers as they lie in memory.
fn embeddings(rows: usize, dim: usize, dtype: DType) -> [Vec<u8>; 2] {
    fn bytes<T: Element>(towers: &Towers<f32>) -> [Vec<u8>; 2] {
        let towers = towers.rounded::<T>();
        [towers.query, towers.passage].map(|x| bytemuck::cast_slice(&x).to_vec())
    }
    let towers = Towers::new(rows, dim, SEED);
    match dtype {
        DType::F16 => bytes::<f16>(&towers),
        DType::BF16 => bytes::<bf16>(&towers),
        DType::F32 | DType::F64 => bytes::<f32>(&towers),
    }
}

impl Runs {
    /// Compiles, allocates and uploads. `shape` and `dtype` are those of the plan.
    pub fn new(engine: &Engine, plan: Plan, (rows, dim): (usize, usize), dtype: DType) -> Result<Self> {
        engine.compile(&plan)?;
        let (device, queue) = (engine.device(), engine.queue());
        let buffer = |label, size: u64, usage| {
            let size = size.next_multiple_of(4);
            device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        };
        let mut slots = Vec::new();
        for slot in Slot::ALL.into_iter().filter(|slot| plan.slot_bytes(*slot) > 0) {
            let kind = if slot == Slot::Uniforms { BufferUsages::UNIFORM } else { BufferUsages::STORAGE };
            let usage = kind | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
            slots.push((slot, buffer(slot.name(), plan.slot_bytes(slot), usage)));
        }
        let [query, passage] = embeddings(rows, dim, dtype);
        for (slot, buffer) in &slots {
            let mut content = match slot {
                Slot::Uniforms => plan.uniforms().to_vec(),
                Slot::Side => plan.side_data().to_vec(),
                Slot::Query => query.clone(),
                Slot::Passage => passage.clone(),
                _ => continue,
            };
            content.resize(content.len().next_multiple_of(4), 0);
            queue.write_buffer(buffer, 0, &content);
        }
        let timestamps = device.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| {
            let count = 2 * MOST as u32;
            let (label, ty) = (Some("timestamps"), wgpu::QueryType::Timestamp);
            let queries = device.create_query_set(&wgpu::QuerySetDescriptor { label, ty, count });
            let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
            (queries, buffer("timestamps", 8 * u64::from(count), usage))
        });
        Ok(Self { engine: engine.clone(), plan, slots, timestamps })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Whether [`Time::device`] is there.
    pub fn has_timestamps(&self) -> bool {
        self.timestamps.is_some()
    }

    /// Bytes of the plan's own buffers.
    #[allow(dead_code)] // the criterion bench does not say it
    pub fn own_bytes(&self) -> u64 {
        Slot::ALL.iter().filter(|slot| !slot.is_callers()).map(|slot| self.plan.slot_bytes(*slot)).sum()
    }

    /// `count` steps, one compute pass and one submission each, one after the other.
    pub fn times(&self, count: usize) -> Result<Vec<Time>> {
        let mut times = Vec::with_capacity(count);
        while times.len() < count {
            times.extend(self.enqueued(MOST.min(count - times.len()))?);
        }
        Ok(times)
    }

    fn enqueued(&self, count: usize) -> Result<Vec<Time>> {
        let (device, queue) = (self.engine.device(), self.engine.queue());
        let buffers = self.slots.iter().fold(Buffers::new(), |all, (slot, buffer)| all.with(*slot, buffer));
        let start = Instant::now();
        for k in 0..count as u32 {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let writes = self.timestamps.as_ref().map(|(query_set, _)| wgpu::ComputePassTimestampWrites {
                query_set,
                beginning_of_pass_write_index: Some(2 * k),
                end_of_pass_write_index: Some(2 * k + 1),
            });
            let step = self.plan.forward().chain(self.plan.backward());
            // SAFETY: the slots hold what the plan says, and nothing but its dispatches writes to them.
            unsafe { self.engine.encode(&self.plan, step, &buffers, &mut encoder, writes) }?;
            queue.submit([encoder.finish()]);
        }
        device.poll(wgpu::PollType::wait_indefinitely())?;
        let wall = start.elapsed() / count as u32;
        let Some((queries, resolved)) = &self.timestamps else {
            return Ok(vec![Time { device: None, wall }; count]);
        };
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.resolve_query_set(queries, 0..2 * count as u32, resolved, 0);
        queue.submit([encoder.finish()]);
        let bytes = self.engine.read(resolved, 0..16 * count as u64)?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        let period = f64::from(queue.get_timestamp_period());
        let device = |pair: &[u64]| Duration::from_secs_f64(pair[1].saturating_sub(pair[0]) as f64 * period * 1e-9);
        Ok(ticks.chunks_exact(2).map(|pair| Time { device: Some(device(pair)), wall }).collect())
    }

    fn bytes(&self, slot: Slot) -> Result<Vec<u8>> {
        let (_, buffer) = self.slots.iter().find(|(s, _)| *s == slot).context("a slot that the plan does not use")?;
        Ok(self.engine.read(buffer, 0..self.plan.slot_bytes(slot))?)
    }

    /// Loss and metrics of the last step, and its gradients as bytes.
    pub fn results(&self) -> Result<(Evaluation, [Vec<u8>; 2])> {
        let state = self.bytes(Slot::State)?;
        if let Some(refusal) = self.plan.refusal(&state)? {
            anyhow::bail!("refused: {refusal:?}");
        }
        let gradients = [self.bytes(Slot::QueryGradient)?, self.bytes(Slot::PassageGradient)?];
        Ok((self.plan.evaluation(&state)?, gradients))
    }
}
