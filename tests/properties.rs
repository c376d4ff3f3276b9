//! Properties of the definition that need no second implementation: invariances, equivalent batches, equal bits.

mod support;

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestCaseError};
use samtone::cpu::{self, Plan, Shard};
use samtone::{
    Batch, DType, Data, Element, Embeddings, EmbeddingsMut, Error, Evaluation, GradientBuffers, Loss, Options,
    Partials, Scope, TemperatureGradient,
};
use support::compare::{against_definition, verdict};
use support::data::{Kind, Source, problem};
use support::problem::{Buffer, Outputs, Problem};

type Tested = Result<(), TestCaseError>;

/// The same cases on every machine and in every run.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(0x5a), ..ProptestConfig::default() }
}

fn failed(error: impl std::fmt::Display) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

/// Ranks and margins closer than this to their edge may fall on either side of it by rounding.
const SLACK: f64 = 5e-7;

/// Workspace that forces the smallest tile, so that few rows already make many tiles.
const TIGHT: usize = 8 << 10;

/// What a batch may carry beside embeddings.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Extras {
    positives: bool,
    weights: bool,
    query_ids: bool,
    passage_ids: bool,
    owners: bool,
    margin: bool,
}

/// A problem in a form that shrinks.
#[derive(Debug, Clone)]
struct Setup {
    preset: usize,
    kind: usize,
    rows: usize,
    more: usize,
    dim: usize,
    temperature: f64,
    seed: u64,
    extras: Extras,
}

fn extras() -> impl Strategy<Value = Extras> {
    any::<[bool; 6]>().prop_map(|[positives, weights, query_ids, passage_ids, owners, margin]| Extras {
        positives,
        weights,
        query_ids,
        passage_ids,
        owners,
        margin,
    })
}

fn setup() -> impl Strategy<Value = Setup> {
    let temperature = prop_oneof![Just(0.01), Just(0.05), Just(0.3), Just(2.0)];
    let shape = (1_usize..50, 0_usize..30, 1_usize..20);
    (0..Loss::PRESETS.len(), 0..Kind::ALL.len(), shape, temperature, any::<u16>(), extras()).prop_map(
        |(preset, kind, (rows, more, dim), temperature, seed, extras)| Setup {
            preset,
            kind,
            rows,
            more,
            dim,
            temperature,
            seed: seed.into(),
            extras,
        },
    )
}

impl Setup {
    fn problem(&self) -> Result<Problem, TestCaseError> {
        let loss = Loss::by_name(Loss::PRESETS[self.preset].0).map_err(failed)?;
        let (rows, passages) = (self.rows, self.rows + self.more);
        let plain = problem(loss, Kind::ALL[self.kind], (rows, passages, self.dim), self.temperature, self.seed, 3.0);
        let mut problem = plain.map_err(failed)?.rounded(DType::F32);
        let mut source = Source::new(self.seed + 1);
        let mut ids = |count: usize| (0..count).map(|_| source.below(count.div_ceil(2) + 1) as i64 - 2).collect();
        let Extras { positives, weights, query_ids, passage_ids, owners, margin } = self.extras;
        problem.query_ids = query_ids.then(|| ids(rows));
        problem.passage_ids = passage_ids.then(|| ids(passages));
        problem.positives = positives.then(|| (0..rows).map(|_| source.below(passages) as u32).collect());
        let weight = |k: usize| if k == 0 { 0.0 } else { k as f32 / 2.0 };
        problem.weights = weights.then(|| {
            let mut weights: Vec<f32> = (0..rows).map(|_| weight(source.below(5))).collect();
            weights[rows - 1] = 1.0;
            weights
        });
        problem.owners = owners.then(|| {
            let owner = |j: usize, s: &mut Source| if j < rows { -1 } else { s.below(rows + 1) as i32 - 1 };
            ((0..passages).map(|j| owner(j, &mut source)).collect(), Scope::Own)
        });
        problem.options = problem.options.with_workspace_bytes(TIGHT);
        if margin {
            problem.options = problem.options.with_margin(source.uniform(-0.3, 0.3)).map_err(failed)?;
        }
        Ok(problem)
    }
}

