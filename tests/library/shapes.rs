//! Every edge of every tile, every length of an embedding, and every extreme of the range of numbers, compared with the definition.

use crate::support::compare::{against_definition, verdict};
use crate::support::data::{Kind, Source, duplicate_ids, problem};
use crate::support::problem::{Buffer, Outputs, Problem};
use samtone::backend;
use samtone::cpu::{self, Plan};
use samtone::half::f16;
use samtone::{Batch, Call, DType, Embeddings, EmbeddingsMut, GradientBuffers, Loss, Scope, ZeroNorm};
use std::collections::BTreeSet;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Slack around ranks and margins: rounding decides what is closer.
const SLACK: f64 = 4e-7;

/// Outputs of a backend, gradients in f64: at the ends of the range of f32 an f32 gradient has no digits left to compare.
fn run(problem: &Problem, backend: &str, dtype: DType) -> Result<Outputs, Box<dyn std::error::Error>> {
    let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
    let (mut dq, mut dp) = (vec![f64::NAN; problem.query.len()], vec![f64::NAN; problem.passage.len()]);
    let buffers = GradientBuffers {
        query: Some(EmbeddingsMut::new(&mut dq, problem.rows, problem.dim)?),
        passage: Some(EmbeddingsMut::new(&mut dp, problem.passages, problem.dim)?),
    };
    let batch = problem.batch(&query, &passage)?;
    let backend = backend::by_name(backend)?;
    let (evaluation, temperature) = backend.loss_and_gradients_into(&batch, 1.0, buffers)?;
    Ok(Outputs { evaluation, grad_query: dq, grad_passage: dp, temperature })
}

/// Both backends on the same rounded embeddings, compared by the tolerance table; the CPU's outputs.
fn agree(problem: &Problem, dtype: DType) -> Result<Outputs, Box<dyn std::error::Error>> {
    let problem = problem.rounded(dtype);
    let (got, want) = (run(&problem, "cpu", dtype)?, run(&problem, "reference", DType::F64)?);
    verdict(&against_definition(&got, &want.into(), &problem, dtype, 1.0))
        .map_err(|e| format!("{} {dtype}: {e}", problem.name))?;
    Ok(got)
}

/// The first seed whose cosines keep their distance from ties.
fn decided(
    dtype: DType,
    make: impl Fn(u64) -> samtone::Result<Problem>,
) -> Result<Problem, Box<dyn std::error::Error>> {
    for seed in 0..100 {
        let problem = make(seed)?.rounded(dtype);
        if problem.is_decided(SLACK) {
            return Ok(problem);
        }
    }
    Err("no seed without ties".into())
}

/// Tile edge of the plan.
fn tile(problem: &Problem, dtype: DType) -> Result<usize, Box<dyn std::error::Error>> {
    let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
    Ok(Plan::new(&problem.batch(&query, &passage)?)?.tile())
}

/// All masks at once.
fn with_everything(problem: Problem) -> Problem {
    let (rows, passages) = (problem.rows, problem.passages);
    let mut source = Source::new(rows as u64);
    let weight = |i: usize| (i + 1 == rows || !i.is_multiple_of(3)) as u8 as f32 * 0.5;
    let owner = |j: usize| if j % 4 == 1 { (j % rows) as i32 } else { -1 };
    problem.with(|call| {
        call.with_positives((0..rows).map(|_| source.below(passages) as u32).collect::<Vec<_>>())
            .with_weights((0..rows).map(weight).collect::<Vec<_>>())
            .with_query_ids(duplicate_ids(rows))
            .with_passage_ids(duplicate_ids(passages))
            .with_shared_ids(true)
            .with_hard_negative_owners((0..passages).map(owner).collect::<Vec<_>>(), Scope::Own)
            .with_margin(0.15)
    })
}

