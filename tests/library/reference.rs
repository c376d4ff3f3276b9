//! The reference, compared with everything that is not the reference: golden files from automatic differentiation, finite
//! differences, and closed forms.

use crate::support::compare::{against_golden, entrywise, verdict};
use crate::support::data::{Kind, Source, problem};
use crate::support::problem::{Buffer, Problem};
use crate::support::{case, compare::Check};
use samtone::half::f16;
use samtone::reference::{ReferenceOutput, loss_and_gradients};
use samtone::{
    Block, Call, DType, Element, Embeddings, EmbeddingsMut, Error, GradientBuffers, Group, Loss, NoNegative, Scope,
    Tower, ZeroNorm,
};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn solve(problem: &Problem, upstream: f64) -> samtone::Result<ReferenceOutput> {
    let (query, passage) = (Buffer::new(DType::F64, &problem.query), Buffer::new(DType::F64, &problem.passage));
    loss_and_gradients(&problem.batch(&query, &passage)?, upstream)
}

fn presets() -> impl Iterator<Item = Loss> {
    Loss::PRESETS.iter().filter_map(|(name, ..)| Loss::by_name(name).ok())
}

#[test]
fn golden_files_agree() -> Outcome {
    let cases = case::golden()?;
    let backend = samtone::backend::by_name("reference")?;
    for case in &cases {
        let got = case.problem.run(backend, DType::F64, 1.0)?;
        verdict(&against_golden(&got, &case.expected)).map_err(|e| format!("{}: {e}", case.problem.name))?;
    }
    for (name, ..) in Loss::PRESETS {
        assert!(cases.iter().any(|c| c.problem.call.loss().name() == *name), "no golden file for preset {name}");
    }
    Ok(())
}

/// The problem with one option at a time, and with all of them.
fn with_options(plain: &Problem) -> Vec<Problem> {
    let positives = |call: Call| call.with_positives([4, 0, 6, 4, 1]); // permuted, shared by rows 0 and 3, one at the end
    let weights = |call: Call| call.with_weights([1.0, 0.0, 2.5, 0.25, 3.0]);
    let query_ids = |call: Call| call.with_query_ids([8, -1, 8, 3, 4]);
    let passage_ids = |call: Call| call.with_passage_ids([1, 2, 3, 2, 5, 6, 5]);
    let shared_ids = |call: Call| passage_ids(query_ids(call)).with_shared_ids(true);
    let owners = |call: Call, scope| call.with_hard_negative_owners([-1, -1, -1, 0, -1, 2, 4], scope);
    let with = |option: &str, change: &dyn Fn(Call) -> Call| {
        let name = format!("{} with {option}", plain.name);
        Problem { name, ..plain.clone().with(change) }
    };
    vec![
        plain.clone(),
        with("positives", &positives),
        with("weights", &weights),
        with("query ids", &query_ids),
        with("passage ids", &passage_ids),
        with("shared ids", &shared_ids),
        with("owners, all", &|call| owners(call, Scope::All)),
        with("owners, own", &|call| owners(call, Scope::Own)),
        with("margin", &|call| call.with_margin(0.05)),
        with("prefixes", &|call| call.with_prefixes([1, 3]).with_prefix_weights([0.5, 2.0])),
        with("prefixes and everything", &|call| {
            let call = owners(shared_ids(weights(positives(call))), Scope::Own).with_margin(0.3);
            call.with_prefixes([2, 3, 4])
        }),
        with("everything", &|call| owners(shared_ids(weights(positives(call))), Scope::Own).with_margin(0.3)),
    ]
}

/// (L(x + h) − L(x − h)) / 2h for every entry of the array that `entry` selects.
fn differences(
    problem: &Problem,
    upstream: f64,
    entries: fn(&mut Problem) -> &mut Vec<f64>,
) -> samtone::Result<Vec<f64>> {
    let mut moved = problem.clone();
    (0..entries(&mut moved).len())
        .map(|k| {
            let x = entries(&mut moved)[k];
            let h = 1e-5 * x.abs().max(0.1);
            let mut at = |value: f64| {
                entries(&mut moved)[k] = value;
                solve(&moved, 1.0).map(|out| out.evaluation.loss)
            };
            let slope = (at(x + h)? - at(x - h)?) / (2.0 * h);
            at(x)?;
            Ok(upstream * slope)
        })
        .collect()
}

