//! What holds of Matryoshka prefixes.

use super::setup::{Extras, SLACK, Setup, close, config, failed, setup, solve, solve_as};
use crate::support::foreign::partials;
use crate::support::problem::{Buffer, Outputs, Problem};
use proptest::prelude::*;
use samtone::{Block, Call, DType, ZeroNorm, reference};
use std::ops::Range;

/// The problem without prefixes.
fn plain(setup: &Setup) -> Result<Problem, TestCaseError> {
    Setup { extras: Extras { prefixes: false, ..setup.extras }, ..setup.clone() }.problem()
}

fn with_prefixes(plain: &Problem, dims: &[usize], weights: &[f64]) -> Problem {
    let call =
        |call: Call| call.with_prefixes(dims).with_prefix_weights(weights).with_zero_norm(ZeroNorm::ZeroGradient);
    plain.clone().with(call)
}

/// What the reference gives for the f64 embeddings of the problem; `None` where it gives an error.
fn judged(problem: &Problem) -> Result<Option<Outputs>, TestCaseError> {
    let (query, passage) = (Buffer::new(DType::F64, &problem.query), Buffer::new(DType::F64, &problem.passage));
    let batch = problem.batch(&query, &passage).map_err(failed)?;
    Ok(reference::loss_and_gradients(&batch, 1.0).ok().map(|out| Outputs {
        evaluation: out.evaluation,
        grad_query: out.grad_query,
        grad_passage: out.grad_passage,
        temperature: out.temperature,
    }))
}

/// The plain problem of embeddings that end after `dim` entries.
fn cut(plain: &Problem, dim: usize) -> Problem {
    let cut = |x: &[f64]| x.chunks(plain.dim).flat_map(|row| row[..dim].to_vec()).collect();
    Problem { dim, query: cut(&plain.query), passage: cut(&plain.passage), ..plain.clone() }
}

/// A gradient of the first `dim` entries as one of `whole` entries, times a weight, added to another.
fn add(sum: &mut [f64], gradient: &[f64], dim: usize, whole: usize, weight: f64) {
    for (sum, gradient) in sum.chunks_mut(whole).zip(gradient.chunks(dim)) {
        sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += weight * g);
    }
}

