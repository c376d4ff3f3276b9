//! Every kernel that a device runs, even one that no plan takes unless told to. Each case is announced before it runs, so that one that
//! never ends is known by name. All cases that fail are listed, so that one run on a GPU tells everything.

use super::prefixes::with_prefixes;
use super::raw::{sample, with_call};
use super::support::case::Expected;
use super::support::compare::{against_definition, verdict};
use super::support::data::{self, Kind};
use super::support::problem::Problem;
use super::{Check, demand, text};
use samtone::cuda::{self, Architecture, Arithmetic, Cosines, Device, Plan, Tile};
use samtone::{Call, DType, Loss, backend};
use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;
use std::time::Instant;

pub const CHECKS: &[Check] = &[
    ("smoke: the driver compiles every kernel", compiled),
    ("smoke: every arithmetic and tile gives what the definition gives", || {
        let mut report = Report::default();
        for kernel in kernels()? {
            let (plain, prefixes) = (sample(Loss::samtone_both(), 71)?, with_prefixes(Loss::samtone_both(), 71)?);
            for (problem, changed) in
                [(&plain, Changed::Nothing), (&plain, Changed::Skipping), (&prefixes, Changed::Nothing)]
            {
                report.case(kernel.named(problem, changed), || kernel.conforms(problem.clone(), changed));
            }
        }
        report.verdict()
    }),
    ("smoke: cosines kept or multiplied again give the same bits", || {
        let mut report = Report::default();
        let problems = [sample(Loss::samtone_both(), 73)?, with_prefixes(Loss::samtone_both(), 73)?];
        for (kernel, problem) in kernels()?.iter().flat_map(|kernel| problems.iter().map(move |p| (kernel, p))) {
            let problem = problem.rounded(kernel.dtype);
            report.case(kernel.named(&problem, Changed::Nothing), || {
                with_call(&problem, kernel.dtype, |call, _| {
                    let outputs = |cosines| {
                        let call = call.replan(&problem, |p| Ok(kernel.changes(p).with_cosines(cosines)))?;
                        let [kept, squares] = call.plan.kept_squares();
                        demand(kept == if cosines == Cosines::Kept { squares } else { 0 }, &call.plan.to_string())?;
                        call.run(Device::loss_and_gradients)?;
                        call.outputs()
                    };
                    let (kept, recomputed) = (outputs(Cosines::Kept)?, outputs(Cosines::Recomputed)?);
                    demand(kept == recomputed, &format!("kept: {kept:?}\nrecomputed: {recomputed:?}"))
                })
            });
        }
        report.verdict()
    }),
];

/// What the emulator is too slow for, or does in tests/cuda_plans.rs.
pub const ON_GPUS: &[Check] = &[
    ("every arithmetic and tile, ragged shapes and waves", || {
        let shapes = [(Kind::Random, (129, 300, 72)), (Kind::Trained, (64, 64, 64)), (Kind::Random, (1, 3, 5))];
        let whole = shapes.map(|(kind, shape)| (kind, shape, Changed::Nothing));
        let waves = [(Kind::Random, (300, 421, 24), Changed::LeastWorkspace)];
        let mut report = Report::default();
        for kernel in kernels()? {
            for (kind, shape, changed) in whole.into_iter().chain(waves) {
                let problem = data::problem(Loss::samtone_both(), kind, shape, 0.05, 11, 0.0).map_err(text)?;
                report.case(kernel.named(&problem, changed), || kernel.conforms(problem.clone(), changed));
                let prefixes = problem.with(|call| call.with_prefixes([1, shape.2 / 2, shape.2]));
                report.case(kernel.named(&prefixes, changed), || kernel.conforms(prefixes.clone(), changed));
            }
        }
        report.verdict()
    }),
    ("every tile on batches of thousands", thousands),
];