#[test]
fn finite_differences_agree() -> Outcome {
    let upstream = -1.75;
    let custom = Loss::custom(
        "custom",
        vec![Group::new(0.7, &[Block::PQ, Block::QQ], 0)?, Group::new(0.4, &[Block::PP, Block::QP], 2)?],
    )?;
    for (seed, loss) in presets().chain([custom]).enumerate() {
        let plain = problem(loss, Kind::Random, (5, 7, 4), 0.2, seed as u64, 0.0)?;
        for problem in with_options(&plain) {
            // An empty softmax is an error where the positive is not in it; the golden files cover the case otherwise.
            let got = match solve(&problem, upstream) {
                Err(Error::NoNegative { .. })
                    if problem.call.loss().groups().iter().any(|g| g.positive_copies() == 0) =>
                {
                    continue;
                }
                other => other?,
            };
            let tau = problem.call.temperature();
            let at_beta = |factor: f64| -> samtone::Result<f64> {
                let moved = problem.clone().with(|call| call.with_temperature(tau / factor));
                Ok(solve(&moved, 1.0)?.evaluation.loss)
            };
            let h = 1e-5_f64;
            let slope = upstream * (at_beta(h.exp())? - at_beta((-h).exp())?) / (2.0 * h);
            let near = |output, got: &[f64], want: &[f64]| Check {
                allowed: 1e-7 * want.iter().fold(1e-2_f64, |max, w| max.max(w.abs())),
                ..entrywise(output, got, want, 0.0)
            };
            let checks = [
                near("grad_q", &got.grad_query, &differences(&problem, upstream, |p| &mut p.query)?),
                near("grad_p", &got.grad_passage, &differences(&problem, upstream, |p| &mut p.passage)?),
                near("grad_log_beta", &[got.temperature.log_beta], &[slope]),
                near("grad_temperature", &[got.temperature.tau], &[-slope / tau]),
            ];
            verdict(&checks).map_err(|e| format!("{}: {e}", problem.name))?;
        }
    }
    Ok(())
}

#[test]
fn equal_logits_count_the_terms() -> Outcome {
    let (m, n) = (4_usize, 6_usize);
    for loss in presets() {
        let mut all_equal = problem(loss.clone(), Kind::Random, (m, n, 3), 0.01, 1, 0.0)?;
        all_equal.query = [3.0, -4.0, 12.0].repeat(m);
        all_equal.passage = [1.5, -2.0, 6.0].repeat(n);
        let got = solve(&all_equal, 1.0)?;
        let row_loss: f64 = loss
            .groups()
            .iter()
            .map(|g| {
                let negatives = g.blocks().iter().map(|b| if b.candidates_are_passages() { n - 1 } else { m - 1 });
                g.coefficient() * (f64::from(g.positive_copies()) + negatives.sum::<usize>() as f64).ln()
            })
            .sum();
        verdict(&[
            entrywise("loss", &[got.evaluation.loss], &[row_loss], 1e-12),
            entrywise("row_losses", &got.evaluation.row_losses, &vec![row_loss; m], 1e-12),
        ])
        .map_err(|e| format!("{loss}: {e}"))?;
        let largest = got.grad_query.iter().chain(&got.grad_passage).fold(0.0_f64, |max, g| max.max(g.abs()));
        assert!(largest < 1e-12, "{loss}: all cosines are at their maximum, but a gradient is {largest}");
        // Ties do not push the positive down.
        assert_eq!(got.evaluation.query_to_passage.precision_at_1, 1.0);
        assert_eq!(got.evaluation.passage_to_query.mrr, 1.0);
    }
    Ok(())
}