proptest! {
    #![proptest_config(config(96))]

    /// One prefix of the whole embedding, with weight 1, is no prefix at all: the same bits, in every type.
    #[test]
    fn the_whole_embedding_is_the_plain_loss(setup in setup(), dtype in 0..3_usize) {
        let dtype = [DType::F32, DType::F16, DType::BF16][dtype];
        let extras = Extras { prefixes: false, ..setup.extras };
        let plain = Setup { extras, ..setup }.problem_in(dtype)?;
        let whole = plain.clone().with(|call| call.with_prefixes([plain.dim]));
        let (want, got) = (solve_as(&plain, dtype, DType::F32, 1.5)?, solve_as(&whole, dtype, DType::F32, 1.5)?);
        let (Some(want), Some(mut got)) = (want, got) else { return Ok(()) };
        let listed = std::mem::take(&mut got.evaluation.prefixes);
        prop_assert_eq!(&got, &want);
        prop_assert_eq!(listed.len(), 1);
        prop_assert_eq!((listed[0].dim, listed[0].loss), (plain.dim, want.evaluation.loss));
        prop_assert_eq!(listed[0].query_to_passage, want.evaluation.query_to_passage);
        prop_assert_eq!(judged(&whole)?.map(|out| out.grad_query), judged(&plain)?.map(|out| out.grad_query));
    }

    /// The loss is the weighted sum of the plain losses of embeddings that are cut off; so are all its derivatives.
    #[test]
    fn prefixes_are_sums_of_plain_losses(setup in setup(), shortest in 1..20_usize) {
        let plain = plain(&setup)?;
        let d = plain.dim;
        let mut dims = vec![shortest.min(d), shortest.min(d).midpoint(d), d];
        dims.dedup();
        let weights: Vec<f64> = [0.75, 2.0, 0.5][..dims.len()].to_vec();
        let nested = with_prefixes(&plain, &dims, &weights);
        prop_assume!(nested.is_decided(SLACK));
        let (Some(got), Some(mut want)) = (solve(&nested, 1.0)?, judged(&nested)?) else { return Ok(()) };
        let reference = want.clone();
        for x in [&mut want.evaluation.loss, &mut want.temperature.tau, &mut want.temperature.log_beta] {
            *x = 0.0;
        }
        for x in [&mut want.evaluation.row_losses, &mut want.grad_query, &mut want.grad_passage] {
            x.fill(0.0);
        }
        for (&dim, &weight) in dims.iter().zip(&weights) {
            let alone = cut(&plain, dim).with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient));
            let Some(part) = judged(&alone)? else { return Err(failed("an error of one prefix alone")) };
            want.evaluation.loss += weight * part.evaluation.loss;
            want.temperature.tau += weight * part.temperature.tau;
            want.temperature.log_beta += weight * part.temperature.log_beta;
            add(&mut want.evaluation.row_losses, &part.evaluation.row_losses, 1, 1, weight);
            add(&mut want.grad_query, &part.grad_query, dim, d, weight);
            add(&mut want.grad_passage, &part.grad_passage, dim, d, weight);
            let listed = reference.evaluation.prefixes.iter().find(|p| p.dim == dim).map(|p| (p.weight, p.loss));
            prop_assert_eq!(listed, Some((weight, part.evaluation.loss)));
        }
        let near = |got: f64, want: f64| (got - want).abs() <= 1e-12 * want.abs().max(1e-300);
        prop_assert!(near(reference.evaluation.loss, want.evaluation.loss));
        close(&got, &want, &nested)?;
    }

    /// Shards merge the sums of every prefix. Those of a prefix are what a plain call has for embeddings that are cut off there.
    #[test]
    fn partial_sums_are_of_every_prefix(setup in setup(), dim in 1..19_usize, middle in 1..49_usize) {
        let plain = plain(&Setup { dim: setup.dim.max(2), ..setup })?;
        let (d, m) = (plain.dim, plain.rows);
        prop_assume!(m > 1);
        let (dim, middle) = (dim.min(d - 1), middle.min(m - 1));
        let nested = with_prefixes(&plain, &[dim, d], &[2.0, 1.0]);
        let of = |problem: &Problem, rows: Range<usize>| {
            let zero = problem.clone().with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient));
            partials(&zero, rows).map_err(failed)
        };
        let mut merged = of(&nested, 0..middle)?;
        merged.merge(&of(&nested, middle..m)?).map_err(failed)?;
        for (k, alone) in [cut(&plain, dim), plain.clone()].iter().enumerate() {
            let want = of(alone, 0..m)?;
            for block in Block::ALL {
                let got = merged.log_sum_exp_of_prefix(k, block);
                prop_assert_eq!(got.is_some(), want.log_sum_exp(block).is_some());
                for (got, want) in got.into_iter().flatten().zip(want.log_sum_exp(block).into_iter().flatten()) {
                    // A cosine near a margin may fall to either side of it, which `is_decided` knows of.
                    let near = got == want || (got - want).abs() <= 2e-6 * plain.call.beta() + 1e-5;
                    prop_assert!(near || !nested.is_decided(SLACK), "{block:?}, prefix {k}: {got} instead of {want}");
                }
            }
        }
        prop_assert_eq!(merged.log_sum_exp(Block::QP), merged.log_sum_exp_of_prefix(1, Block::QP));
        prop_assert_eq!(merged.log_sum_exp_of_prefix(2, Block::QP), None);
    }

    /// A prefix of weight 0 is not there, and what lies behind the last prefix is not read.
    #[test]
    fn weights_of_zero_and_entries_behind_the_last_count_nothing(setup in setup(), at in 1..19_usize) {
        let plain = plain(&Setup { dim: setup.dim.max(3), ..setup })?;
        let d = plain.dim;
        let dim = at.min(d - 2);
        let nested = with_prefixes(&plain, &[dim, d - 1], &[0.5, 2.0]);
        let Some(want) = solve(&nested, 1.0)? else { return Ok(()) };
        let with_zeros = if dim + 2 < d {
            with_prefixes(&plain, &[dim, dim + 1, d - 1, d], &[0.5, 0.0, 2.0, 0.0])
        } else {
            with_prefixes(&plain, &[dim, d - 1, d], &[0.5, 2.0, 0.0])
        };
        prop_assert_eq!(solve(&with_zeros, 1.0)?, Some(want.clone()));
        let mut changed = nested.clone();
        for row in changed.query.chunks_mut(d).chain(changed.passage.chunks_mut(d)) {
            row[d - 1] = f64::NAN;
        }
        prop_assert_eq!(solve(&changed, 1.0)?, Some(want.clone()));
        for gradient in want.grad_query.chunks(d).chain(want.grad_passage.chunks(d)) {
            prop_assert_eq!(gradient[d - 1].to_bits(), 0);
        }
    }
}
