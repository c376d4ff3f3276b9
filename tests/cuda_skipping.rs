//! Tile skipping of the CUDA backend on the emulator. What is left out of the gradient is bounded for every row; the sums for that are by
//! the definition in f64. Nothing else changes, to the bit. A threshold that is too lax is noticed.
//!
//! Without a C++ compiler the trials are reported as ignored, as in tests/cuda_plans.rs.

mod support;

use libtest_mimic::Failed;
use samtone::backend;
use samtone::cuda::abi::ExpSum;
use samtone::cuda::{Launch, Plan, Problem as Planned, Tile};
use samtone::{Call, DType, Loss, Scope};
use std::process::ExitCode;
use support::case::Expected;
use support::compare::{against_definition, verdict};
use support::cuda_emulated::{Check, CudaEmulated, Emulated, Run, clusters, run_checks};
use support::data::{Kind, Source, problem};
use support::problem::{Buffer, Outputs, Problem};
use support::report::{Listed, note};
use support::skipped::{Outcome, Shares, expect_near};

/// Of a call of so many queries and passages.
type With = fn(Call, usize, usize) -> Call;
type Change = for<'a> fn(Planned<'a>) -> Planned<'a>;

fn main() -> ExitCode {
    let checks: [(&str, Check); 9] = [
        ("clustered batches skip most squares, within the bound", clustered_batches),
        ("more squares than a warp has lanes", long_lines),
        ("independent pairs skip nothing", independent_pairs),
        ("every preset keeps its bound, with weights and ids", presets),
        ("masks, shared positives, waves and types", calls),
        ("the threshold is where the definition puts it", threshold),
        ("shards together", shards),
        ("a lax threshold is noticed", lax),
        ("the same bits under every order, and every barrier is needed", orders),
    ];
    run_checks(checks, vec![Listed::new("others", "other backends compute every tile", others)])
}

fn keep<'a>(p: Planned<'a>) -> Planned<'a> {
    p
}

/// Rows and columns of a square.
fn step(how: &CudaEmulated) -> usize {
    if clusters(how) { 256 } else { 64 }
}

/// By the plan of the problem, with f32 gradients.
fn run_with(how: &CudaEmulated, problem: &Problem, dtype: DType, run: Run, change: Change) -> Result<Outcome, Failed> {
    let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    let planned = Planned::new(*batch.pairs(), dtype, problem.dim)?;
    let mut device = Emulated::new(Plan::new(&change(how.problem(planned)))?, run)?;
    device.upload_embeddings("query", batch.query())?;
    device.upload_embeddings("passage", batch.passage())?;
    device.launch(Plan::forward)?;
    device.launch(Plan::backward)?;
    device.check_status(&batch)?;
    Ok(Outcome::read(&mut device)?)
}

fn run(how: &CudaEmulated, problem: &Problem) -> Result<Outcome, Failed> {
    run_with(how, problem, DType::BF16, Run::default(), keep)
}

fn skipping(whole: &Problem, share: f64) -> Problem {
    whole.clone().with(|call| call.with_tile_skipping(share))
}

/// Embeddings around as many centres as there are squares of queries; rows of a square belong to one centre, and so do their
/// passages. Hard negatives go around the centres in turn, in order.
fn clustered(
    how: &CudaEmulated,
    loss: Loss,
    shape: (usize, usize, usize),
    noise: f64,
    tau: f64,
) -> Result<Problem, Failed> {
    let (rows, passages, dim) = shape;
    let mut problem = problem(loss, Kind::Random, shape, tau, 5, 0.0)?;
    let count = rows.div_ceil(step(how));
    let mut source = Source::new(17);
    let centres = source.normal(count * dim);
    let mut around = |centre: usize| -> Vec<f64> {
        let noise = source.normal(dim).into_iter().map(|z| noise * z);
        noise.zip(&centres[centre * dim..]).map(|(z, c)| c + z).collect()
    };
    problem.query = (0..rows).flat_map(|i| around(i / step(how))).collect();
    let centre = |j: usize| if j < rows { j / step(how) } else { (j - rows) * count / (passages - rows) };
    problem.passage = (0..passages).flat_map(|j| around(centre(j))).collect();
    Ok(problem.rounded(DType::BF16))
}

