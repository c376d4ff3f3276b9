//! Plans of the CUDA backend on the emulator: every arithmetic and tile, super-blocks and waves, shards, forward and backward apart,
//! types and strides of outputs, refused inputs. Every order of threads gives the same bits. Kernels with a barrier left out are noticed.
//!
//! Without a C++ compiler the trials are reported as ignored. With `cuda-emulated` in `SAMTONE_REQUIRE` they fail instead.

#[path = "cuda_plans/fallbacks.rs"]
mod fallbacks;
#[path = "cuda_plans/prefixes.rs"]
mod prefixes;
mod support;

use libtest_mimic::Failed;
use samtone::backend::{self, Backend};
use samtone::cuda::abi::{ExpSum, NONE, RESULTS};
use samtone::cuda::{Arithmetic, GradientOutput, Plan, Problem as Planned, Tile};
use samtone::{Block, Call, DType, EmbeddingsMut, Error, GradientBuffers, Group, Loss, ZeroNorm};
use std::process::{Command, ExitCode};
use support::case::Expected;
use support::compare::{against_definition, verdict};
use support::cuda_emulated::{self, Check, CudaEmulated, Emulated, Run, clusters, run_checks};
use support::data::{Kind, duplicate_ids, problem};
use support::problem::{Buffer, Outputs, Problem};
use support::report::{Listed, note};

fn main() -> ExitCode {
    let checks: [(&str, Check); 20] = [
        ("every barrier is needed", barriers),
        ("with prefixes, every barrier is needed", prefixes::barriers),
        ("with prefixes, every arithmetic and tile", prefixes::arithmetics),
        ("with prefixes, at a small temperature", prefixes::fallbacks),
        ("with prefixes, the same bits from stored and from recomputed cosines", prefixes::cosines),
        ("with prefixes, shards together give the whole", prefixes::shards),
        ("with prefixes, outputs of any type and stride, and the same bits under every order", prefixes::outputs),
        ("with prefixes, a frozen tower is left out", prefixes::frozen),
        ("with prefixes, refused inputs", prefixes::refused),
        ("every arithmetic and tile", arithmetics),
        ("every arithmetic and tile at a small temperature", fallbacks::fallbacks),
        ("a tight workspace makes waves", waves),
        ("shards together give the whole", shards),
        ("forward and backward apart give the bits of the fused call", apart),
        ("outputs of any type and stride", outputs),
        ("a frozen tower is left out", frozen),
        ("the same bits under every order", determinism),
        ("refused inputs", refused),
        ("nothing is left of the call before", again),
        ("the last block adds up many", many_rows),
    ];
    run_checks(checks, vec![Listed::new("others", "plans run on another device", another_device)])
}

/// The executable that the environment names is the one that is started, and it failing is a failure.
fn another_device() -> Result<(), Failed> {
    let device = "no/such/device";
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "cuda-emulated: a frozen tower is left out"]).env(cuda_emulated::ANOTHER_DEVICE, device);
    let output = command.output()?;
    let printed = String::from_utf8_lossy(&output.stdout);
    if output.status.success() || !printed.contains(device) {
        return Err(format!("without the device that is named, the test printed {printed}").into());
    }
    Ok(())
}

fn sized(kind: Kind, loss: Loss, shape: (usize, usize, usize)) -> Result<Problem, Failed> {
    Ok(problem(loss, kind, shape, 0.05, 11, 0.0)?)
}

/// By the plan that `change` makes of the default one.
fn run_with(
    problem: &Problem,
    dtype: DType,
    run: Run,
    change: impl for<'a> Fn(Planned<'a>) -> samtone::Result<Planned<'a>>,
) -> samtone::Result<Outputs> {
    let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    let mut gradients = [&problem.query, &problem.passage].map(|x| Buffer::new(DType::F32, &vec![f64::NAN; x.len()]));
    let [grad_query, grad_passage] = &mut gradients;
    let buffers = GradientBuffers {
        query: Some(grad_query.embeddings_mut(problem.rows, problem.dim)?),
        passage: Some(grad_passage.embeddings_mut(problem.passages, problem.dim)?),
    };
    let planned = change(Planned::new(*batch.pairs(), dtype, problem.dim)?)?;
    let (evaluation, temperature) = cuda_emulated::run(&planned, &batch, buffers, run)?;
    let [grad_query, grad_passage] = gradients.map(|g| g.to_f64());
    Ok(Outputs { evaluation, grad_query, grad_passage, temperature })
}

