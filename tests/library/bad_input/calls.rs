//! What is refused only when a loss is computed: values of embeddings, states, shards, buffers, workspaces.

use super::{
    D, M, N, Outcome, PATTERN, batch, expect_invalid, good, present, refused, refused_everywhere, still_works, towers,
};
use samtone::backend;
use samtone::cpu::{self, Plan, Shard};
use samtone::half::{bf16, f16};
use samtone::{
    Batch, Block, Call, DType, Embeddings, EmbeddingsMut, Error, GradientBuffers, Group, Loss, NoNegative, Scope,
    Tower, ZeroNorm,
};

#[test]
fn embeddings_that_are_not_finite() -> Outcome {
    let both = Call::new(Loss::samtone_both(), 0.05);
    let last = |rows: usize| (rows - 1, D - 1);
    for (tower, rows) in [(Tower::Query, M), (Tower::Passage, N)] {
        for (row, column) in [(0, 0), (1, 2), (rows - 1, 0), last(rows)] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let (mut q, mut p) = towers();
                let x = if tower == Tower::Query { &mut q } else { &mut p };
                x[row * D + column] = bad;
                // Also where the zero-gradient policy is lenient about other rows.
                for call in [both.clone(), both.clone().with_zero_norm(ZeroNorm::ZeroGradient)] {
                    let mut errors = refused_everywhere(&batch(&call, &q, &p)?);
                    let simple = call.clone().with_loss(Loss::info_nce());
                    let simple = batch(&simple, &q, &p)?;
                    errors.extend(Plan::new(&simple).err());
                    errors.extend(Shard::new(&simple, 0..1).err());
                    assert_eq!(errors.len(), present().len() + 4);
                    for error in errors {
                        let Error::NonFinite { tower: t, row: r, column: c, value } = &error else { panic!("{error}") };
                        assert_eq!((*t, *r, *c), (tower, row, column), "{error}");
                        assert_eq!(value.to_string(), bad.to_string(), "{error}");
                        let sentence = format!("the {tower} embedding in row {row} contains {bad} at column {column};");
                        assert!(error.to_string().starts_with(&sentence), "{error}");
                    }
                }
            }
        }
    }

    // The first offender in row order is named, in 16-bit types too.
    let (q, p) = towers();
    let (mut q, mut p) = (
        q.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>(),
        p.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>(),
    );
    q[2 * D + 1] = f16::NAN;
    q[2 * D + 2] = f16::INFINITY;
    q[3 * D] = f16::NAN;
    p[0] = f16::NAN;
    let clip = both.with_loss(Loss::clip());
    let batch = Batch::new(&clip, Embeddings::new(&q, M, D)?, Embeddings::new(&p, N, D)?)?;
    for error in refused_everywhere(&batch) {
        assert!(matches!(error, Error::NonFinite { tower: Tower::Query, row: 2, column: 1, .. }), "{error}");
    }
    Ok(())
}

#[test]
fn embeddings_of_norm_zero() -> Outcome {
    let call = Call::new(Loss::info_nce(), 0.05);
    let lenient = call.clone().with_zero_norm(ZeroNorm::ZeroGradient);
    for (tower, rows) in [(Tower::Query, M), (Tower::Passage, N)] {
        for row in [0, 1, rows - 1] {
            for zero in [0.0_f32, -0.0] {
                let (mut q, mut p) = towers();
                let x = if tower == Tower::Query { &mut q } else { &mut p };
                x[row * D..(row + 1) * D].fill(zero);
                for error in refused_everywhere(&batch(&call, &q, &p)?) {
                    assert_eq!(error, Error::ZeroNorm { tower, row, prefix: None });
                    let sentence = error.to_string();
                    let parts = [tower.to_string(), format!("row {row}"), "zero".into(), "ZeroGradient".into()];
                    assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
                }
                assert!(samtone::loss_and_gradients(&batch(&lenient, &q, &p)?, 1.0).is_ok());
            }
        }
    }
    Ok(())
}