/// Embeddings along a curve: cosines fall smoothly with the distance of the indices, so that the shares of squares cover every
/// size, those near the threshold among them. Passages beyond the rows go along the whole curve again.
fn curve(loss: Loss, shape: (usize, usize, usize), tau: f64, seed: u64) -> Result<Problem, Failed> {
    let (rows, passages, dim) = shape;
    let mut problem = problem(loss, Kind::Random, shape, tau, seed, 0.0)?;
    let mut source = Source::new(seed);
    let (frequency, phase) = (source.normal(dim), source.normal(dim));
    let mut at = |t: f64| -> Vec<f64> {
        let noise = source.normal(dim);
        (0..dim).map(|k| (6.0 * frequency[k] * t + 3.0 * phase[k]).cos() + 0.15 * noise[k]).collect()
    };
    problem.query = (0..rows).flat_map(|i| at(i as f64 / rows as f64)).collect();
    let place = |j: usize| if j < rows { j as f64 / rows as f64 } else { (j - rows) as f64 / (passages - rows) as f64 };
    problem.passage = (0..passages).flat_map(|j| at(place(j))).collect();
    Ok(problem.rounded(DType::BF16))
}

fn clustered_batches(how: &'static CudaEmulated) -> Result<(), Failed> {
    let shape = if clusters(how) { (768, 1000, 32) } else { (256, 320, 32) };
    for (loss, tau) in [(Loss::info_nce(), 0.02), (Loss::samtone_query(), 0.01), (Loss::samtone_both(), 0.02)] {
        let share = 1e-3;
        let whole = clustered(how, loss, shape, 0.25, tau)?;
        let problem = skipping(&whole, share);
        let (got, full) = (run(how, &problem)?, run(how, &whole)?);
        let used = Shares::new(&problem).expect_bound(&got, step(how), share)?;
        expect_near(&problem, &got, &full, share)?;
        note(format_args!(
            "{}: {} of {} squares skipped, {used:.1e} of the bound",
            problem.name, got.count, got.squares
        ));
        if got.count < 0.4 * got.squares || got.count > got.squares {
            return Err(format!("{}: {} of {} squares skipped", problem.name, got.count, got.squares).into());
        }
        // So little is left out here that the result is as near to the definition as without. Metrics apart: with so many rows some
        // cosine is too near to its positive's for f32 to tell which is larger.
        let reference = problem.run(backend::by_name("reference")?, DType::F64, 1.0).map(Expected::from)?;
        let reference = Expected { metrics: None, ..reference };
        verdict(&against_definition(&got.outputs, &reference, &problem, DType::BF16, 1.0))?;
    }
    if !clusters(how) {
        let problem = skipping(&clustered(how, Loss::samtone_query(), (256, 320, 32), 0.25, 0.02)?, 1e-3);
        let got = run_with(how, &problem, DType::BF16, Run::default(), |p| p.with_tile(Tile::Large))?;
        Shares::new(&problem).expect_bound(&got, 128, 1e-3)?;
        if got.count < 3.0 {
            return Err(format!("tiles of 128: {} of {} skipped", got.count, got.squares).into());
        }
    }
    Ok(())
}

/// A product reads the words of as many squares at once as a warp has lanes.
fn long_lines(how: &'static CudaEmulated) -> Result<(), Failed> {
    let (rows, passages) = if clusters(how) { (512, 9000) } else { (128, 2300) };
    let whole = clustered(how, Loss::info_nce(), (rows, passages, 16), 0.1, 0.01)?;
    let problem = skipping(&whole, 1e-3);
    let (got, full) = (run(how, &problem)?, run(how, &whole)?);
    Shares::new(&problem).expect_bound(&got, step(how), 1e-3)?;
    expect_near(&problem, &got, &full, 1e-3)?;
    let along = passages.div_ceil(step(how));
    if along <= 33 || got.count < 0.4 * got.squares {
        return Err(format!("{} of {} squares skipped, {along} along a row", got.count, got.squares).into());
    }
    Ok(())
}

