//! Properties of the definition that need no second implementation: invariances, equivalent batches, equal bits.

mod masks;
mod prefixes;
mod runs;
mod setup;

use crate::support::data::Source;
use crate::support::problem::{Outputs, Problem};
use proptest::prelude::*;
use samtone::{DType, Evaluation, Loss, PrefixEvaluation, cpu};
use setup::{
    Extras, SLACK, Setup, close, config, different, failed, inverse, pairs, pick, reduced, setup, shuffled, solve,
    subset,
};

/// The metrics of a prefix, the other way round.
fn swapped_metrics(of: &PrefixEvaluation) -> PrefixEvaluation {
    PrefixEvaluation { query_to_passage: of.passage_to_query, passage_to_query: of.query_to_passage, ..*of }
}

proptest! {
    #![proptest_config(config(96))]

    /// A cosine does not change along its embedding: x·∂L/∂x = 0.
    #[test]
    fn gradients_are_tangent(setup in setup()) {
        let problem = setup.problem()?;
        let Some(got) = solve(&problem, 1.0)? else { return Ok(()) };
        let beta = problem.call.beta();
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
        // One tile size for all.
        let problem = setup.problem()?.with(|call| call.with_workspace_bytes(cpu::DEFAULT_WORKSPACE_BYTES));
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
        let factors: Vec<f64> =
            (0..problem.rows + problem.passages).map(|_| 10_f64.powf(source.uniform(-9.0, 9.0))).collect();
        let (of_query, of_passage) = factors.split_at(problem.rows);
        let scale = |x: &[f64], factors: &[f64]| -> Vec<f64> {
            x.chunks(problem.dim).zip(factors).flat_map(|(row, f)| row.iter().map(move |v| v * f)).collect()
        };
        let scaled = Problem {
            query: scale(&problem.query, of_query),
            passage: scale(&problem.passage, of_passage),
            ..problem.clone()
        };
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
        if setup.extras.positives || setup.extras.passage_ids {
            // The lowest row gives a shared passage, or a copy of its positive, its query key.
            let ids = different(problem.rows);
            problem = problem.with(|call| call.with_query_ids(ids).with_shared_ids(false));
        }
        prop_assume!(problem.is_decided(SLACK));
        let mut source = Source::new(setup.seed + 3);
        let (rows, passages) = (shuffled(problem.rows, &mut source), shuffled(problem.passages, &mut source));
        let (Some(want), Some(got)) = (solve(&problem, 1.0)?, solve(&subset(&problem, &rows, &passages), 1.0)?) else {
            return Ok(());
        };
        close(&reduced(&got, problem.dim, &inverse(&rows), &inverse(&passages)), &want, &problem)?;
    }

    /// Losses that treat the towers alike swap their gradients; the two one-sided SamToNe presets are each other's mirror.
    #[test]
    fn swapping_towers_swaps_gradients(setup in setup(), which in 0..5_usize) {
        let (preset, mirrored) = [
            ("bidirectional", "bidirectional"),
            ("clip", "clip"),
            ("samtone_both", "samtone_both"),
            ("samtone_query", "samtone_passage"),
            ("samtone_passage", "samtone_query"),
        ][which];
        let extras = Extras { positives: false, owners: false, ..setup.extras };
        let [loss, mirrored] = [preset, mirrored].map(Loss::by_name);
        let (loss, mirrored) = (loss.map_err(failed)?, mirrored.map_err(failed)?);
        let problem = Setup { more: 0, extras, ..setup }.problem()?.with(|call| call.with_loss(loss));
        prop_assume!(problem.is_decided(SLACK));
        let ids = |ids: Option<&[i64]>| ids.map_or_else(|| different(problem.rows), <[i64]>::to_vec);
        let call = problem.call.clone().with_loss(mirrored).with_query_ids(ids(pairs(&problem).passage_ids()));
        let swapped = Problem {
            call: call.with_passage_ids(ids(pairs(&problem).query_ids())),
            query: problem.passage.clone(),
            passage: problem.query.clone(),
            ..problem.clone()
        };
        let (Some(want), Some(got)) = (solve(&problem, 1.0)?, solve(&swapped, 1.0)?) else { return Ok(()) };
        let evaluation = Evaluation {
            query_to_passage: got.evaluation.passage_to_query,
            passage_to_query: got.evaluation.query_to_passage,
            prefixes: got.evaluation.prefixes.iter().map(swapped_metrics).collect(),
            ..got.evaluation
        };
        let back = Outputs { evaluation, grad_query: got.grad_passage, grad_passage: got.grad_query, ..got };
        close(&back, &want, &problem)?;
    }

    /// A masked negative might as well not be in the batch. All weight on one row, what it does not see deleted.
    #[test]
    fn masking_is_deletion(setup in setup(), by in 0..4_usize) {
        let none = Extras {
            positives: false,
            weights: false,
            query_ids: false,
            passage_ids: false,
            shared_ids: false,
            owners: false,
            margin: false,
            prefixes: setup.extras.prefixes,
        };
        let extras = match by {
            0 => Extras { owners: true, ..none },
            1 => Extras { passage_ids: true, ..none },
            2 => Extras { query_ids: true, ..none },
            // Each prefix has cosines of its own, so a margin hides other negatives from each.
            _ => Extras { margin: true, prefixes: false, ..none },
        };
        let problem = Setup { extras, ..setup.clone() }.problem()?;
        let (m, n, d) = (problem.rows, problem.passages, problem.dim);
        let row = Source::new(setup.seed + 4).below(m);
        let weights: Vec<f32> = (0..m).map(|i| f32::from(u8::from(i == row))).collect();
        let mut problem = problem.with(|call| call.with_weights(weights));
        let margin = problem.call.margin();
        if margin.is_some() {
            problem = problem.with(|call| call.with_loss(Loss::info_nce())); // in PP the same passage has another cosine
        }
        prop_assume!(problem.is_decided(SLACK));
        let cosine = |i: usize, j: usize| {
            let (q, p) = (&problem.query[i * d..(i + 1) * d], &problem.passage[j * d..(j + 1) * d]);
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
            dot(q, p) / (dot(q, q) * dot(p, p)).sqrt()
        };
        let pairs = pairs(&problem);
        let query_ids = pairs.query_ids();
        // Hard negatives are nobody's positive, so they can go alone; a query goes with its positive.
        let passage_masked = |j: usize| match (pairs.exclusive_owners(), pairs.passage_ids(), query_ids) {
            (Some(owners), ..) => j >= m && owners[j] >= 0 && owners[j] as usize != row,
            (_, Some(ids), _) => j >= m && ids[j] == ids[row],
            (.., Some(ids)) => j < m && j != row && ids[j] == ids[row],
            _ => j >= m && margin.is_some_and(|margin| cosine(row, j) > cosine(row, row) + margin),
        };
        let query_masked = |i: usize| query_ids.is_some_and(|ids| i != row && ids[i] == ids[row]);
        let rows: Vec<usize> = (0..m).filter(|&i| !query_masked(i)).collect();
        let passages: Vec<usize> = (0..n).filter(|&j| !passage_masked(j)).collect();
        let (Some(full), Some(got)) = (solve(&problem, 1.0)?, solve(&subset(&problem, &rows, &passages), 1.0)?) else {
            return Ok(());
        };
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
        let extras = Extras { weights: false, query_ids: false, shared_ids: false, owners: false, ..setup.extras };
        let rows = setup.rows.min(12);
        let loss = Loss::by_name(["info_nce", "pair", "decoupled"][which]).map_err(failed)?;
        let problem = Setup { rows, more: 3 * rows, extras, ..setup.clone() }.problem()?;
        let problem = problem.with(|call| call.with_loss(loss));
        prop_assume!(problem.is_decided(SLACK));
        let mut source = Source::new(setup.seed + 5);
        let mut copies: Vec<usize> = (0..rows).map(|_| source.below(4)).collect();
        copies[0] += 1;
        let repeated: Vec<usize> = (0..rows).flat_map(|i| vec![i; copies[i]]).collect();
        let all: Vec<usize> = (0..problem.passages).collect();
        let weights: Vec<f32> = copies.iter().map(|&k| k as f32).collect();
        let weighted = problem.clone().with(|call| call.with_weights(weights));
        let (Some(want), Some(got)) = (solve(&weighted, 1.0)?, solve(&subset(&problem, &repeated, &all), 1.0)?) else {
            return Ok(());
        };
        let mut gathered = want.clone();
        gathered.grad_query.fill(0.0);
        for (k, &i) in repeated.iter().enumerate() {
            gathered.evaluation.row_losses[i] = got.evaluation.row_losses[k];
            let copy = &got.grad_query[k * problem.dim..(k + 1) * problem.dim];
            gathered.grad_query[i * problem.dim..(i + 1) * problem.dim]
                .iter_mut()
                .zip(copy)
                .for_each(|(sum, g)| *sum += g);
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
            let all = |x: &Outputs| {
                [x.grad_query.clone(), x.grad_passage.clone(), vec![x.temperature.tau, x.temperature.log_beta]].concat()
            };
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
        let loss = [Loss::info_nce(), Loss::decoupled()][which].clone();
        let problem = setup.problem()?.with(|call| call.with_loss(loss));
        let lift = |x: &[f64], height: f64| -> Vec<f64> {
            x.chunks(problem.dim)
                .flat_map(|row| {
                    let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
                    row.iter().copied().chain([height * norm])
                })
                .collect()
        };
        let lifted = Problem {
            dim: problem.dim + 1,
            query: lift(&problem.query, 0.0),
            passage: lift(&problem.passage, 0.5),
            ..problem.clone()
        };
        let lifted = lifted.rounded(DType::F32);
        let Some(got) = solve(&lifted, 1.0)? else { return Ok(()) };
        let (beta, weights) = (lifted.call.beta(), lifted.normalized_weights());
        for (i, row) in got.grad_query.chunks(lifted.dim).enumerate() {
            let norm = lifted.query[i * lifted.dim..(i + 1) * lifted.dim].iter().map(|v| v * v).sum::<f64>().sqrt();
            let sum = row[lifted.dim - 1] * norm / beta;
            // Rounding moves a logit by β times that of a cosine, and a coefficient by as much of the row's weight.
            prop_assert!(sum.abs() <= weights[i] * (3e-6 + beta * 5e-7) + 1e-9, "row {i}: {sum:e}");
        }
    }
}
