//! Random problems, in a form that proptest can shrink, and what the tests do with them.

use crate::support::compare::{against_definition, verdict};
use crate::support::data::{Kind, Source, problem};
use crate::support::problem::{Buffer, Outputs, Problem};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestCaseError};
use samtone::cpu;
use samtone::{DType, Error, Evaluation, GradientBuffers, Loss, Pairs, Scope, ZeroNorm};

pub type Tested = Result<(), TestCaseError>;

/// The same cases on every machine and in every run.
pub fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(0x5a), ..ProptestConfig::default() }
}

pub fn failed(error: impl std::fmt::Display) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

/// Ranks and margins closer than this to their edge may fall on either side of it by rounding.
pub const SLACK: f64 = 5e-7;

/// Workspace that forces the smallest tile, so that few rows already make many tiles.
pub const TIGHT: usize = 8 << 10;

/// What a batch may carry beside embeddings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extras {
    pub positives: bool,
    pub weights: bool,
    pub query_ids: bool,
    pub passage_ids: bool,
    /// Only with ids of both.
    pub shared_ids: bool,
    pub owners: bool,
    pub margin: bool,
    pub prefixes: bool,
}

/// A problem in a form that shrinks.
#[derive(Debug, Clone)]
pub struct Setup {
    pub preset: usize,
    pub kind: usize,
    pub rows: usize,
    pub more: usize,
    pub dim: usize,
    pub temperature: f64,
    pub seed: u64,
    pub extras: Extras,
}

pub fn extras() -> impl Strategy<Value = Extras> {
    any::<[bool; 8]>().prop_map(|[positives, weights, query_ids, passage_ids, shared_ids, owners, margin, prefixes]| {
        Extras {
            positives,
            weights,
            query_ids,
            passage_ids,
            shared_ids: shared_ids && query_ids && passage_ids,
            owners,
            margin,
            prefixes,
        }
    })
}

pub fn setup() -> impl Strategy<Value = Setup> {
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
    pub fn problem(&self) -> Result<Problem, TestCaseError> {
        self.problem_in(DType::F32)
    }

    /// With embeddings that `dtype` holds exactly.
    pub fn problem_in(&self, dtype: DType) -> Result<Problem, TestCaseError> {
        let decades = if dtype == DType::F16 { 2.0 } else { 12.0 };
        let loss = Loss::by_name(Loss::PRESETS[self.preset].0).map_err(failed)?;
        let (rows, passages) = (self.rows, self.rows + self.more);
        let plain =
            problem(loss, Kind::ALL[self.kind], (rows, passages, self.dim), self.temperature, self.seed, decades);
        let problem = plain.map_err(failed)?.rounded(dtype);
        let mut call = problem.call.clone().with_workspace_bytes(TIGHT);
        let mut source = Source::new(self.seed + 1);
        let id = |count: usize, s: &mut Source| s.below(count.div_ceil(2) + 1) as i64 - 2;
        let Extras { positives, weights, query_ids, passage_ids, shared_ids, owners, margin, prefixes } = self.extras;
        if query_ids {
            call = call.with_query_ids((0..rows).map(|_| id(rows, &mut source)).collect::<Vec<_>>());
        }
        if passage_ids {
            call = call.with_passage_ids((0..passages).map(|_| id(passages, &mut source)).collect::<Vec<_>>());
        }
        call = call.with_shared_ids(shared_ids);
        if positives {
            call = call.with_positives((0..rows).map(|_| source.below(passages) as u32).collect::<Vec<_>>());
        }
        if weights {
            let mut weights: Vec<f32> = (0..rows).map(|_| source.below(5) as f32 / 2.0).collect();
            weights[rows - 1] = 1.0;
            call = call.with_weights(weights);
        }
        if owners {
            let owner = |j: usize, s: &mut Source| if j < rows { -1 } else { s.below(rows + 1) as i32 - 1 };
            let owners: Vec<i32> = (0..passages).map(|j| owner(j, &mut source)).collect();
            call = call.with_hard_negative_owners(owners, Scope::Own);
        }
        if margin {
            call = call.with_margin(source.uniform(-0.3, 0.3));
        }
        if prefixes {
            let mut dims: Vec<usize> = (1..=self.dim).filter(|_| source.below(3) == 0).collect();
            dims.extend(if dims.is_empty() { Some(self.dim) } else { None });
            let weights: Vec<f64> = dims.iter().map(|_| [0.25, 1.0, 3.0][source.below(3)]).collect();
            // A slot of the workspace has a tile for each prefix.
            call = call.with_workspace_bytes(TIGHT * dims.len());
            // In some kinds of data the first entries of a row may all be 0.
            call = call.with_prefixes(dims).with_prefix_weights(weights).with_zero_norm(ZeroNorm::ZeroGradient);
        }
        Ok(Problem { call, ..problem })
    }
}

