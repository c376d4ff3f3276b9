//! The ends of the range of every option, and data at the limits of arithmetic. Whatever is accepted there is computed right by every
//! backend.

use super::{Case, Make};
use crate::support::data::{Kind, Source, problem};
use crate::support::problem::Problem;
use samtone::{Block, Call, DType, Group, Loss};
use std::sync::Arc;

const SHAPE: (usize, usize, usize) = (13, 29, 16);

pub fn cases() -> Result<Vec<Case>, String> {
    let found = [temperatures(), margins(), weights(), coefficients(), pairs(), norms(), cancelling(), lines()];
    let cases = found.into_iter().collect::<samtone::Result<Vec<_>>>().map_err(|e| e.to_string())?;
    Ok(cases.concat())
}

fn case(
    name: String,
    upstream: f64,
    in_turn: bool,
    make: impl Fn(DType, u64) -> samtone::Result<Problem> + Send + Sync + 'static,
) -> Case {
    let make: Make = Arc::new(move |dtype, more| make(dtype, more).map_err(|e| e.to_string()));
    Case { name: format!("edge: {name}"), upstream, make, in_turn }
}

/// A problem of plain data whose call is changed.
fn changed(
    name: String,
    upstream: f64,
    (loss, kind, tau): (Loss, Kind, f64),
    change: impl Fn(Call) -> Call + Send + Sync + 'static,
) -> Case {
    let name = format!("{name}, {} {} τ={tau:e}", loss.name(), kind.name());
    case(name, upstream, true, move |_, more| {
        let problem = problem(loss.clone(), kind, SHAPE, tau, 5000 + more, 3.0)?;
        Ok(problem.with(&change))
    })
}

fn temperatures() -> samtone::Result<Vec<Case>> {
    let mut cases = Vec::new();
    // Below 2.8e-6 the twelve leading bits of β·log2 e leave more of a logit than f32 has exponents; below 1.44e-6 the logarithm to
    // base 2 of a softmax term may lie below −10⁶.
    let written = |name: &str, tau: f64, query: [f64; 4], passage: [f64; 4]| {
        case(format!("{name} τ={tau:e}"), 1.0, false, move |_, _| {
            let mut problem = problem(Loss::info_nce(), Kind::Random, (2, 2, 2), tau, 1, 0.0)?;
            (problem.query, problem.passage) = (query.to_vec(), passage.to_vec());
            Ok(problem)
        })
    };
    for tau in [1e-6, 1.4e-6, 2e-6, 2.7e-6] {
        cases.push(written("the other is nearer", tau, [1.0, 0.0, 0.75, 0.25], [0.75, 0.25, 1.0, 0.0]));
        cases.push(written("positives at right angles", tau, [1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]));
    }
    let losses = [Loss::samtone_both(), Loss::gte(), Loss::decoupled(), Loss::qwen3(), Loss::samtone_query()];
    for (k, kind) in Kind::ALL.into_iter().enumerate() {
        for (tau, step) in [(1e-6, 0), (2e-6, 1), (1e6, 2)] {
            let loss = losses[(k + step) % losses.len()].clone();
            cases.push(changed("temperature".into(), 1.0, (loss, kind, tau), |call| call));
        }
    }
    Ok(cases)
}

fn margins() -> samtone::Result<Vec<Case>> {
    let ends = [f64::MAX, f64::MIN, 2.0, -2.0, f64::MIN_POSITIVE, -f64::MIN_POSITIVE];
    let case = |margin: f64| {
        changed(format!("margin {margin:e}"), 1.0, (Loss::samtone_both(), Kind::Random, 0.05), move |call| {
            call.with_margin(margin)
        })
    };
    Ok(ends.map(case).to_vec())
}

fn weights() -> samtone::Result<Vec<Case>> {
    let (least, most) = (f32::from_bits(1), f32::MAX);
    let cases = [[least; 4], [most; 4], [least, most, 0.0, 1.0], [0.0, least, 0.0, 3.0 * least], [most, 0.0, 0.0, 0.0]];
    let case = |turns: [f32; 4]| {
        changed(format!("weights {turns:?}"), 1.0, (Loss::samtone_both(), Kind::Random, 0.05), move |call| {
            call.with_weights((0..SHAPE.0).map(|i| turns[i % 4]).collect::<Vec<_>>())
        })
    };
    Ok(cases.map(case).to_vec())
}

/// With the upstream gradients that bring the gradient into the range of f32, and that are the ends of their own range.
fn coefficients() -> samtone::Result<Vec<Case>> {
    let (least, most) = (Group::MIN_COEFFICIENT, Group::MAX_COEFFICIENT);
    let group = |c: f64, blocks: &[Block], copies: u8| Group::new(c, blocks, copies);
    let (largest, smallest) = (f64::from(f32::MAX), f64::from(f32::from_bits(1)));
    let one =
        |c: f64, copies: u8| Ok(vec![group(c, &[Block::QP, Block::QQ], copies)?, group(c, &[Block::PQ], copies)?]);
    let mixed = vec![group(most, &[Block::QP], 1)?, group(least, &[Block::PP], 1)?];
    let mut problems = vec![("both".to_owned(), 1.0, 0.05, mixed)];
    for (c, upstreams) in [(least, [1.0, largest, -largest]), (most, [1.0, smallest, -smallest])] {
        for (copies, upstream) in (0..3).zip(upstreams) {
            for tau in [0.05, Call::MIN_TEMPERATURE] {
                problems.push((format!("{c:e} (e = {copies})"), upstream, tau, one(c, copies)?));
            }
        }
    }
    let case = |(name, upstream, tau, groups): (String, f64, f64, Vec<Group>)| -> samtone::Result<Case> {
        let loss = Loss::custom("custom", groups)?;
        Ok(changed(format!("coefficient {name}, upstream {upstream:e}"), upstream, (loss, Kind::Random, tau), |call| {
            call
        }))
    };
    problems.into_iter().map(case).collect()
}