#[test]
fn f64_is_for_the_reference() -> Outcome {
    let (q, p) = towers();
    let [q, p] = [q, p].map(|x| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    let call = good();
    let batch = Batch::new(&call, Embeddings::new(&q, M, D)?, Embeddings::new(&p, N, D)?)?;
    let errors = [
        Some(refused(backend::by_name("cpu")?, &batch, 1.0)),
        cpu::forward(&batch).err(),
        samtone::loss_and_gradients(&batch, 1.0).err(),
        Plan::new(&batch).err(),
        Shard::new(&batch, 0..M).err(),
    ];
    for error in errors {
        let error = error.ok_or("f64 was accepted")?;
        assert!(matches!(&error, Error::Unsupported { backend: "cpu", .. }), "{error}");
        let sentence = error.to_string();
        assert!(["cpu", "f64", "f32, f16 and bf16"].iter().all(|part| sentence.contains(part)), "{sentence}");
    }
    for backend in present() {
        assert_eq!(backend.dtypes().contains(&DType::F64), backend.name() == "reference");
    }
    assert!(samtone::reference::loss_and_gradients(&batch, 1.0).is_ok());
    Ok(())
}

#[test]
fn upstream_gradients() -> Outcome {
    let (q, p) = towers();
    let call = good();
    let batch = batch(&call, &q, &p)?;
    let forward = cpu::forward(&batch)?;
    let shard = Shard::new(&batch, 0..M)?;
    for upstream in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, -3.5e38] {
        let value = format!("{upstream:?}");
        for backend in present() {
            let error = refused(backend, &batch, upstream);
            expect_invalid(Err::<(), _>(error), "upstream", &value, "a finite number");
        }
        expect_invalid(samtone::loss_and_gradients(&batch, upstream), "upstream", &value, "a finite");
        expect_invalid(forward.backward(&batch, upstream), "upstream", &value, "a finite number");
        expect_invalid(shard.gradients(&shard.partials()?, upstream), "upstream", &value, "a finite number");
        let mut dq = [PATTERN; M * D];
        let buffers = GradientBuffers { query: Some(EmbeddingsMut::new(&mut dq[..], M, D)?), passage: None };
        expect_invalid(forward.backward_into(&batch, upstream, buffers), "upstream", &value, "a finite number");
        assert_eq!(dq, [PATTERN; M * D]);
    }
    Ok(())
}

#[test]
fn gradient_buffers_of_another_shape() -> Outcome {
    let (q, p) = towers();
    let call = good();
    let batch = batch(&call, &q, &p)?;
    let forward = cpu::forward(&batch)?;
    type Way<'a> = Box<dyn Fn(GradientBuffers<'_>) -> Option<Error> + 'a>;
    let mut ways: Vec<Way<'_>> = vec![Box::new(|buffers| forward.backward_into(&batch, 1.0, buffers).err())];
    for backend in present() {
        ways.push(Box::new(|buffers| backend.loss_and_gradients_into(&batch, 1.0, buffers).err()));
    }
    for (rows, dim) in [(M + 1, D), (M - 1, D), (M, D + 1), (M, D - 1), (D, M), (1, M * D)] {
        for way in &ways {
            let (mut dq, mut dp) = (vec![PATTERN; rows * dim], vec![PATTERN; N * D]);
            let query = Some(EmbeddingsMut::new(&mut dq, rows, dim)?);
            let error = way(GradientBuffers { query, passage: Some(EmbeddingsMut::new(&mut dp, N, D)?) });
            let given = format!("{rows} x {dim}");
            expect_invalid(error.map_or(Ok(()), Err), "gradients.query", &given, "4 x 3");
            assert!(dq.iter().chain(&dp).all(|v| *v == PATTERN), "the good buffer or the bad one was written");
        }
    }
    for (rows, dim) in [(N - 1, D), (M, D), (N, D + 1), (D, N)] {
        for way in &ways {
            let (mut dq, mut dp) = (vec![PATTERN; M * D], vec![PATTERN; rows * dim]);
            let passage = Some(EmbeddingsMut::new(&mut dp, rows, dim)?);
            let error = way(GradientBuffers { query: Some(EmbeddingsMut::new(&mut dq, M, D)?), passage });
            let given = format!("{rows} x {dim}");
            expect_invalid(error.map_or(Ok(()), Err), "gradients.passage", &given, "6 x 3");
            assert!(dq.iter().chain(&dp).all(|v| *v == PATTERN), "the good buffer or the bad one was written");
        }
    }
    Ok(())
}

