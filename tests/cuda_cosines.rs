//! Kept cosines of the CUDA backend on the emulator. Results have the same bits as with recomputed ones, whether all cosines are kept,
//! some or none, and whatever else a call asks for. Nothing reads what is not kept. Kernels with a barrier left out are noticed.
//!
//! Without a C++ compiler the trials are reported as ignored, as in tests/cuda_plans.rs.

mod support;

use libtest_mimic::Failed;
use samtone::backend;
use samtone::cuda::{Arithmetic, Cosines, GradientOutput, Launch, Plan, Problem as Planned, Tile};
use samtone::{Call, DType, Loss, Scope};
use std::process::ExitCode;
use support::case::Expected;
use support::compare::{against_definition, verdict};
use support::cuda_emulated::{Check, CudaEmulated, Emulated, Run, clusters, run_checks};
use support::data::{Kind, Source, problem};
use support::problem::{Buffer, Problem};
use support::report::note;
use support::skipped::Outcome;

/// Of a call of so many queries and passages.
type With = fn(Call, usize, usize) -> Call;

fn main() -> ExitCode {
    let checks: [(&str, Check); 8] = [
        ("every barrier is needed, and none decides a bit", barriers),
        ("the same bits by every arithmetic and tile", arithmetics),
        ("the same bits for every preset", presets),
        ("the same bits with every option", calls),
        ("the same bits if some are kept", partly),
        ("the same bits of shards and with a frozen tower", shards),
        ("skipped squares are not read", skipping),
        ("what is kept is read, and by `backward` alone", poisoned),
    ];
    run_checks(checks, Vec::new())
}

/// A plan on the emulator, whose forward part has run.
struct Launched {
    device: Emulated,
}

impl Launched {
    /// The parts of the plan that `change` makes of the default one.
    fn new(
        how: &CudaEmulated,
        problem: &Problem,
        dtype: DType,
        run: Run,
        parts: &[fn(&Plan) -> &[Launch]],
        change: impl for<'a> Fn(Planned<'a>) -> samtone::Result<Planned<'a>>,
    ) -> Result<Self, Failed> {
        let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
        let batch = problem.batch(&query, &passage)?;
        let planned = Planned::new(*batch.pairs(), dtype, problem.dim)?;
        let mut device = Emulated::new(Plan::new(&change(how.problem(planned))?)?, run)?;
        device.upload_embeddings("query", batch.query())?;
        device.upload_embeddings("passage", batch.passage())?;
        parts.iter().try_for_each(|part| device.launch(*part))?;
        Ok(Self { device })
    }

    /// What another user of the memory may leave there.
    fn spoil(&mut self, names: &[&str]) -> Result<(), Failed> {
        for name in names {
            if let Some(bytes) = self.device.plan().array(name).map(|a| a.bytes as usize) {
                self.device.upload(name, &vec![0xff_u8; bytes])?;
            }
        }
        Ok(())
    }

    /// Results, with gradients by a part of the plan, whose outputs hold none before.
    fn outcome(&mut self, part: fn(&Plan) -> &[Launch]) -> Result<Outcome, Failed> {
        self.spoil(&["query_gradient", "passage_gradient", "query_sums", "passage_sums", "gradients", "dots"])?;
        self.device.launch(part)?;
        Ok(Outcome::read(&mut self.device)?)
    }

    /// Results from kept cosines, and without them the same. `enough`: of how many squares kept, and how many there are.
    fn both(&mut self, enough: fn(usize, usize) -> bool) -> Result<Outcome, Failed> {
        let [kept, all] = self.device.plan().kept_squares();
        if !enough(kept, all) {
            return Err(format!("{kept} of {all} squares: {}", self.device.plan()).into());
        }
        let reading = self.outcome(Plan::backward)?;
        self.spoil(&["cosines", "query_packed", "passage_packed", "query_inverse", "passage_inverse"])?;
        let recomputing = self.outcome(Plan::backward_alone)?;
        if reading != recomputing || !reading.outputs.grad_passage.iter().all(|g| g.is_finite()) {
            return Err(format!("kept cosines give other bits: {}", self.device.plan()).into());
        }
        Ok(reading)
    }
}

fn every(kept: usize, all: usize) -> bool {
    kept == all && all > 0
}

fn some(kept: usize, all: usize) -> bool {
    kept > 0 && kept < all
}