/// Rows and passages one below, at and one above multiples of every tile edge that a bound on the workspace leads to.
#[test]
fn edges_of_every_tile() -> Outcome {
    let mut seen = BTreeSet::new();
    let dim = 5;
    // From 16 upwards in every step that halving can reach; and the edges that sizes of batches choose by themselves.
    let bounds = [3 << 10, 13 << 10, 28 << 10, cpu::DEFAULT_WORKSPACE_BYTES];
    for (b, bound) in bounds.into_iter().enumerate() {
        for base in [64, 320] {
            let make = |rows: usize, passages: usize, seed: u64| {
                let loss = if (rows + passages).is_multiple_of(2) { Loss::samtone_both() } else { Loss::gte() };
                let p = problem(loss, Kind::Random, (rows, passages, dim), 0.05, seed, 0.0)?;
                Ok(p.with(|call| call.with_workspace_bytes(bound)))
            };
            let edge = tile(&make(base, base, 0)?, DType::F32)?;
            seen.insert(edge);
            let around = |k: usize| [k * edge - 1, k * edge, k * edge + 1];
            let some = if base == 64 { vec![1, 2] } else { vec![base / edge] };
            for (n, rows) in some.into_iter().flat_map(around).enumerate() {
                // As many passages, and an edge further in every residue.
                for passages in [rows, rows + [1, edge - 1, edge, edge + 1][(n + b) % 4]] {
                    let plain = decided(DType::F32, |seed| make(rows, passages, seed))?;
                    agree(&plain, DType::F32)?;
                    let masked = decided(DType::F32, |seed| Ok(with_everything(make(rows, passages, seed)?)))?;
                    agree(&masked, DType::F32)?;
                }
            }
        }
    }
    assert!([16, 32, 48, 64, 80].iter().all(|edge| seen.contains(edge)), "{seen:?}");
    Ok(())
}

/// The largest tile, with one row over, one short, and passages that end elsewhere.
#[test]
fn edges_of_the_largest_tile() -> Outcome {
    for (rows, passages) in [(2047, 2049), (1985, 2561)] {
        let p = decided(DType::F32, |seed| {
            problem(Loss::samtone_both(), Kind::Random, (rows, passages, 3), 0.3, seed, 0.0)
        });
        // In three dimensions thousands of cosines are dense; take ranks as they come where none is decided.
        let p = match p {
            Ok(p) => p,
            Err(_) => {
                problem(Loss::samtone_both(), Kind::Random, (rows, passages, 3), 0.3, 1, 0.0)?.rounded(DType::F32)
            }
        };
        let p = p.with(|call| call.with_workspace_bytes(cpu::DEFAULT_WORKSPACE_BYTES));
        assert_eq!(tile(&p, DType::F32)?, 512);
        agree(&p, DType::F32)?;
    }
    Ok(())
}

/// Few rows, every count of passages, primes.
#[test]
fn small_and_prime() -> Outcome {
    for rows in [1, 2, 3, 5, 7, 11, 13] {
        for passages in [rows, rows + 1, rows + 2, 17, 31, 97] {
            for (k, loss) in [Loss::samtone_both(), Loss::qwen3(), Loss::pair(0.3)?].into_iter().enumerate() {
                let make = |seed| problem(loss.clone(), Kind::Random, (rows, passages, 2 + k), 0.1, seed, 0.0);
                agree(&decided(DType::F32, make)?, DType::F32)?;
            }
        }
    }
    Ok(())
}

/// Embeddings of every length, read in place and in panels.
#[test]
fn every_dimension() -> Outcome {
    let dims = [1, 2, 3, 7, 8, 15, 16, 17, 64, 96, 127, 511, 512, 513, 527, 768, 1000, 1024, 1025, 4096, 8192];
    for dim in dims {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for kind in [Kind::Random, Kind::Norms] {
                // Norms over 20 decades make f32 rows be read scaled, in panels as the 16-bit types are.
                let decades = if dtype == DType::F16 { 1.0 } else { 10.0 };
                let make = |seed| problem(Loss::samtone_both(), kind, (19, 23, dim), 0.05, seed, decades);
                // In one dimension every cosine is 1 or −1, and every tie is exact up to rounding.
                let p = if dim == 1 { make(0)?.rounded(dtype) } else { decided(dtype, make)? };
                agree(&p, dtype)?;
            }
        }
    }
    Ok(())
}