#[test]
fn two_orthogonal_pairs_are_a_logistic_loss() -> Outcome {
    let tau = 0.4;
    let mut pairs = problem(Loss::info_nce(), Kind::Random, (2, 2, 2), tau, 1, 0.0)?;
    pairs.query = vec![2.0, 0.0, 0.0, 5.0];
    pairs.passage = vec![0.5, 0.0, 0.0, 8.0];
    let got = solve(&pairs, 1.0)?;
    // Both rows: s⁺ = 1 and one negative at 0, so its probability is σ(−β).
    let beta = 1.0 / tau;
    let probability = 1.0 / (1.0 + beta.exp());
    let slope = 0.5 * beta * probability; // of a row's loss, with w̃ = ½; only the part across the embedding remains
    verdict(&[
        entrywise("loss", &[got.evaluation.loss], &[(-beta).exp().ln_1p()], 1e-14),
        entrywise("grad_q", &got.grad_query, &[0.0, slope / 2.0, slope / 5.0, 0.0], 1e-14),
        entrywise("grad_p", &got.grad_passage, &[0.0, slope / 0.5, slope / 8.0, 0.0], 1e-14),
        entrywise("grad_log_beta", &[got.temperature.log_beta], &[-beta * probability], 1e-14),
    ])?;
    Ok(())
}

#[test]
fn losses_of_thousands_of_nats_are_exact() -> Outcome {
    // On a line the cosines are ±1 and nothing can turn. Positives above their only negative, then below.
    for (loss, passage, want) in [(Loss::decoupled(), [3.0, -4.0], -2000.0), (Loss::info_nce(), [-3.0, 4.0], 2000.0)] {
        let mut line = problem(loss, Kind::Random, (2, 2, 1), 1e-3, 1, 0.0)?;
        (line.query, line.passage) = (vec![1.0, -2.0], passage.to_vec());
        let got = solve(&line, 1.0)?;
        verdict(&[
            entrywise("row_losses", &got.evaluation.row_losses, &[want; 2], 1e-14),
            entrywise("grad_log_beta", &[got.temperature.log_beta], &[want], 1e-14),
        ])
        .map_err(|e| format!("{}: {e}", line.name))?;
        assert!(got.grad_query.iter().chain(&got.grad_passage).all(|g| *g == 0.0), "{}", line.name);
    }
    Ok(())
}

#[test]
fn a_row_without_negatives_costs_the_copies_of_its_positive() -> Outcome {
    for loss in presets() {
        let single = problem(loss.clone(), Kind::Random, (1, 1, 3), 0.01, 5, 0.0)?;
        let masked = problem(loss.clone(), Kind::Random, (4, 6, 3), 0.01, 6, 0.0)?;
        for problem in [single, masked.with(|call| call.with_passage_ids([7; 6]))] {
            let got = solve(&problem, 1.0);
            if loss.name() == "decoupled" {
                let want = Error::NoNegative { loss: "decoupled".into(), group: 0, row: 0, prefix: None };
                assert_eq!(got.err(), Some(want), "{}", problem.name);
                continue;
            }
            let got = got?;
            let want: f64 = loss.groups().iter().map(|g| g.coefficient() * f64::from(g.positive_copies()).ln()).sum();
            assert_eq!(got.evaluation.loss, want, "{}", problem.name);
            assert!(got.grad_query.iter().chain(&got.grad_passage).all(|g| *g == 0.0), "{}", problem.name);
            assert_eq!(got.temperature.tau, 0.0);
            assert_eq!(got.evaluation.query_to_passage.mrr, 1.0);
        }
    }
    Ok(())
}

#[test]
fn an_empty_softmax_is_forgiven_to_rows_of_weight_0() -> Outcome {
    let problem = problem(Loss::decoupled(), Kind::Random, (3, 3, 4), 0.1, 7, 0.0)?;
    // Rows 0 and 1 lose passages 1 and 2.
    let problem = problem.with(|call| call.with_query_ids([1, 2, 3]).with_hard_negative_owners([-1, 2, 2], Scope::Own));
    let want = Error::NoNegative { loss: "decoupled".into(), group: 0, row: 0, prefix: None };
    assert_eq!(solve(&problem, 1.0).err(), Some(want));
    let got = solve(&problem.with(|call| call.with_weights([0.0, 1.0, 1.0])), 1.0)?;
    assert_eq!(got.evaluation.row_losses[0], 0.0);
    assert!(got.evaluation.row_losses[1..].iter().all(|l| l.is_finite() && *l != 0.0));
    assert!(got.grad_query[..4].iter().all(|g| *g == 0.0), "nothing pulls on the row");
    Ok(())
}

