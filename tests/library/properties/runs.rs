//! Other ways to make the same call: in shards, forward and backward apart, into other buffers, with another workspace.

use super::setup::{SLACK, Setup, Tested, close, config, failed, setup, shuffled, solve_as};
use crate::support::case::Expected;
use crate::support::compare::{against_definition, verdict};
use crate::support::data::{Kind, Source, problem};
use crate::support::problem::{Buffer, Outputs, Problem};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use samtone::backend;
use samtone::cpu::{self, Plan, Shard};
use samtone::{
    Batch, DType, Data, Element, Embeddings, EmbeddingsMut, Error, GradientBuffers, Loss, Partials, TemperatureGradient,
};

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
    let shards = bounds.windows(2).map(|b| Shard::new(&batch, b[0]..b[1]));
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

    /// Whatever a batch carries, in whatever combination: the CPU gives the numbers of the definition, in one piece and in
    /// shards.
    #[test]
    fn any_batch_agrees_with_the_definition(setup in setup(), dtype in 1..4_usize, k in 1..5_usize) {
        let dtype = DType::ALL[dtype];
        let setup = Setup { rows: setup.rows.max(k), ..setup };
        let problem = setup.problem_in(dtype)?;
        prop_assume!(problem.is_decided(SLACK));
        let reference = backend::by_name("reference").map_err(failed)?;
        let want = match problem.run(reference, DType::F64, 1.0) {
            Ok(want) => Expected::from(want),
            Err(error) => {
                prop_assert!(matches!(error, Error::NoNegative { .. }), "{error}");
                prop_assert!(solve_as(&problem, dtype, DType::F64, 1.0)?.is_none(), "only the reference says: {error}");
                return Ok(());
            }
        };
        let whole = solve_as(&problem, dtype, DType::F64, 1.0)?;
        let parts = sharded(&problem, k, &mut Source::new(setup.seed + 7))?;
        for got in [whole, parts] {
            let Some(got) = got else { return Err(failed("only the CPU finds a row without negatives")) };
            let checks = against_definition(&got, &want, &problem, dtype, 1.0);
            verdict(&checks).map_err(|e| failed(format!("{}: {e}", problem.name)))?;
        }
    }

    /// Any cut into 1, 2, 3 or 7 shards gives what one device gives: the same bits for one, the table's digits for more.
    #[test]
    fn shards_add_up_to_one_device(setup in setup(), k in prop::sample::select(vec![1_usize, 2, 3, 7])) {
        let setup = Setup { rows: setup.rows.max(k), ..setup };
        let problem = setup.problem()?;
        prop_assume!(problem.is_decided(SLACK));
        let (want, got) =
            (solve_as(&problem, DType::F32, DType::F32, 1.0)?, sharded(&problem, k, &mut Source::new(setup.seed + 6))?);
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
            problem = problem.with(|call| call.with_workspace_bytes(cpu::DEFAULT_WORKSPACE_BYTES));
        }
        let (query, passage) = (Buffer::new(DType::F32, &problem.query), Buffer::new(DType::F32, &problem.passage));
        let batch = problem.batch(&query, &passage).map_err(failed)?;
        let Ok(fused) = samtone::loss_and_gradients(&batch, -0.7) else { return Ok(()) };
        let forward = cpu::forward(&batch).map_err(failed)?;
        prop_assert_eq!(forward.evaluation(), &fused.evaluation);
        for _ in 0..2 {
            prop_assert_eq!(&forward.backward(&batch, -0.7).map_err(failed)?, &fused.gradients);
        }
        // One tower alone, as for a frozen encoder.
        let mut dq = vec![f32::NAN; problem.query.len()];
        let query = Some(EmbeddingsMut::new(&mut dq, problem.rows, problem.dim).map_err(failed)?);
        let temperature =
            forward.backward_into(&batch, -0.7, GradientBuffers { query, passage: None }).map_err(failed)?;
        prop_assert_eq!((&dq, temperature), (&fused.gradients.query, fused.gradients.temperature));
        let mut dp = vec![f32::NAN; problem.passage.len()];
        let passage = Some(EmbeddingsMut::new(&mut dp, problem.passages, problem.dim).map_err(failed)?);
        let temperature =
            forward.backward_into(&batch, -0.7, GradientBuffers { query: None, passage }).map_err(failed)?;
        prop_assert_eq!((&dp, temperature), (&fused.gradients.passage, fused.gradients.temperature));
    }

    /// Caller-owned buffers: any type holds the gradient rounded once; strides of outputs change no bit,
    /// those of inputs no digit of the table, and nothing between rows is read or written.
    #[test]
    fn buffers_of_every_type_and_stride(setup in setup(), pad in 1..20_usize, input in 1..4_usize) {
        let input = DType::ALL[input];
        let problem = setup.problem_in(input)?.with(|call| call.with_workspace_bytes(1 << 16));
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
        let batch = Batch::new(&problem.call, query, passage).map_err(failed)?;
        const GUARD: f64 = 777.25;
        let (mut dq, mut dp) = (vec![GUARD; problem.rows * wide], vec![GUARD; problem.passages * wide]);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::with_row_stride(&mut dq, problem.rows, dim, wide).map_err(failed)?),
            passage: Some(EmbeddingsMut::with_row_stride(&mut dp, problem.passages, dim, wide).map_err(failed)?),
        };
        let (evaluation, temperature) = cpu::loss_and_gradients_into(&batch, 1.0, buffers).map_err(failed)?;
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
    for (seed, (name, ..)) in Loss::PRESETS.iter().enumerate() {
        for dtype in [DType::F32, DType::BF16] {
            let base = problem(Loss::by_name(name)?, Kind::Random, (150, 217, 40), 0.05, seed as u64, 0.0)?;
            let base = base.rounded(dtype);
            let (query, passage) = (Buffer::new(dtype, &base.query), Buffer::new(dtype, &base.passage));
            let run = |bytes: usize| -> samtone::Result<_> {
                let bounded = base.clone().with(|call| call.with_workspace_bytes(bytes));
                let batch = bounded.batch(&query, &passage)?;
                let plan = Plan::new(&batch)?;
                Ok((plan.stores_logits(), plan.tile(), samtone::loss_and_gradients(&batch, 1.0)?))
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