/// The same problem with all its rows multiplied.
fn scaled(base: &Problem, name: &str, factor: impl Fn(usize) -> f64) -> Problem {
    let scale = |x: &[f64], offset: usize| -> Vec<f64> {
        x.chunks(base.dim)
            .enumerate()
            .flat_map(|(r, row)| row.iter().map(move |v| (r, *v)))
            .map(|(r, v)| v * factor(r + offset))
            .collect()
    };
    Problem {
        name: name.into(),
        query: scale(&base.query, 0),
        passage: scale(&base.passage, base.rows),
        ..base.clone()
    }
}

fn base(dim: usize) -> samtone::Result<Problem> {
    problem(Loss::samtone_both(), Kind::Random, (20, 33, dim), 0.05, 7, 0.0)
}

fn all_finite(x: &Outputs) -> bool {
    x.grad_query.iter().chain(&x.grad_passage).chain(&x.evaluation.row_losses).all(|v| v.is_finite())
}

/// f32 rows of any size: squares, products of norms and their inverses leave the range, results do not.
#[test]
fn f32_of_any_size() -> Outcome {
    let base = base(24)?;
    let one = |e: i32| 10_f64.powi(e);
    let mixed = |r: usize| one([30, -30, 0, 12, -17, 25][r % 6]);
    let cases = [
        scaled(&base, "1e30", |_| one(30)),
        scaled(&base, "1e-30", |_| one(-30)),
        scaled(&base, "60 decades in one batch", mixed),
        scaled(&base, "one row of 1e37", |r| if r == 25 { one(37) } else { 1.0 }),
        scaled(&base, "just inside the range that is read in place", |r| 2_f64.powi(if r % 2 == 0 { 27 } else { -27 })),
        scaled(&base, "huge queries, tiny passages", |r| one(if r < 20 { 36 } else { -36 })),
    ];
    for case in cases {
        for workspace in [8 << 10, 256 << 20] {
            let case = case.rounded(DType::F32).with(|call| call.with_workspace_bytes(workspace));
            assert!(all_finite(&agree(&case, DType::F32)?), "{}", case.name);
        }
    }
    Ok(())
}

/// Subnormal rows have directions too, with as many digits as are left.
#[test]
fn subnormal_rows() -> Outcome {
    let base = base(24)?;
    let tiny = scaled(&base, "f32 subnormals", |r| if r % 3 == 0 { 1e-42 } else { 1.0 });
    let got = agree(&tiny, DType::F32)?;
    assert!(all_finite(&got));
    let tiny = scaled(&base, "every row subnormal", |_| 1e-41);
    agree(&tiny, DType::F32)?;
    let tiny = scaled(&base, "bf16 subnormals", |r| if r % 4 == 1 { 1e-39 } else { 1.0 });
    agree(&tiny, DType::BF16)?;
    let tiny = scaled(&base, "f16 subnormals", |_| 1e-6);
    assert!(tiny.rounded(DType::F16).query.iter().any(|v| *v != 0.0 && v.abs() < f64::from(f16::MIN_POSITIVE)));
    agree(&tiny, DType::F16)?;
    Ok(())
}

/// Norms whose squares no f16 holds, and norms that no f16 holds.
#[test]
fn f16_norms_beyond_f16() -> Outcome {
    let base = base(64)?;
    let largest = base.query.iter().chain(&base.passage).fold(0.0_f64, |max, v| max.max(v.abs()));
    for factor in [300.0, 60000.0 / largest] {
        let case = scaled(&base, "large f16", |_| factor).rounded(DType::F16);
        assert!(case.query.iter().chain(&case.passage).all(|v| v.is_finite()));
        let norm = |row: &[f64]| row.iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!(case.query.chunks(64).any(|row| norm(row) > 1000.0));
        agree(&case, DType::F16)?;
    }
    Ok(())
}