#[test]
fn an_empty_softmax_may_count_as_nothing() -> Outcome {
    // q̂ = p̂ = (1, 0), (0, 1), (0.6, 0.8); row 0 has no negative.
    let mut problem = problem(Loss::decoupled(), Kind::Random, (3, 3, 2), 0.5, 7, 0.0)?;
    problem.query = vec![1.0, 0.0, 0.0, 1.0, 0.6, 0.8];
    problem.passage = problem.query.clone();
    // Rows 0 and 1 lose passages 1 and 2.
    let problem =
        problem.with(|call| call.with_hard_negative_owners([-1, 2, 2], Scope::Own).with_weights([5.0, 2.0, 1.0]));
    assert!(matches!(solve(&problem, 1.0), Err(Error::NoNegative { row: 0, .. })));
    let got = solve(&problem.with(|call| call.with_no_negative(NoNegative::Zero)), 1.0)?;
    // Row 1 has passage 0, at a cosine of 0; row 2 has passages 0 and 1. Row 0 keeps its 5 of the 8 parts of the weight.
    let rows = [0.0, -2.0, (1.2_f64.exp() + 1.6_f64.exp()).ln() - 2.0];
    verdict(&[
        entrywise("row_losses", &got.evaluation.row_losses, &rows, 1e-14),
        entrywise("loss", &[got.evaluation.loss], &[(2.0 * rows[1] + rows[2]) / 8.0], 1e-14),
    ])?;
    assert!(got.grad_query[..2].iter().all(|g| *g == 0.0), "nothing pulls on the row");
    assert!(got.grad_query[2..].iter().any(|g| *g != 0.0), "the others train");
    // Nothing at all left: a batch of one row.
    let single = self::problem(Loss::decoupled(), Kind::Random, (1, 1, 3), 0.01, 5, 0.0)?;
    let got = solve(&single.with(|call| call.with_no_negative(NoNegative::Zero)), 1.0)?;
    assert_eq!((got.evaluation.loss, got.temperature.tau), (0.0, 0.0));
    assert!(got.grad_query.iter().chain(&got.grad_passage).all(|g| *g == 0.0));
    Ok(())
}

#[test]
fn the_lowest_row_owns_a_shared_passage() -> Outcome {
    // Rows 0 and 1 share passage 0, the only possible negative of row 2.
    let shared = problem(Loss::info_nce(), Kind::Random, (3, 3, 4), 0.1, 8, 0.0)?;
    let shared = shared.with(|call| call.with_positives([0, 0, 1]).with_passage_ids([1, 2, 2]));
    let third = |query_ids: [i64; 3]| -> samtone::Result<f64> {
        let shared = shared.clone().with(|call| call.with_query_ids(query_ids));
        Ok(solve(&shared, 1.0)?.evaluation.row_losses[2])
    };
    assert_ne!(third([5, 6, 6])?, 0.0, "row 1 shares the query of row 2, but owns nothing");
    assert_eq!(third([6, 5, 6])?, 0.0, "passage 0 answers the query of row 2");
    Ok(())
}

#[test]
fn a_text_is_no_negative_of_itself_in_the_other_tower() -> Outcome {
    // Texts X0 … X3, rows (X0, X1), (X1, X2), (X2, X3): queries 1 and 2 meet their own texts among the passages.
    let texts = Source::new(11).normal(4 * 3);
    let mut chain = problem(Loss::info_nce(), Kind::Random, (3, 3, 3), 0.05, 1, 0.0)?;
    (chain.query, chain.passage) = (texts[..9].to_vec(), texts[3..].to_vec());
    let chain = chain.with(|call| call.with_query_ids([0, 1, 2]).with_passage_ids([1, 2, 3]));
    let cosine = |i: usize, j: usize| {
        let (x, y) = (&texts[3 * i..3 * i + 3], &texts[3 * j..3 * j + 3]);
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
        dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()
    };
    let row_loss = |i: usize, negatives: &[usize]| {
        negatives.iter().map(|&j| ((cosine(i, j) - cosine(i, i + 1)) / 0.05).exp()).sum::<f64>().ln_1p()
    };
    for (shared, want) in [
        (false, [row_loss(0, &[2, 3]), row_loss(1, &[1, 3]), row_loss(2, &[1, 2])]),
        (true, [row_loss(0, &[2, 3]), row_loss(1, &[3]), row_loss(2, &[1])]),
    ] {
        let chain = chain.clone().with(|call| call.with_shared_ids(shared));
        let got = solve(&chain, 1.0)?.evaluation.row_losses;
        verdict(&[entrywise("row_losses", &got, &want, 1e-12)]).map_err(|e| format!("shared ids {shared}: {e}"))?;
    }
    Ok(())
}

