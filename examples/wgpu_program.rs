//! A training loop that never leaves the device: the caller's own wgpu program, with samtone's loss between its two shaders.
//!
//!     cargo run --release --features wgpu --example wgpu_program
//!
//! Two linear encoders learn which passages belong to which queries. A step is one command encoder and one submission, and nothing
//! is read back between steps:
//!
//! ```text
//! features ─ encode (here) ─→ embeddings ─ forward, backward (samtone) ─→ gradients ─ update (here) ─→ weights
//!                                               └ loss: copied to its place in a history, read once at the end
//! ```
//!
//! Then the last step is compared with the definition in f64. Exit code: 0 if it agrees and the loss fell, 1 if not, 2 without device.

use anyhow::Context;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use samtone::wgpu::wgpu::util::DeviceExt;
use samtone::wgpu::wgpu::{self, BufferUsages};
use samtone::wgpu::{BufferRange, Buffers, Engine, Plan, Slot, Step};
use samtone::{Batch, Call, DType, Embeddings, Loss, Problem, reference};
use std::io::{self, Write};
use std::process::ExitCode;

const ROWS: usize = 128; // of a batch
const DIM: usize = 64; // a workgroup of the shaders below
/// A text has a word in each of so many places, each of a vocabulary of its own.
const PLACES: usize = 4;
const WORDS: usize = 16;
const BATCHES: usize = 8;
const STEPS: usize = 160;
const LEARNING_RATE: f32 = 1.0;
const TEMPERATURE: f64 = 0.1;
/// That of the f32 gradients of every backend, relative and in the Frobenius norm.
const TOLERANCE: f64 = 3e-5;

/// The caller's shaders. Rows 0 … ROWS are queries, the others passages: both towers lie in one buffer, one after the other.
const SHADERS: &str = "
@group(0) @binding(0) var<storage, read> features: array<u32>; // PLACES rows of `weights` for each text
@group(0) @binding(1) var<storage, read_write> weights: array<f32>;
@group(0) @binding(2) var<storage, read_write> embeddings: array<f32>;

// An embedding is the sum of the weights of its words.
@compute @workgroup_size(64)
fn encode(@builtin(global_invocation_id) id: vec3<u32>) {
    var sum = 0.0;
    for (var place = 0u; place < PLACES; place += 1u) {
        sum += weights[features[id.y * PLACES + place] * DIM + id.x];
    }
    embeddings[id.y * DIM + id.x] = sum;
}

@group(0) @binding(3) var<storage, read> gradients: array<f32>;

// Gradient descent. A weight's gradient is the sum over the texts that have its word, in their order: no atomics, so every run
// gives the same bits.
@compute @workgroup_size(64)
fn update(@builtin(global_invocation_id) id: vec3<u32>) {
    var sum = 0.0;
    for (var k = 0u; k < TEXTS * PLACES; k += 1u) {
        if features[k] == id.y {
            sum += gradients[k / PLACES * DIM + id.x];
        }
    }
    weights[id.y * DIM + id.x] -= LEARNING_RATE * sum;
}";

/// Words of the texts of every batch: its queries, then its passages, which have words of their own. A passage has the
/// counterparts of its query's words, but for one in ten.
fn features(source: &mut ChaCha8Rng) -> Vec<u32> {
    let word = |text_side: usize, place: usize, word: usize| ((text_side * PLACES + place) * WORDS + word) as u32;
    let mut features = Vec::new();
    for _ in 0..BATCHES {
        let mut passages = Vec::new();
        for k in 0..ROWS * PLACES {
            let (place, said) = (k % PLACES, source.random_range(0..WORDS));
            let counterpart = if source.random_range(0..10) == 0 { source.random_range(0..WORDS) } else { said };
            features.push(word(0, place, said));
            passages.push(word(1, place, (5 * counterpart + 3) % WORDS)); // which is which has to be learnt
        }
        features.extend(passages);
    }
    features
}

/// The device of this program: samtone takes it as it is, and uses what it was asked for.
fn device() -> anyhow::Result<(wgpu::Device, wgpu::Queue)> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle().with_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let info = adapter.get_info();
    writeln!(io::stdout(), "{} ({:?}, {} {})", info.name, info.backend, info.driver, info.driver_info)?;
    let descriptor = wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() };
    Ok(pollster::block_on(adapter.request_device(&descriptor))?)
}

/// This program's pipelines.
struct Program {
    device: wgpu::Device,
    encode: wgpu::ComputePipeline,
    update: wgpu::ComputePipeline,
}

impl Program {
    fn new(device: &wgpu::Device) -> Self {
        let constants = format!(
            "const DIM = {DIM}u; const PLACES = {PLACES}u; const TEXTS = {}u; const LEARNING_RATE = {LEARNING_RATE:?};\n",
            2 * ROWS
        );
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("the caller's shaders"),
            source: wgpu::ShaderSource::Wgsl((constants + SHADERS).into()),
        });
        let pipeline = |entry_point: &'static str| {
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(entry_point),
                layout: None,
                module: &module,
                entry_point: Some(entry_point),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            })
        };
        Self { device: device.clone(), encode: pipeline("encode"), update: pipeline("update") }
    }

    /// An invocation for each column of so many rows.
    fn record(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        pipeline: &wgpu::ComputePipeline,
        bindings: &[(u32, wgpu::BufferBinding<'_>)],
        rows: usize,
    ) {
        let resource = wgpu::BindingResource::Buffer;
        let entries = bindings
            .iter()
            .map(|(binding, range)| wgpu::BindGroupEntry { binding: *binding, resource: resource(range.clone()) });
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries.collect::<Vec<_>>(),
        });
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups((DIM / 64) as u32, rows as u32, 1);
    }
}

