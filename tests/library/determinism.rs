//! The same bits on every run, for any number of threads, and with memory that other calls have used before.

use crate::support::data::{Kind, Source, duplicate_ids, problem};
use crate::support::problem::{Buffer, Problem};
use samtone::cpu::{self, Plan, Shard, Workspace};
use samtone::{Batch, DType, EmbeddingsMut, GradientBuffers, Loss, LossAndGradients, NoNegative, Scope};
use std::collections::BTreeSet;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const THREADS: [usize; 5] = [1, 2, 3, 5, 8];

/// A batch with everything that a mask can depend on, several tiles of every matrix, and ragged edges.
fn everything(loss: Loss, dtype: DType, workspace: usize) -> samtone::Result<Problem> {
    let (rows, passages) = (131, 203);
    let problem = problem(loss, Kind::Duplicates, (rows, passages, 37), 0.02, 9, 0.0)?.rounded(dtype);
    let mut source = Source::new(3);
    let owner = |j: usize| if j.is_multiple_of(3) { (j % rows) as i32 } else { -1 };
    Ok(problem.with(|call| {
        call.with_positives((0..rows).map(|_| source.below(passages) as u32).collect::<Vec<_>>())
            .with_weights((0..rows).map(|i| (i % 4) as f32).collect::<Vec<_>>())
            .with_query_ids(duplicate_ids(rows))
            .with_passage_ids(duplicate_ids(passages))
            .with_shared_ids(true)
            .with_hard_negative_owners((0..passages).map(owner).collect::<Vec<_>>(), Scope::Own)
            .with_margin(0.2)
            .with_workspace_bytes(workspace)
    }))
}

/// Without any of that: other tiles are unmasked, and the passages are read in place.
fn plain(loss: Loss, dtype: DType, workspace: usize) -> samtone::Result<Problem> {
    let problem = problem(loss, Kind::Random, (131, 203, 37), 0.02, 9, 0.0)?.rounded(dtype);
    Ok(problem.with(|call| call.with_workspace_bytes(workspace)))
}

/// The first with prefixes.
fn prefixes(loss: Loss, dtype: DType, workspace: usize) -> samtone::Result<Problem> {
    Ok(everything(loss, dtype, workspace)?
        .with(|call| call.with_prefixes([3, 16, 17, 36]).with_no_negative(NoNegative::Zero)))
}

/// Bounds that store every logit, and that keep so few tiles that the number of threads decides about the waves.
const WORKSPACES: [usize; 3] = [256 << 20, 256 << 10, 130 << 10];

fn bits(x: &LossAndGradients) -> Vec<u64> {
    let (e, g) = (&x.evaluation, &x.gradients);
    let scalars = [
        e.loss,
        g.temperature.tau,
        g.temperature.log_beta,
        e.query_to_passage.precision_at_1,
        e.query_to_passage.mrr,
        e.passage_to_query.precision_at_1,
        e.passage_to_query.mrr,
    ];
    let wide = scalars.iter().chain(&e.row_losses).map(|v| v.to_bits());
    wide.chain(g.query.iter().chain(&g.passage).map(|v| v.to_bits().into())).collect()
}

/// Fused, split, and from shards: every way to compute a gradient.
fn every_way(batch: &Batch<'_>) -> samtone::Result<[Vec<u64>; 3]> {
    let fused = samtone::loss_and_gradients(batch, 1.0)?;
    let forward = cpu::forward(batch)?;
    let split = LossAndGradients { evaluation: forward.evaluation().clone(), gradients: forward.backward(batch, 1.0)? };
    let middle = batch.rows() / 3;
    let [a, b] = [0..middle, middle..batch.rows()].map(|r| Shard::new(batch, r));
    let (a, b) = (a?, b?);
    let mut merged = a.partials()?;
    merged.merge(&b.partials()?)?;
    let gradients = b.gradients(&merged, 1.0)?;
    let sharded = LossAndGradients { evaluation: a.evaluate(&merged)?, gradients };
    Ok([fused, split, sharded].map(|x| bits(&x)))
}

#[test]
fn any_number_of_threads() -> Outcome {
    let mut seen = BTreeSet::new();
    for (k, (name, ..)) in Loss::PRESETS.iter().enumerate() {
        for (w, workspace) in WORKSPACES.into_iter().enumerate() {
            for dtype in [DType::F32, DType::BF16] {
                let make = [everything, plain, prefixes][(k + w) % 3];
                let problem = make(Loss::by_name(name)?, dtype, workspace)?;
                let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
                let batch = problem.batch(&query, &passage)?;
                let mut want = None;
                for threads in THREADS {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
                    let (got, plan) = pool.install(|| (every_way(&batch), Plan::new(&batch)));
                    let (got, plan) = (got?, plan?);
                    assert!(plan.workspace_bytes() <= workspace, "{plan}");
                    seen.insert((dtype.name(), plan.stores_logits()));
                    let want = want.get_or_insert_with(|| got.clone());
                    for (way, (got, want)) in ["fused", "split", "sharded"].iter().zip(got.iter().zip(want.iter())) {
                        assert!(got == want, "{name} {dtype} {way}: other bits with {threads} threads; {plan}");
                    }
                }
            }
        }
    }
    assert_eq!(seen.len(), 4, "a type was never stored or never recomputed: {seen:?}");
    Ok(())
}

