//! Time of one step (forward and backward) on the first CUDA device, without criterion, so that it is one binary that runs on a
//! machine without cargo:
//!
//!     bench_cuda [OPTION ...] [B,d ...]   default: 256,768 512,768 1024,768 2048,1024 8192,768
//!                                                          16384,768 32768,1024
//!
//!     --cosines kept|recomputed       for the gradient; otherwise what the plan takes, likewise below
//!     --kernels sm80|sm90a            of that architecture
//!     --tile small|large|cluster
//!     --workspace MIB                 the bound
//!     --loss NAME                     a preset; otherwise samtone_query
//!     --temperature T --margin M      otherwise 0.01, and the margin of the loss
//!     --prefixes 64,128,256           Matryoshka prefixes; those that are longer than d are left out
//!     --write FOLDER
//!     --quick
//!
//! bf16 embeddings, f32 gradients. Prints CSV: B, d, median milliseconds of 20 steps after 3, TFLOP/s
//! on the products counted once, MiB beyond inputs and gradients, loss; and up to B = 2048, where launches count, the median
//! milliseconds on the device from the end of one step to the end of the next among 200 that nobody waits for, first called, then
//! replayed from a CUDA graph; squares of cosines that are kept, of how many. Fails if 100 runs of a small batch, or its replays,
//! differ in any bit, when all shapes are done. With --quick, 10 for 100 and 20 for 200. With --write, FOLDER gets embeddings and
//! gradients as little-endian files for benches/peers/judge_files.py.

#[path = "inputs.rs"]
#[allow(dead_code)] // the CPU benches use the rest
mod inputs;

use anyhow::Context;
use inputs::Towers;
use samtone::cuda::cudarc::driver::sys::CUevent_flags;
use samtone::cuda::cudarc::driver::{CudaContext, CudaStream};
use samtone::cuda::{Architecture, Cosines, Device, GradientSlices, Problem, Slot, Step, Tile};
use samtone::half::bf16;
use samtone::{Call, DType, Loss};
use std::io::Write;
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

/// What the command line says.
struct Settings {
    call: Call,
    quick: bool,
    folder: Option<PathBuf>,
    cosines: Option<Cosines>,
    kernels: Option<String>,
    tile: Option<Tile>,
    prefixes: Vec<usize>,
    shapes: Vec<String>,
}

impl Settings {
    fn read(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut settings = Self {
            call: Call::new(Loss::samtone_query(), 0.01),
            quick: false,
            folder: None,
            cosines: None,
            kernels: None,
            tile: None,
            prefixes: Vec::new(),
            shapes: Vec::new(),
        };
        while let Some(argument) = arguments.next() {
            let Some(option) = argument.strip_prefix("--") else {
                settings.shapes.push(argument);
                continue;
            };
            if option == "quick" {
                settings.quick = true;
                continue;
            }
            let value = arguments.next().with_context(|| format!("{argument} needs a value"))?;
            match (option, value.as_str()) {
                ("write", folder) => settings.folder = Some(folder.into()),
                ("cosines", "kept") => settings.cosines = Some(Cosines::Kept),
                ("cosines", "recomputed") => settings.cosines = Some(Cosines::Recomputed),
                ("kernels", "sm80" | "sm90a") => settings.kernels = Some(value),
                ("tile", "small") => settings.tile = Some(Tile::Small),
                ("tile", "large") => settings.tile = Some(Tile::Large),
                ("tile", "cluster") => settings.tile = Some(Tile::Cluster),
                ("workspace", mib) => settings.call = settings.call.with_workspace_bytes(mib.parse::<usize>()? << 20),
                ("loss", name) => settings.call = settings.call.with_loss(Loss::by_name(name)?),
                ("temperature", tau) => settings.call = settings.call.with_temperature(tau.parse()?),
                ("prefixes", dims) => settings.prefixes = dims.split(',').map(str::parse).collect::<Result<_, _>>()?,
                ("margin", cosine) => settings.call = settings.call.with_margin(cosine.parse()?),
                _ => anyhow::bail!("no option {argument} {value}"),
            }
        }
        if settings.shapes.is_empty() {
            settings.shapes = SHAPES.iter().map(|s| s.to_string()).collect();
        }
        settings.call.check()?;
        Ok(settings)
    }

