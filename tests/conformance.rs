//! One table: every backend × every type it takes × every case. Each trial compares with the definition in f64 on the same embeddings.
//!
//! A backend enters by its line in `samtone::backend::all`. One that cannot run on this machine is reported as ignored, with the reason.
//! If the environment variable `SAMTONE_REQUIRE` (names separated by commas) has its name, that is a failure instead. With
//! `SAMTONE_TRACE` set, each case is announced on standard error before it runs. So if a case never ends, its name is known.
//!
//! Emulated CUDA kernels and variants of WGSL in software take most of the time. So on the backends of [`IN_TURN`] two kinds of cases run
//! in only one type each: golden files, and cases that combine losses with kinds of data and with options. The types take turns, and so do
//! both architectures of CUDA. Elsewhere these cases are ignored, and run with `--include-ignored`. CI also runs golden files in every
//! type, by `examples/evaluate`, on both architectures and on the usual variant of WGSL.

#[path = "conformance/edges.rs"]
mod edges;
#[path = "conformance/prefixes.rs"]
mod prefixes;
mod support;
#[path = "conformance/winners.rs"]
mod winners;

use libtest_mimic::{Arguments, Failed};
use samtone::backend::{self, Backend};
use samtone::{Block, Call, DType, Error, Group, Loss, NoNegative, Scope};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use support::backends;
use support::case::{Expected, golden};
use support::compare::{against_definition, verdict};
use support::data::{Kind, Source, duplicate_ids, problem};
use support::problem::Problem;
use support::report::{self, Listed};

/// What a case asks, for embeddings of a type (its values may depend on the range of the type) and a seed to add.
type Make = Arc<dyn Fn(DType, u64) -> Result<Problem, String> + Send + Sync>;

#[derive(Clone)]
struct Case {
    name: String,
    upstream: f64,
    make: Make,
    /// One of many of its like, whose types differ little.
    in_turn: bool,
}

/// Backends that are too slow for every case in every type: the emulators, whose kernels share all but their products, and variants of
/// WGSL, which share all but a few lines of their shaders with `wgpu`. Those of one list take a case in turn, too.
const IN_TURN: [&[&str]; 7] = [
    &["cuda-emulated", "cuda-emulated-sm90a"],
    &["wgpu-baseline"],
    &["wgpu-large-tiles"],
    &["wgpu-f16"],
    &["wgpu-subgroups"],
    &["wgpu-cooperative-emulated"],
    &["wgpu-small-bindings"],
];

