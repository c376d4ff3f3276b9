//! One configuration, timed: `bench_step --batch 4096 --dim 768 --products` prints JSON.
//!
//! `--serve` keeps the process for a driver that rotates engines: it prints a line with the plan, then answers each line
//! `samtone`, `products`, `plain` or `calls` on standard input with the milliseconds of a step, until the input ends.

mod allocations;
mod inputs;
mod products;

use allocations::Counting;
use clap::{Parser, ValueEnum};
use inputs::Towers;
use products::{Products, Schedule};
use samtone::half::{bf16, f16};
use samtone::{Batch, Call, Data, Element, EmbeddingsMut, GradientBuffers, Loss, LossAndGradients, cpu};
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

#[global_allocator]
static ALLOCATIONS: Counting = Counting::new();

type AnyError = Box<dyn std::error::Error>;

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

/// Times loss and gradients of one batch of seeded embeddings.
#[derive(Parser)]
struct Arguments {
    /// Rows of both towers, B.
    #[arg(long, default_value_t = 4096)]
    batch: usize,
    /// Embedding dimension, d.
    #[arg(long, default_value_t = 768)]
    dim: usize,
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Type,
    #[arg(long, default_value = "samtone_query")]
    preset: String,
    #[arg(long, default_value_t = 0.01)]
    temperature: f64,
    /// Matryoshka prefixes, such as 64,128,256. Then also times, in turns, a call without prefixes, and a call for each prefix.
    #[arg(long, value_delimiter = ',')]
    prefixes: Vec<usize>,
    /// Bound on the workspace in MiB; the default is the crate's.
    #[arg(long)]
    workspace_mib: Option<usize>,
    /// Threads; all cores by default.
    #[arg(long)]
    threads: Option<usize>,
    /// Timed runs after one that is not.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// A timed run repeats short steps until it lasts this long, and reports the mean.
    #[arg(long, default_value_t = 100.0)]
    least_ms: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also times the bare matrix products of the same number of operations, in turns.
    #[arg(long)]
    products: bool,
    /// Writes query.f32, passage.f32 (the inputs, widened) and query_gradient.f32, passage_gradient.f32 into this folder:
    /// row-major little-endian f32.
    #[arg(long)]
    write: Option<PathBuf>,
    #[arg(long, conflicts_with_all = ["products", "repeats"])]
    serve: bool,
}

fn main() -> Result<(), AnyError> {
    let arguments = Arguments::parse();
    let threads = arguments.threads.unwrap_or(0);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    if arguments.batch == 0 || arguments.dim == 0 || arguments.repeats == 0 {
        return Err("--batch, --dim and --repeats must be at least 1".into());
    }
    let towers = Towers::new(arguments.batch, arguments.dim, arguments.seed);
    let mut call = Call::new(Loss::by_name(&arguments.preset)?, arguments.temperature);
    if let Some(mib) = arguments.workspace_mib {
        call = call.with_workspace_bytes(mib << 20);
    }
    let plain = call.clone();
    if !arguments.prefixes.is_empty() {
        call = call.with_prefixes(arguments.prefixes.clone());
    }
    match arguments.dtype {
        Type::F32 => run(&arguments, [&call, &plain], &towers, &towers),
        Type::F16 => run(&arguments, [&call, &plain], &towers.rounded::<f16>(), &towers),
        Type::Bf16 => run(&arguments, [&call, &plain], &towers.rounded::<bf16>(), &towers),
    }
}

fn run<T: Element>(
    arguments: &Arguments,
    [call, plain]: [&Call; 2],
    rounded: &Towers<T>,
    towers: &Towers<f32>,
) -> Result<(), AnyError>
where
    for<'a> &'a [T]: Into<Data<'a>>,
{
    let separate = arguments.prefixes.iter().map(|&dim| rounded.prefix(plain, dim)).collect::<Result<Vec<_>, _>>()?;
    let (batch, plain) = (rounded.batch(call)?, [rounded.batch(plain)?]);
    Session::new(arguments, &batch, [&plain, &separate], towers).run()
}

