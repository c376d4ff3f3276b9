//! Partial sums of other problems, each of which differs from a given problem in one part.

use super::problem::{Buffer, Problem};
use samtone::{Block, Call, DType, Error, Group, Loss, NoNegative, Partials, Result, Scope, ZeroNorm, cpu};
use std::ops::Range;

/// Partials of f32 embeddings by the CPU.
pub fn partials(problem: &Problem, rows: Range<usize>) -> Result<Partials> {
    let [query, passage] = [&problem.query, &problem.passage].map(|x| Buffer::new(DType::F32, x));
    let batch = problem.batch(&query, &passage)?;
    cpu::Shard::new(&batch, rows)?.partials()
}

/// Problems like `problem`, and how an error must call the part in which each differs.
fn others(problem: &Problem) -> Result<Vec<(&'static str, Problem)>> {
    let mut others = Vec::new();
    let (m, n, d) = (problem.rows, problem.passages, problem.dim);
    let mut fewer = problem.clone();
    fewer.passages -= 1;
    fewer.passage.truncate((n - 1) * d);
    others.push(("passages of dimension", fewer));
    let mut with = |part, change: &dyn Fn(Call) -> Call| others.push((part, problem.clone().with(change)));
    let namesake = Loss::custom(problem.call.loss().name(), vec![Group::new(0.25, &[Block::QP], 2)?])?;
    with("the loss 0.25·{qp} (e = 2)", &|call| call.with_loss(namesake.clone()));
    with("temperature 0.3", &|call| call.with_temperature(0.3));
    with("margin 0.7", &|call| call.with_margin(0.7));
    with("`zero_norm`", &|call| call.with_zero_norm(ZeroNorm::ZeroGradient));
    with("`no_negative`", &|call| call.with_no_negative(NoNegative::Zero));
    with("`positives`", &|call| call.with_positives((0..m as u32).rev().collect::<Vec<_>>()));
    let weights: Vec<f32> = (0..m).map(|i| if i == 3 { 0.5 } else { 1.0 }).collect();
    with("`weights`", &|call| call.with_weights(&*weights));
    with("`prefixes` 1 (weight 1)", &|call| call.with_prefixes([1, d]));
    let halves = |count: usize| (0..count as i64).map(|i| i / 2).collect::<Vec<_>>();
    with("`query_ids`", &|call| call.with_query_ids(halves(m)));
    with("`passage_ids`", &|call| call.with_passage_ids(halves(n)));
    let owners: Vec<i32> = (0..n).map(|j| if j + 1 == n { 0 } else { -1 }).collect();
    with("exclusive `owners`", &|call| call.with_hard_negative_owners(&*owners, Scope::Own));
    Ok(others)
}

/// An error unless `use_partials` refuses the partials of each, and names the part.
pub fn all_refused(
    problem: &Problem,
    mut use_partials: impl FnMut(&Partials) -> Result<()>,
) -> std::result::Result<(), String> {
    for (part, other) in others(problem).map_err(|e| e.to_string())? {
        let partials = partials(&other, 0..other.rows).map_err(|e| format!("{part}: {e}"))?;
        match use_partials(&partials) {
            Err(error @ Error::StateMismatch { .. }) if error.to_string().contains(part) => {}
            other => return Err(format!("partials of another problem, in {part}: {other:?}")),
        }
    }
    Ok(())
}

/// Partials of the same shape, but of other embeddings.
pub fn other_embeddings(problem: &Problem) -> Result<Partials> {
    let mut other = problem.clone();
    other.query[0] += 0.5;
    partials(&other, 0..other.rows)
}