impl Case {
    /// Whether the `number`-th case is left out of the backend's usual run in this type.
    fn is_spared(&self, number: usize, backend: &dyn Backend, dtype: DType) -> bool {
        let mut lists = IN_TURN.iter().enumerate();
        let own = lists.find_map(|(list, names)| Some((list, names, names.iter().position(|n| *n == backend.name())?)));
        let kind = backend.dtypes().iter().position(|d| *d == dtype);
        let (Some((list, names, place)), Some(kind)) = (own, kind) else { return false };
        // Scattered, because the number of losses may be a multiple of that of types.
        let turn = (number * 2_654_435_761) >> 16;
        let types = backend.dtypes().len();
        self.in_turn && (turn + list) % (types * names.len()) != place * types + kind
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let required = std::env::var("SAMTONE_REQUIRE").unwrap_or_default();
    let required: Vec<_> = required.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    match trials(&backends::all(), &required) {
        Ok(trials) => report::run(&arguments, trials),
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn trials(backends: &[&'static dyn Backend], required: &[&str]) -> Result<Vec<Listed>, String> {
    let mut trials = vec![
        Listed::new(OF_THE_TABLE, "absent backends are ignored unless required", absent_backends),
        Listed::new(OF_THE_TABLE, "a wrong backend fails every output", wrong_backend),
    ];
    // Demanded of tests/emulator, tests/wgsl and tests/mpi.rs, and no backends.
    let elsewhere = |name: &str| matches!(name, "emulator" | "spirv-val" | "tint" | "mpi");
    for name in required.iter().filter(|name| !elsewhere(name) && !backends.iter().any(|b| b.name() == **name)) {
        let message = format!("SAMTONE_REQUIRE names `{name}`, which is not in this build");
        trials.push(Listed::new(OF_THE_TABLE, format!("{name} is in this build"), move || Err(message.into())));
    }
    let presences: Vec<_> = backends.iter().map(|&backend| presence(backend, required)).collect();
    for (number, case) in cases()?.into_iter().enumerate() {
        for dtype in DType::ALL {
            // One judgement serves all backends, and is computed by the first that asks.
            let judge = Arc::new(OnceLock::new());
            let taking = backends.iter().zip(&presences).filter(|(backend, _)| backend.dtypes().contains(&dtype));
            for (&backend, presence) in taking {
                let (make, judge, upstream) = (case.make.clone(), judge.clone(), case.upstream);
                let name = format!("{} {dtype}: {}", backend.name(), case.name);
                let spared = case.is_spared(number, backend, dtype).then(|| {
                    "these cases take types and architectures in turn; all of them: `-- --include-ignored`".to_string()
                });
                let run = move || {
                    let (problem, want) = judge.get_or_init(|| judgement(&make, dtype, upstream)).as_ref()?;
                    conforms(backend, problem, want, dtype, upstream)
                };
                let group = backend.name();
                trials.push(match presence.clone() {
                    Presence::Runs => Listed::new(group, name, run).ignored(spared),
                    Presence::Ignored(reason) => Listed::new(group, name, run).ignored(Some(reason)),
                    Presence::Missed(message) => Listed::new(group, name, move || Err(message.into())).ignored(spared),
                });
            }
        }
    }
    Ok(trials)
}

/// The group of what checks this table itself.
const OF_THE_TABLE: &str = "this table";

/// Trials run where a backend can, are ignored where it cannot, and fail if it then is required.
#[derive(Debug, Clone, PartialEq)]
enum Presence {
    Runs,
    Ignored(String),
    Missed(String),
}

fn presence(backend: &dyn Backend, required: &[&str]) -> Presence {
    match backend.available() {
        Ok(()) => Presence::Runs,
        Err(reason) if required.contains(&backend.name()) => {
            Presence::Missed(format!("SAMTONE_REQUIRE names `{}`: {reason}", backend.name()))
        }
        Err(reason) => Presence::Ignored(reason.to_string()),
    }
}

type Judgement = Result<(Problem, Result<Expected, Error>), String>;

/// The problem with rounded embeddings, and what the definition says about it, be that an error.
///
/// A cosine on the edge of a margin or a tie may be rounded to either side, and both are right. Such a problem has no single
/// answer, on some machine at least, so it is passed over for the next seed.
fn judgement(make: &Make, dtype: DType, upstream: f64) -> Judgement {
    let slack = if dtype == DType::F64 { 0.0 } else { 4e-7 };
    let candidates = (0..100).map(|attempt| make(dtype, attempt * 1_000_003).map(|p| p.rounded(dtype)));
    let mut decided = candidates.filter(|p| p.as_ref().map_or(true, |p| p.is_decided(slack)));
    let problem = decided.next().ok_or("every seed puts a cosine on the edge of a margin or a tie")??;
    let reference = backend::by_name("reference").map_err(|e| e.to_string())?;
    let want = problem.run(reference, DType::F64, upstream).map(Expected::from);
    Ok((problem, want))
}

/// The end of what the backend says that it does not support, where it must not compute the prefixes of a problem.
fn refused(backend: &dyn Backend, problem: &Problem) -> Option<&'static str> {
    // The whole embedding, with weight 1, is no prefix.
    let prefixes = problem.call.prefixes().filter(|dims| *dims != [problem.dim])?.len();
    // Gradients of a tile of 64 x 64, of all prefixes, are bound at once.
    let small = backend.name() == "wgpu-small-bindings" && prefixes * 64 * 64 * 4 > 256 << 10;
    small.then_some("of the buffer `scratch`")
}

fn conforms(
    backend: &dyn Backend,
    problem: &Problem,
    want: &Result<Expected, Error>,
    dtype: DType,
    upstream: f64,
) -> Result<(), Failed> {
    let refused = refused(backend, problem);
    let judged = match (problem.run(backend, dtype, upstream), want) {
        (Err(Error::Unsupported { what, .. }), _) if refused.is_some_and(|refused| what.ends_with(refused)) => Ok(()),
        (got, _) if refused.is_some() => Err(format!("prefixes are not refused: {got:?}")),
        (Ok(got), Ok(want)) => verdict(&against_definition(&got, want, problem, dtype, upstream)),
        (Err(got), Err(want)) if got == *want => Ok(()),
        (Ok(_), Err(want)) => Err(format!("no error, but the definition says: {want}")),
        (Err(got), Ok(_)) => Err(format!("an error where the definition has a value: {got}")),
        (Err(got), Err(want)) => Err(format!("got the error: {got}\nbut the definition says: {want}")),
    };
    let plan = |sentence| match backends::plan(backend, problem, dtype) {
        Some(plan) => format!("{sentence}\n{plan}"),
        None => sentence,
    };
    Ok(judged.map_err(plan)?)
}

/// Powers of ten that norms may spread over, either way, so that f32 gradients stay in range (in f16, the embeddings).
fn decades(dtype: DType) -> f64 {
    match dtype {
        DType::F64 | DType::F32 | DType::BF16 => 15.0,
        DType::F16 => 3.0,
    }
}

/// M × N × d: the smallest, primes, multiples of 16 and their neighbours (lanes, tiles), wide and narrow.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (1, 2, 3),
    (2, 2, 2),
    (3, 3, 7),
    (3, 7, 1),
    (5, 13, 8),
    (15, 17, 16),
    (16, 16, 33),
    (17, 47, 64),
    (31, 33, 96),
    (63, 64, 127),
    (65, 129, 65),
    (97, 101, 31),
];
const TEMPERATURES: &[f64] = &[0.01, 0.05, 0.001, 0.2, 1.0, 0.02, 10.0];
const UPSTREAM: &[f64] = &[1.0, -0.5, 64.0, 0.0, 3e-3];

fn cases() -> Result<Vec<Case>, String> {
    let mut cases = Vec::new();
    let golden = golden()?;
    // Golden files are counted apart, lest a new one give every other case another upstream gradient.
    let first = golden.len();
    let mut add = |in_turn: bool, name: String, make: Make| {
        let number = cases.len().checked_sub(first).map_or(cases.len(), |k| k + UPSTREAM.len() - 1);
        let upstream = UPSTREAM[number % UPSTREAM.len()];
        cases.push(Case { name, upstream, make, in_turn });
    };
    for case in golden {
        add(true, format!("golden {}", case.problem.name), Arc::new(move |_, _| Ok(case.problem.clone())));
    }
    let plain = |loss: &Loss, kind: Kind, shape, temperature, seed| -> (String, Make) {
        let name = format!("{} {} {shape:?} τ={temperature}", loss.name(), kind.name());
        let loss = loss.clone();
        let make = move |dtype, more| {
            problem(loss.clone(), kind, shape, temperature, seed + more, decades(dtype)).map_err(|e| e.to_string())
        };
        (name, Arc::new(make))
    };

    // Every preset on every kind of data; lengths of the cycles have no common divisor, so each meets each in time.
    let mut seed = 0;
    let losses = losses()?;
    for kind in Kind::ALL {
        for loss in &losses {
            let shape = SHAPES[seed % SHAPES.len()];
            let (name, make) = plain(loss, kind, shape, TEMPERATURES[seed % TEMPERATURES.len()], seed as u64);
            add(true, name, make);
            seed += 1;
        }
    }
    // Where single precision is hardest, and every shape with every block.
    for kind in Kind::ALL {
        for loss in [Loss::samtone_query(), Loss::samtone_both()] {
            let (name, make) = plain(&loss, kind, (65, 97, 64), 0.01, 1000 + seed as u64);
            add(false, name, make);
        }
    }
    for &shape in SHAPES.iter().chain(&[(2, 3, 768), (4, 5, 1000), (3, 3, 4096), (2, 2, 8192), (128, 255, 513)]) {
        let (name, make) = plain(&Loss::samtone_both(), Kind::Random, shape, 0.03, 2000 + shape.2 as u64);
        add(shape.2 >= 4096, name, make); // up to a tenth of all that an emulator does in a type
    }
    // Several tiles of every matrix, stored and recomputed.
    let edges = [(300, 421, 24), (511, 513, 9), (257, 1025, 33)];
    for (shape, workspace) in edges.into_iter().flat_map(|shape| [(shape, None), (shape, Some(64 << 10))]) {
        let (name, make) = plain(&Loss::samtone_both(), Kind::Trained, shape, 0.02, 3000);
        let bounded: Make = Arc::new(move |dtype, more| {
            let problem = make(dtype, more)?;
            let bound = |call: Call| workspace.map_or(call.clone(), |bytes| call.with_workspace_bytes(bytes));
            with_option("everything", problem.with(bound))
        });
        add(false, format!("{name} with everything, workspace {workspace:?}"), bounded);
    }
    for option in OPTIONS {
        for (k, loss) in losses.iter().enumerate() {
            let kind = if option.contains("duplicates") { Kind::Duplicates } else { Kind::ALL[k % Kind::ALL.len()] };
            let (name, make) = plain(loss, kind, (13, 29, 16), 0.05, 4000 + k as u64);
            let optional: Make = Arc::new(move |dtype, more| with_option(option, make(dtype, more)?));
            add(true, format!("{name} with {option}"), optional);
        }
    }
    cases.extend(edges::cases()?);
    cases.extend(winners::cases()?);
    cases.extend(prefixes::cases()?);
    Ok(cases)
}

/// Every preset, and what no preset has: a tower against itself alone, and no or two copies of the positive beside others.
fn losses() -> Result<Vec<Loss>, String> {
    let custom = || -> samtone::Result<Vec<Loss>> {
        Ok(vec![
            Loss::custom("queries_only", vec![Group::new(2.0, &[Block::QQ], 1)?])?,
            Loss::custom(
                "mixed_copies",
                vec![
                    Group::new(0.7, &[Block::PQ, Block::QQ], 0)?,
                    Group::new(0.4, &[Block::PP, Block::QP], 2)?,
                    Group::new(0.0, &[Block::QP], 0)?,
                ],
            )?,
        ])
    };
    let presets = Loss::PRESETS.iter().map(|(name, ..)| Loss::by_name(name)).collect::<Result<Vec<_>, _>>();
    Ok([presets.map_err(|e| e.to_string())?, custom().map_err(|e| e.to_string())?].concat())
}

const OPTIONS: &[&str] = &[
    "permuted positives",
    "shared positives",
    "weights",
    "ids",
    "ids of duplicates",
    "shared ids",
    "shared ids, own negatives and a margin",
    "copies of positives",
    "margin 0 on duplicates",
    "margin",
    "negative margin",
    "owners, all",
    "owners, own",
    "everything",
    "every negative masked",
    "every negative masked, as zero",
    "negatives for one row, as zero",
];

fn with_option(option: &str, problem: Problem) -> Result<Problem, String> {
    let call = call_with(option, problem.call.clone(), (problem.rows, problem.passages))?;
    Ok(Problem { call, ..problem })
}

/// A call for M queries and N passages, with that option.
fn call_with(option: &str, call: Call, (m, n): (usize, usize)) -> Result<Call, String> {
    let mut source = Source::new(m as u64 * 7919 + n as u64);
    let mut below = |end: usize, count: usize| (0..count).map(|_| source.below(end) as u32).collect::<Vec<_>>();
    let ids = |numbers: Vec<u32>| numbers.into_iter().map(i64::from).collect::<Vec<_>>();
    let weights = || (0..m).map(|i| [1.0, 0.0, 2.5, 0.125, 1e-3][i % 5]).collect::<Vec<f32>>();
    let owner = |j: usize| if j < m || j.is_multiple_of(4) { -1 } else { (j % m) as i32 };
    let owned = |call: Call, scope| call.with_hard_negative_owners((0..n).map(owner).collect::<Vec<_>>(), scope);
    Ok(match option {
        "permuted positives" => {
            call.with_positives((0..m).map(|i| ((i * 5 + 3) % m + n - m) as u32).collect::<Vec<_>>())
        }
        "shared positives" => call.with_positives(below(n.div_ceil(2), m)),
        "weights" => call.with_weights(weights()),
        "ids" => {
            let call = call.with_query_ids(below(m, m).iter().map(|&id| i64::from(id) - 2).collect::<Vec<_>>());
            call.with_passage_ids(below(n, n).iter().map(|&id| i64::MAX - i64::from(id)).collect::<Vec<_>>())
        }
        "ids of duplicates" => call.with_query_ids(duplicate_ids(m)).with_passage_ids(duplicate_ids(n)),
        // Row i asks with text i for text i + 1; further passages are any of them.
        "shared ids" => {
            let texts = (1..=m as i64).chain(ids(below(m, n - m)));
            let call = call.with_query_ids((0..m as i64).collect::<Vec<_>>());
            call.with_passage_ids(texts.collect::<Vec<_>>()).with_shared_ids(true)
        }
        "shared ids, own negatives and a margin" => {
            owned(call_with("shared ids", call, (m, n))?, Scope::Own).with_margin(0.3)
        }
        // Queries come twice, with other positives, whose texts are among the further passages too.
        "copies of positives" => {
            let call = call.with_query_ids((0..m).map(|i| i as i64 / 2).collect::<Vec<_>>());
            call.with_passage_ids((0..n).map(|j| (j % m) as i64).collect::<Vec<_>>())
        }
        "margin 0 on duplicates" => call.with_margin(0.0),
        "margin" => call.with_margin(0.1),
        "negative margin" => call.with_margin(-0.05),
        "owners, all" => owned(call, Scope::All),
        "owners, own" => owned(call, Scope::Own),
        "everything" => {
            let call = call.with_positives(below(n, m)).with_weights(weights());
            let call = call.with_query_ids(ids(below(m, m))).with_passage_ids(ids(below(n, n))).with_shared_ids(true);
            owned(call, Scope::Own).with_margin(0.2)
        }
        "every negative masked" => call.with_positives(vec![0; m]).with_passage_ids(vec![1; n]),
        "every negative masked, as zero" => {
            call_with("every negative masked", call, (m, n))?.with_no_negative(NoNegative::Zero)
        }
        "negatives for one row, as zero" => {
            // The last passage is another text than all others, and for row 1 alone.
            let call = call.with_passage_ids((0..n).map(|j| i64::from(j == n - 1)).collect::<Vec<_>>());
            let owners: Vec<i32> = (0..n).map(|j| if j == n - 1 { 1 } else { -1 }).collect();
            let mut weights = weights();
            weights[1] = 0.5;
            call.with_hard_negative_owners(owners, Scope::Own).with_weights(weights).with_no_negative(NoNegative::Zero)
        }
        _ => return Err(format!("no option `{option}`")),
    })
}

/// A stand-in for hardware that is not there, and for a backend that gets one thing wrong.
struct StandIn {
    present: bool,
    wrong: Option<&'static str>,
}

impl Backend for StandIn {
    fn name(&self) -> &'static str {
        "stand-in"
    }

    fn dtypes(&self) -> &'static [DType] {
        &[DType::F32]
    }