/// One batch, ready to be timed.
struct Session<'a> {
    arguments: &'a Arguments,
    batch: &'a Batch<'a>,
    /// The batch without prefixes, and one for each prefix.
    others: [&'a [Batch<'a>]; 2],
    towers: &'a Towers<f32>,
    /// Products and their fastest schedule; made when first asked for, so that they never weigh on the step's memory.
    products: Option<(Products<'a>, Schedule)>,
    steps: usize,
    /// What a trainer keeps between steps: the library's memory and its own gradients.
    workspace: cpu::Workspace,
    gradients: [Vec<f32>; 2],
}

impl<'a> Session<'a> {
    fn new(
        arguments: &'a Arguments,
        batch: &'a Batch<'a>,
        others: [&'a [Batch<'a>]; 2],
        towers: &'a Towers<f32>,
    ) -> Self {
        let gradients = [batch.rows(), batch.passages()].map(|rows| vec![0.0; rows * batch.dim()]);
        let workspace = cpu::Workspace::new();
        Self { arguments, batch, others, towers, products: None, steps: 1, workspace, gradients }
    }

    fn run(mut self) -> Result<(), AnyError> {
        let plan = cpu::Plan::new(self.batch)?;
        let started = Instant::now();
        let (first, peak) = ALLOCATIONS.peak_during(|| self.step());
        let first = first?;
        self.steps = steps_for(self.arguments.least_ms, milliseconds(started));
        if let Some(folder) = &self.arguments.write {
            self.write(folder, &first)?;
        }
        let mut report = json!({
            "loss": first.evaluation.loss,
            "peak_bytes": peak,
            "workspace_bound_bytes": self.batch.call().workspace_bytes().unwrap_or(cpu::DEFAULT_WORKSPACE_BYTES),
            "plan": plan.to_string(),
            "stored": plan.stores_logits(),
            "flops": plan.flops(),
            "threads": rayon::current_num_threads(),
            "batch": self.batch.rows(),
            "dim": self.batch.dim(),
            "dtype": self.batch.dtype().name(),
            "preset": self.batch.call().loss().name(),
            "version": env!("CARGO_PKG_VERSION"),
        });
        drop(first);
        if self.arguments.serve {
            return self.serve(&report);
        }
        let mut times = Times::default();
        let mut bare = Times::default();
        let mut others = [Times::default(), Times::default()];
        for _ in 0..self.arguments.repeats {
            times.0.push(self.time_step()?);
            if !self.arguments.prefixes.is_empty() {
                for (times, batches) in others.iter_mut().zip(self.others) {
                    times.0.push(self.time(batches)?);
                }
            }
            if self.arguments.products {
                bare.0.push(self.time_products()?);
            }
        }
        times.report("", &mut report);
        if !self.arguments.prefixes.is_empty() {
            report["prefixes"] = json!(self.arguments.prefixes);
            for (name, other) in ["plain", "calls"].into_iter().zip(&others) {
                other.report(&format!("{name}_"), &mut report);
                report[format!("ratio_to_{name}")] = json!(times.median() / other.median());
            }
        }
        if let Some((_, schedule)) = &self.products {
            bare.report("products_", &mut report);
            report["products_schedule"] = json!(schedule.to_string());
            report["ratio_to_products"] = json!(times.median() / bare.median());
        }
        writeln!(std::io::stdout(), "{report:#}")?;
        Ok(())
    }

    fn step(&self) -> samtone::Result<LossAndGradients> {
        samtone::loss_and_gradients(self.batch, 1.0)
    }

    /// Mean milliseconds of a step into memory that the caller keeps.
    fn time_step(&mut self) -> Result<f64, AnyError> {
        self.time(std::slice::from_ref(self.batch))
    }

    /// The same of calls for these batches, one after the other.
    fn time(&mut self, batches: &[Batch<'_>]) -> Result<f64, AnyError> {
        let stride = self.batch.dim();
        let started = Instant::now();
        for batch in (0..self.steps).flat_map(|_| batches) {
            let (rows, passages, dim) = (batch.rows(), batch.passages(), batch.dim());
            let [query, passage] = &mut self.gradients;
            let buffers = GradientBuffers {
                query: Some(EmbeddingsMut::with_row_stride(query, rows, dim, stride)?),
                passage: Some(EmbeddingsMut::with_row_stride(passage, passages, dim, stride)?),
            };
            std::hint::black_box(self.workspace.loss_and_gradients_into(batch, 1.0, buffers)?);
        }
        Ok(milliseconds(started) / self.steps as f64)
    }

    /// Mean milliseconds of the products of a step, by the schedule that was fastest when first asked.
    fn time_products(&mut self) -> Result<f64, AnyError> {
        let (products, schedule) = match self.products.take() {
            Some(ready) => self.products.insert(ready),
            None => {
                if self.batch.call().loss().name() != "samtone_query" {
                    return Err("the bare products are those of the preset samtone_query".into());
                }
                let (query, passage) = (&self.towers.query, &self.towers.passage);
                let recompute = !cpu::Plan::new(self.batch)?.stores_logits();
                let mut products = Products::new(query, passage, self.batch.rows(), self.batch.dim(), recompute);
                let schedule = fastest(&mut products, self.steps);
                self.products.insert((products, schedule))
            }
        };
        let started = Instant::now();
        for _ in 0..self.steps {
            products.run(*schedule);
        }
        Ok(milliseconds(started) / self.steps as f64)
    }

    fn serve(mut self, report: &Value) -> Result<(), AnyError> {
        let mut out = std::io::stdout();
        writeln!(out, "{report}")?;
        out.flush()?;
        for line in std::io::stdin().lock().lines() {
            let answer = match line?.trim() {
                "samtone" => json!({ "ms": self.time_step()? }),
                "plain" => json!({ "ms": self.time(self.others[0])? }),
                "calls" => json!({ "ms": self.time(self.others[1])? }),
                "products" => {
                    let ms = self.time_products()?;
                    let schedule = self.products.as_ref().map(|(_, s)| s.to_string());
                    json!({ "ms": ms, "schedule": schedule })
                }
                other => {
                    return Err(format!("asked for {other:?}; known are samtone, products, plain and calls").into());
                }
            };
            writeln!(out, "{answer}")?;
            out.flush()?;
        }
        Ok(())
    }

    fn write(&self, folder: &Path, results: &LossAndGradients) -> Result<(), AnyError> {
        std::fs::create_dir_all(folder)?;
        let widened = |x: samtone::Embeddings<'_>| -> Vec<f32> {
            (0..x.rows()).flat_map(|row| x.row_to_f64(row).unwrap_or_default()).map(|v| v as f32).collect()
        };
        let files = [
            ("query.f32", &widened(self.batch.query())),
            ("passage.f32", &widened(self.batch.passage())),
            ("query_gradient.f32", &results.gradients.query),
            ("passage_gradient.f32", &results.gradients.passage),
        ];
        for (name, values) in files {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            std::fs::write(folder.join(name), bytes)?;
        }
        Ok(())
    }
}

fn fastest(products: &mut Products<'_>, steps: usize) -> Schedule {
    products.run(Schedule::Library);
    let timed = Schedule::ALL.map(|schedule| {
        let started = Instant::now();
        (0..steps).for_each(|_| products.run(schedule));
        (milliseconds(started), schedule)
    });
    timed.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).map_or(Schedule::Library, |(_, schedule)| schedule)
}

#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let half = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) }
    }

    fn report(&self, prefix: &str, into: &mut Value) {
        into[format!("{prefix}median_ms")] = json!(self.median());
        into[format!("{prefix}min_ms")] = json!(self.0.iter().copied().fold(f64::INFINITY, f64::min));
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn steps_for(least_ms: f64, step_ms: f64) -> usize {
    (least_ms / step_ms.max(1e-3)).ceil().clamp(1.0, 1000.0) as usize
}