fn independent_pairs(how: &'static CudaEmulated) -> Result<(), Failed> {
    let shape = if clusters(how) { (300, 520, 64) } else { (150, 200, 64) };
    for tau in [0.01, 0.05] {
        let plain = problem(Loss::samtone_both(), Kind::Random, shape, tau, 3, 0.0)?.rounded(DType::BF16);
        let (got, full) = (run(how, &skipping(&plain, 0.1))?, run(how, &plain)?);
        if got.count != 0.0 || got.squares == 0.0 || got.outputs != full.outputs {
            return Err(format!("{}: {} of {} squares skipped", plain.name, got.count, got.squares).into());
        }
    }
    Ok(())
}

fn all_presets() -> Result<Vec<Loss>, Failed> {
    Ok(Loss::PRESETS.iter().map(|(name, ..)| Loss::by_name(name)).collect::<samtone::Result<_>>()?)
}

fn presets(how: &'static CudaEmulated) -> Result<(), Failed> {
    let shape = if clusters(how) { (700, 1100, 40) } else { (231, 301, 40) };
    let (mut count, mut spared) = (0.0, 0.0);
    for (k, loss) in all_presets()?.into_iter().enumerate() {
        let seed = 20 + k as u64;
        let share = [1e-2, 1e-3, 1e-1][k % 3];
        let mut whole = curve(loss, shape, [0.05, 0.02][k % 2], seed)?;
        if k % 2 == 1 {
            let weights: Vec<_> = (0..shape.0).map(|i| [1.0, 0.0, 2.5, 0.125, 1e-3][(i / 7) % 5]).collect();
            whole = whole.with(|call| call.with_weights(weights));
        }
        if k % 3 == 2 {
            let mut source = Source::new(seed);
            let mut ids = |len: usize| (0..len).map(|_| source.below(len) as i64).collect::<Vec<_>>();
            let (query, passage) = (ids(shape.0), ids(shape.1));
            whole = whole.with(|call| call.with_query_ids(query).with_passage_ids(passage).with_shared_ids(true));
        }
        let problem = skipping(&whole, share);
        let (got, full) = (run(how, &problem)?, run(how, &whole)?);
        let used = Shares::new(&problem).expect_bound(&got, step(how), share)?;
        expect_near(&problem, &got, &full, share)?;
        note(format_args!(
            "{}: {} of {} squares skipped, {used:.1e} of the bound",
            problem.name, got.count, got.squares
        ));
        count += got.count;
        spared += Shares::new(&problem).spared(step(how), share) as f64;
    }
    // The device compares the largest sum with the most demanding row, which may be another one.
    if count > 0.0 && count >= 0.8 * spared {
        return Ok(());
    }
    Err(format!("{count} squares skipped, of {spared} that every row could spare").into())
}

fn calls(how: &'static CudaEmulated) -> Result<(), Failed> {
    let (m, n, dim) = if clusters(how) { (600, 800, 24) } else { (160, 230, 24) };
    let share = 1e-2;
    let mut skipped = Vec::new();
    let changes: [(&str, With); 5] = [
        ("shared positives", |call, m, _| call.with_positives((0..m).map(|i| (i - i % 3) as u32).collect::<Vec<_>>())),
        ("owners", |call, m, n| {
            let owner = |j| if j < m { -1 } else { (j - m) as i32 };
            call.with_hard_negative_owners((0..n).map(owner).collect::<Vec<_>>(), Scope::Own)
        }),
        ("a margin", |call, _, _| call.with_margin(0.05)),
        ("a row whose negatives are all masked", |call, m, _| {
            let id = |i| if i == 3 { 0 } else { i as i64 + 1 };
            call.with_query_ids((0..m).map(id).collect::<Vec<_>>()).with_margin(-1.9)
        }),
        ("waves", |call, m, _| call.with_workspace_bytes(if m > 300 { 600_000 } else { 100_000 })),
    ];
    for (k, (name, change)) in changes.into_iter().enumerate() {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            if clusters(how) && dtype == DType::F16 {
                continue; // its kernels are those of bf16 below 256 queries, and tested there
            }
            let whole = curve(Loss::samtone_both(), (m, n, dim), 0.02, 40 + k as u64)?;
            let whole = whole.with(|call| change(call, m, n));
            let problem = skipping(&whole, share);
            let got = run_with(how, &problem, dtype, Run::default(), keep)?;
            let full = run_with(how, &whole, dtype, Run::default(), keep)?;
            expect_near(&problem, &got, &full, share).map_err(|e| format!("{name}, {dtype}: {e}"))?;
            skipped.push((name, dtype, got.count, got.squares));
        }
    }
    note(format_args!("{skipped:?}"));
    let some = |name: &str| skipped.iter().any(|s| s.0 == name && s.2 > 0.0);
    match changes.iter().find(|(name, _)| !some(name)) {
        Some((name, _)) if !name.contains("all masked") => Err(format!("{name}: nothing skipped").into()),
        _ => Ok(()),
    }
}