/// More squares than a GPU takes at a time, and more rows than from which plans take large tiles. The judge is the CPU backend, on
/// the same embeddings.
fn thousands() -> Result<(), String> {
    let mut report = Report::default();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let shapes = [(Kind::Trained, (2300, 2500, 200)), (Kind::Random, (2048, 2048, 256))];
        for ((kind, shape), prefixes) in shapes.into_iter().flat_map(|of| [false, true].map(|prefixes| (of, prefixes)))
        {
            let problem = data::problem(Loss::samtone_both(), kind, shape, 0.05, 72, 0.0).map_err(text)?.rounded(dtype);
            let problem = if prefixes { problem.with(|call| call.with_prefixes([32, 100, shape.2])) } else { problem };
            let cpu = backend::by_name("cpu").map_err(text)?;
            let mut want = Expected::from(problem.run(cpu, DType::F32, 0.5).map_err(text)?);
            // Single precision decides some of so many near ties the other way.
            (want.metrics, want.prefix_metrics) = (None, None);
            for kernel in kernels()?.into_iter().filter(|kernel| kernel.dtype == dtype) {
                let name = kernel.named(&problem, Changed::Nothing);
                report.case(name, || kernel.judged(&problem, &want, Changed::Nothing));
            }
        }
    }
    report.verdict()
}

#[derive(Clone, Copy, PartialEq)]
enum Changed {
    Nothing,
    /// A bound on the workspace that makes as many waves as can be.
    LeastWorkspace,
    /// Squares of next to no mass are left out of the gradient, where there are any.
    Skipping,
}

/// Kernels of one arithmetic and tile, and the type whose tolerances hold for them.
#[derive(Clone, Copy)]
struct Kernel {
    arithmetic: Arithmetic,
    dtype: DType,
    tile: Tile,
    architecture: Architecture,
}

/// Those that run on the first device; with `SAMTONE_KERNELS`, such as `F16 Large`, these alone.
fn kernels() -> Result<Vec<Kernel>, String> {
    let architecture = Device::first().map_err(text)?.architecture();
    let tiles: &[Tile] = match architecture {
        Architecture::Sm80 => &[Tile::Small, Tile::Large],
        Architecture::Sm90a { .. } => &[Tile::Small, Tile::Large, Tile::Cluster],
    };
    let of = |arithmetic, dtype, tiles: &[Tile]| {
        tiles.iter().map(|&tile| Kernel { arithmetic, dtype, tile, architecture }).collect::<Vec<_>>()
    };
    let only = std::env::var("SAMTONE_KERNELS").unwrap_or_default();
    let chosen = |kernel: &Kernel| only.is_empty() || only == format!("{:?} {:?}", kernel.arithmetic, kernel.tile);
    let all = [
        of(Arithmetic::F16, DType::BF16, tiles),
        of(Arithmetic::F16x2, DType::F16, tiles),
        of(Arithmetic::F16x3, DType::F32, tiles),
        of(Arithmetic::Exact, DType::F32, &[Tile::Small]),
    ];
    Ok(all.concat().into_iter().filter(chosen).collect())
}

impl Kernel {
    fn named(&self, problem: &Problem, changed: Changed) -> String {
        let how = match changed {
            Changed::Nothing => "",
            Changed::LeastWorkspace => ", least workspace",
            Changed::Skipping => ", tile skipping",
        };
        let prefixes = problem.call.prefixes().map_or_else(String::new, |dims| format!(", prefixes {dims:?}"));
        format!("{:?} {:?}: {}{prefixes}{how}", self.arithmetic, self.tile, problem.name)
    }

