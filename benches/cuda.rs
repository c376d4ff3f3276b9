//! One step (forward and backward) on the first CUDA device: `cargo bench --features cudarc --bench cuda`.
//!
//! `samtone_query/bf16/4096x768` is a type and B × d. The times are those between two CUDA events around the steps, which are
//! enqueued one after the other. Without a device, a line says so and nothing is measured.

#[allow(dead_code)] // the CPU benches use the rest
mod inputs;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use inputs::Towers;
use samtone::cuda::cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys};
use samtone::cuda::{Device, GradientSlices, Problem, Step};
use samtone::half::{bf16, f16};
use samtone::{Call, DType, Element, Loss};
use std::sync::Arc;
use std::time::Duration;

/// B × d.
const SHAPES: [(usize, usize); 5] = [(512, 768), (2048, 1024), (4096, 768), (8192, 768), (16384, 768)];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const TEMPERATURE: f64 = 0.01;
const SEED: u64 = 1;

fn steps(c: &mut Criterion) {
    if let Err(error) = samtone::cuda::available() {
        return println!("nothing measured: {error}");
    }
    let device = Device::first().expect("a device that is available");
    println!("{} {:?}", device.name(), device.compute_capability());
    let mut group = c.benchmark_group("samtone_query");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for (shape, dtype) in SHAPES.iter().flat_map(|shape| DTYPES.map(|dtype| (*shape, dtype))) {
        let measured = match dtype {
            DType::F16 => bench::<f16>(&mut group, &device, shape),
            DType::BF16 => bench::<bf16>(&mut group, &device, shape),
            DType::F32 | DType::F64 => bench::<f32>(&mut group, &device, shape),
        };
        measured.expect("a step that is neither refused nor short of memory");
    }
    group.finish();
}

fn bench<T: Element>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    device: &Device,
    (rows, dim): (usize, usize),
) -> anyhow::Result<()> {
    let stream = CudaContext::new(device.ordinal())?.new_stream()?;
    let towers = Towers::new(rows, dim, SEED).rounded::<T>();
    let copied = [&towers.query, &towers.passage].map(|x| stream.clone_htod(bytemuck::cast_slice::<T, u8>(x)));
    let [Ok(query), Ok(passage)] = &copied else { anyhow::bail!("no memory for the embeddings") };
    // SAFETY: any bytes are elements of these types, and the driver aligns what it allocates to more than four bytes.
    let views = [query, passage].map(|x| unsafe { x.transmute::<T>(rows * dim) });
    let [Some(query), Some(passage)] = &views else { anyhow::bail!("bytes that are not {rows} x {dim} elements") };
    let mut gradients = [stream.alloc_zeros::<f32>(rows * dim)?, stream.alloc_zeros::<f32>(rows * dim)?];
    let call = Call::new(Loss::samtone_query(), TEMPERATURE);
    let problem = Problem::new(call.pairs(rows, rows)?, T::DTYPE, dim)?;
    let mut step = Step::new(device, &stream, &problem)?;
    let flops = step.plan().flops();
    let mut time = |count: u64| -> anyhow::Result<Duration> {
        let start = event(&stream)?;
        for _ in 0..count {
            let [grad_query, grad_passage] = &mut gradients;
            step.loss_and_gradients(query, passage, GradientSlices::both(grad_query, grad_passage), 1.0)?;
        }
        let milliseconds = start.elapsed_ms(&event(&stream)?)?;
        step.results(query, passage)?;
        Ok(Duration::try_from_secs_f64(f64::from(milliseconds) * 1e-3)?)
    };
    time(1)?; // what would fail fails here
    group.throughput(Throughput::Elements(flops as u64));
    group.bench_function(BenchmarkId::from_parameter(format!("{}/{rows}x{dim}", T::DTYPE)), |b| {
        b.iter_custom(|count| time(count).expect("steps that ran before"));
    });
    Ok(())
}

fn event(stream: &Arc<CudaStream>) -> anyhow::Result<CudaEvent> {
    Ok(stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))?)
}

criterion_group!(benches, steps);
criterion_main!(benches);