    fn available(&self) -> samtone::Result<()> {
        let (what, allowed) = ("a machine without the device".into(), "one with it".into());
        if self.present { Ok(()) } else { Err(Error::Unsupported { backend: "stand-in", what, allowed }) }
    }

    fn loss_and_gradients_into(
        &self,
        batch: &samtone::Batch<'_>,
        upstream: f64,
        mut buffers: samtone::GradientBuffers<'_>,
    ) -> samtone::Result<(samtone::Evaluation, samtone::TemperatureGradient)> {
        match self.wrong {
            Some("grad_q") => buffers.query = None, // leaves the NaN that the caller put there
            Some("grad_p") => buffers.passage = None,
            _ => {}
        }
        let reference = backend::by_name("reference")?;
        let (mut evaluation, mut temperature) = reference.loss_and_gradients_into(batch, upstream, buffers)?;
        match self.wrong {
            Some("loss") => evaluation.loss *= 1.0 + 1e-4,
            Some("row_losses") => evaluation.row_losses[1] *= 1.0 + 1e-4,
            Some("grad_temperature") => temperature.tau *= 1.001,
            Some("grad_log_beta") => temperature.log_beta *= 1.001,
            Some("metrics") => evaluation.passage_to_query.mrr += 1e-3,
            _ => {}
        }
        Ok((evaluation, temperature))
    }
}