/// What the CPU gives, gradients in f64 as they are before rounding. `None` where a row has no term in its softmax.
pub fn solve(problem: &Problem, upstream: f64) -> Result<Option<Outputs>, TestCaseError> {
    solve_as(problem, DType::F32, DType::F64, upstream)
}

pub fn solve_as(
    problem: &Problem,
    input: DType,
    output: DType,
    upstream: f64,
) -> Result<Option<Outputs>, TestCaseError> {
    let (query, passage) = (Buffer::new(input, &problem.query), Buffer::new(input, &problem.passage));
    let batch = problem.batch(&query, &passage).map_err(failed)?;
    let mut grad_query = Buffer::new(output, &vec![f64::NAN; problem.query.len()]);
    let mut grad_passage = Buffer::new(output, &vec![f64::NAN; problem.passage.len()]);
    let buffers = GradientBuffers {
        query: Some(grad_query.embeddings_mut(problem.rows, problem.dim).map_err(failed)?),
        passage: Some(grad_passage.embeddings_mut(problem.passages, problem.dim).map_err(failed)?),
    };
    match cpu::loss_and_gradients_into(&batch, upstream, buffers) {
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
pub fn close(got: &Outputs, want: &Outputs, problem: &Problem) -> Tested {
    let mut checks = against_definition(got, &want.clone().into(), problem, DType::F32, 1.0);
    checks.iter_mut().for_each(|c| c.allowed *= 2.0);
    verdict(&checks).map_err(|e| failed(format!("{}: {e}", problem.name)))
}

/// Rows of a row-major matrix in another order, or some of them.
pub fn pick<T: Clone>(x: &[T], width: usize, rows: &[usize]) -> Vec<T> {
    rows.iter().flat_map(|&r| x[r * width..(r + 1) * width].to_vec()).collect()
}

pub fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(new, &old)| inverse[old] = new);
    inverse
}

pub fn shuffled(count: usize, source: &mut Source) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    (1..count).for_each(|i| order.swap(i, source.below(i + 1)));
    order
}

/// Who belongs to whom in a problem, all of which are valid here.
pub fn pairs(problem: &Problem) -> Pairs<'_> {
    problem.pairs().expect("a valid problem")
}

/// Ids for so many rows that say nothing.
pub fn different(rows: usize) -> Vec<i64> {
    (0..rows as i64).collect()
}

/// Only some queries and passages of a problem, in the given order. Every kept row keeps its positive.
pub fn subset(problem: &Problem, rows: &[usize], passages: &[usize]) -> Problem {
    let at = |list: &[usize], old: usize| list.iter().position(|&k| k == old);
    let pairs = pairs(problem);
    let positive = |&i: &usize| at(passages, pairs.positive(i)).unwrap_or(usize::MAX) as u32;
    let call = problem.call.clone().with_positives(rows.iter().map(positive).collect::<Vec<_>>());
    let mut call = call.with_weights(rows.iter().map(|&i| pairs.weight(i) as f32).collect::<Vec<_>>());
    if let Some(ids) = pairs.query_ids() {
        call = call.with_query_ids(pick(ids, 1, rows));
    }
    if let Some(ids) = pairs.passage_ids() {
        call = call.with_passage_ids(pick(ids, 1, passages));
    }
    if let Some(owners) = pairs.exclusive_owners() {
        let renamed = passages.iter().map(|&j| match owners[j] {
            // A hard negative whose owner is gone belongs to nobody who is left: it must be gone as well.
            row if row >= 0 => at(rows, row as usize).map_or(-1, |k| k as i32),
            everyone => everyone,
        });
        call = call.with_hard_negative_owners(renamed.collect::<Vec<_>>(), Scope::Own);
    }
    Problem {
        call,
        rows: rows.len(),
        passages: passages.len(),
        query: pick(&problem.query, problem.dim, rows),
        passage: pick(&problem.passage, problem.dim, passages),
        ..problem.clone()
    }
}

/// `full` reduced to the given rows and passages.
pub fn reduced(full: &Outputs, dim: usize, rows: &[usize], passages: &[usize]) -> Outputs {
    Outputs {
        evaluation: Evaluation { row_losses: pick(&full.evaluation.row_losses, 1, rows), ..full.evaluation.clone() },
        grad_query: pick(&full.grad_query, dim, rows),
        grad_passage: pick(&full.grad_passage, dim, passages),
        temperature: full.temperature,
    }
}