fn reference(problem: &Problem) -> Result<Expected, Failed> {
    Ok(problem.run(backend::by_name("reference")?, DType::F64, 1.0).map(Expected::from)?)
}

fn compare(got: &Outputs, problem: &Problem, tolerance: DType) -> Result<(), Failed> {
    let want = reference(problem)?;
    Ok(verdict(&against_definition(got, &want, problem, tolerance, 1.0))
        .map_err(|e| format!("{}: {e}", problem.name))?)
}

fn arithmetics(how: &'static CudaEmulated) -> Result<(), Failed> {
    // Each arithmetic is held to the row of the type it is the default of, whatever the type of the embeddings.
    let rows = [
        (Arithmetic::F16, DType::BF16),
        (Arithmetic::F16x2, DType::F16),
        (Arithmetic::F16x3, DType::F32),
        (Arithmetic::Exact, DType::F32),
    ];
    for (arithmetic, dtype) in rows {
        let tiles: &[Tile] = match (how.name(), arithmetic) {
            ("cuda-emulated", Arithmetic::Exact) => &[Tile::Small],
            ("cuda-emulated", _) => &[Tile::Small, Tile::Large],
            (_, Arithmetic::Exact) => &[],
            _ => &[Tile::Cluster],
        };
        for &tile in tiles {
            for (shape, kind) in
                [((129, 300, 72), Kind::Random), ((64, 64, 64), Kind::Trained), ((1, 3, 5), Kind::Random)]
            {
                let problem = sized(kind, Loss::samtone_both(), shape)?.rounded(dtype);
                let got = run_with(&problem, dtype, Run::default(), |p| {
                    Ok(how.problem(p).with_arithmetic(arithmetic).with_tile(tile))
                })?;
                compare(&got, &problem, dtype).map_err(|e| format!("{arithmetic:?} {tile:?}: {e:?}"))?;
            }
        }
    }
    Ok(())
}

fn waves(how: &'static CudaEmulated) -> Result<(), Failed> {
    // A super-block of one tile or square, and one of several; of clusters, whose squares are four tiles, a larger batch.
    let clusters = clusters(how);
    let (shape, bounds) =
        if clusters { ((300, 400, 40), [270_000, 1_200_000]) } else { ((200, 270, 40), [70_000, 300_000]) };
    let shared = |i| ((i * 7 + 3) % (shape.0 * 3 / 4)) as u32; // rows that share, and passages that are nobody's
    let mut problem = sized(Kind::Random, Loss::gte(), shape)?.rounded(DType::BF16);
    problem = problem.with(|call| call.with_positives((0..shape.0).map(shared).collect::<Vec<_>>()));
    for bytes in bounds {
        problem = problem.with(|call| call.with_workspace_bytes(bytes));
        let (query, passage) = (Buffer::new(DType::BF16, &problem.query), Buffer::new(DType::BF16, &problem.passage));
        let batch = problem.batch(&query, &passage)?;
        let planned = Planned::new(*batch.pairs(), DType::BF16, problem.dim)?;
        let plan = Plan::new(&how.problem(planned))?;
        let products = plan.backward().iter().filter(|l| l.module.starts_with("gradient_product")).count();
        if products < 2 || plan.bounded_bytes() > bytes {
            return Err(format!("{products} waves, {} bytes of {bytes}: {plan}", plan.bounded_bytes()).into());
        }
        compare(&run_with(&problem, DType::BF16, Run::default(), |p| Ok(how.problem(p)))?, &problem, DType::BF16)?;
    }
    problem = problem.with(|call| call.with_workspace_bytes(1000));
    match run_with(&problem, DType::BF16, Run::default(), |p| Ok(how.problem(p))) {
        Err(Error::WorkspaceTooSmall { given: 1000, needed, .. }) if needed > 1000 => Ok(()),
        other => Err(format!("a bound of 1000 bytes gave {other:?}").into()),
    }
}

/// Whose queries are passages of other rows, and of other shards.
fn shared(call: Call) -> Call {
    let call = call.with_positives((0..70).map(|i| (i * 5 + 1) % 60).collect::<Vec<_>>());
    let (query, passage): (Vec<_>, Vec<_>) = ((0..70).collect(), (0..90).map(|j| j * 7 % 80).collect());
    call.with_query_ids(query).with_passage_ids(passage).with_shared_ids(true)
}