#[test]
fn workspaces_that_are_too_small() -> Outcome {
    let (q, p) = towers();
    let half = |x: &[f32]| x.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
    let (q16, p16) = (half(&q), half(&p));
    let wide = (Embeddings::new(&q, M, D)?, Embeddings::new(&p, N, D)?);
    let narrow = (Embeddings::new(&q16, M, D)?, Embeddings::new(&p16, N, D)?);
    let bounded = |bytes: usize| Call::new(Loss::samtone_both(), 0.05).with_workspace_bytes(bytes);
    for (q, p) in [wide, narrow] {
        let mut least = None;
        for bytes in [0, 1, 1000, usize::MAX] {
            let call = bounded(bytes);
            let batch = Batch::new(&call, q, p)?;
            if bytes == usize::MAX {
                assert!(samtone::loss_and_gradients(&batch, 1.0).is_ok());
                continue;
            }
            let errors = [
                Some(refused(backend::by_name("cpu")?, &batch, 1.0)),
                cpu::forward(&batch).err(),
                Plan::new(&batch).err(),
                Shard::new(&batch, 1..3).err(),
            ];
            for error in errors {
                let error = error.ok_or("accepted")?;
                let Error::WorkspaceTooSmall { given, needed, rows, passages, dim } = error else { panic!("{error}") };
                assert_eq!((given, rows, passages, dim), (bytes, M, N, D));
                let sentence = error.to_string();
                let parts = ["workspace_bytes".into(), format!("is {bytes},"), format!("{needed} or more")];
                assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
                least = Some(needed);
            }
        }
        // The sentence tells the truth, to the byte.
        let least = least.ok_or("no bound was refused")?;
        for (bytes, fits) in [(least, true), (least - 1, false)] {
            let call = bounded(bytes);
            assert_eq!(samtone::loss_and_gradients(&Batch::new(&call, q, p)?, 1.0).is_ok(), fits);
        }
    }
    Ok(())
}

#[test]
fn a_state_used_with_another_batch() -> Outcome {
    let (q, p) = towers();
    let call = good();
    let batch = batch(&call, &q, &p)?;
    let forward = cpu::forward(&batch)?;
    let half: Vec<bf16> = q.iter().chain(&p).map(|&v| bf16::from_f32(v)).collect();
    let others = [
        Batch::new(&call, Embeddings::new(&q[..9], 3, D)?, Embeddings::new(&p, N, D)?)?,
        Batch::new(&call, Embeddings::new(&q, M, D)?, Embeddings::new(&p[..12], 4, D)?)?,
        Batch::new(&call, Embeddings::new(&q[..8], M, 2)?, Embeddings::new(&p[..12], N, 2)?)?,
        Batch::new(&call, Embeddings::new(&half[..12], M, D)?, Embeddings::new(&half[12..], N, D)?)?,
    ];
    for other in &others {
        let error = forward.backward(other, 1.0).err().ok_or("another batch was accepted")?;
        let describe = |b: &Batch<'_>| {
            format!("{} queries x {} passages of dimension {}, {}", b.rows(), b.passages(), b.dim(), b.dtype())
        };
        assert_eq!(error, Error::StateMismatch { saved: describe(&batch), given: describe(other) });
        let sentence = error.to_string();
        assert!(sentence.contains(&describe(&batch)) && sentence.contains(&describe(other)), "{sentence}");

        let (mut dq, mut dp) = (vec![PATTERN; M * D], vec![PATTERN; N * D]);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::new(&mut dq, M, D)?),
            passage: Some(EmbeddingsMut::new(&mut dp, N, D)?),
        };
        assert!(matches!(forward.backward_into(other, 1.0, buffers), Err(Error::StateMismatch { .. })));
        assert!(dq.iter().chain(&dp).all(|v| *v == PATTERN));
    }
    // Other annotations, by name.
    for (part, other) in [
        ("`weights`", good().with_weights([1.0, 1.0, 1.0, 0.5])),
        ("`query_ids`", good().with_query_ids([1, 2, 1, 3])),
        ("`passage_ids`", good().with_passage_ids([1, 2, 3, 4, 5, 1])),
        ("`owners`", good().with_hard_negative_owners([-1, -1, -1, -1, 0, 1], Scope::Own)),
    ] {
        let other = super::batch(&other, &q, &p)?;
        let error = forward.backward(&other, 1.0).err().ok_or(format!("other {part} were accepted"))?;
        assert!(
            matches!(&error, Error::StateMismatch { saved, given } if saved.contains(part) && given.contains(part)),
            "{error}"
        );
    }
    // The same shape with other embeddings: of another norm, of another direction, or none at all.
    let refused = |tower: Tower, change: &dyn Fn(&mut [f32])| -> samtone::Result<Error> {
        let (mut q, mut p) = (q.clone(), p.clone());
        change(if tower == Tower::Query { &mut q[6..9] } else { &mut p[6..9] }); // row 2
        let other = Batch::new(&call, Embeddings::new(&q, M, D)?, Embeddings::new(&p, N, D)?)?;
        let (mut dq, mut dp) = (vec![PATTERN; M * D], vec![PATTERN; N * D]);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::new(&mut dq, M, D)?),
            passage: Some(EmbeddingsMut::new(&mut dp, N, D)?),
        };
        let error = forward.backward_into(&other, 1.0, buffers).expect_err("other embeddings were accepted");
        assert!(dq.iter().chain(&dp).all(|v| *v == PATTERN));
        Ok(error)
    };
    for tower in [Tower::Query, Tower::Passage] {
        let error = refused(tower, &|row| row[1] *= 2.0)?.to_string();
        assert!(error.contains(&format!("a {tower} embedding in row 2 of norm")), "{error}");
        let error = refused(tower, &|row| row.iter_mut().for_each(|v| *v = -*v))?.to_string();
        assert!(error.contains("row 2 has a cosine of"), "{error}");
        assert_eq!(refused(tower, &|row| row.fill(0.0))?, Error::ZeroNorm { tower, row: 2, prefix: None });
        for value in [f32::NAN, f32::INFINITY] {
            let error = refused(tower, &|row| row[1] = value)?;
            assert!(matches!(error, Error::NonFinite { row: 2, column: 1, tower: t, .. } if t == tower), "{error}");
        }
    }
    // The right batch still works.
    let fused = samtone::loss_and_gradients(&batch, 1.0)?;
    assert_eq!(forward.backward(&batch, 1.0)?, fused.gradients);
    Ok(())
}