/// What the CPU gives, gradients in f64 as they are before rounding. `None` where a row has no term in its softmax.
fn solve(problem: &Problem, upstream: f64) -> Result<Option<Outputs>, TestCaseError> {
    solve_as(problem, DType::F32, DType::F64, upstream)
}

fn solve_as(problem: &Problem, input: DType, output: DType, upstream: f64) -> Result<Option<Outputs>, TestCaseError> {
    let (query, passage) = (Buffer::new(input, &problem.query), Buffer::new(input, &problem.passage));
    let batch = problem.batch(&query, &passage).map_err(failed)?;
    let mut grad_query = Buffer::new(output, &vec![f64::NAN; problem.query.len()]);
    let mut grad_passage = Buffer::new(output, &vec![f64::NAN; problem.passage.len()]);
    let buffers = GradientBuffers {
        query: Some(grad_query.embeddings_mut(problem.rows, problem.dim).map_err(failed)?),
        passage: Some(grad_passage.embeddings_mut(problem.passages, problem.dim).map_err(failed)?),
    };
    match cpu::loss_and_gradients_into(&problem.loss, &batch, &problem.options, upstream, buffers) {
        Ok((evaluation, temperature)) => Ok(Some(Outputs {
            evaluation,
            grad_query: grad_query.to_f64(),
            grad_passage: grad_passage.to_f64(),
            temperature,
        })),
        Err(Error::NoNegative { .. }) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Equal up to what two roundings of the table allow.
fn close(got: &Outputs, want: &Outputs, problem: &Problem) -> Tested {
    let mut checks = against_definition(got, &want.clone().into(), problem, DType::F32, 1.0);
    checks.iter_mut().for_each(|c| c.allowed *= 2.0);
    verdict(&checks).map_err(|e| failed(format!("{}: {e}", problem.name)))
}

/// Rows of a row-major matrix in another order, or some of them.
fn pick<T: Clone>(x: &[T], width: usize, rows: &[usize]) -> Vec<T> {
    rows.iter().flat_map(|&r| x[r * width..(r + 1) * width].to_vec()).collect()
}

fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(new, &old)| inverse[old] = new);
    inverse
}

fn shuffled(count: usize, source: &mut Source) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    (1..count).for_each(|i| order.swap(i, source.below(i + 1)));
    order
}

fn positives(problem: &Problem) -> Vec<usize> {
    let identity = || (0..problem.rows).collect();
    problem.positives.as_ref().map_or_else(identity, |p| p.iter().map(|&n| n as usize).collect())
}

/// Only some queries and passages of a problem, in the given order. Every kept row keeps its positive.
fn subset(problem: &Problem, rows: &[usize], passages: &[usize]) -> Problem {
    let at = |list: &[usize], old: usize| list.iter().position(|&k| k == old);
    let own = positives(problem);
    let owners = problem.owners.as_ref().map(|(owners, scope)| {
        let renamed = passages.iter().map(|&j| match owners[j] {
            // A hard negative whose owner is gone belongs to nobody who is left: it must be gone as well.
            row if row >= 0 => at(rows, row as usize).map_or(-1, |k| k as i32),
            everyone => everyone,
        });
        (renamed.collect(), *scope)
    });
    Problem {
        rows: rows.len(),
        passages: passages.len(),
        query: pick(&problem.query, problem.dim, rows),
        passage: pick(&problem.passage, problem.dim, passages),
        positives: Some(rows.iter().map(|&i| at(passages, own[i]).unwrap_or(usize::MAX) as u32).collect()),
        weights: problem.weights.as_ref().map(|w| pick(w, 1, rows)),
        query_ids: problem.query_ids.as_ref().map(|ids| pick(ids, 1, rows)),
        passage_ids: problem.passage_ids.as_ref().map(|ids| pick(ids, 1, passages)),
        owners,
        ..problem.clone()
    }
}

/// `full` reduced to the given rows and passages.
fn reduced(full: &Outputs, dim: usize, rows: &[usize], passages: &[usize]) -> Outputs {
    Outputs {
        evaluation: Evaluation { row_losses: pick(&full.evaluation.row_losses, 1, rows), ..full.evaluation.clone() },
        grad_query: pick(&full.grad_query, dim, rows),
        grad_passage: pick(&full.grad_passage, dim, passages),
        temperature: full.temperature,
    }
}