/// Whether the loss fell and the gradients are right.
fn train() -> anyhow::Result<bool> {
    let (device, queue) = device()?;
    let program = Program::new(&device);

    let mut source = ChaCha8Rng::seed_from_u64(1);
    let features = features(&mut source);
    let vocabulary = 2 * PLACES * WORDS;
    let weights: Vec<f32> = (0..vocabulary * DIM).map(|_| source.random_range(-0.5..0.5)).collect();
    let filled = |label, contents: &[u8]| {
        let usage = BufferUsages::STORAGE;
        device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: Some(label), contents, usage })
    };
    let (features, weights) =
        (filled("features", bytemuck::cast_slice(&features)), filled("weights", bytemuck::cast_slice(&weights)));
    let empty = |label, size: usize, usage| {
        let (size, mapped_at_creation) = (size as u64, false);
        device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation })
    };
    let tower_bytes = ROWS * DIM * 4;
    let embeddings = empty("embeddings", 2 * tower_bytes, BufferUsages::STORAGE | BufferUsages::COPY_SRC);
    let gradients = empty("gradients", 2 * tower_bytes, BufferUsages::STORAGE | BufferUsages::COPY_SRC);
    let history = empty("losses", STEPS * 4, BufferUsages::COPY_DST | BufferUsages::COPY_SRC);

    // samtone: what to compute, on which device, on which ranges of the caller's buffers.
    let engine = Engine::new(&device, &queue);
    let call = Call::new(Loss::samtone_query(), TEMPERATURE);
    let plan = Plan::new(&Problem::new(call.pairs(ROWS, ROWS)?, DType::F32, DIM)?, engine.capabilities())?;
    let step = Step::new(&engine, plan)?;
    writeln!(io::stdout(), "{}", step.plan().variant())?;
    let tower = |buffer, k| BufferRange { buffer, offset: (k * tower_bytes) as u64, bytes: tower_bytes as u64 };
    let buffers = Buffers::new()
        .with(Slot::Query, tower(&embeddings, 0))
        .with(Slot::Passage, tower(&embeddings, 1))
        .with(Slot::QueryGradient, tower(&gradients, 0))
        .with(Slot::PassageGradient, tower(&gradients, 1));
    let state = step.state().context("a step has a state")?;

    for k in 0..STEPS {
        let batch_bytes = (2 * ROWS * PLACES * 4) as u64;
        let words = wgpu::BufferBinding {
            buffer: &features,
            offset: (k % BATCHES) as u64 * batch_bytes,
            size: std::num::NonZeroU64::new(batch_bytes),
        };
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let bindings =
            [(0, words.clone()), (1, weights.as_entire_buffer_binding()), (2, embeddings.as_entire_buffer_binding())];
        program.record(&mut encoder, &program.encode, &bindings, 2 * ROWS);
        step.forward(&mut encoder, &buffers)?;
        step.backward(&mut encoder, &buffers)?;
        let bindings = [(0, words), (1, weights.as_entire_buffer_binding()), (3, gradients.as_entire_buffer_binding())];
        program.record(&mut encoder, &program.update, &bindings, vocabulary);
        // The loss is the first f32 of the results.
        encoder.copy_buffer_to_buffer(state, 256, &history, (k * 4) as u64, 4);
        queue.submit([encoder.finish()]);
    }

    // Only now does the host look.
    let floats = |buffer: &wgpu::Buffer| -> anyhow::Result<Vec<f32>> {
        Ok(bytemuck::pod_collect_to_vec(&engine.read(buffer, 0..buffer.size())?))
    };
    let losses = floats(&history)?;
    for (k, loss) in losses.iter().enumerate().filter(|(k, _)| k % 20 == 0 || k + 1 == STEPS) {
        writeln!(io::stdout(), "step {k:>3}: loss {loss:.4}")?;
    }
    let (evaluation, _) = step.results(&buffers)?;
    writeln!(io::stdout(), "P@1 of the last batch {:.2}", evaluation.query_to_passage.precision_at_1)?;

    // The last step against the definition: its embeddings and gradients are still in their buffers.
    let (x, computed) = (floats(&embeddings)?, floats(&gradients)?);
    let (query, passage) = x.split_at(ROWS * DIM);
    let batch = Batch::new(&call, Embeddings::new(query, ROWS, DIM)?, Embeddings::new(passage, ROWS, DIM)?)?;
    let exact = reference::loss_and_gradients(&batch, 1.0)?;
    let (of_query, of_passage) = computed.split_at(ROWS * DIM);
    let loss_error = (evaluation.loss - exact.evaluation.loss).abs() / exact.evaluation.loss;
    let errors = [loss_error, distance(of_query, &exact.grad_query), distance(of_passage, &exact.grad_passage)];
    let [of_loss, of_query, of_passage] = errors;
    writeln!(io::stdout(), "errors against f64: loss {of_loss:.1e}, gradients {of_query:.1e} and {of_passage:.1e}")?;
    Ok(losses[STEPS - 1] < 0.5 * losses[0] && errors.iter().all(|error| *error < TOLERANCE)) // NaN is not below
}

/// ‖x − y‖ / ‖y‖.
fn distance(x: &[f32], y: &[f64]) -> f64 {
    let difference = x.iter().zip(y).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum::<f64>();
    (difference / y.iter().map(|y| y * y).sum::<f64>()).sqrt()
}

fn main() -> ExitCode {
    match train() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("the loss did not fall, or the gradients are beyond {TOLERANCE:e}");
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