    /// The call for embeddings of `dim` entries.
    fn call(&self, dim: usize) -> Call {
        let prefixes: Vec<_> = self.prefixes.iter().copied().filter(|prefix| *prefix <= dim).collect();
        if prefixes.is_empty() { self.call.clone() } else { self.call.clone().with_prefixes(prefixes) }
    }

    fn apply<'a>(&self, mut problem: Problem<'a>, device: &Device) -> anyhow::Result<Problem<'a>> {
        match (self.kernels.as_deref(), device.architecture()) {
            (Some("sm80"), _) => problem = problem.with_architecture(Architecture::Sm80),
            (Some("sm90a"), Architecture::Sm80) => anyhow::bail!("{} has no kernels of 9.0", device.name()),
            _ => {}
        }
        if let Some(tile) = self.tile {
            problem = problem.with_tile(tile);
        }
        if let Some(cosines) = self.cosines {
            problem = problem.with_cosines(cosines);
        }
        Ok(problem)
    }
}

fn main() -> anyhow::Result<()> {
    let settings = Settings::read(std::env::args().skip(1))?;
    let [repeats, steps] = [REPEATS, ENQUEUED].map(|count| if settings.quick { count / QUICK } else { count });
    // An error where the reader has left, instead of a panic.
    let mut out = std::io::stdout();
    // Before the work.
    settings.folder.iter().try_for_each(std::fs::create_dir_all)?;
    let mut differing = Vec::new();
    samtone::cuda::available()?;
    let device = Device::first()?;
    let stream = CudaContext::new(device.ordinal())?.new_stream()?;
    // SAFETY: everything below is on one stream.
    unsafe { stream.context().disable_event_tracking() };
    eprintln!("{} {:?}", device.name(), device.compute_capability());
    writeln!(out, "rows,dim,milliseconds,tflops,extra_mib,loss,enqueued_milliseconds,graph_milliseconds,kept,squares")?;
    for shape in &settings.shapes {
        let (rows, dim) = shape.split_once(',').with_context(|| format!("`{shape}` is not B,d"))?;
        let (rows, dim) = (rows.parse::<usize>()?, dim.parse::<usize>()?);
        let towers = Towers::new(rows, dim, 1).rounded::<bf16>();
        let bits = |x: &[bf16]| x.iter().map(|v| v.to_bits()).collect::<Vec<u16>>();
        let mut copied = [stream.clone_htod(&bits(&towers.query))?, stream.clone_htod(&bits(&towers.passage))?];
        // SAFETY: bf16 is two bytes of any value, as u16 is.
        let views = copied.each_ref().map(|x| unsafe { x.transmute::<bf16>(rows * dim) });
        let [Some(query), Some(passage)] = &views else { anyhow::bail!("views of bf16") };
        let mut gradients = [stream.alloc_zeros::<f32>(rows * dim)?, stream.alloc_zeros::<f32>(rows * dim)?];
        let call = settings.call(dim);
        let problem = Problem::new(call.pairs(rows, rows)?, DType::BF16, dim)?;
        let problem = settings.apply(problem, &device)?;
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
        if let Some(folder) = &settings.folder {
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
        let ([kept, squares], loss) = (plan.kept_squares(), evaluation.loss);
        let milliseconds = median * 1e3;
        writeln!(
            out,
            "{rows},{dim},{milliseconds:.4},{tflops:.1},{mib:.1},{loss},{of_calls},{of_graph},{kept},{squares}"
        )?;
    }
    anyhow::ensure!(differing.is_empty(), "{}", differing.join("\n"));
    Ok(())
}
