//! Trains the dual encoder of [the adapters](../adapters/dual-encoder/README.md) on many ranks, each of which encodes its part of every
//! batch. The losses follow the curve of one process.
//!
//! ```sh
//! cargo run --release --example train_distributed -- --threads 4
//! cargo build --release --features mpi --example train_distributed
//! mpirun -n 4 target/release/examples/train_distributed --mpi
//! ```
//!
//! A rank does here what a trainer does on one device, with three changes: it takes its rows of the batch, `Distributed` computes the loss of
//! all rows, and the gradients of the parameters are added up over ranks.

use anyhow::{Context, Result, bail};
use clap::Parser;
use safetensors::SafeTensors;
use samtone::distributed::{Distributed, Group, Part, Threads};
use samtone::{Call, Embeddings, Loss};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "One dual encoder trained on many ranks, along the curve of one process")]
struct Args {
    /// Ranks that are threads of this process.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// Ranks are the processes that `mpirun` has started.
    #[arg(long, conflicts_with = "threads")]
    mpi: bool,
    /// Folder with `pairs.safetensors` and `curve.json`.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/adapters/dual-encoder"))]
    data: PathBuf,
    /// The rank and the step at which it ends itself, to see what becomes of the others.
    #[arg(long, value_names = ["RANK", "STEP"], num_args = 2, requires = "mpi")]
    kill: Option<Vec<usize>>,
}

/// Largest relative distance of a loss from the curve.
const TOLERANCE: f64 = 1e-3;

#[derive(Deserialize)]
struct Curve {
    loss: Vec<f64>,
    log_beta: f64,
}

/// The tensors of `pairs.safetensors`.
struct Data {
    buckets: [Vec<u32>; 2],
    weights: [Vec<f32>; 2],
    ids: [Vec<i64>; 2],
    table: Vec<f32>,
    projection: Vec<f32>,
    batches: Vec<u32>,
    /// Buckets of a text, entries of an embedding, pairs of a batch.
    length: [usize; 2],
    dim: usize,
    batch: usize,
}

impl Data {
    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("pairs.safetensors");
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let file = SafeTensors::deserialize(&bytes)?;
        let columns = |name: &str| anyhow::Ok(file.tensor(name)?.shape().last().copied().unwrap_or(1));
        fn numbers<T: bytemuck::Pod>(file: &SafeTensors<'_>, name: &str) -> Result<Vec<T>> {
            Ok(bytemuck::pod_collect_to_vec(file.tensor(name)?.data()))
        }
        Ok(Self {
            buckets: [numbers(&file, "query_buckets")?, numbers(&file, "passage_buckets")?],
            weights: [numbers(&file, "query_weights")?, numbers(&file, "passage_weights")?],
            ids: [numbers(&file, "query_ids")?, numbers(&file, "passage_ids")?],
            table: numbers(&file, "table")?,
            projection: numbers(&file, "projection")?,
            batches: numbers(&file, "batches")?,
            length: [columns("query_buckets")?, columns("passage_buckets")?],
            dim: columns("table")?,
            batch: columns("batches")?,
        })
    }
}

/// x = (Σ_k weight_k · table[bucket_k]) · projection, for both towers.
struct Encoder {
    /// The table, then the projection, then log β.
    parameters: Vec<f32>,
    gradient: Vec<f32>,
    dim: usize,
    /// Where the projection begins.
    table: usize,
}

impl Encoder {
    fn new(data: &Data, log_beta: f32) -> Self {
        let parameters = [&*data.table, &*data.projection, &[log_beta]].concat();
        Self { gradient: vec![0.0; parameters.len()], parameters, dim: data.dim, table: data.table.len() }
    }

    fn log_beta(&self) -> f32 {
        self.parameters.last().copied().unwrap_or(f32::NAN)
    }