/// The same bits from kept cosines, from the same plan without them, and from a plan that keeps none.
fn expect_same(
    how: &CudaEmulated,
    problem: &Problem,
    dtype: DType,
    change: impl for<'a> Fn(Planned<'a>) -> Planned<'a>,
) -> Result<Outcome, Failed> {
    let call = |cosines| {
        Launched::new(how, problem, dtype, Run::default(), &[Plan::forward], |p| Ok(change(p).with_cosines(cosines)))
    };
    let name = |e: Failed| format!("{}, {dtype}: {}", problem.name, e.message().unwrap_or_default());
    let keeping = call(Cosines::Kept)?.both(every).map_err(name)?;
    let mut without = call(Cosines::Recomputed)?;
    if without.device.plan().array("cosines").is_some() || without.outcome(Plan::backward)? != keeping {
        return Err(format!("{}, {dtype}: a plan that keeps nothing gives other bits", problem.name).into());
    }
    Ok(keeping)
}

fn keep<'a>(p: Planned<'a>) -> Planned<'a> {
    p
}

fn sized(kind: Kind, loss: Loss, shape: (usize, usize, usize)) -> Result<Problem, Failed> {
    Ok(problem(loss, kind, shape, 0.05, 11, 3.0)?)
}

fn arithmetics(how: &'static CudaEmulated) -> Result<(), Failed> {
    let split = [Arithmetic::F16, Arithmetic::F16x2, Arithmetic::F16x3];
    let tiles: &[Tile] = if clusters(how) { &[Tile::Cluster] } else { &[Tile::Small, Tile::Large] };
    let exact = (!clusters(how)).then_some((Arithmetic::Exact, Tile::Small));
    let all = split.iter().flat_map(|a| tiles.iter().map(|t| (*a, *t))).chain(exact);
    for (arithmetic, tile) in all {
        for (shape, kind) in [((129, 300, 72), Kind::Random), ((64, 64, 64), Kind::Trained), ((1, 3, 5), Kind::Random)]
        {
            let problem = sized(kind, Loss::samtone_both(), shape)?.rounded(DType::F32);
            expect_same(how, &problem, DType::F32, |p| p.with_arithmetic(arithmetic).with_tile(tile))
                .map_err(|e| format!("{arithmetic:?} {tile:?}: {e:?}"))?;
        }
    }
    Ok(())
}

fn presets(how: &'static CudaEmulated) -> Result<(), Failed> {
    for (k, (name, ..)) in Loss::PRESETS.iter().enumerate() {
        let shape = if clusters(how) { (260, 300, 24) } else { (70, 130, 24) };
        let dtype = [DType::BF16, DType::F16, DType::F32][k % 3];
        let problem = sized(Kind::ALL[k % Kind::ALL.len()], Loss::by_name(name)?, shape)?.rounded(dtype);
        expect_same(how, &problem, dtype, keep)?;
    }
    Ok(())
}

fn calls(how: &'static CudaEmulated) -> Result<(), Failed> {
    let changes: [(&str, With); 6] = [
        ("permuted positives", |call, m, _| {
            call.with_positives((0..m).map(|i| ((i * 7 + 3) % m) as u32).collect::<Vec<_>>())
        }),
        ("shared positives", |call, m, _| call.with_positives((0..m).map(|i| (i - i % 3) as u32).collect::<Vec<_>>())),
        ("owners", |call, m, n| {
            let owner = |j| if j < m { -1 } else { (j % m) as i32 };
            call.with_hard_negative_owners((0..n).map(owner).collect::<Vec<_>>(), Scope::Own)
        }),
        ("ids and weights", |call, m, n| {
            let mut source = Source::new(5);
            let mut ids = |len: usize| (0..len).map(|_| source.below(len) as i64).collect::<Vec<_>>();
            let call = call.with_query_ids(ids(m)).with_passage_ids(ids(n)).with_shared_ids(true);
            call.with_weights((0..m).map(|i| [1.0, 0.0, 2.5, 0.125, 1e-3][i % 5]).collect::<Vec<_>>())
        }),
        ("a margin", |call, _, _| call.with_margin(0.05)),
        ("cold", |call, _, _| call.with_temperature(1e-3)), // an exponential for each row and column
    ];
    for (k, (name, change)) in changes.into_iter().enumerate() {
        let shape = if clusters(how) { (290, 340, 24) } else { (90, 140, 24) };
        let dtype = [DType::BF16, DType::F32][k % 2];
        let problem = sized(Kind::Anisotropic, Loss::samtone_both(), shape)?.rounded(dtype);
        let problem = problem.with(|call| change(call, shape.0, shape.1));
        expect_same(how, &problem, dtype, keep).map_err(|e| format!("{name}: {e:?}"))?;
    }
    Ok(())
}

