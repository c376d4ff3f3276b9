//! Partial sums of other problems, each of which differs in one part from a given one.

use super::problem::{Buffer, Problem};
use samtone::{Block, DType, Error, Group, Loss, NoNegative, Options, Partials, Result, Scope, ZeroNorm, cpu};
use std::ops::Range;

/// Partials of f32 embeddings by the CPU.
pub fn partials(problem: &Problem, rows: Range<usize>) -> Result<Partials> {
    let [query, passage] = [&problem.query, &problem.passage].map(|x| Buffer::new(DType::F32, x));
    let batch = problem.batch(&query, &passage)?;
    cpu::Shard::new(&problem.loss, &batch, &problem.options, rows)?.partials()
}

/// Problems like `problem`, and how an error must call the part in which each differs.
fn others(problem: &Problem) -> Result<Vec<(&'static str, Problem)>> {
    let mut others = Vec::new();
    let mut with = |part, change: &dyn Fn(&mut Problem) -> Result<()>| -> Result<()> {
        let mut other = problem.clone();
        change(&mut other)?;
        others.push((part, other));
        Ok(())
    };
    let (m, n, d) = (problem.rows, problem.passages, problem.dim);
    let namesake = Loss::custom(problem.loss.name(), vec![Group::new(0.25, &[Block::QP], 2)?])?;
    with("passages of dimension", &|p| {
        p.passages -= 1;
        p.passage.truncate((n - 1) * d);
        Ok(())
    })?;
    with("the loss 0.25·{qp} (e = 2)", &move |p| {
        p.loss = namesake.clone();
        Ok(())
    })?;
    with("temperature 0.3", &|p| {
        p.options = Options::new(0.3)?;
        Ok(())
    })?;
    with("margin 0.7", &|p| {
        p.options = p.options.with_margin(0.7)?;
        Ok(())
    })?;
    with("`zero_norm`", &|p| {
        p.options = p.options.with_zero_norm(ZeroNorm::ZeroGradient);
        Ok(())
    })?;
    with("`no_negative`", &|p| {
        p.options = p.options.with_no_negative(NoNegative::Zero);
        Ok(())
    })?;
    with("`positives`", &|p| {
        p.positives = Some((0..m as u32).rev().collect());
        Ok(())
    })?;
    with("`weights`", &|p| {
        p.weights = Some((0..m).map(|i| if i == 3 { 0.5 } else { 1.0 }).collect());
        Ok(())
    })?;
    with("`query_ids`", &|p| {
        p.query_ids = Some((0..m as i64).map(|i| i / 2).collect());
        Ok(())
    })?;
    with("`passage_ids`", &|p| {
        p.passage_ids = Some((0..n as i64).map(|i| i / 2).collect());
        Ok(())
    })?;
    with("exclusive `owners`", &|p| {
        p.owners = Some(((0..n).map(|j| if j + 1 == n { 0 } else { -1 }).collect(), Scope::Own));
        Ok(())
    })?;
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