proptest! {
    #![proptest_config(config(96))]

    /// A cosine does not change along its embedding: x·∂L/∂x = 0.
    #[test]
    fn gradients_are_tangent(setup in setup()) {
        let problem = setup.problem()?;
        let Some(got) = solve(&problem, 1.0)? else { return Ok(()) };
        let beta = problem.options.beta();
        for (x, g) in [(&problem.query, &got.grad_query), (&problem.passage, &got.grad_passage)] {
            for (row, (x, g)) in x.chunks(problem.dim).zip(g.chunks(problem.dim)).enumerate() {
                let (radial, size) = x.iter().zip(g).fold((0.0, 0.0), |(r, s), (x, g)| (r + x * g, s + (x * g).abs()));
                prop_assert!(radial.abs() <= 1e-12 * (size + beta), "row {row}: {radial:e} of {size:e}");
            }
        }
    }

    /// Lengths do not matter, and the gradient shrinks as its embedding grows; powers of two are exact, so every bit agrees,
    /// also where the scale is so large or small that rows are read scaled.
    #[test]
    fn scaling_rows_by_powers_of_two_changes_no_bit(setup in setup(), far in prop::bool::ANY) {
        let setup = Setup { kind: 0, temperature: setup.temperature.max(0.05), ..setup };
        let mut problem = setup.problem()?;
        problem.options = problem.options.with_workspace_bytes(Options::DEFAULT_WORKSPACE_BYTES); // one tile size for all
        let Some(want) = solve(&problem, 1.0)? else { return Ok(()) };
        let mut source = Source::new(setup.seed + 2);
        let reach = if far { 100 } else { 12 };
        let mut scaled = problem.clone();
        let mut factors = |rows: usize| -> Vec<f64> {
            (0..rows).map(|_| 2_f64.powi(source.below(2 * reach + 1) as i32 - reach as i32)).collect()
        };
        let (of_query, of_passage) = (factors(problem.rows), factors(problem.passages));
        let scale = |x: &mut [f64], factors: &[f64]| {
            x.chunks_mut(problem.dim).zip(factors).for_each(|(row, f)| row.iter_mut().for_each(|v| *v *= f));
        };
        scale(&mut scaled.query, &of_query);
        scale(&mut scaled.passage, &of_passage);
        let Some(mut got) = solve(&scaled, 1.0)? else { return Err(failed("no negative after scaling")) };
        scale(&mut got.grad_query, &of_query);
        scale(&mut got.grad_passage, &of_passage);
        prop_assert_eq!(got, want);
    }

    /// Any factor, up to rounding of the scaled input.
    #[test]
    fn scaling_rows_changes_nothing(setup in setup()) {
        let problem = setup.problem()?;
        let mut source = Source::new(setup.seed + 2);
        let factors: Vec<f64> = (0..problem.rows + problem.passages).map(|_| 10_f64.powf(source.uniform(-9.0, 9.0))).collect();
        let (of_query, of_passage) = factors.split_at(problem.rows);
        let scale = |x: &[f64], factors: &[f64]| -> Vec<f64> {
            x.chunks(problem.dim).zip(factors).flat_map(|(row, f)| row.iter().map(move |v| v * f)).collect()
        };
        let scaled = Problem { query: scale(&problem.query, of_query), passage: scale(&problem.passage, of_passage), ..problem.clone() };
        let scaled = scaled.rounded(DType::F32);
        prop_assume!(problem.is_decided(SLACK) && scaled.is_decided(SLACK));
        let (Some(want), Some(mut got)) = (solve(&problem, 1.0)?, solve(&scaled, 1.0)?) else { return Ok(()) };
        got.grad_query = scale(&got.grad_query, of_query);
        got.grad_passage = scale(&got.grad_passage, of_passage);
        close(&got, &want, &problem)?;
    }

    /// The order of queries and of passages is nobody's business.
    #[test]
    fn permuting_permutes(setup in setup()) {
        let mut problem = setup.problem()?;
        if setup.extras.positives {
            problem.query_ids = None; // the lowest row gives a shared passage its query key
        }
        prop_assume!(problem.is_decided(SLACK));
        let mut source = Source::new(setup.seed + 3);
        let (rows, passages) = (shuffled(problem.rows, &mut source), shuffled(problem.passages, &mut source));
        let (Some(want), Some(got)) = (solve(&problem, 1.0)?, solve(&subset(&problem, &rows, &passages), 1.0)?) else { return Ok(()) };
        close(&reduced(&got, problem.dim, &inverse(&rows), &inverse(&passages)), &want, &problem)?;
    }

    /// Losses that treat the towers alike swap their gradients; the two one-sided SamToNe presets are each other's mirror.
    #[test]
    fn swapping_towers_swaps_gradients(setup in setup(), which in 0..5_usize) {
        let (preset, mirrored) = [
            ("bidirectional", "bidirectional"), ("clip", "clip"), ("samtone_both", "samtone_both"),
            ("samtone_query", "samtone_passage"), ("samtone_passage", "samtone_query"),
        ][which];
        let extras = Extras { positives: false, owners: false, ..setup.extras };
        let mut problem = Setup { more: 0, extras, ..setup }.problem()?;
        prop_assume!(problem.is_decided(SLACK));
        problem.loss = Loss::by_name(preset).map_err(failed)?;
        let swapped = Problem {
            loss: Loss::by_name(mirrored).map_err(failed)?,
            query: problem.passage.clone(),
            passage: problem.query.clone(),
            query_ids: problem.passage_ids.clone(),
            passage_ids: problem.query_ids.clone(),
            ..problem.clone()
        };
        let (Some(want), Some(got)) = (solve(&problem, 1.0)?, solve(&swapped, 1.0)?) else { return Ok(()) };
        let evaluation = Evaluation {
            query_to_passage: got.evaluation.passage_to_query,
            passage_to_query: got.evaluation.query_to_passage,
            ..got.evaluation
        };
        let back = Outputs { evaluation, grad_query: got.grad_passage, grad_passage: got.grad_query, ..got };
        close(&back, &want, &problem)?;
    }

    /// A masked negative might as well not be in the batch. All weight on one row, what it does not see deleted.
    #[test]
    fn masking_is_deletion(setup in setup(), by in 0..4_usize) {
        let none = Extras { positives: false, weights: false, query_ids: false, passage_ids: false, owners: false, margin: false };
        let extras = match by {
            0 => Extras { owners: true, ..none },
            1 => Extras { passage_ids: true, ..none },
            2 => Extras { query_ids: true, ..none },
            _ => Extras { margin: true, ..none },
        };
        let mut problem = Setup { extras, ..setup.clone() }.problem()?;
        let (m, n, d) = (problem.rows, problem.passages, problem.dim);
        let row = Source::new(setup.seed + 4).below(m);
        problem.weights = Some((0..m).map(|i| f32::from(u8::from(i == row))).collect());
        let margin = problem.options.margin();
        if margin.is_some() {
            problem.loss = Loss::info_nce(); // in PP the same passage has another cosine
        }
        prop_assume!(problem.is_decided(SLACK));
        let cosine = |i: usize, j: usize| {
            let (q, p) = (&problem.query[i * d..(i + 1) * d], &problem.passage[j * d..(j + 1) * d]);
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
            dot(q, p) / (dot(q, q) * dot(p, p)).sqrt()
        };
        // Hard negatives are nobody's positive, so they can go alone; a query goes with its positive.
        let passage_masked = |j: usize| match (&problem.owners, &problem.passage_ids, &problem.query_ids) {
            (Some((owners, _)), ..) => j >= m && owners[j] >= 0 && owners[j] as usize != row,
            (_, Some(ids), _) => j >= m && ids[j] == ids[row],
            (.., Some(ids)) => j < m && j != row && ids[j] == ids[row],
            _ => j >= m && margin.is_some_and(|margin| cosine(row, j) > cosine(row, row) + margin),
        };
        let query_masked = |i: usize| problem.query_ids.as_ref().is_some_and(|ids| i != row && ids[i] == ids[row]);
        let rows: Vec<usize> = (0..m).filter(|&i| !query_masked(i)).collect();
        let passages: Vec<usize> = (0..n).filter(|&j| !passage_masked(j)).collect();
        let (Some(full), Some(got)) = (solve(&problem, 1.0)?, solve(&subset(&problem, &rows, &passages), 1.0)?) else { return Ok(()) };
        for (x, gone) in [
            (&full.grad_query, (0..m).filter(|&i| query_masked(i)).collect::<Vec<_>>()),
            (&full.grad_passage, (0..n).filter(|&j| passage_masked(j)).collect()),
        ] {
            prop_assert!(pick(x, d, &gone).iter().all(|g| *g == 0.0), "a masked negative has a gradient");
        }
        let kept = subset(&problem, &rows, &passages);
        let mut want = reduced(&full, d, &rows, &passages);
        // Rows without weight may well see what this row does not.
        let own = rows.iter().position(|&i| i == row).unwrap_or_default();
        for i in (0..rows.len()).filter(|&i| i != own) {
            want.evaluation.row_losses[i] = got.evaluation.row_losses[i];
        }
        close(&got, &want, &kept)?;
    }

    /// A row of weight k counts as k rows, where the candidates are passages: as a candidate a repeated query would count more.
    #[test]
    fn weights_are_repetition(setup in setup(), which in 0..3_usize) {
        let extras = Extras { weights: false, query_ids: false, owners: false, ..setup.extras };
        let rows = setup.rows.min(12);
        let mut problem = Setup { rows, more: 3 * rows, extras, ..setup.clone() }.problem()?;
        problem.loss = Loss::by_name(["info_nce", "pair", "decoupled"][which]).map_err(failed)?;
        prop_assume!(problem.is_decided(SLACK));
        let mut source = Source::new(setup.seed + 5);
        let mut copies: Vec<usize> = (0..rows).map(|_| source.below(4)).collect();
        copies[0] += 1;
        let repeated: Vec<usize> = (0..rows).flat_map(|i| vec![i; copies[i]]).collect();
        let all: Vec<usize> = (0..problem.passages).collect();
        let weighted = Problem { weights: Some(copies.iter().map(|&k| k as f32).collect()), ..problem.clone() };
        let (Some(want), Some(got)) = (solve(&weighted, 1.0)?, solve(&subset(&problem, &repeated, &all), 1.0)?) else { return Ok(()) };
        let mut gathered = want.clone();
        gathered.grad_query.fill(0.0);
        for (k, &i) in repeated.iter().enumerate() {
            gathered.evaluation.row_losses[i] = got.evaluation.row_losses[k];
            let copy = &got.grad_query[k * problem.dim..(k + 1) * problem.dim];
            gathered.grad_query[i * problem.dim..(i + 1) * problem.dim].iter_mut().zip(copy).for_each(|(sum, g)| *sum += g);
        }
        gathered.evaluation.loss = got.evaluation.loss;
        gathered.evaluation.query_to_passage = got.evaluation.query_to_passage;
        gathered.grad_passage = got.grad_passage;
        gathered.temperature = got.temperature;
        close(&gathered, &want, &weighted)?;
    }

    /// Gradients are linear in the upstream gradient; a power of two, or a sign, changes nothing else.
    #[test]
    fn gradients_are_linear_in_upstream(setup in setup(), upstream in -3.0..3.0_f64) {
        let problem = setup.problem()?;
        let Some(one) = solve(&problem, 1.0)? else { return Ok(()) };
        for upstream in [upstream, 0.0, -1.0, 0.125, 1024.0] {
            let Some(got) = solve(&problem, upstream)? else { return Err(failed("upstream decides about negatives")) };
            prop_assert_eq!(&got.evaluation, &one.evaluation);
            let all = |x: &Outputs| [x.grad_query.clone(), x.grad_passage.clone(), vec![x.temperature.tau, x.temperature.log_beta]].concat();
            for (got, one) in all(&got).into_iter().zip(all(&one)) {
                let slack = if upstream.abs().log2().fract() == 0.0 { 0.0 } else { 1e-14 * (upstream * one).abs() };
                prop_assert!((got - upstream * one).abs() <= slack, "{upstream} x {one:e} gave {got:e}");
            }
        }
    }

    /// The softmax coefficients of a row add up to 0. Where every passage has the same component outside the space of the
    /// queries, ∂L/∂q along it is that sum.
    #[test]
    fn coefficients_of_a_row_sum_to_zero(setup in setup(), which in 0..2_usize) {
        let mut problem = setup.problem()?;
        problem.loss = [Loss::info_nce(), Loss::decoupled()][which].clone();
        let lift = |x: &[f64], height: f64| -> Vec<f64> {
            x.chunks(problem.dim)
                .flat_map(|row| {
                    let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
                    row.iter().copied().chain([height * norm])
                })
                .collect()
        };
        let lifted = Problem { dim: problem.dim + 1, query: lift(&problem.query, 0.0), passage: lift(&problem.passage, 0.5), ..problem.clone() };
        let lifted = lifted.rounded(DType::F32);
        let Some(got) = solve(&lifted, 1.0)? else { return Ok(()) };
        let (beta, weights) = (lifted.options.beta(), lifted.normalized_weights());
        for (i, row) in got.grad_query.chunks(lifted.dim).enumerate() {
            let norm = lifted.query[i * lifted.dim..(i + 1) * lifted.dim].iter().map(|v| v * v).sum::<f64>().sqrt();
            let sum = row[lifted.dim - 1] * norm / beta;
            // Rounding moves a logit by β times that of a cosine, and a coefficient by as much of the row's weight.
            prop_assert!(sum.abs() <= weights[i] * (3e-6 + beta * 5e-7) + 1e-9, "row {i}: {sum:e}");
        }
    }
}