/// Waves that keep, waves that do not, and one that does both.
fn partly(how: &'static CudaEmulated) -> Result<(), Failed> {
    let (shape, bounds) = if clusters(how) {
        ((400, 700, 24), [900_000, 1_400_000, 2_400_000])
    } else {
        ((200, 270, 24), [150_000, 250_000, 400_000])
    };
    let mut mixed = 0;
    for (bytes, loss) in bounds.into_iter().zip([Loss::gte(), Loss::samtone_both(), Loss::samtone_query()]) {
        let positives: Vec<_> = (0..shape.0).map(|i| ((i * 7 + 3) % (shape.0 * 3 / 4)) as u32).collect();
        let problem = sized(Kind::Random, loss, shape)?.rounded(DType::BF16);
        let problem = problem.with(|call| call.with_positives(positives).with_workspace_bytes(bytes));
        let run = Run::default();
        let mut call = Launched::new(how, &problem, DType::BF16, run, &[Plan::forward], |p| {
            Ok(p.with_arithmetic(Arithmetic::F16).with_cosines(Cosines::Kept))
        })?;
        let plan = call.device.plan();
        note(format_args!("{bytes}: {}", plan.to_string().lines().next().unwrap_or_default()));
        if plan.bounded_bytes() > bytes {
            return Err(format!("{} bytes of {bytes}: {plan}", plan.bounded_bytes()).into());
        }
        let tiles: Vec<_> =
            plan.backward().iter().map(|l| l.kernel.contains("tile").then_some(l.kernel.contains("kept"))).collect();
        mixed += tiles.windows(2).filter(|pair| pair == &[Some(true), Some(false)]).count();
        // Both parts of a wave have the same places whether cosines are read or not, so the definition judges these.
        let got = call.both(some)?.outputs;
        let want = Expected::from(problem.run(backend::by_name("reference")?, DType::F64, 1.0)?);
        verdict(&against_definition(&got, &want, &problem, DType::BF16, 1.0))?;
    }
    if mixed == 0 { Err("no wave has kept and other super-blocks".into()) } else { Ok(()) }
}

fn shards(how: &'static CudaEmulated) -> Result<(), Failed> {
    let (shape, cuts) = if clusters(how) { ((300, 400, 24), [0, 40, 300]) } else { ((150, 190, 24), [0, 13, 150]) };
    let positives: Vec<_> = (0..shape.0).map(|i| ((i * 5 + 1) % (shape.0 - 9)) as u32).collect();
    let problem = sized(Kind::Random, Loss::samtone_both(), shape)?.rounded(DType::F16);
    let problem = problem.with(|call| call.with_positives(positives));
    let mut whole = Launched::new(how, &problem, DType::F16, Run::default(), &[Plan::forward], |p| Ok(p))?;
    let (sums, above): (Vec<u8>, Vec<u8>) = (whole.device.download("sums")?, whole.device.download("above")?);
    let passages = Some(GradientOutput { dtype: DType::F32, row_stride: shape.2 });
    for (rows, frozen) in cuts.windows(2).flat_map(|rows| [(rows[0]..rows[1], false), (rows[0]..rows[1], true)]) {
        let mut call = Launched::new(how, &problem, DType::F16, Run::default(), &[Plan::partials], |p| {
            let p = p.with_rows(rows.clone())?.with_cosines(Cosines::Kept);
            if frozen { p.with_gradients(None, passages) } else { Ok(p) }
        })?;
        call.device.upload("sums", &sums)?;
        call.device.upload("above", &above)?;
        call.device.launch(Plan::combine)?;
        call.both(every).map_err(|e| format!("{rows:?}, frozen {frozen}: {e:?}"))?;
    }
    Ok(())
}

/// Each square of queries has a cluster of passages of its own, so that most squares have no mass.
fn clustered(how: &CudaEmulated, loss: Loss) -> Result<Problem, Failed> {
    let (step, rows, passages) = if clusters(how) { (256, 520, 700) } else { (64, 140, 230) };
    let mut problem = sized(Kind::Random, loss, (rows, passages, 24))?;
    let mut source = Source::new(17);
    let centres = source.normal(rows.div_ceil(step) * 24);
    let mut around = |centre: usize| -> Vec<f64> {
        source.normal(24).into_iter().zip(&centres[centre * 24..]).map(|(z, c)| c + 0.2 * z).collect()
    };
    problem.query = (0..rows).flat_map(|i| around(i / step)).collect();
    problem.passage = (0..passages).flat_map(|j| around(j % rows / step)).collect();
    Ok(problem.rounded(DType::BF16).with(|call| call.with_temperature(0.02).with_tile_skipping(1e-3)))
}

