//! Loss and gradients on the CPU backend: `cargo bench --bench cpu`, a few minutes on two cores.
//!
//! `samtone_query/f32/4096x768` is a type and B × d; `presets/…` is every preset at one shape. The throughput is in
//! floating-point operations of the plan's matrix products (elements/s in criterion's words).

mod inputs;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use inputs::Towers;
use samtone::half::bf16;
use samtone::{Batch, Call, Loss, cpu};
use std::time::Duration;

/// B × d: both ends of each range, and the shape of the record in benches/record.
const SHAPES: [(usize, usize); 7] =
    [(512, 128), (512, 768), (512, 1024), (2048, 256), (2048, 1024), (4096, 768), (8192, 128)];
/// The shape at which every preset runs.
const PRESET_SHAPE: (usize, usize) = (1024, 256);
const TEMPERATURE: f64 = 0.01;
const SEED: u64 = 1;

fn shapes(c: &mut Criterion) {
    for (rows, dim) in SHAPES {
        let towers = Towers::new(rows, dim, SEED);
        let rounded = towers.rounded::<bf16>();
        let call = Call::new(Loss::samtone_query(), TEMPERATURE);
        let mut group = group(c, "samtone_query");
        for batch in [towers.batch(&call), rounded.batch(&call)] {
            let batch = batch.expect("towers of equal shape are a batch");
            bench(&mut group, format!("{}/{rows}x{dim}", batch.dtype()), &batch);
        }
        group.finish();
    }
}

fn presets(c: &mut Criterion) {
    let (rows, dim) = PRESET_SHAPE;
    let towers = Towers::new(rows, dim, SEED);
    let mut group = group(c, "presets");
    for (name, ..) in Loss::PRESETS {
        let loss = Loss::by_name(name).expect("a name of the table");
        // None has a margin, so that only the groups differ.
        let call = Call::new(loss, TEMPERATURE).with_margin(f64::INFINITY);
        let batch = towers.batch(&call).expect("towers of equal shape are a batch");
        bench(&mut group, format!("{name}/{rows}x{dim}"), &batch);
    }
    group.finish();
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    // Ten samples; a step lasts from milliseconds to a second, and varies little.
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, name: String, batch: &Batch<'_>) {
    let plan = cpu::Plan::new(batch).expect("a plan for a valid batch");
    group.throughput(Throughput::Elements(plan.flops() as u64));
    group.bench_function(BenchmarkId::from_parameter(name), |b| {
        b.iter(|| samtone::loss_and_gradients(batch, 1.0).expect("a valid batch"));
    });
}

criterion_group!(benches, shapes, presets);
criterion_main!(benches);