/// Bounds of `k` shards of uneven size.
fn bounds(rows: usize, k: usize, source: &mut Source) -> Vec<usize> {
    let mut inner = shuffled(rows - 1, source)[..k - 1].iter().map(|b| b + 1).collect::<Vec<_>>();
    inner.extend([0, rows]);
    inner.sort_unstable();
    inner
}

/// Loss and gradients from `k` shards, merged in a random order; with k = 1 rounded to f32 as one device does.
fn sharded(problem: &Problem, k: usize, source: &mut Source) -> Result<Option<Outputs>, TestCaseError> {
    let (query, passage) = (Buffer::new(DType::F32, &problem.query), Buffer::new(DType::F32, &problem.passage));
    let batch = problem.batch(&query, &passage).map_err(failed)?;
    let bounds = bounds(problem.rows, k, source);
    let shards = bounds.windows(2).map(|b| Shard::new(&problem.loss, &batch, &problem.options, b[0]..b[1]));
    let shards = shards.collect::<samtone::Result<Vec<_>>>().map_err(failed)?;
    let mut merged: Option<Partials> = None;
    for s in shuffled(k, source) {
        let partials = shards[s].partials().map_err(failed)?;
        match &mut merged {
            Some(merged) => merged.merge(&partials).map_err(failed)?,
            None => merged = Some(partials),
        }
    }
    let merged = merged.ok_or_else(|| failed("no shard"))?;
    let evaluation = match shards[0].evaluate(&merged) {
        Ok(evaluation) => evaluation,
        Err(Error::NoNegative { .. }) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut out = Outputs {
        evaluation,
        grad_query: Vec::new(),
        grad_passage: vec![0.0; problem.passage.len()],
        temperature: TemperatureGradient { tau: 0.0, log_beta: 0.0 },
    };
    for shard in &shards {
        prop_assert_eq!(&shard.evaluate(&merged).map_err(failed)?, &out.evaluation, "shards disagree");
        let part = shard.gradients(&merged, 1.0).map_err(failed)?;
        out.grad_query.extend(part.query.iter().map(|&g| f64::from(g)));
        out.grad_passage.iter_mut().zip(part.passage).for_each(|(sum, g)| *sum += f64::from(g));
        out.temperature.tau += part.temperature.tau;
        out.temperature.log_beta += part.temperature.log_beta;
    }
    Ok(Some(out))
}

proptest! {
    #![proptest_config(config(96))]

    /// Any cut into 1, 2, 3 or 7 shards gives what one device gives: the same bits for one, the table's digits for more.
    #[test]
    fn shards_add_up_to_one_device(setup in setup(), k in prop::sample::select(vec![1_usize, 2, 3, 7])) {
        let setup = Setup { rows: setup.rows.max(k), ..setup };
        let problem = setup.problem()?;
        prop_assume!(problem.is_decided(SLACK));
        let (want, got) = (solve_as(&problem, DType::F32, DType::F32, 1.0)?, sharded(&problem, k, &mut Source::new(setup.seed + 6))?);
        match (want, got) {
            (Some(want), Some(got)) if k == 1 => prop_assert_eq!(got, want),
            (Some(want), Some(got)) => close(&got, &want, &problem)?,
            (want, got) => prop_assert!(want.is_none() && got.is_none(), "one of them finds a row without negatives"),
        }
    }

    /// Forward and backward apart give the bits of the fused call.
    #[test]
    fn forward_then_backward_is_the_fused_call(setup in setup(), stored in prop::bool::ANY) {
        let mut problem = setup.problem()?;
        if stored {
            problem.options = problem.options.with_workspace_bytes(Options::DEFAULT_WORKSPACE_BYTES);
        }
        let (query, passage) = (Buffer::new(DType::F32, &problem.query), Buffer::new(DType::F32, &problem.passage));
        let batch = problem.batch(&query, &passage).map_err(failed)?;
        let fused = samtone::loss_and_gradients(&problem.loss, &batch, &problem.options, -0.7);
        let Ok(fused) = fused else { return Ok(()) };
        let forward = cpu::forward(&problem.loss, &batch, &problem.options).map_err(failed)?;
        prop_assert_eq!(forward.evaluation(), &fused.evaluation);
        for _ in 0..2 {
            prop_assert_eq!(&forward.backward(&batch, -0.7).map_err(failed)?, &fused.gradients);
        }
        // One tower alone, as for a frozen encoder.
        let mut dq = vec![f32::NAN; problem.query.len()];
        let query = Some(EmbeddingsMut::new(&mut dq, problem.rows, problem.dim).map_err(failed)?);
        let temperature = forward.backward_into(&batch, -0.7, GradientBuffers { query, passage: None }).map_err(failed)?;
        prop_assert_eq!((&dq, temperature), (&fused.gradients.query, fused.gradients.temperature));
        let mut dp = vec![f32::NAN; problem.passage.len()];
        let passage = Some(EmbeddingsMut::new(&mut dp, problem.passages, problem.dim).map_err(failed)?);
        let temperature = forward.backward_into(&batch, -0.7, GradientBuffers { query: None, passage }).map_err(failed)?;
        prop_assert_eq!((&dp, temperature), (&fused.gradients.passage, fused.gradients.temperature));
    }

    /// Caller-owned buffers: any type holds the gradient rounded once; strides of outputs change no bit,
    /// those of inputs no digit of the table, and nothing between rows is read or written.
    #[test]
    fn buffers_of_every_type_and_stride(setup in setup(), pad in 1..20_usize, input in 1..4_usize) {
        let input = DType::ALL[input];
        let problem = setup.problem()?.rounded(input);
        let problem = Problem { options: problem.options.with_workspace_bytes(1 << 16), ..problem };
        let Some(want) = solve_as(&problem, input, DType::F64, 1.0)? else { return Ok(()) };
        for output in [DType::F32, DType::F16, DType::BF16] {
            let Some(got) = solve_as(&problem, input, output, 1.0)? else { return Err(failed("the type decides")) };
            prop_assert_eq!(got.grad_query, Buffer::new(output, &want.grad_query).to_f64());
            prop_assert_eq!(got.grad_passage, Buffer::new(output, &want.grad_passage).to_f64());
            prop_assert_eq!((got.evaluation, got.temperature), (want.evaluation.clone(), want.temperature));
        }
        match input {
            DType::F64 | DType::F32 => strided::<f32>(&problem, pad, &want)?,
            DType::F16 => strided::<samtone::half::f16>(&problem, pad, &want)?,
            DType::BF16 => strided::<samtone::half::bf16>(&problem, pad, &want)?,
        }
    }
}

/// The batch of a problem over embeddings that live elsewhere.
fn over<'a>(problem: &'a Problem, query: Embeddings<'a>, passage: Embeddings<'a>) -> samtone::Result<Batch<'a>> {
    let mut batch = Batch::new(query, passage)?;
    if let Some(positives) = &problem.positives {
        batch = batch.with_positives(positives)?;
    }
    if let Some(weights) = &problem.weights {
        batch = batch.with_weights(weights)?;
    }
    if let Some(ids) = &problem.query_ids {
        batch = batch.with_query_ids(ids)?;
    }
    if let Some(ids) = &problem.passage_ids {
        batch = batch.with_passage_ids(ids)?;
    }
    if let Some((owners, scope)) = &problem.owners {
        batch = batch.with_hard_negative_owners(owners, *scope)?;
    }
    Ok(batch)
}

