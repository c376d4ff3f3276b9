//! Ranks that are MPI processes: they get the bits that threads get, and none outlives one that dies.
//!
//! Without `mpirun` the test is ignored, unless `SAMTONE_REQUIRE` names `mpi`.

#[path = "library/distributed/spread.rs"]
#[allow(dead_code)]
mod spread;
mod support;

use libtest_mimic::{Arguments, Failed};
use samtone::distributed::{Distributed, Group, Mpi, Reduction, mpi};
use samtone::{Call, DType, Loss, Scope};
use spread::{Lists, SHAPES, Spread};
use std::process::{Command, ExitCode, Output};
use support::data::Kind;
use support::report::{self, Listed, is_required};

/// What a process is told to do; set by this program for those that it starts.
const TASK: &str = "SAMTONE_MPI_TASK";

fn main() -> ExitCode {
    if let Ok(task) = std::env::var(TASK) {
        return rank(&task);
    }
    let absent = Command::new("mpirun").arg("--version").output().err();
    let absent = absent.filter(|_| !is_required("mpi")).map(|e| format!("there is no `mpirun`: {e}"));
    let of = |task: &'static str, ranks: usize| move || succeeds(task, ranks);
    let mut trials = Vec::new();
    for (number, shapes) in SHAPES.iter().enumerate() {
        let task: &'static str = ["0", "1", "2", "3", "4", "5", "6"][number];
        trials.push(Listed::new("mpi", format!("{} processes, {shapes:?}", shapes.len()), of(task, shapes.len())));
    }
    trials.push(Listed::new("mpi", "an error is the same in every process", of("error", 3)));
    for task in ["aborts", "panics", "exits"] {
        trials.push(Listed::new("mpi", format!("a process that {task} ends the others"), move || ends(task)));
    }
    report::run(&Arguments::from_args(), trials.into_iter().map(|trial| trial.ignored(absent.clone())).collect())
}

/// This program in so many processes.
fn run(task: &str, ranks: usize) -> Result<Output, Failed> {
    let program = std::env::current_exe()?;
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--timeout", "120", "-n", &ranks.to_string()]).arg(program);
    // Processes that wait for each other must not take turns at the cores of one that works.
    command.env(TASK, task).env("OMPI_MCA_mpi_yield_when_idle", "1");
    Ok(command.output()?)
}

fn succeeds(task: &str, ranks: usize) -> Result<(), Failed> {
    let output = run(task, ranks)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(said.into()) }
}

fn ends(task: &str) -> Result<(), Failed> {
    let output = run(task, 3)?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // `mpirun` numbers ranks, and names the process of one that exits by both.
    let named = ["rank 1", "Rank 1", "],1]"].iter().any(|name| said.contains(name));
    if !output.status.success() && named { Ok(()) } else { Err(format!("{}: {said}", output.status).into()) }
}

/// One process of a task.
fn rank(task: &str) -> ExitCode {
    let Some(universe) = mpi::initialize() else {
        eprintln!("MPI was initialised before");
        return ExitCode::FAILURE;
    };
    // Messages are cut into pieces, of which ranks have different numbers.
    let mut rank = Distributed::new(Mpi::new(universe.world()).with_message_bytes(1000));
    let outcome = match task {
        "error" => error(&mut rank),
        "aborts" | "panics" | "exits" => ending(&mut rank, task),
        number => equal(&mut rank, number.parse().unwrap_or(0)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("rank {}: {message}", rank.group().rank());
            ExitCode::FAILURE
        }
    }
}

fn problems(shapes: &[spread::Shape]) -> [Spread; 2] {
    let lists = Lists { shared_positives: true, ids: true, weights: true, owners: Some(Scope::Own) };
    let call = Call::new(Loss::samtone_both(), 0.1).with_prefixes([2, 5, 8]);
    let prefixes = Spread::new(&call, Kind::Random, shapes, 11, 3, lists);
    [Spread::preset("samtone_query", Kind::Trained, shapes, Lists::default()), prefixes]
}

/// This rank's results have the bits that it has among threads.
fn equal(rank: &mut Distributed<impl Group>, number: usize) -> Result<(), String> {
    let own = rank.group().rank();
    for spread in problems(SHAPES[number]) {
        for dtype in [DType::F32, DType::BF16] {
            let got = spread.parts[own].run(rank, dtype, 2.0);
            let want = spread.run(dtype, 2.0, Reduction::Sum).swap_remove(own);
            if got != want || got.is_err() {
                return Err(format!("{dtype}: {got:?} instead of {want:?}"));
            }
        }
    }
    let mut numbers = [own as f32, 1.0, 0.5];
    rank.sum(&mut numbers).map_err(|e| e.to_string())?;
    let size = rank.group().size() as f32;
    if numbers == [size * (size - 1.0) / 2.0, size, size / 2.0] { Ok(()) } else { Err(format!("sums {numbers:?}")) }
}

fn error(rank: &mut Distributed<impl Group>) -> Result<(), String> {
    let [mut spread, _] = problems(&[(4, 4), (4, 6), (4, 4)]);
    spread.parts[1].query[3] = f64::NAN;
    let own = rank.group().rank();
    match spread.parts[own].run(rank, DType::F32, 1.0) {
        Err(error) if error.to_string().starts_with("rank 1 has failed: the query embedding in row 0") => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

fn ending(rank: &mut Distributed<impl Group>, how: &str) -> Result<(), String> {
    let [spread, _] = problems(&[(4, 4), (4, 6), (4, 4)]);
    let own = rank.group().rank();
    for step in 0.. {
        match how {
            _ if (own, step) != (1, 3) => {}
            "aborts" => std::process::abort(),
            "panics" => panic!("planted"),
            _ => std::process::exit(1),
        }
        spread.parts[own].run(rank, DType::F32, 1.0).map_err(|e| e.to_string())?;
    }
    Ok(())
}