fn pairs() -> samtone::Result<Vec<Case>> {
    let ends = [0.0, Group::MIN_COEFFICIENT, 1.0 - f64::EPSILON / 2.0, 1.0];
    let case = |alpha: f64| {
        let of = (Loss::pair(alpha)?, Kind::Random, 0.05);
        Ok(changed(format!("alpha {alpha:e}"), 1.0, of, |call| call))
    };
    ends.into_iter().map(case).collect()
}

/// Embeddings of the smallest and of the largest numbers of their type.
fn norms() -> samtone::Result<Vec<Case>> {
    let least = |dtype: DType| match dtype {
        DType::F64 | DType::F32 => f64::from(f32::from_bits(1)),
        DType::F16 => samtone::half::f16::from_bits(1).to_f64(),
        DType::BF16 => samtone::half::bf16::from_bits(1).to_f64(),
    };
    let most = |dtype: DType| match dtype {
        DType::F64 | DType::F32 => f64::from(f32::MAX),
        DType::F16 => samtone::half::f16::MAX.to_f64(),
        DType::BF16 => samtone::half::bf16::MAX.to_f64(),
    };
    let plain = |more| problem(Loss::samtone_both(), Kind::Random, SHAPE, 0.05, 6000 + more, 0.0);
    let smallest = move |dtype, more| -> samtone::Result<Problem> {
        let mut problem = plain(more)?;
        // Whole multiples of the smallest number, 1 to 3 of it in norm at the least: every tenth row is the smallest of all.
        for (k, x) in problem.query.iter_mut().chain(&mut problem.passage).enumerate() {
            let only = k % SHAPE.2 == k / SHAPE.2 % SHAPE.2;
            let multiple = if (k / SHAPE.2) % 10 == 3 { f64::from(u8::from(only)) } else { (3.0 * *x).round() };
            *x = least(dtype) * (multiple + if only && multiple == 0.0 { 1.0 } else { 0.0 });
        }
        Ok(problem)
    };
    let largest = move |dtype, more| -> samtone::Result<Problem> {
        let mut problem = plain(more)?;
        for row in problem.query.chunks_mut(SHAPE.2).chain(problem.passage.chunks_mut(SHAPE.2)) {
            let top = row.iter().fold(0.0_f64, |top, x| top.max(x.abs()));
            row.iter_mut().for_each(|x| *x = (*x / top) * most(dtype));
        }
        Ok(problem)
    };
    // Upstream gradients that keep gradients within f32: they are the inverse of norms.
    Ok(vec![
        case("the smallest numbers".into(), 1e-15, false, smallest),
        case("the largest numbers".into(), 1e15, false, largest),
    ])
}

/// Negatives that point as the positive does: their gradients and the positive's cancel, down to what rounding leaves of them.
fn cancelling() -> samtone::Result<Vec<Case>> {
    let ties = |_, more| -> samtone::Result<Problem> {
        let problem = problem(Loss::pair(0.1)?, Kind::Ties, (365, 365, 8), 0.02, 8767 + more, 0.0)?;
        let mut source = Source::new(1774 + more);
        let ids: Vec<i64> = (0..365).map(|_| source.below(365) as i64).collect();
        Ok(problem.with(|call| call.with_passage_ids(ids).with_margin(0.1)))
    };
    let copies = |_, more| -> samtone::Result<Problem> {
        let mut problem = problem(Loss::info_nce(), Kind::Trained, (300, 300, 24), 0.05, 8000 + more, 0.0)?;
        let d = problem.dim;
        for i in (0..40).step_by(2) {
            problem.query.copy_within(i * d..(i + 1) * d, (i + 1) * d);
            problem.passage.copy_within(i * d..(i + 1) * d, (i + 1) * d);
        }
        Ok(problem)
    };
    Ok(vec![
        case("ties under ids and a margin".into(), 3e-3, false, ties),
        case("copies without ids in a trained batch".into(), 1.0, false, copies),
    ])
}

/// Embeddings of one number: every gradient is exactly 0, and what a backend gives is what it loses on the way there. The upstream
/// gradient that is no power of two does not scale that exactly.
fn lines() -> samtone::Result<Vec<Case>> {
    let case = |loss: Loss, (m, n): (usize, usize), upstream: f64| {
        let name = format!("dimension 1, {m} x {n}, {}, upstream {upstream:e}", loss.name());
        case(name, upstream, true, move |_, more| {
            problem(loss.clone(), Kind::Random, (m, n, 1), 0.03, 2001 + more, 0.0)
        })
    };
    let upstreams = super::UPSTREAM.iter().filter(|upstream| **upstream != 0.0);
    let few = upstreams.map(|&upstream| case(Loss::samtone_both(), (3, 7), upstream));
    Ok(few.chain([case(Loss::gte(), (3, 7), 64.0), case(Loss::gte(), (97, 101), 64.0)]).collect())
}