    /// Σ_k weight_k · table[bucket_k] of a text.
    fn pooled(&self, buckets: &[u32], weights: &[f32]) -> Vec<f32> {
        let mut sum = vec![0.0; self.dim];
        for (&bucket, weight) in buckets.iter().zip(weights) {
            let row = &self.parameters[bucket as usize * self.dim..][..self.dim];
            sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
        }
        sum
    }

    fn encode(&self, buckets: &[u32], weights: &[f32]) -> Vec<f32> {
        let pooled = self.pooled(buckets, weights);
        let projection = &self.parameters[self.table..];
        let entry = |j: usize| pooled.iter().enumerate().map(|(i, x)| x * projection[i * self.dim + j]).sum();
        (0..self.dim).map(entry).collect()
    }

    /// Adds what the gradient of a text's embedding says of the parameters.
    fn backward(&mut self, buckets: &[u32], weights: &[f32], gradient: &[f32]) {
        let pooled = self.pooled(buckets, weights);
        let (dim, table) = (self.dim, self.table);
        for (i, x) in pooled.iter().enumerate() {
            let row = &self.parameters[table + i * dim..][..dim];
            let of_pooled: f32 = row.iter().zip(gradient).map(|(p, g)| p * g).sum();
            self.gradient[table + i * dim..][..dim].iter_mut().zip(gradient).for_each(|(sum, g)| *sum += x * g);
            for (&bucket, weight) in buckets.iter().zip(weights) {
                self.gradient[bucket as usize * dim + i] += weight * of_pooled;
            }
        }
    }
}

/// AdamW without weight decay, in f64: rate 0.01, betas 0.9 and 0.999, epsilon 1e-8.
struct Adam {
    moments: Vec<[f64; 2]>,
    steps: i32,
}

impl Adam {
    fn step(&mut self, parameters: &mut [f32], gradient: &[f32]) {
        self.steps += 1;
        let corrected = |moment: f64, beta: f64| moment / (1.0 - beta.powi(self.steps));
        for ((x, &g), [mean, square]) in parameters.iter_mut().zip(gradient).zip(&mut self.moments) {
            let g = f64::from(g);
            (*mean, *square) = (0.9 * *mean + 0.1 * g, 0.999 * *square + 0.001 * g * g);
            *x -= (0.01 * corrected(*mean, 0.9) / (corrected(*square, 0.999).sqrt() + 1e-8)) as f32;
        }
    }
}

/// The losses before each step, and log β at the end. The same on every rank.
fn train(group: impl Group, data: &Data, kill: Option<&[usize]>) -> Result<Curve> {
    let (rank, size) = (group.rank(), group.size());
    let mut distributed = Distributed::new(group);
    let mut encoder = Encoder::new(data, 20_f32.ln());
    let mut adam = Adam { moments: vec![[0.0; 2]; encoder.parameters.len()], steps: 0 };
    let mut curve = Curve { loss: Vec::new(), log_beta: f64::NAN };
    for (step, batch) in data.batches.chunks(data.batch).enumerate() {
        if kill == Some(&[rank, step]) {
            std::process::abort();
        }
        // This rank's pairs: uneven parts are as good as even ones.
        let own = &batch[rank * batch.len() / size..(rank + 1) * batch.len() / size];
        let text = |tower: usize, pair: u32| {
            let range = pair as usize * data.length[tower]..(pair as usize + 1) * data.length[tower];
            (&data.buckets[tower][range.clone()], &data.weights[tower][range])
        };
        let tower = |tower: usize| -> Vec<f32> {
            own.iter()
                .flat_map(|&pair| {
                    let (buckets, weights) = text(tower, pair);
                    encoder.encode(buckets, weights)
                })
                .collect()
        };
        let (query, passage) = (tower(0), tower(1));
        let ids = |tower: usize| own.iter().map(|&pair| data.ids[tower][pair as usize]).collect::<Vec<_>>();
        let call = Call::new(Loss::samtone_query(), (-f64::from(encoder.log_beta())).exp());
        let call = call.with_query_ids(ids(0)).with_passage_ids(ids(1));
        let embeddings = |x| (!own.is_empty()).then(|| Embeddings::new(x, own.len(), data.dim)).transpose();
        let part = Part { call: &call, query: embeddings(&query)?, passage: embeddings(&passage)? };
        let result = distributed.loss_and_gradients(&part, 1.0)?;
        curve.loss.push(result.evaluation.loss);

        encoder.gradient.fill(0.0);
        for (at, gradients) in [&result.gradients.query, &result.gradients.passage].into_iter().enumerate() {
            for (&pair, gradient) in own.iter().zip(gradients.chunks(data.dim)) {
                let (buckets, weights) = text(at, pair);
                encoder.backward(buckets, weights, gradient);
            }
        }
        if let Some(log_beta) = encoder.gradient.last_mut() {
            *log_beta = result.gradients.temperature.log_beta as f32;
        }
        distributed.sum(&mut encoder.gradient)?;
        adam.step(&mut encoder.parameters, &encoder.gradient);
    }
    curve.log_beta = encoder.log_beta().into();
    Ok(curve)
}

