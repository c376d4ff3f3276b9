//! The step of ranks that have one thread each: `bench_distributed --ranks 2 --batch 8192 --dim 512`, or under `mpirun -n 2` with `--mpi`.
//! Prints JSON.

#[allow(dead_code)] // other benches use more of it
mod inputs;

use clap::Parser;
use inputs::Towers;
use samtone::distributed::{Distributed, Group, Part, Threads};
use samtone::{Call, Embeddings, Loss};
use serde_json::json;
use std::time::Instant;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Times loss and gradients of one batch that ranks of one thread each share evenly.
#[derive(Parser)]
struct Arguments {
    /// Rows of both towers of all ranks, B.
    #[arg(long, default_value_t = 8192)]
    batch: usize,
    /// Embedding dimension, d.
    #[arg(long, default_value_t = 512)]
    dim: usize,
    #[arg(long, default_value = "samtone_query")]
    preset: String,
    #[arg(long, default_value_t = 0.01)]
    temperature: f64,
    /// Ranks that are threads of this process.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// Ranks are the processes that `mpirun` has started.
    #[arg(long, conflicts_with = "ranks")]
    mpi: bool,
    /// Timed steps after one that is not.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Milliseconds of each step on this rank.
fn steps(group: impl Group, arguments: &Arguments, towers: &Towers<f32>, call: &Call) -> Result<Vec<f64>, AnyError> {
    let (rank, size) = (group.rank(), group.size());
    let rows = rank * arguments.batch / size..(rank + 1) * arguments.batch / size;
    let own = |x: &[f32]| x[rows.start * arguments.dim..rows.end * arguments.dim].to_vec();
    let (query, passage) = (own(&towers.query), own(&towers.passage));
    let embeddings = |x| Embeddings::new(x, rows.len(), arguments.dim);
    let part = Part { call, query: Some(embeddings(&query)?), passage: Some(embeddings(&passage)?) };
    let mut distributed = Distributed::new(group);
    // This thread is the whole pool of its rank.
    let _pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build()?;
    let mut times = Vec::new();
    for step in 0..=arguments.repeats {
        distributed.sum(&mut [])?; // all begin together
        let start = Instant::now();
        std::hint::black_box(distributed.loss_and_gradients(&part, 1.0)?);
        if step > 0 {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times)
}

#[cfg(feature = "mpi")]
fn with_mpi(arguments: &Arguments, towers: &Towers<f32>, call: &Call) -> Result<(), AnyError> {
    use samtone::distributed::mpi::traits::Communicator;
    use samtone::distributed::{Mpi, mpi};
    let universe = mpi::initialize().ok_or("MPI was initialised before")?;
    let (rank, size) = (universe.world().rank(), universe.world().size());
    let times = steps(Mpi::new(universe.world()), arguments, towers, call)?;
    if rank == 0 {
        report(arguments, "processes (MPI)", size as usize, times);
    }
    Ok(())
}

#[cfg(not(feature = "mpi"))]
fn with_mpi(_: &Arguments, _: &Towers<f32>, _: &Call) -> Result<(), AnyError> {
    Err("`--mpi` needs the feature `mpi`".into())
}

fn report(arguments: &Arguments, what: &str, ranks: usize, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    let (batch, dim) = (arguments.batch, arguments.dim);
    println!(
        "{}",
        json!({ "ranks": ranks, "as": what, "batch": batch, "dim": dim, "median_ms": times[times.len() / 2], "ms": times })
    );
}

fn main() -> Result<(), AnyError> {
    let arguments = Arguments::parse();
    if arguments.ranks == 0 || arguments.batch < arguments.ranks || arguments.dim == 0 || arguments.repeats == 0 {
        return Err("`--ranks`, `--dim` and `--repeats` must be at least 1, and `--batch` at least `--ranks`".into());
    }
    let towers = Towers::new(arguments.batch, arguments.dim, arguments.seed);
    let call = Call::new(Loss::by_name(&arguments.preset)?, arguments.temperature);
    if arguments.mpi {
        return with_mpi(&arguments, &towers, &call);
    }
    let ends = Threads::group(arguments.ranks);
    let first = std::thread::scope(|scope| {
        let rank = |end| scope.spawn(|| steps(end, &arguments, &towers, &call));
        let ranks: Vec<_> = ends.into_iter().map(rank).collect();
        let times: Result<Vec<_>, AnyError> =
            ranks.into_iter().map(|rank| rank.join().map_err(|_| "a rank panicked")?).collect();
        times.map(|mut times| times.swap_remove(0))
    })?;
    report(&arguments, "threads", arguments.ranks, first);
    Ok(())
}
