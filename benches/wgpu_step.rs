//! Time of one step (forward and backward) on the first wgpu device, by its own timestamps where it has them, without criterion,
//! so that it is one binary that runs on a machine without cargo:
//!
//!     bench_wgpu [B,d ...]       default: 512,128 512,768 2048,1024 8192,768 16384,768; on software only the first
//!
//! samtone_query at τ = 0.01, f32 gradients, for each type and each variant of the shaders that the device allows. Prints CSV:
//! B, d, type, variant, median milliseconds of 20 steps after 3 by timestamps (empty without) and by the clock, TFLOP/s on the
//! products counted once, milliseconds to compile every shader anew, milliseconds of the first step, for which a driver may keep
//! part of the compilation, MiB beyond inputs and gradients, loss. Fails if runs of a batch of at most 2048 pairs (100; 5 on
//! software) differ in any bit.

#[path = "inputs.rs"]
#[allow(dead_code)] // the CPU benches use the rest
mod inputs;
mod wgpu_runs;

use anyhow::Context;
use samtone::DType;
use samtone::wgpu::wgpu::DeviceType;
use samtone::wgpu::{Engine, Variant};
use std::io::Write;
use std::time::{Duration, Instant};
use wgpu_runs::{Runs, plan};

const SHAPES: &[&str] = &["512,128", "512,768", "2048,1024", "8192,768", "16384,768"];
const SOFTWARE_SHAPES: &[&str] = &["512,128"];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const WARM_UP: usize = 3;
const MEASURED: usize = 20;
/// Batches up to so many rows are computed again and again, and every run must give the same bits.
const REPEATED_ROWS: usize = 2048;

fn main() -> anyhow::Result<()> {
    // An error where the reader has left, instead of a panic.
    let mut out = std::io::stdout();
    let start = Instant::now();
    let engine = Engine::first()?;
    let started = start.elapsed();
    let info = engine.device().adapter_info();
    let software = info.device_type == DeviceType::Cpu;
    eprintln!(
        "{} ({:?}, {:?}), driver {} {}",
        info.name, info.device_type, info.backend, info.driver, info.driver_info
    );
    eprintln!("first device after {:.1} ms; {:?}", milliseconds(started), engine.capabilities());
    let shapes: Vec<String> = std::env::args().skip(1).collect();
    let default = if software { SOFTWARE_SHAPES } else { SHAPES };
    let shapes = if shapes.is_empty() { default.iter().map(|s| s.to_string()).collect() } else { shapes };
    writeln!(out, "rows,dim,dtype,variant,device_ms,wall_ms,tflops,compile_ms,first_ms,extra_mib,loss")?;
    for shape in shapes {
        let (rows, dim) = shape.split_once(',').with_context(|| format!("`{shape}` is not B,d"))?;
        let shape = (rows.parse::<usize>()?, dim.parse::<usize>()?);
        for dtype in DTYPES {
            for variant in variants(&engine, dtype) {
                // What one engine has compiled, another has not.
                let engine = Engine::new(engine.device(), engine.queue());
                measure(&engine, shape, dtype, variant, if software { 5 } else { 100 })
                    .with_context(|| format!("{},{} {dtype}, {variant}", shape.0, shape.1))?;
            }
        }
    }
    Ok(())
}

/// The baseline, each feature alone, and what the device would get; those that it allows.
fn variants(engine: &Engine, dtype: DType) -> Vec<Variant> {
    let baseline = Variant::default();
    let candidates = [
        baseline,
        Variant { large_tiles: true, ..baseline },
        Variant { subgroups: true, ..baseline },
        Variant { f16: true, ..baseline },
        engine.capabilities().variant(dtype),
    ];
    let mut variants = Vec::new();
    for variant in candidates {
        let of_type = dtype.bytes() == 2 || !variant.f16;
        if of_type && engine.capabilities().allow(variant) && !variants.contains(&variant) {
            variants.push(variant);
        }
    }
    variants
}

fn measure(
    engine: &Engine,
    shape: (usize, usize),
    dtype: DType,
    variant: Variant,
    repetitions: usize,
) -> anyhow::Result<()> {
    let (rows, dim) = shape;
    let plan = plan(engine, rows, dim, dtype, Some(variant))?;
    let start = Instant::now();
    engine.compile(&plan)?;
    let compiled = milliseconds(start.elapsed());
    let runs = Runs::new(engine, plan, shape, dtype)?;
    let start = Instant::now();
    runs.times(1)?;
    let first = milliseconds(start.elapsed());
    runs.times(WARM_UP - 1)?;
    let times = runs.times(MEASURED)?;
    let (evaluation, gradients) = runs.results()?;
    if rows <= REPEATED_ROWS {
        for run in 1..repetitions {
            runs.times(1)?;
            anyhow::ensure!(runs.results()? == (evaluation.clone(), gradients.clone()), "run {run} gives other bits");
        }
    }
    let wall = median(times.iter().map(|time| time.wall));
    let device = runs.has_timestamps().then(|| median(times.iter().filter_map(|time| time.device)));
    let shown = device.map(|time| format!("{:.4}", milliseconds(time))).unwrap_or_default();
    writeln!(
        std::io::stdout(),
        "{rows},{dim},{dtype},{},{shown},{:.4},{:.4},{compiled:.1},{first:.1},{:.1},{}",
        variant.to_string().replace(", ", "; "),
        milliseconds(wall),
        runs.plan().flops() / device.unwrap_or(wall).as_secs_f64() / 1e12,
        runs.own_bytes() as f64 / f64::from(1 << 20),
        evaluation.loss,
    )?;
    Ok(())
}

fn median(times: impl Iterator<Item = Duration>) -> Duration {
    let mut times: Vec<_> = times.collect();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