/// Prints the losses beside those of one process in float64. An error if one is too far from it.
fn compare(got: &Curve, want: &Curve, ranks: usize) -> Result<()> {
    let mut distances = Vec::new();
    for (step, (got, want)) in got.loss.iter().zip(&want.loss).enumerate() {
        println!("step {step:2}  loss {got:.5}  of one process {want:.5}");
        distances.push((got - want).abs() / want);
    }
    let worst = distances.iter().copied().fold(0.0, f64::max);
    let log_beta = (got.log_beta - want.log_beta).abs() / want.log_beta;
    println!("{ranks} ranks: the losses are within {worst:.1e} of the curve, log β within {log_beta:.1e}");
    distances.push(log_beta);
    // NaN is no number below the tolerance.
    let near = distances.iter().all(|&distance| distance <= TOLERANCE);
    if got.loss.len() != want.loss.len() || !near {
        bail!("the training does not follow the curve within {TOLERANCE:e}");
    }
    Ok(())
}

fn run(args: &Args) -> Result<()> {
    let data = Data::read(&args.data)?;
    let want: Curve = serde_json::from_str(&std::fs::read_to_string(args.data.join("curve.json"))?)?;
    let kill = args.kill.as_deref();
    if args.mpi {
        return with_mpi(&data, &want, kill);
    }
    let ends = Threads::group(args.threads.into());
    let curves: Result<Vec<Curve>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = ends.into_iter().map(|end| scope.spawn(|| train(end, &data, kill))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|_| bail!("a rank panicked"))).collect()
    });
    let curves = curves?;
    if curves.iter().any(|curve| curve.loss != curves[0].loss) {
        bail!("the ranks have different losses");
    }
    compare(&curves[0], &want, curves.len())
}

#[cfg(feature = "mpi")]
fn with_mpi(data: &Data, want: &Curve, kill: Option<&[usize]>) -> Result<()> {
    use samtone::distributed::Mpi;
    use samtone::distributed::mpi::traits::Communicator;
    let universe = samtone::distributed::mpi::initialize().context("MPI was initialised before")?;
    let world = universe.world();
    let (rank, size) = (world.rank(), world.size());
    let curve = train(Mpi::new(world), data, kill).unwrap_or_else(|error| {
        eprintln!("error: rank {rank}: {error:#}");
        // Not by returning: that would finalise MPI, which waits for the other ranks, and they may wait for this one.
        std::process::exit(1);
    });
    if rank == 0 { compare(&curve, want, size as usize) } else { Ok(()) }
}

#[cfg(not(feature = "mpi"))]
fn with_mpi(_: &Data, _: &Curve, _: Option<&[usize]>) -> Result<()> {
    bail!("`--mpi` needs the feature `mpi`: cargo build --release --features mpi --example train_distributed")
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