#[test]
fn ranks_count_what_is_above_the_positive() -> Outcome {
    let mut ranked = problem(Loss::info_nce(), Kind::Random, (2, 4, 2), 0.1, 1, 0.0)?;
    let at = |degrees: f64| [degrees.to_radians().cos(), degrees.to_radians().sin()];
    ranked.query = [at(0.0), at(90.0)].concat();
    ranked.passage = [at(30.0), at(80.0), at(20.0), at(-30.0)].concat(); // the last ties with the first positive
    let ranked = ranked.with(|call| call.with_weights([3.0, 1.0]));
    let metrics = solve(&ranked, 1.0)?.evaluation;
    assert_eq!(metrics.query_to_passage.precision_at_1, 0.25, "row 0 has passage 2 above it");
    assert_eq!(metrics.query_to_passage.mrr, 0.75 / 2.0 + 0.25);
    assert_eq!(metrics.passage_to_query.precision_at_1, 1.0);
    let mut ranked = ranked.with(|call| call.with_passage_ids([5, 6, 5, 7]));
    assert_eq!(solve(&ranked, 1.0)?.evaluation.query_to_passage.mrr, 1.0, "a masked passage has no rank");
    // cos 30° changes by 8.7e-3 per degree: 2.6e-7 is a tie, 2.6e-6 is not.
    ranked.passage[6..].copy_from_slice(&at(-30.0 + 3e-5));
    assert_eq!(solve(&ranked, 1.0)?.evaluation.query_to_passage.mrr, 1.0);
    ranked.passage[6..].copy_from_slice(&at(-30.0 + 3e-4));
    assert_eq!(solve(&ranked, 1.0)?.evaluation.query_to_passage.mrr, 0.75 / 2.0 + 0.25);
    Ok(())
}

#[test]
fn norms_may_be_anything_but_zero() -> Outcome {
    let plain = problem(Loss::samtone_both(), Kind::Random, (5, 6, 8), 0.05, 3, 0.0)?;
    let want = solve(&plain, 1.0)?;
    for (query, passage) in [(1e300, 1e-300), (1e-300, 1e300), (2_f64.powi(-1060), 1.0)] {
        let mut scaled = plain.clone();
        scaled.query.iter_mut().for_each(|x| *x *= query);
        scaled.passage.iter_mut().for_each(|x| *x *= passage);
        // A subnormal carries fewer digits, and its gradient exceeds even f64 unless the upstream gradient makes up for it.
        let (tolerance, upstream) = if query < 1e-300 { (1e-3, 1e-20) } else { (1e-12, 1.0) };
        let mut got = solve(&scaled, upstream)?;
        got.grad_query.iter_mut().for_each(|g| *g = *g * query / upstream);
        got.grad_passage.iter_mut().for_each(|g| *g = *g * passage / upstream);
        verdict(&[
            entrywise("loss", &[got.evaluation.loss], &[want.evaluation.loss], tolerance),
            entrywise("grad_q", &got.grad_query, &want.grad_query, tolerance),
            entrywise("grad_p", &got.grad_passage, &want.grad_passage, tolerance),
        ])
        .map_err(|e| format!("norms times {query:e} and {passage:e}: {e}"))?;
    }

    let mut zero = plain.clone();
    zero.passage[2 * 8..3 * 8].fill(0.0);
    assert_eq!(solve(&zero, 1.0).err(), Some(Error::ZeroNorm { tower: Tower::Passage, row: 2, prefix: None }));
    let got = solve(&zero.with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient)), 1.0)?;
    assert!(got.grad_passage[2 * 8..3 * 8].iter().all(|g| *g == 0.0));
    assert!(got.evaluation.loss.is_finite());
    assert!(got.grad_query.iter().chain(&got.grad_passage).all(|g| g.is_finite()));
    Ok(())
}