/// All rows of a square are the same, so that its share is one number, known from the definition.
fn threshold(how: &'static CudaEmulated) -> Result<(), Failed> {
    let side = step(how);
    for loss in [Loss::info_nce(), Loss::clip(), Loss::gte()] {
        let plain = clustered(how, loss, (2 * side, 2 * side, 16), 0.0, 0.2)?;
        let smallest = Shares::new(&plain).smallest_threshold(side);
        for (factor, want) in [(0.99, false), (1.01, true)] {
            let problem = skipping(&plain, smallest * factor);
            let got = run(how, &problem)?;
            if (got.count > 0.0) != want {
                return Err(format!("{}: {} skipped at {factor} times the threshold", plain.name, got.count).into());
            }
            let used = Shares::new(&problem).expect_bound(&got, side, smallest * factor)?;
            note(format_args!(
                "{} at {factor} times its threshold: {} skipped, {used:.2} of the bound",
                plain.name, got.count
            ));
        }
    }
    Ok(())
}

fn shards(how: &'static CudaEmulated) -> Result<(), Failed> {
    let (shape, share) = (if clusters(how) { (600, 700, 24) } else { (200, 260, 24) }, 1e-2);
    let cuts = [0, shape.0 / 3, shape.0];
    let whole = curve(Loss::samtone_both(), shape, 0.02, 60)?;
    let (problem, full) = (skipping(&whole, share), run(how, &whole)?);
    let (query, passage) = (Buffer::new(DType::BF16, &problem.query), Buffer::new(DType::BF16, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    let mut devices = Vec::new();
    for rows in cuts.windows(2) {
        let planned = Planned::new(*batch.pairs(), DType::BF16, problem.dim)?;
        let planned = how.problem(planned.with_rows(rows[0]..rows[1])?);
        let mut device = Emulated::new(Plan::new(&planned)?, Run::default())?;
        device.upload_embeddings("query", batch.query())?;
        device.upload_embeddings("passage", batch.passage())?;
        device.launch(Plan::partials)?;
        devices.push(device);
    }
    let mut sums: Vec<ExpSum> = devices[0].download("sums")?;
    let mut above: Vec<u32> = devices[0].download("above")?;
    for (mine, theirs) in sums.iter_mut().zip(devices[1].download::<ExpSum>("sums")?) {
        let top = if mine.sum == 0.0 { theirs.exponent } else { mine.exponent.max(theirs.exponent) };
        let scaled = |s: &ExpSum| if s.sum == 0.0 { 0.0 } else { s.sum * f64::from(s.exponent - top).exp2() };
        *mine = ExpSum { sum: scaled(mine) + scaled(&theirs), exponent: top, padding: 0 };
    }
    above.iter_mut().zip(devices[1].download::<u32>("above")?).for_each(|(a, b)| *a += b);
    let mut all: Option<Outcome> = None;
    for device in &mut devices {
        device.upload("sums", &sums)?;
        device.upload("above", &above)?;
        device.launch(Plan::combine)?;
        device.launch(Plan::backward_alone)?;
        let mine = Outcome::read(device)?;
        note(format_args!("{} of {} squares of a shard skipped", mine.count, mine.squares));
        if mine.count == 0.0 {
            return Err("a shard skips nothing".into());
        }
        all = Some(match all {
            None => mine,
            Some(mut all) => {
                all.outputs.grad_query.extend(mine.outputs.grad_query);
                all.outputs.grad_passage.iter_mut().zip(mine.outputs.grad_passage).for_each(|(a, b)| *a += b);
                all.outputs.temperature.tau += mine.outputs.temperature.tau;
                all.outputs.temperature.log_beta += mine.outputs.temperature.log_beta;
                all
            }
        });
    }
    let mut all = all.ok_or("no shard")?;
    // Sums of shards are merged in another order.
    let (loss, want) = (all.outputs.evaluation.loss, full.outputs.evaluation.loss);
    all.outputs.evaluation = full.outputs.evaluation.clone();
    expect_near(&problem, &all, &full, share)?;
    if (loss - want).abs() <= 1e-6 * want {
        Ok(())
    } else {
        Err(format!("loss {loss} of shards, {want} of all").into())
    }
}

/// log₂(η/C) of `choose_skipped`, the f64 after four pointers of its last argument, is 10 too large: 1024 times what is allowed.
fn a_thousand_times_laxer(launch: &mut Launch) {
    if launch.kernel == "choose_skipped" {
        let bytes = &mut launch.arguments.last_mut().unwrap().bytes[32..40];
        let log2_share = f64::from_le_bytes(bytes.try_into().unwrap());
        bytes.copy_from_slice(&(log2_share + 10.0).to_le_bytes());
    }
}

/// Every square counts as without mass.
fn everything(launch: &mut Launch) {
    if launch.kernel == "choose_skipped" {
        launch.arguments.last_mut().unwrap().bytes[32..40].copy_from_slice(&f64::INFINITY.to_le_bytes());
    }
}

fn lax(how: &'static CudaEmulated) -> Result<(), Failed> {
    let (shape, share) = (if clusters(how) { (700, 700, 40) } else { (231, 301, 40) }, 1e-2);
    let whole = curve(Loss::samtone_query(), shape, 0.05, 70)?;
    let (problem, full) = (skipping(&whole, share), run(how, &whole)?);
    for (name, change) in
        [("1024 times", a_thousand_times_laxer as fn(&mut Launch)), ("whatever it is", everything as fn(&mut Launch))]
    {
        let run = Run { change: Some(change), ..Run::default() };
        let got = run_with(how, &problem, DType::BF16, run, keep)?;
        let by_sums = Shares::new(&problem).expect_bound(&got, step(how), share);
        let by_gradient = expect_near(&problem, &got, &full, share);
        note(format_args!("{name}: {} of {} skipped, {by_sums:?}, {by_gradient:?}", got.count, got.squares));
        if by_sums.is_ok() || by_gradient.is_ok() && name != "1024 times" {
            return Err(format!("nobody notices a threshold that is too lax: {name}").into());
        }
    }
    Ok(())
}

fn orders(how: &'static CudaEmulated) -> Result<(), Failed> {
    let shape = if clusters(how) { (520, 530, 24) } else { (140, 200, 24) };
    let problem = skipping(&curve(Loss::samtone_both(), shape, 0.02, 80)?, 1e-2);
    let first = run(how, &problem)?;
    if first.count == 0.0 {
        return Err("nothing is skipped".into());
    }
    for seed in 1..4 {
        if run_with(how, &problem, DType::BF16, Run { seed, ..Run::default() }, keep)? != first {
            return Err(format!("seed {seed} gives other bits").into());
        }
    }
    for label in ["D1", "R1", "R2"] {
        let mutant = Some(("skip_squares", label));
        let noticed =
            |seed| run_with(how, &problem, DType::BF16, Run { seed, mutant, ..Run::default() }, keep).is_err();
        if !(0..4).any(noticed) {
            return Err(format!("nobody misses {label}").into());
        }
    }
    Ok(())
}

/// Backends that skip nothing take the option, and give the same bits.
fn others() -> Result<(), Failed> {
    let plain = problem(Loss::samtone_both(), Kind::Trained, (20, 30, 16), 0.02, 1, 0.0)?.rounded(DType::F32);
    let skipping = skipping(&plain, 0.5);
    for name in ["reference", "cpu"] {
        let outputs = |p: &Problem| -> Result<Outputs, Failed> { Ok(p.run(backend::by_name(name)?, DType::F32, 1.0)?) };
        if outputs(&plain)? != outputs(&skipping)? {
            return Err(format!("{name} gives other bits").into());
        }
    }
    Ok(())
}