fn skipping(how: &'static CudaEmulated) -> Result<(), Failed> {
    let outcome = expect_same(how, &clustered(how, Loss::samtone_both())?, DType::BF16, keep)?;
    if outcome.count == 0.0 {
        return Err("nothing was skipped".into());
    }
    // Of rectangles alone, squares and their cosines are in the same order.
    let problem = clustered(how, Loss::info_nce())?;
    let mut call = Launched::new(how, &problem, DType::BF16, Run::default(), &[Plan::forward], |p| {
        Ok(p.with_cosines(Cosines::Kept))
    })?;
    let before = call.outcome(Plan::backward)?;
    let mut cosines: Vec<f32> = call.device.download("cosines")?;
    let elements = cosines.len() / before.skipped.len();
    for (square, skipped) in cosines.chunks_mut(elements).zip(&before.skipped) {
        if *skipped != 0 {
            square.fill(f32::NAN);
        }
    }
    call.device.upload("cosines", &cosines)?;
    if before.count == 0.0 || call.outcome(Plan::backward)? != before {
        return Err(format!("{} of {} skipped, and what they kept matters", before.count, before.squares).into());
    }
    Ok(())
}

fn poisoned(how: &'static CudaEmulated) -> Result<(), Failed> {
    let shape = if clusters(how) { (260, 270, 24) } else { (70, 80, 24) };
    let problem = sized(Kind::Random, Loss::samtone_both(), shape)?.rounded(DType::BF16);
    let mut call = Launched::new(how, &problem, DType::BF16, Run::default(), &[Plan::forward], |p| {
        Ok(p.with_cosines(Cosines::Kept))
    })?;
    let right = call.outcome(Plan::backward)?;
    let len = call.device.plan().array("cosines").ok_or("nothing is kept")?.bytes as usize / 4;
    call.device.upload("cosines", &vec![0.25_f32; len])?;
    let wrong = call.outcome(Plan::backward)?;
    for (wrong, right) in [
        (&wrong.outputs.grad_query, &right.outputs.grad_query),
        (&wrong.outputs.grad_passage, &right.outputs.grad_passage),
    ] {
        if wrong.chunks(shape.2).zip(right.chunks(shape.2)).any(|(wrong, right)| wrong == right) {
            return Err("a row whose gradient is not from kept cosines".into());
        }
    }
    if call.outcome(Plan::backward_alone)? == right { Ok(()) } else { Err("`backward_alone` reads them".into()) }
}

/// As in tests/cuda_plans.rs, of the kernels that read kept cosines.
fn barriers(how: &'static CudaEmulated) -> Result<(), Failed> {
    // Not P5: no block reaches into the other one. Not E3, as there.
    let (module, labels): (&str, &[&str]) = if clusters(how) {
        ("gradient_tile_sm90a", &["P1", "P2", "P3", "P4", "E1", "E2", "G1", "G2", "G3", "G4"])
    } else {
        ("gradient_tile_sm80", &["E1", "G1"])
    };
    // Several squares for each cluster.
    let shape = if clusters(how) { (257, 300, 24) } else { (66, 70, 24) };
    let problem = sized(Kind::Random, Loss::samtone_both(), shape)?.rounded(DType::BF16);
    let outcome = |run: Run| {
        Launched::new(how, &problem, DType::BF16, run, &[Plan::forward], |p| Ok(p.with_cosines(Cosines::Kept)))?
            .outcome(Plan::backward)
    };
    let want = outcome(Run::default())?;
    for seed in 1..4 {
        if outcome(Run { seed, ..Run::default() })? != want {
            return Err(format!("seed {seed} gives other bits").into());
        }
    }
    let mut survivors = Vec::new();
    for label in labels {
        let run =
            |seed, ignore_races| outcome(Run { seed, ignore_races, mutant: Some((module, label)), ..Run::default() });
        let conflict = (0..4).any(|seed| run(seed, false).is_err());
        let wrong = clusters(how) || (0..6).any(|seed| run(seed, true).map_or(true, |got| got != want));
        note(format_args!("{module} without {label}: a conflict {conflict}, other results {wrong}"));
        if !conflict || !wrong {
            survivors.push(label);
        }
    }
    if survivors.is_empty() { Ok(()) } else { Err(format!("nobody misses {survivors:?}").into()) }
}