/// Zero rows under the lenient policy: their cosines are 0, their gradients exactly 0, everyone else's as defined.
#[test]
fn zero_rows() -> Outcome {
    for (name, ..) in Loss::PRESETS {
        for dtype in [DType::F32, DType::BF16] {
            for wild in [false, true] {
                let case = problem(Loss::by_name(name)?, Kind::Random, (20, 33, 9), 0.1, 11, 0.0)?;
                let zero = |r: usize| [0, 7, 19, 20, 21, 30, 52].contains(&r);
                let size = |r: usize| if wild && r % 5 == 1 { 1e20 } else { 1.0 };
                let case = scaled(&case, name, |r| if zero(r) { 0.0 } else { size(r) }).rounded(dtype);
                let case = case.with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient).with_workspace_bytes(8 << 10));
                let got = agree(&case, dtype)?;
                assert!(all_finite(&got));
                let rows = got.grad_query.chunks(case.dim).chain(got.grad_passage.chunks(case.dim));
                for (r, row) in rows.enumerate().filter(|(r, _)| zero(*r)) {
                    assert!(row.iter().all(|g| *g == 0.0), "{name} {dtype}: row {r}");
                }
            }
        }
    }
    Ok(())
}

/// A single row never steps, so any stride that is accepted is right.
#[test]
fn one_row_of_any_stride() -> Outcome {
    let p = problem(Loss::samtone_both(), Kind::Random, (1, 3, 40), 0.1, 5, 0.0)?.rounded(DType::F32);
    let want = run(&p, "cpu", DType::F32)?;
    let [query, passage] = [&p.query, &p.passage].map(|x| x.iter().map(|&v| v as f32).collect::<Vec<_>>());
    for stride in [40, 41, 1 << 40, isize::MAX as usize / 8] {
        let (mut dq, mut dp) = (vec![f64::NAN; 40], vec![f64::NAN; 120]);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::with_row_stride(&mut dq, 1, 40, stride)?),
            passage: Some(EmbeddingsMut::new(&mut dp, 3, 40)?),
        };
        let query = Embeddings::with_row_stride(&query, 1, 40, stride)?;
        let batch = Batch::new(&p.call, query, Embeddings::new(&passage, 3, 40)?)?;
        let (evaluation, _) = cpu::loss_and_gradients_into(&batch, 1.0, buffers)?;
        assert!((evaluation.loss - want.evaluation.loss).abs() < 1e-6, "stride {stride}");
        for (got, want) in dq.iter().chain(&dp).zip(want.grad_query.iter().chain(&want.grad_passage)) {
            assert!((got - want).abs() <= 1e-5, "stride {stride}: {got} {want}");
        }
    }
    Ok(())
}

/// The ends of what a temperature may be: nothing overflows on the way, though f32 cosines leave few digits at the lower end.
#[test]
fn extreme_temperatures() -> Outcome {
    for kind in Kind::ALL {
        for (name, ..) in Loss::PRESETS {
            for tau in [Call::MIN_TEMPERATURE, 1e-4, 1e3, Call::MAX_TEMPERATURE] {
                let make = |seed| problem(Loss::by_name(name)?, kind, (20, 33, 12), tau, seed, 3.0);
                let got = agree(&decided(DType::F32, make)?, DType::F32)?;
                let scalars = [got.evaluation.loss, got.temperature.tau, got.temperature.log_beta];
                assert!(all_finite(&got) && scalars.iter().all(|v| v.is_finite()), "{name} {} {tau}", kind.name());
            }
        }
    }
    Ok(())
}