#[test]
fn a_state_used_with_other_positives() -> Outcome {
    let (q, p) = towers();
    let (call, other) = (good(), good().with_positives([1, 0, 2, 3]));
    let forward = cpu::forward(&batch(&other, &q, &p)?)?;
    let error = forward.backward(&batch(&call, &q, &p)?, 1.0).err().ok_or("other positives were accepted")?;
    assert!(matches!(error, Error::StateMismatch { .. }), "{error}");
    let sentence = error.to_string();
    assert!(sentence.contains("row 0 has passage 1") && sentence.contains("row 0 has passage 0"), "{sentence}");
    Ok(())
}

#[test]
#[allow(clippy::reversed_empty_ranges)] // among the bad input
fn shard_ranges() -> Outcome {
    let (q, p) = towers();
    let call = good();
    let batch = batch(&call, &q, &p)?;
    for rows in [0..0, 2..2, 3..2, 0..5, 4..5, 4..4, 0..usize::MAX, usize::MAX..0] {
        let shard = Shard::new(&batch, rows.clone());
        expect_invalid(shard.map(|_| ()), "rows", &format!("{rows:?}"), "a non-empty range within 0..4");
    }
    Ok(())
}

#[test]
fn partials_that_do_not_fit_together() -> Outcome {
    let (q, p) = towers();
    let call = good();
    let batch = batch(&call, &q, &p)?;
    let shard = |rows| Shard::new(&batch, rows);
    let (first, second) = (shard(0..2)?, shard(2..4)?);

    // A gap.
    let gap = first.partials()?;
    for result in [first.evaluate(&gap).map(|_| ()), second.gradients(&gap, 1.0).map(|_| ())] {
        expect_invalid(result, "partials", "[0..2]", "cover all rows, 0..4");
    }
    // An overlap, and the same shard twice; what was merged before stays as it was.
    let mut merged = first.partials()?;
    for rows in [1..4, 0..2, 0..4, 1..2] {
        let before = merged.clone();
        let result = merged.merge(&shard(rows.clone())?.partials()?);
        expect_invalid(result, "other", &format!("{rows:?}"), "outside 0..2");
        assert_eq!(merged, before);
    }
    merged.merge(&second.partials()?)?;
    assert_eq!(first.evaluate(&merged)?, second.evaluate(&merged)?);

    // Another problem: to merge, to evaluate, to differentiate.
    let foreign = |batch: &Batch<'_>| Shard::new(batch, 0..batch.rows()).and_then(|s| s.partials());
    let other = |call: Call| foreign(&super::batch(&call, &q, &p)?);
    let fewer_queries = Batch::new(&call, Embeddings::new(&q[..9], 3, D)?, Embeddings::new(&p, N, D)?)?;
    let fewer_passages = Batch::new(&call, Embeddings::new(&q, M, D)?, Embeddings::new(&p[..15], 5, D)?)?;
    let half: Vec<bf16> = q.iter().chain(&p).map(|&v| bf16::from_f32(v)).collect();
    let rounded = Batch::new(&call, Embeddings::new(&half[..12], M, D)?, Embeddings::new(&half[12..], N, D)?)?;
    let moved: Vec<f32> = q.iter().enumerate().map(|(k, v)| if k == 7 { v + 0.1 } else { *v }).collect();
    let moved = Batch::new(&call, Embeddings::new(&moved, M, D)?, batch.passage())?;
    let namesake = Loss::custom("samtone_query", vec![Group::new(1.0, &[Block::QP, Block::QQ], 1)?])?;
    // All different, as by default.
    let ids = good().with_query_ids([1, 2, 3, 4]).with_passage_ids([5, 6, 7, 8, 9, 10]);
    let owners = [-1, -1, -1, -1, 0, 1];
    let own = "the loss 1·{qp, qq} + 1·{pq}";
    let lists =
        ["`positives` with", "`weights` with", "`query_ids` with", "`passage_ids` with", "exclusive `owners` with"];
    let [positives, weights, query_ids, passage_ids, exclusive] = lists;
    let cases = [
        ("4 queries x 6 passages", "3 queries", foreign(&fewer_queries)?),
        ("4 queries x 6 passages", "5 passages", foreign(&fewer_passages)?),
        ("dimension 3, f32", "dimension 3, bf16", foreign(&rounded)?),
        ("temperature 0.05", "temperature 0.06", other(good().with_temperature(0.06))?),
        ("margin none", "margin 0.1", other(good().with_margin(0.1))?),
        ("`zero_norm` Error", "ZeroGradient", other(good().with_zero_norm(ZeroNorm::ZeroGradient))?),
        ("`no_negative` Error", "Zero", other(good().with_no_negative(NoNegative::Zero))?),
        (own, "the loss 1·{qp}", other(good().with_loss(Loss::info_nce()))?),
        (own, "1·{pq, pp}", other(good().with_loss(Loss::samtone_both()))?),
        (own, "1·{qp, qq, pp}", other(good().with_loss(Loss::qwen3()).with_margin(f64::INFINITY))?),
        (own, "the loss 1·{qp, qq},", other(good().with_loss(namesake))?),
        (positives, positives, other(good().with_positives([0, 1, 2, 4]))?),
        (weights, weights, other(good().with_weights([1.0, 1.0, 1.0, 0.5]))?),
        (query_ids, query_ids, other(good().with_query_ids([1, 2, 1, 3]))?),
        (passage_ids, passage_ids, other(good().with_passage_ids([1, 2, 3, 4, 5, 1]))?),
        ("`shared_ids` false", "`shared_ids` true", other(ids.clone().with_shared_ids(true))?),
        (exclusive, exclusive, other(good().with_hard_negative_owners(owners, Scope::Own))?),
        ("row 2 has a cosine of", "row 2 has a cosine of", foreign(&moved)?),
    ];
    for (own, what, foreign) in &cases {
        let mut merging = gap.clone();
        let errors = [merging.merge(foreign).err(), first.evaluate(foreign).err(), first.gradients(foreign, 1.0).err()];
        assert_eq!(merging, gap, "a refused merge left something");
        for error in errors {
            let error = error.ok_or(format!("partials of {what} were accepted"))?;
            assert!(matches!(error, Error::StateMismatch { .. }), "{error}");
            let sentence = error.to_string();
            let (saved, given) = sentence.split_once("but is used with").ok_or("no two values")?;
            assert!(saved.contains(what) && given.contains(own), "{sentence}");
        }
    }
    // What says the same in other words is the same problem, whatever its bounds.
    let same = other(ids.with_workspace_bytes(1 << 20).with_tile_skipping(0.1))?;
    let (got, want) = (first.evaluate(&same)?.loss, first.evaluate(&merged)?.loss);
    assert!((got - want).abs() <= 1e-8 * want, "{got} instead of {want}");
    still_works();
    Ok(())
}