fn strided<T>(problem: &Problem, pad: usize, want: &Outputs) -> Tested
where
    T: Element,
    for<'a> Data<'a>: From<&'a [T]>,
{
    let (dim, wide) = (problem.dim, problem.dim + pad);
    for stride in [dim, wide] {
        // NaN between the rows of the input: whoever reads it shows.
        let spread = |x: &[f64]| -> Vec<T> {
            x.chunks(dim)
                .flat_map(|row| {
                    row.iter().copied().chain(vec![f64::NAN; stride - dim]).map(T::from_f64).collect::<Vec<_>>()
                })
                .collect()
        };
        let (q, p) = (spread(&problem.query), spread(&problem.passage));
        let query = Embeddings::with_row_stride(&q[..], problem.rows, dim, stride).map_err(failed)?;
        let passage = Embeddings::with_row_stride(&p[..], problem.passages, dim, stride).map_err(failed)?;
        let batch = over(problem, query, passage).map_err(failed)?;
        const GUARD: f64 = 777.25;
        let (mut dq, mut dp) = (vec![GUARD; problem.rows * wide], vec![GUARD; problem.passages * wide]);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::with_row_stride(&mut dq, problem.rows, dim, wide).map_err(failed)?),
            passage: Some(EmbeddingsMut::with_row_stride(&mut dp, problem.passages, dim, wide).map_err(failed)?),
        };
        let (evaluation, temperature) =
            cpu::loss_and_gradients_into(&problem.loss, &batch, &problem.options, 1.0, buffers).map_err(failed)?;
        let rows = |x: &[f64]| x.chunks(wide).flat_map(|row| row[..dim].to_vec()).collect();
        let got = Outputs { evaluation, grad_query: rows(&dq), grad_passage: rows(&dp), temperature };
        let gaps = dq.chunks(wide).chain(dp.chunks(wide)).flat_map(|row| &row[dim..]);
        prop_assert!(gaps.into_iter().all(|v| *v == GUARD), "written between rows");
        if stride == dim {
            prop_assert_eq!(&got, want);
        } else if problem.is_decided(SLACK) {
            // The matrix library picks its loop by the strides of its operands, and with it the order of a sum.
            close(&got, want, problem)?;
        }
    }
    Ok(())
}