#[test]
fn any_run() -> Outcome {
    for workspace in WORKSPACES {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let problem = everything(Loss::samtone_both(), dtype, workspace)?;
            let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
            let batch = problem.batch(&query, &passage)?;
            let want = every_way(&batch)?;
            for run in 1..20 {
                assert!(every_way(&batch)? == want, "{dtype}: other bits in run {run}");
            }
        }
    }
    Ok(())
}

/// A workspace changes nothing, whatever it was used for before: larger and smaller batches, other types, stored and
/// recomputed plans, calls that failed.
#[test]
fn any_history_of_a_workspace() -> Outcome {
    let mut workspace = Workspace::new();
    let mut source = Source::new(17);
    for round in 0..60 {
        let dtype = [DType::F32, DType::BF16, DType::F16][source.below(3)];
        let loss = Loss::by_name(Loss::PRESETS[source.below(Loss::PRESETS.len())].0)?;
        let bytes = WORKSPACES[source.below(3)];
        let problem = match source.below(4) {
            0 => everything(loss, dtype, bytes)?,
            1 => plain(loss, dtype, bytes)?,
            2 => crate::support::data::problem(loss, Kind::Norms, (5, 9, 3), 0.1, round, 3.0)?.rounded(dtype),
            _ => crate::support::data::problem(loss, Kind::Trained, (66, 70, 600), 0.1, round, 3.0)?.rounded(dtype),
        };
        let (mut query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
        if round % 7 == 3 {
            query = Buffer::new(dtype, &vec![f64::NAN; problem.query.len()]);
        }
        let batch = problem.batch(&query, &passage)?;
        let want = samtone::loss_and_gradients(&batch, 2.0);
        let (mut dq, mut dp) = (vec![f32::NAN; problem.query.len()], vec![f32::NAN; problem.passage.len()]);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::new(&mut dq, problem.rows, problem.dim)?),
            passage: Some(EmbeddingsMut::new(&mut dp, problem.passages, problem.dim)?),
        };
        let got = match round % 2 {
            0 => workspace.loss_and_gradients_into(&batch, 2.0, buffers),
            // Split in two, the second half of which takes the memory.
            _ => cpu::forward(&batch).and_then(|forward| {
                let temperature = workspace.backward_into(&forward, &batch, 2.0, buffers)?;
                Ok((forward.evaluation().clone(), temperature))
            }),
        };
        assert_eq!(got.is_err(), round % 7 == 3, "round {round}");
        match (got, want) {
            (Ok((evaluation, temperature)), Ok(want)) => {
                let gradients = samtone::Gradients { query: dq, passage: dp, temperature };
                let got = LossAndGradients { evaluation, gradients };
                assert!(bits(&got) == bits(&want), "round {round}: {}", problem.name);
            }
            (got, want) => {
                assert_eq!(got.map(|_| ()).err().map(|e| e.to_string()), want.map(|_| ()).err().map(|e| e.to_string()))
            }
        }
    }
    Ok(())
}

/// A shard or a state may move to a pool with other threads than the one it was made in.
#[test]
fn any_pool_for_each_step() -> Outcome {
    for workspace in WORKSPACES {
        for dtype in [DType::F32, DType::BF16] {
            let problem = everything(Loss::samtone_both(), dtype, workspace)?;
            let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
            let batch = problem.batch(&query, &passage)?;
            let want = every_way(&batch)?;
            for (made, used) in [(1, 8), (8, 1), (2, 5), (3, 7)] {
                let [made, used] = [made, used].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build());
                let (made, used) = (made?, used?);
                let middle = problem.rows / 3;
                let shard = |rows| made.install(|| Shard::new(&batch, rows));
                let (a, b) = (shard(0..middle)?, shard(middle..problem.rows)?);
                let mut merged = made.install(|| a.partials())?;
                merged.merge(&used.install(|| b.partials())?)?;
                let gradients = used.install(|| b.gradients(&merged, 1.0))?;
                let sharded = LossAndGradients { evaluation: a.evaluate(&merged)?, gradients };
                let forward = made.install(|| cpu::forward(&batch))?;
                let gradients = used.install(|| forward.backward(&batch, 1.0))?;
                let split = LossAndGradients { evaluation: forward.evaluation().clone(), gradients };
                assert!([bits(&split), bits(&sharded)] == want[1..], "{dtype}, {workspace} bytes");
            }
        }
    }
    Ok(())
}
