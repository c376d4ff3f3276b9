//! One step (forward and backward) on the first wgpu device: `cargo bench --features wgpu --bench wgpu`.
//!
//! `samtone_query/f16/4096x768` is a type and B × d, with the variant of the shaders that suits the device. The times are the
//! device's own timestamps where it has them, else those of the clock; a line in front says which. Without a device, a line says
//! so and nothing is measured. On software (llvmpipe), only small shapes run.

#[allow(dead_code)] // the CPU benches use the rest
mod inputs;
mod wgpu_runs;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use samtone::DType;
use samtone::wgpu::Engine;
use samtone::wgpu::wgpu::DeviceType;
use std::time::Duration;
use wgpu_runs::{Runs, plan};

/// B × d.
const SHAPES: [(usize, usize); 5] = [(512, 128), (512, 768), (2048, 256), (4096, 768), (8192, 768)];
const SOFTWARE_SHAPES: [(usize, usize); 2] = [(256, 64), (512, 128)];
const DTYPES: [DType; 2] = [DType::F32, DType::F16];

fn steps(c: &mut Criterion) {
    let engine = match Engine::first() {
        Ok(engine) => engine,
        Err(error) => return println!("nothing measured: {error}"),
    };
    let info = engine.device().adapter_info();
    let shapes: &[(usize, usize)] = if info.device_type == DeviceType::Cpu { &SOFTWARE_SHAPES } else { &SHAPES };
    let mut group = c.benchmark_group("samtone_query");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for (shape, dtype) in shapes.iter().flat_map(|shape| DTYPES.map(|dtype| (*shape, dtype))) {
        let (rows, dim) = shape;
        let plan = plan(&engine, rows, dim, dtype, None).expect("a plan for a valid batch");
        let runs = Runs::new(&engine, plan, shape, dtype).expect("memory for the batch");
        let clock = if runs.has_timestamps() { "timestamps of the device" } else { "the clock" };
        println!("{}, {}, by {clock}", info.name, runs.plan().variant());
        group.throughput(Throughput::Elements(runs.plan().flops() as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{dtype}/{rows}x{dim}")), |b| {
            b.iter_custom(|count| {
                let times = runs.times(count as usize).expect("steps that were measured before");
                times.iter().map(|time| time.device.unwrap_or(time.wall)).sum()
            });
        });
        runs.results().expect("embeddings that are not refused");
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
