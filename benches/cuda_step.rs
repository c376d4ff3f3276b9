//! Time of one step (forward and backward) on the first CUDA device, without criterion, so that it is one binary that runs on a
//! machine without cargo:
//!
//!     bench_cuda [--quick] [--write FOLDER] [B,d ...]     default: 256,768 512,768 1024,768 2048,1024 8192,768
//!                                                                  16384,768 32768,1024
//!
//! bf16 embeddings, f32 gradients, samtone_query at τ = 0.01. Prints CSV: B, d, median milliseconds of 20 steps after 3, TFLOP/s
//! on the products counted once, MiB beyond inputs and gradients, loss; and up to B = 2048, where launches count, the median
//! milliseconds on the device from the end of one step to the end of the next among 200 that nobody waits for, first called, then
//! replayed from a CUDA graph. Fails if 100 runs of a small batch, or its replays, differ in any bit, when all shapes are done. With
//! --quick, 10 for 100 and 20 for 200. With --write, FOLDER gets embeddings and gradients as little-endian files for
//! benches/peers/judge_files.py.

#[path = "inputs.rs"]
#[allow(dead_code)] // the CPU benches use the rest
mod inputs;

use anyhow::Context;
use inputs::Towers;
use samtone::cuda::cudarc::driver::sys::CUevent_flags;
use samtone::cuda::cudarc::driver::{CudaContext, CudaStream};
use samtone::cuda::{Device, GradientSlices, Problem, Slot, Step};
use samtone::half::bf16;
use samtone::{DType, Loss, Options, Pairs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

const SHAPES: &[&str] = &["256,768", "512,768", "1024,768", "2048,1024", "8192,768", "16384,768", "32768,1024"];

/// Batches up to so many rows are computed 100 times, and every run must give the same bits; and timed as graphs.
const REPEATED_ROWS: usize = 2048;
const REPEATS: usize = 100;
/// Steps that are enqueued one after the other, after a tenth as many.
const ENQUEUED: usize = 200;
/// What both are divided by where it must be quick.
const QUICK: usize = 10;

/// The median time from the end of one step to the end of the next, in milliseconds of the device.
fn enqueued(
    stream: &Arc<CudaStream>,
    steps: usize,
    mut step: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<f32> {
    let timed = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let ends = (0..=steps).map(|_| timed()).collect::<Result<Vec<_>, _>>()?;
    (0..steps / 10).try_for_each(|_| step())?;
    for (k, end) in ends.iter().enumerate() {
        if k > 0 {
            step()?;
        }
        end.record(stream)?;
    }
    stream.synchronize()?;
    let mut times = ends.windows(2).map(|pair| pair[0].elapsed_ms(&pair[1])).collect::<Result<Vec<f32>, _>>()?;
    times.sort_by(f32::total_cmp);
    Ok(times[times.len() / 2])
}

fn main() -> anyhow::Result<()> {
    let mut shapes: Vec<String> = std::env::args().skip(1).collect();
    let (mut folder, mut differing) = (None, Vec::new());
    let quick = shapes.first().is_some_and(|argument| argument == "--quick");
    let [repeats, steps] = [REPEATS, ENQUEUED].map(|count| if quick { count / QUICK } else { count });
    shapes.drain(..usize::from(quick));
    if shapes.first().is_some_and(|argument| argument == "--write") {
        anyhow::ensure!(shapes.len() > 1, "--write needs a folder");
        folder = shapes.drain(..2).nth(1).map(PathBuf::from);
    }
    let shapes = if shapes.is_empty() { SHAPES.iter().map(|s| s.to_string()).collect() } else { shapes };
    samtone::cuda::available()?;
    let device = Device::first()?;
    let stream = CudaContext::new(device.ordinal())?.new_stream()?;
    // SAFETY: everything below is on one stream.
    unsafe { stream.context().disable_event_tracking() };
    eprintln!("{} {:?}", device.name(), device.compute_capability());
    println!("rows,dim,milliseconds,tflops,extra_mib,loss,enqueued_milliseconds,graph_milliseconds");
    for shape in shapes {
        let (rows, dim) = shape.split_once(',').with_context(|| format!("`{shape}` is not B,d"))?;
        let (rows, dim) = (rows.parse::<usize>()?, dim.parse::<usize>()?);
        let towers = Towers::new(rows, dim, 1).rounded::<bf16>();
        let bits = |x: &[bf16]| x.iter().map(|v| v.to_bits()).collect::<Vec<u16>>();
        let mut copied = [stream.clone_htod(&bits(&towers.query))?, stream.clone_htod(&bits(&towers.passage))?];
        // SAFETY: bf16 is two bytes of any value, as u16 is.
        let views = copied.each_ref().map(|x| unsafe { x.transmute::<bf16>(rows * dim) });
        let [Some(query), Some(passage)] = &views else { anyhow::bail!("views of bf16") };
        let mut gradients = [stream.alloc_zeros::<f32>(rows * dim)?, stream.alloc_zeros::<f32>(rows * dim)?];
        let (loss, pairs) = (Loss::samtone_query(), Pairs::new(rows, rows)?);
        let problem = Problem::new(&loss, &pairs, &Options::new(0.01)?, DType::BF16, dim)?;
        let mut step = Step::new(&device, &stream, &problem)?;
        let mut times = Vec::new();
        for _ in 0..23 {
            stream.synchronize()?;
            let start = Instant::now();
            let [grad_query, grad_passage] = &mut gradients;
            step.loss_and_gradients(query, passage, GradientSlices::both(grad_query, grad_passage), 1.0)?;
            stream.synchronize()?;
            times.push(start.elapsed().as_secs_f64());
        }
        let (evaluation, _) = step.results(query, passage)?;
        if let Some(folder) = &folder {
            std::fs::create_dir_all(folder)?;
            for (name, values) in [("query", &towers.query), ("passage", &towers.passage)] {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                std::fs::write(folder.join(format!("{rows}-{dim}-{name}.bf16")), bytes)?;
            }
            for (name, values) in ["query", "passage"].iter().zip(&gradients) {
                let bytes: Vec<u8> = stream.clone_dtoh(values)?.iter().flat_map(|v| v.to_le_bytes()).collect();
                std::fs::write(folder.join(format!("{rows}-{dim}-{name}_gradient.f32")), bytes)?;
            }
        }
        let (mut of_calls, mut of_graph) = (String::new(), String::new());
        if rows <= REPEATED_ROWS {
            let first = gradients.each_ref().map(|g| stream.clone_dtoh(g));
            let [Ok(first_query), Ok(first_passage)] = &first else { anyhow::bail!("gradients cannot be copied") };
            for run in 1..repeats {
                let [grad_query, grad_passage] = &mut gradients;
                step.loss_and_gradients(query, passage, GradientSlices::both(grad_query, grad_passage), 1.0)?;
                let same = stream.clone_dtoh(grad_query)? == *first_query
                    && stream.clone_dtoh(grad_passage)? == *first_passage
                    && step.results(query, passage)?.0 == evaluation;
                if !same {
                    differing.push(format!("run {run} of {shape} gives other bits than the first"));
                }
            }
            of_calls = enqueued(&stream, steps, || {
                let [grad_query, grad_passage] = &mut gradients;
                let slices = GradientSlices::both(grad_query, grad_passage);
                Ok(step.loss_and_gradients(query, passage, slices, 1.0)?)
            })
            .map(|ms| format!("{ms:.4}"))?;
            // SAFETY: as above.
            let views = copied.each_mut().map(|x| unsafe { x.transmute_mut::<bf16>(rows * dim) });
            let [Some(query), Some(passage)] = views else { anyhow::bail!("views of bf16") };
            let [grad_query, grad_passage] = &mut gradients;
            stream.memset_zeros(grad_query)?;
            stream.memset_zeros(grad_passage)?;
            let mut graph = step.capture(query, passage, GradientSlices::both(grad_query, grad_passage), 1.0)?;
            of_graph = enqueued(&stream, steps, || Ok(graph.launch()?)).map(|ms| format!("{ms:.4}"))?;
            let same = graph.evaluation()? == evaluation
                && stream.clone_dtoh(&gradients[0])? == *first_query
                && stream.clone_dtoh(&gradients[1])? == *first_passage;
            if !same {
                differing.push(format!("replays of {shape} give other bits than calls"));
            }
        }
        let mut times = times.split_off(3);
        times.sort_by(f64::total_cmp);
        let (median, plan) = (times[times.len() / 2], step.plan());
        let extra: u64 = [Slot::Workspace, Slot::State, Slot::Side].map(|s| plan.slot_bytes(s)).iter().sum();
        let (tflops, mib) = (plan.flops() / median / 1e12, extra as f64 / f64::from(1 << 20));
        println!("{rows},{dim},{:.4},{tflops:.1},{mib:.1},{},{of_calls},{of_graph}", median * 1e3, evaluation.loss);
    }
    anyhow::ensure!(differing.is_empty(), "{}", differing.join("\n"));
    Ok(())
}