#[test]
fn a_row_without_a_negative() -> Outcome {
    let (q, p) = towers();
    // Row 2 carries the passage id of every passage but its own text's; all other rows keep a negative.
    let decoupled = Call::new(Loss::decoupled(), 0.05)
        .with_positives([0, 1, 2, 3])
        .with_passage_ids([7, 7, 7, 8, 9, 10])
        .with_hard_negative_owners([-1, -1, -1, -1, 0, 1], Scope::Own)
        .with_query_ids([1, 2, 3, 3]);
    let strict = batch(&decoupled, &q, &p)?;
    for error in refused_everywhere(&strict) {
        assert_eq!(error, Error::NoNegative { loss: "decoupled".into(), group: 0, row: 2, prefix: None });
        let sentence = error.to_string();
        let parts = ["row 2", "group 0", "`decoupled`", "positive_copies"];
        assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
    }
    // The group is named too.
    let groups = vec![Group::new(1.0, &[Block::PQ], 1)?, Group::new(1.0, &[Block::QP], 0)?];
    let mine = decoupled.clone().with_loss(Loss::custom("mine", groups)?);
    for error in refused_everywhere(&batch(&mine, &q, &p)?) {
        assert_eq!(error, Error::NoNegative { loss: "mine".into(), group: 1, row: 2, prefix: None });
    }
    let shard = Shard::new(&strict, 0..4)?;
    assert!(matches!(shard.evaluate(&shard.partials()?), Err(Error::NoNegative { row: 2, .. })));

    // It may be asked to count as nothing, in a shard too.
    let lenient = decoupled.clone().with_no_negative(NoNegative::Zero);
    let lenient = batch(&lenient, &q, &p)?;
    let whole = samtone::loss_and_gradients(&lenient, 1.0)?.evaluation;
    assert_eq!(whole.row_losses[2], 0.0);
    assert!(whole.loss.is_finite() && whole.loss != 0.0);
    let [first, second] = [0..2, 2..4].map(|rows| Shard::new(&lenient, rows));
    let (first, mut merged) = (first?, second?.partials()?);
    merged.merge(&first.partials()?)?;
    assert_eq!(first.evaluate(&merged)?.row_losses[2], 0.0);

    // With a copy of the positive its loss and gradient are 0.
    let copied = decoupled.clone().with_loss(Loss::info_nce());
    let result = samtone::loss_and_gradients(&batch(&copied, &q, &p)?, 1.0)?;
    assert_eq!(result.evaluation.row_losses[2], 0.0);
    assert_eq!(result.gradients.query[2 * D..3 * D], [0.0; D]);

    // Without weight the row is accepted, and contributes nothing.
    let weighted = decoupled.with_weights([1.0, 2.0, 0.0, 1.0]);
    for backend in present() {
        let (mut dq, mut dp) = (vec![f32::NAN; M * D], vec![f32::NAN; N * D]);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::new(&mut dq, M, D)?),
            passage: Some(EmbeddingsMut::new(&mut dp, N, D)?),
        };
        let (evaluation, temperature) = backend.loss_and_gradients_into(&batch(&weighted, &q, &p)?, 1.0, buffers)?;
        assert_eq!(evaluation.row_losses[2], 0.0);
        assert_eq!(dq[2 * D..3 * D], [0.0; D]);
        assert!(evaluation.loss.is_finite() && temperature.tau.is_finite());
        assert!(dq.iter().chain(&dp).all(|v| v.is_finite()) && dq.iter().any(|v| *v != 0.0));
    }
    Ok(())
}

#[test]
fn the_reference_without_memory() -> Outcome {
    // 2^22 rows: dense cosines of 128 TiB, more than an address space.
    let rows = 1 << 22;
    let x = vec![1.0_f32; rows];
    let call = Call::new(Loss::info_nce(), 1.0);
    let batch = Batch::new(&call, Embeddings::new(&x, rows, 1)?, Embeddings::new(&x, rows, 1)?)?;
    let error = refused(backend::by_name("reference")?, &batch, 1.0);
    assert!(matches!(error, Error::OutOfMemory { bytes, .. } if bytes == rows * rows * 8), "{error}");
    assert!(error.to_string().contains("140737488355328 bytes for the dense matrices"), "{error}");
    Ok(())
}