/// Logits kept or computed twice, in waves of any length: the same bits, as long as the tile edge is the same.
#[test]
fn storing_or_recomputing_gives_the_same_bits() -> Result<(), Box<dyn std::error::Error>> {
    let mut plans = std::collections::BTreeSet::new();
    for (seed, (name, _)) in Loss::PRESETS.iter().enumerate() {
        for dtype in [DType::F32, DType::BF16] {
            let base = problem(Loss::by_name(name)?, Kind::Random, (150, 217, 40), 0.05, seed as u64, 0.0)?;
            let base = base.rounded(dtype);
            let (query, passage) = (Buffer::new(dtype, &base.query), Buffer::new(dtype, &base.passage));
            let batch = base.batch(&query, &passage)?;
            let run = |bytes: usize| -> samtone::Result<_> {
                let options = base.options.with_workspace_bytes(bytes);
                let plan = Plan::new(&base.loss, &batch, &options)?;
                let result = samtone::loss_and_gradients(&base.loss, &batch, &options, 1.0)?;
                let tile = plan.to_string().split(" tiles of ").nth(1).map(|s| s[..7].to_string());
                Ok((plan.stores_logits(), tile, result))
            };
            let (stored, tile, want) = run(256 << 20)?;
            assert!(stored);
            for bytes in [120 << 10, 150 << 10, 200 << 10, 250 << 10, 16 << 20] {
                let (stored, other, got) = run(bytes)?;
                assert_eq!(other, tile, "a bound of {bytes} bytes moved the tile");
                assert_eq!(got, want, "{name} {dtype}, {bytes} bytes");
                plans.insert(stored);
            }
        }
    }
    assert_eq!(plans.len(), 2, "one of the two ways was never taken");
    Ok(())
}