    fn changes<'a>(&self, problem: cuda::Problem<'a>) -> cuda::Problem<'a> {
        let problem = problem.with_architecture(self.architecture).with_arithmetic(self.arithmetic);
        problem.with_tile(self.tile).with_room_for(self.tile)
    }

    /// Plans that launch whatever has kernels of its own: cosines recomputed and kept, several waves, tile skipping, prefixes.
    fn plans(&self) -> Result<[Plan; 4], String> {
        let call = Call::new(Loss::samtone_both(), 0.05).with_tile_skipping(0.01);
        let waves = call.clone().with_workspace_bytes(1);
        let prefixes = Call::new(Loss::samtone_both(), 0.05).with_prefixes([3, 24]);
        let plan = |cosines, call: &Call| {
            let plain = call.pairs(37, 41).and_then(|pairs| cuda::Problem::new(pairs, self.dtype, 24));
            plain.and_then(|p| Plan::new(&self.changes(p).with_cosines(cosines))).map_err(text)
        };
        let [recomputed, kept] = [Cosines::Recomputed, Cosines::Kept];
        Ok([plan(recomputed, &call)?, plan(kept, &call)?, plan(recomputed, &waves)?, plan(recomputed, &prefixes)?])
    }

    fn conforms(&self, problem: Problem, changed: Changed) -> Result<(), String> {
        let problem = problem.rounded(self.dtype);
        let reference = backend::by_name("reference").map_err(text)?;
        let want = Expected::from(problem.run(reference, DType::F64, 0.5).map_err(text)?);
        self.judged(&problem, &want, changed)
    }

    fn judged(&self, problem: &Problem, want: &Expected, changed: Changed) -> Result<(), String> {
        let asked = problem.clone().with(|call| match changed {
            Changed::Nothing => call,
            Changed::LeastWorkspace => call.with_workspace_bytes(1),
            Changed::Skipping => call.with_tile_skipping(1e-6),
        });
        with_call(problem, self.dtype, |call, _| {
            let call = call.replan(&asked, |p| Ok(self.changes(p)))?;
            let judged = call
                .run(Device::loss_and_gradients)
                .and_then(|()| verdict(&against_definition(&call.outputs()?, want, problem, self.dtype, 0.5)));
            judged.map_err(|sentence| format!("{sentence}\n{}", call.plan))
        })
    }
}

fn compiled() -> Result<(), String> {
    let device = Device::first().map_err(text)?;
    let (name, capability) = (device.name(), device.compute_capability());
    eprintln!("{name}, compute capability {capability:?}, {:?}", device.architecture());
    let (mut report, mut loaded) = (Report::default(), BTreeSet::new());
    for kernel in kernels()? {
        report.case(format!("{:?} {:?}", kernel.arithmetic, kernel.tile), || {
            kernel.plans()?.iter().try_for_each(|plan| {
                device.load(plan).map_err(text)?;
                loaded.extend(entries(plan));
                Ok(())
            })
        });
    }
    let files: BTreeSet<_> = loaded.iter().map(|(file, _)| file).collect();
    eprintln!("  {} kernels of {} files are loaded", loaded.len(), files.len());
    report.verdict()
}

/// The file and the name of every kernel that a plan launches.
fn entries(plan: &Plan) -> impl Iterator<Item = (&'static str, String)> {
    let launches = plan.forward().iter().chain(plan.backward()).chain(plan.backward_alone());
    launches.map(|launch| (launch.module, launch.kernel.clone()))
}

/// What the smoke check loads is all that there is: for a device of 9.0, which has kernels of both architectures.
pub fn nothing_is_left_out() -> Result<(), String> {
    let mut launched = BTreeSet::new();
    for plan in kernels()?.iter().map(Kernel::plans).collect::<Result<Vec<_>, _>>()?.iter().flatten() {
        launched.extend(entries(plan));
    }
    let launched: BTreeSet<String> = launched.into_iter().map(|(file, entry)| format!("{file}: {entry}")).collect();
    let mut written = BTreeSet::new();
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/ptx")).map_err(text)? {
        let path = file.map_err(text)?.path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for line in std::fs::read_to_string(&path).map_err(text)?.lines() {
            if let Some((_, rest)) = line.split_once(".entry ") {
                written.insert(format!("{stem}: {}", rest.trim_end_matches('(')));
            }
        }
    }
    let others: Vec<_> = launched.symmetric_difference(&written).collect();
    demand(others.is_empty(), &format!("left out or unknown: {others:?}"))
}

/// Cases that failed, with what they said.
#[derive(Default)]
struct Report(Vec<String>);

impl Report {
    /// Standard error is not buffered: a name is there also if the process is ended while the case hangs.
    fn case(&mut self, name: impl Display, run: impl FnOnce() -> Result<(), String>) {
        eprint!("  {name} ... ");
        let start = Instant::now();
        let result = run();
        eprintln!("{}, {:.1} ms", if result.is_ok() { "ok" } else { "FAILED" }, start.elapsed().as_secs_f64() * 1e3);
        if let Err(sentence) = result {
            self.0.push(format!("{name}: {sentence}"));
        }
    }

    fn verdict(self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0.join("\n")) }
    }
}