#[test]
fn bad_input_is_named_and_nothing_is_written() -> Outcome {
    let backend = samtone::backend::by_name("reference")?;
    let plain = problem(Loss::gte(), Kind::Random, (3, 3, 2), 0.05, 3, 0.0)?;
    let mut infinite = plain.clone();
    infinite.query[5] = f64::NEG_INFINITY;
    let mut grad = [f16::from_f32(7.0); 6];
    for (problem, upstream, want) in [
        (&infinite, 1.0, "the query embedding in row 2 contains -inf at column 1; allowed: finite numbers"),
        (&plain, f64::NAN, "argument `upstream` is NaN; allowed: a finite number in the range of f32"),
    ] {
        let (query, passage) = (Buffer::new(DType::F64, &problem.query), Buffer::new(DType::F64, &problem.passage));
        let batch = problem.batch(&query, &passage)?;
        let buffers = GradientBuffers { query: Some(EmbeddingsMut::new(&mut grad[..], 3, 2)?), passage: None };
        let got = backend.loss_and_gradients_into(&batch, upstream, buffers);
        assert_eq!(got.err().map(|e| e.to_string()).as_deref(), Some(want));
    }
    let query = Buffer::new(DType::F64, &plain.query);
    let batch = plain.batch(&query, &query)?;
    let buffers = GradientBuffers { query: None, passage: Some(EmbeddingsMut::new(&mut grad[..], 2, 3)?) };
    let got = backend.loss_and_gradients_into(&batch, 1.0, buffers);
    let want = "argument `gradients.passage` is 2 x 3; allowed: 3 x 2";
    assert_eq!(got.err().map(|e| e.to_string()).as_deref(), Some(want));
    assert_eq!(grad, [f16::from_f32(7.0); 6]);
    Ok(())
}

#[test]
fn buffers_may_be_strided_and_narrow() -> Outcome {
    let problem = problem(Loss::samtone_query(), Kind::Random, (3, 3, 2), 0.2, 9, 0.0)?;
    let want = solve(&problem, 2.0)?;
    let mut strided = vec![f64::NAN; 2 * 5 + 2];
    for (i, row) in problem.query.chunks(2).enumerate() {
        strided[i * 5..i * 5 + 2].copy_from_slice(row);
    }
    let passage = Buffer::new(DType::F64, &problem.passage);
    let query = Embeddings::with_row_stride(&strided, 3, 2, 5)?;
    let batch = samtone::Batch::new(&problem.call, query, passage.embeddings(3, 2)?)?;
    let mut grad = vec![f16::NAN; 2 * 4 + 2];
    let buffers = GradientBuffers { query: Some(EmbeddingsMut::with_row_stride(&mut grad, 3, 2, 4)?), passage: None };
    let (evaluation, temperature) = samtone::reference::loss_and_gradients_into(&batch, 2.0, buffers)?;
    assert_eq!((evaluation, temperature), (want.evaluation, want.temperature));
    for (k, got) in grad.iter().enumerate() {
        match (k / 4, k % 4) {
            (i, column @ 0..2) => assert_eq!(*got, <f16 as Element>::from_f64(want.grad_query[2 * i + column])),
            _ => assert!(got.is_nan(), "element {k} between the rows was written"),
        }
    }
    Ok(())
}

/// Weights that add up to 1 within an ulp must not show in metrics: 49 times 1/49 is 0.9999999999999999.
#[test]
fn metrics_are_1_where_all_positives_win() -> Outcome {
    let mut source = Source::new(11);
    for rows in (1..=64).chain([343, 1000]) {
        let mut problem = problem(Loss::bidirectional(), Kind::Random, (rows, rows, 16), 0.05, rows as u64, 0.0)?;
        problem.passage.clone_from(&problem.query);
        let weights: Vec<f32> = (0..rows).map(|_| source.uniform(0.001, 3.0) as f32).collect();
        for problem in [problem.clone(), problem.with(|call| call.with_weights(weights))] {
            let problem = problem.rounded(DType::F32);
            for backend in ["reference", "cpu"] {
                let got = problem.run(samtone::backend::by_name(backend)?, DType::F32, 1.0)?;
                assert_eq!(got.metrics(), [1.0; 4], "{rows} rows by {backend}");
            }
        }
    }
    Ok(())
}