fn absent_backends() -> Result<(), Failed> {
    let absent = StandIn { present: false, wrong: None };
    let present = StandIn { present: true, wrong: None };
    let got = [presence(&present, &["stand-in"]), presence(&absent, &["cpu"]), presence(&absent, &["cpu", "stand-in"])];
    match got {
        [Presence::Runs, Presence::Ignored(reason), Presence::Missed(why)]
            if reason.contains("without the device") && why.contains("without the device") =>
        {
            Ok(())
        }
        other => Err(format!("{other:?}").into()),
    }
}

fn wrong_backend() -> Result<(), Failed> {
    let problem = problem(Loss::samtone_both(), Kind::Random, (9, 11, 8), 0.05, 1, 0.0).map_err(|e| e.to_string())?;
    let make: Make = Arc::new(move |_, _| Ok(problem.clone()));
    let (problem, want) = judgement(&make, DType::F32, 1.0)?;
    conforms(&StandIn { present: true, wrong: None }, &problem, &want, DType::F32, 1.0)?;
    for output in ["loss", "row_losses", "grad_q", "grad_p", "grad_temperature", "grad_log_beta", "metrics"] {
        let backend = StandIn { present: true, wrong: Some(output) };
        match conforms(&backend, &problem, &want, DType::F32, 1.0) {
            Err(e) if e.message().is_some_and(|m| m.starts_with(output)) => {}
            other => return Err(format!("a wrong {output} gave {other:?}").into()),
        }
    }
    Ok(())
}