fn shards(how: &'static CudaEmulated) -> Result<(), Failed> {
    let problem = sized(Kind::Random, Loss::samtone_both(), (70, 90, 24))?.rounded(DType::F16);
    shards_of(how, &problem.with(shared))
}

/// A problem of 70 rows in f16, in shards.
fn shards_of(how: &'static CudaEmulated, problem: &Problem) -> Result<(), Failed> {
    let (query, passage) = (Buffer::new(DType::F16, &problem.query), Buffer::new(DType::F16, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    let ranges = [0..13, 13..64, 64..70];
    let mut devices = Vec::new();
    for range in &ranges {
        let planned = Planned::new(*batch.pairs(), DType::F16, problem.dim)?;
        let planned = how.problem(planned.with_rows(range.clone())?);
        let mut device = Emulated::new(Plan::new(&planned)?, Run::default())?;
        device.upload_embeddings("query", batch.query())?;
        device.upload_embeddings("passage", batch.passage())?;
        device.launch(Plan::partials)?;
        devices.push(device);
    }
    let mut sums: Vec<ExpSum> = devices[0].download("sums")?;
    let mut above: Vec<u32> = devices[0].download("above")?;
    for device in &mut devices[1..] {
        for (mine, theirs) in sums.iter_mut().zip(device.download::<ExpSum>("sums")?) {
            let top = if mine.sum == 0.0 { theirs.exponent } else { mine.exponent.max(theirs.exponent) };
            let scaled = |s: &ExpSum| if s.sum == 0.0 { 0.0 } else { s.sum * f64::from(s.exponent - top).exp2() };
            *mine = ExpSum { sum: scaled(mine) + scaled(&theirs), exponent: top, padding: 0 };
        }
        above.iter_mut().zip(device.download::<u32>("above")?).for_each(|(a, b)| *a += b);
    }
    let (mut grad_query, mut grad_passage) = (Vec::new(), vec![0.0; problem.passage.len()]);
    let (mut tau, mut log_beta, mut evaluation) = (0.0, 0.0, None);
    for device in &mut devices {
        device.upload("sums", &sums)?;
        device.upload("above", &above)?;
        device.launch(Plan::combine)?;
        device.launch(Plan::backward_alone)?;
        grad_query.extend(device.download::<f32>("query_gradient")?.into_iter().map(f64::from));
        let passage: Vec<f32> = device.download("passage_gradient")?;
        grad_passage.iter_mut().zip(passage).for_each(|(a, b)| *a += f64::from(b));
        let temperature = device.temperature()?;
        tau += temperature.tau;
        log_beta += temperature.log_beta;
        evaluation = Some(device.evaluation(&cuda_emulated::listed(&batch))?);
    }
    let evaluation = evaluation.ok_or("no shard")?;
    let temperature = samtone::TemperatureGradient { tau, log_beta };
    compare(&Outputs { evaluation, grad_query, grad_passage, temperature }, problem, DType::F16)
}

fn apart(how: &'static CudaEmulated) -> Result<(), Failed> {
    let problem = sized(Kind::Random, Loss::samtone_query(), (40, 50, 24))?.rounded(DType::BF16);
    let fused = run_with(&problem, DType::BF16, Run::default(), |p| how.problem(p).with_upstream(2.0))?;
    let (query, passage) = (Buffer::new(DType::BF16, &problem.query), Buffer::new(DType::BF16, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    let planned = Planned::new(*batch.pairs(), DType::BF16, problem.dim)?;
    let mut device = Emulated::new(Plan::new(&how.problem(planned).with_device_upstream())?, Run::default())?;
    device.upload_embeddings("query", batch.query())?;
    device.upload_embeddings("passage", batch.passage())?;
    device.launch(Plan::forward)?;
    // The workspace may have served others in between.
    for name in ["query_packed", "passage_packed", "query_inverse", "passage_inverse", "block_results"] {
        let bytes = device.plan().array(name).ok_or("no such array")?.bytes as usize;
        device.upload(name, &vec![0xff_u8; bytes])?;
    }
    device.upload("upstream", &[2.0_f32])?;
    device.launch(Plan::backward_alone)?;
    let gradient: Vec<f32> = device.download("query_gradient")?;
    let same = gradient.iter().zip(&fused.grad_query).all(|(a, b)| f64::from(*a) == *b);
    let temperature = device.temperature()?;
    if !same || device.evaluation(&[])? != fused.evaluation || temperature != fused.temperature {
        return Err("the two calls differ".into());
    }
    Ok(())
}

fn strided(buffer: &mut Buffer, rows: usize, dim: usize, stride: usize) -> samtone::Result<EmbeddingsMut<'_>> {
    match buffer {
        Buffer::F64(x) => EmbeddingsMut::with_row_stride(x, rows, dim, stride),
        Buffer::F32(x) => EmbeddingsMut::with_row_stride(x, rows, dim, stride),
        Buffer::F16(x) => EmbeddingsMut::with_row_stride(x, rows, dim, stride),
        Buffer::BF16(x) => EmbeddingsMut::with_row_stride(x, rows, dim, stride),
    }
}

fn outputs(how: &'static CudaEmulated) -> Result<(), Failed> {
    outputs_of(how, &sized(Kind::Random, Loss::samtone_both(), (20, 33, 19))?.rounded(DType::F32))
}

/// A problem of 20 x 33 x 19 in f32.
fn outputs_of(how: &'static CudaEmulated, problem: &Problem) -> Result<(), Failed> {
    let exact = run_with(problem, DType::F32, Run::default(), |p| Ok(how.problem(p)))?;
    let (query, passage) = (Buffer::new(DType::F32, &problem.query), Buffer::new(DType::F32, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    for (dtype, stride, step) in
        [(DType::F32, 23, 1e-7), (DType::F32, 24, 1e-7), (DType::F16, 19, 1e-3), (DType::BF16, 20, 8e-3)]
    {
        let mut gradients = [20, 33].map(|rows| Buffer::new(dtype, &vec![-7.0; rows * stride]));
        let planned = Planned::new(*batch.pairs(), DType::F32, problem.dim)?;
        let output = Some(GradientOutput { dtype, row_stride: stride });
        let planned = how.problem(planned.with_gradients(output, output)?);
        let [q, p] = &mut gradients;
        let buffers =
            GradientBuffers { query: Some(strided(q, 20, 19, stride)?), passage: Some(strided(p, 33, 19, stride)?) };
        cuda_emulated::run(&planned, &batch, buffers, Run::default())?;
        for (got, want) in gradients.iter().zip([&exact.grad_query, &exact.grad_passage]) {
            let largest = want.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            for (row, want) in got.to_f64().chunks(stride).zip(want.chunks(problem.dim)) {
                let near = row.iter().zip(want).all(|(g, w)| (g - w).abs() <= step * largest); // false for NaN
                if !near || row[problem.dim..].iter().any(|v| *v != -7.0) {
                    return Err(format!("{dtype}, stride {stride}: {row:?}, wanted {want:?}").into());
                }
            }
        }
    }
    Ok(())
}

fn frozen(how: &'static CudaEmulated) -> Result<(), Failed> {
    frozen_of(how, &sized(Kind::Random, Loss::samtone_both(), (30, 33, 16))?.rounded(DType::F16))
}

/// A problem of 30 x 33 x 16 in f16.
fn frozen_of(how: &'static CudaEmulated, problem: &Problem) -> Result<(), Failed> {
    let all = run_with(problem, DType::F16, Run::default(), |p| Ok(how.problem(p)))?;
    let (query, passage) = (Buffer::new(DType::F16, &problem.query), Buffer::new(DType::F16, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    let planned = Planned::new(*batch.pairs(), DType::F16, problem.dim)?;
    let planned = planned.with_gradients(None, Some(GradientOutput { dtype: DType::F32, row_stride: 16 }))?;
    let planned = how.problem(planned);
    let mut gradient = Buffer::new(DType::F32, &vec![f64::NAN; problem.passage.len()]);
    let buffers = GradientBuffers { query: None, passage: Some(gradient.embeddings_mut(33, 16)?) };
    let (_, temperature) = cuda_emulated::run(&planned, &batch, buffers, Run::default())?;
    let whole = Planned::new(*batch.pairs(), DType::F16, problem.dim)?;
    let whole = Plan::new(&how.problem(whole))?;
    if gradient.to_f64() != all.grad_passage
        || temperature != all.temperature
        || Plan::new(&planned)?.flops() >= whole.flops()
    {
        return Err("a frozen query tower changed the passages' gradient, or saved nothing".into());
    }
    Ok(())
}

fn determinism(how: &'static CudaEmulated) -> Result<(), Failed> {
    let problem = sized(Kind::Duplicates, Loss::samtone_both(), (70, 80, 40))?.rounded(DType::BF16);
    let problem = problem.with(|call| call.with_query_ids(duplicate_ids(70)).with_passage_ids(duplicate_ids(80)));
    let first = run_with(&problem, DType::BF16, Run::default(), |p| Ok(how.problem(p)))?;
    for seed in 1..6 {
        if run_with(&problem, DType::BF16, Run { seed, ..Run::default() }, |p| Ok(how.problem(p)))? != first {
            return Err(format!("seed {seed} gives other bits").into());
        }
    }
    Ok(())
}

fn refused(how: &'static CudaEmulated) -> Result<(), Failed> {
    let problem = sized(Kind::Random, Loss::decoupled(), (9, 9, 8))?.rounded(DType::F32);
    let with = |change: fn(&mut Problem)| {
        let mut changed = problem.clone();
        change(&mut changed);
        run_with(&changed, DType::F32, Run::default(), |p| Ok(how.problem(p)))
    };
    match with(|p| p.query[5 * 8 + 3] = f64::NAN) {
        Err(Error::NonFinite { row: 5, column: 3, .. }) => {}
        other => return Err(format!("NaN gave {other:?}").into()),
    }
    match with(|p| p.passage[2 * 8..3 * 8].fill(0.0)) {
        Err(Error::ZeroNorm { row: 2, .. }) => {}
        other => return Err(format!("a zero row gave {other:?}").into()),
    }
    // Nobody has a negative.
    let lonely = problem.clone().with(|call| call.with_passage_ids([1; 9]));
    match run_with(&lonely, DType::F32, Run::default(), |p| Ok(how.problem(p))) {
        Err(Error::NoNegative { row: 0, group: 0, .. }) => {}
        other => return Err(format!("no negative gave {other:?}").into()),
    }
    let groups = [[Block::QP], [Block::QQ]].map(|blocks| Group::new(1.0, &blocks, 0));
    let loss = Loss::custom("two groups", groups.into_iter().collect::<samtone::Result<_>>()?)?;
    let second = sized(Kind::Random, loss, (9, 12, 8))?; // passages of nobody are negatives of all
    let weights = [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0];
    let second = second.with(|call| call.with_query_ids([1; 9]).with_weights(weights));
    match run_with(&second, DType::F32, Run::default(), |p| Ok(how.problem(p))) {
        Err(Error::NoNegative { row: 2, group: 1, .. }) => {}
        other => return Err(format!("no negative in the second group gave {other:?}").into()),
    }
    let zero = with(|p| {
        p.passage[2 * 8..3 * 8].fill(0.0);
        p.call = p.call.clone().with_zero_norm(ZeroNorm::ZeroGradient);
    })?;
    if zero.grad_passage[2 * 8..3 * 8].iter().any(|g| *g != 0.0) || !zero.evaluation.loss.is_finite() {
        return Err("a row without direction has a gradient, or there is no loss".into());
    }
    // Whoever does not look at the status must not see a number.
    let (query, passage) = (Buffer::new(DType::F32, &problem.query), Buffer::new(DType::F32, &problem.passage));
    let batch = lonely.batch(&query, &passage)?;
    let planned = Planned::new(*batch.pairs(), DType::F32, 8)?;
    let mut device = Emulated::new(Plan::new(&how.problem(planned))?, Run::default())?;
    device.upload_embeddings("query", batch.query())?;
    device.upload_embeddings("passage", batch.passage())?;
    device.launch(Plan::forward)?;
    if !device.evaluation(&[])?.loss.is_nan() {
        return Err("rows without negatives have a loss".into());
    }
    let (query, passage) = (Buffer::new(DType::F32, &[f64::NAN; 72]), Buffer::new(DType::F32, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    let planned = Planned::new(*batch.pairs(), DType::F32, 8)?;
    let mut device = Emulated::new(Plan::new(&how.problem(planned))?, Run::default())?;
    device.upload_embeddings("query", batch.query())?;
    device.upload_embeddings("passage", batch.passage())?;
    device.launch(Plan::forward)?;
    device.launch(Plan::backward)?;
    let gradients = [device.download::<f32>("query_gradient")?, device.download::<f32>("passage_gradient")?].concat();
    if !device.evaluation(&[])?.loss.is_nan() || !gradients.iter().all(|g| g.is_nan()) {
        return Err("a refused call left numbers".into());
    }
    Ok(())
}

/// A refused call, then a good one on the same state, as a graph does it; a part that is launched twice.
fn again(how: &'static CudaEmulated) -> Result<(), Failed> {
    let problem = sized(Kind::Random, Loss::samtone_both(), (150, 170, 16))?.rounded(DType::F32);
    let problem = problem.with(|call| call.with_workspace_bytes(if clusters(how) { 600_000 } else { 100_000 }));
    let want = run_with(&problem, DType::F32, Run::default(), |p| Ok(how.problem(p)))?;
    let (mut query, mut passage) = (problem.query.clone(), problem.passage.clone());
    query[149 * 16 + 3] = f64::NAN;
    passage[16..32].fill(0.0);
    passage[100 * 16] = f64::INFINITY;
    let of = |query: &[f64], passage: &[f64]| (Buffer::new(DType::F32, query), Buffer::new(DType::F32, passage));
    let ((good_query, good_passage), (query, passage)) = (of(&problem.query, &problem.passage), of(&query, &passage));
    let (good, bad) = (problem.batch(&good_query, &good_passage)?, problem.batch(&query, &passage)?);
    let planned = Planned::new(*good.pairs(), DType::F32, problem.dim)?;
    let mut device = Emulated::new(Plan::new(&how.problem(planned))?, Run::default())?;
    for (batch, status) in [(&bad, [149, 100, NONE, 1]), (&good, [NONE; 4]), (&bad, [149, 100, NONE, 1])] {
        device.upload_embeddings("query", batch.query())?;
        device.upload_embeddings("passage", batch.passage())?;
        // Neither a second call of a part nor the order of the parts leaves a trace.
        device.launch(Plan::partials)?;
        device.launch(Plan::combine)?;
        device.upload("results", &[-7.0; RESULTS])?;
        device.launch(Plan::combine)?;
        let apart = device.evaluation(&[])?;
        device.launch(Plan::forward)?;
        if device.download::<u32>("ticket")? != [0] {
            return Err("the ticket is not as it was".into());
        }
        device.launch(Plan::backward)?;
        device.launch(Plan::backward_alone)?;
        let found: Vec<u32> = device.download("status")?;
        if found[..4] != status || found[4..].iter().any(|word| *word != NONE) {
            return Err(format!("the status is {found:?}, not {status:?}").into());
        }
        let gradient: Vec<f32> = device.download("passage_gradient")?;
        let same = gradient.iter().zip(&want.grad_passage).all(|(a, b)| f64::from(*a) == *b);
        let whole = apart == want.evaluation && device.evaluation(&[])? == want.evaluation;
        if std::ptr::eq(batch, &good) {
            if !same || !whole || device.temperature()? != want.temperature {
                return Err("a call before changed the results".into());
            }
        } else if !device.evaluation(&[])?.loss.is_nan() || !gradient.iter().all(|g| g.is_nan()) {
            return Err("a refused call left numbers".into());
        }
    }
    Ok(())
}

/// More blocks of `combine` than it has threads: from sums that no pass has made, because products of so many rows take too long.
fn many_rows(how: &'static CudaEmulated) -> Result<(), Failed> {
    const ROWS: usize = 16_500;
    let call = Call::new(Loss::info_nce(), 0.1);
    let problem = how.problem(Planned::new(call.pairs(ROWS, ROWS)?, DType::F32, 1)?);
    let mut device = Emulated::new(Plan::new(&problem)?, Run::default())?;
    let sums = (0..4 * ROWS).map(|i| ExpSum { sum: 1.0 + (i % 977) as f64, exponent: 3, padding: 0 });
    let above: Vec<u32> = (0..2 * ROWS).map(|i| u32::from(i % 3 != 0)).collect();
    device.upload("sums", &sums.collect::<Vec<_>>())?;
    device.upload("above", &above)?;
    device.upload("positive", &vec![0.5; ROWS])?;
    device.upload("ticket", &[0_u32])?;
    for name in ["query_faults", "passage_faults"] {
        device.upload(name, &vec![NONE; 2 * ROWS])?;
    }
    device.launch(Plan::combine)?;
    let got = device.evaluation(&[])?;
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / ROWS as f64;
    let wanted = mean(&mut got.row_losses.iter().copied());
    let precision = mean(&mut above[..ROWS].iter().map(|a| f64::from(u8::from(*a == 0))));
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b;
    if !near(got.loss, wanted) || !near(got.query_to_passage.precision_at_1, precision) {
        return Err(format!("loss {}, not {wanted}; {:?}, not {precision}", got.loss, got.query_to_passage).into());
    }
    Ok(())
}

/// Leaves out one barrier or wait at a time, named as in the kernels' headers. Each must be seen: as a conflict, and, of the
/// kernels of 8.0, with detection of conflicts off, as other bits or a failure under some order of the threads.
fn barriers(how: &'static CudaEmulated) -> Result<(), Failed> {
    const SM80: &[Labels] = &[
        ("logsumexp_sm80", &["P1", "P2", "P3", "E1", "L1"]),
        ("gradient_tile_sm80", &["P1", "P2", "P3", "E1", "G1"]),
        ("gradient_product_sm80", &["P1", "P2", "P3"]),
        ("combine", &["R1", "C1", "C5"]),
        ("project", &["R1"]),
    ];
    // Of a message to the last block: blocks run one after the other here, so that results are right anyway.
    const MESSAGES: &[Labels] = &[("combine", &["C2", "C3", "C4"])];
    // Waits for earlier launches, which are complete here.
    const WAITS: &[Labels] = &[
        ("prepare", &["D1"]),
        ("logsumexp_sm80", &["D1"]),
        ("combine", &["D1"]),
        ("gradient_tile_sm80", &["D1"]),
        ("gradient_product_sm80", &["D1"]),
        ("project", &["D1"]),
    ];
    const SM90A: &[Labels] = &[
        ("logsumexp_sm90a", &["D1", "P1", "P2", "P3", "P4", "P5", "E1", "E2", "E3", "L1", "L2"]),
        // Not E3: the warpgroup's barriers of the last half order its reads already.
        ("gradient_tile_sm90a", &["D1", "P1", "P2", "P3", "P4", "P5", "E1", "E2", "G1", "G2", "G3", "G4"]),
        ("gradient_product_sm90a", &["D1", "P1", "P2", "P3", "P4", "P5"]),
    ];
    let labels = if clusters(how) { SM90A.to_vec() } else { [SM80, MESSAGES, WAITS].concat() };
    // More stages than the ring has, and the last one in the slot where the epilogue begins. Several waves. Of clusters, several
    // squares for each.
    let shape = if clusters(how) { (257, 300, 320) } else { (66, 70, 256) };
    let problem = sized(Kind::Random, Loss::samtone_both(), shape)?.rounded(DType::BF16);
    let problem = problem.with(|call| call.with_workspace_bytes(if clusters(how) { 1_200_000 } else { 100_000 }));
    expect_needed(how, &problem, &labels, &[MESSAGES, WAITS].concat())
}

/// Labels by kernel file.
type Labels = (&'static str, &'static [&'static str]);

/// An error if a barrier can be left out. Those that are `unseen` are seen as a conflict only.
fn expect_needed(
    how: &'static CudaEmulated,
    problem: &Problem,
    labels: &[Labels],
    unseen: &[Labels],
) -> Result<(), Failed> {
    let want = run_with(problem, DType::BF16, Run::default(), |p| Ok(how.problem(p)))?;
    let mut survivors = Vec::new();
    for (module, label) in labels.iter().flat_map(|(module, labels)| labels.iter().map(move |label| (*module, *label)))
    {
        let run = |seed, ignore_races| {
            let run = Run { seed, ignore_races, mutant: Some((module, label)), ..Run::default() };
            run_with(problem, DType::BF16, run, |p| Ok(how.problem(p)))
        };
        // Conflicts come first and so are looked for under one order after the other; results are compared for the smaller kernels
        // alone, where a launch takes little, because some barriers of the larger are missed under few orders.
        let conflict = (0..4).any(|seed| run(seed, false).is_err());
        let unseen = clusters(how) || unseen.iter().any(|(of, labels)| *of == module && labels.contains(&label));
        let wrong = unseen || (0..6).any(|seed| run(seed, true).map_or(true, |got| got != want));
        let results = if unseen { String::new() } else { format!(", other results {wrong}") };
        note(format_args!("{module} without {label}: a conflict {conflict}{results}"));
        if !conflict || !wrong {
            survivors.push((module, label));
        }
    }
    if survivors.is_empty() { Ok(()) } else { Err(format!("nobody misses {survivors:?}").into()) }
}
