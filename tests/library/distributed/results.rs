//! What ranks compute is what one process computes.

use super::spread::{Lists, SHAPES, Spread, each, joined};
use crate::support::case::Expected;
use crate::support::compare::{against_definition, verdict};
use crate::support::data::Kind;
use crate::support::problem::{Buffer, Outputs};
use samtone::distributed::{Distributed, Reduction, Threads};
use samtone::{Call, DType, Loss, Scope, TemperatureGradient, backend};

const LISTS: [Lists; 5] = [
    Lists { shared_positives: false, ids: false, weights: false, owners: None },
    Lists { shared_positives: true, ids: false, weights: true, owners: None },
    Lists { shared_positives: false, ids: true, weights: false, owners: Some(Scope::Own) },
    Lists { shared_positives: false, ids: false, weights: false, owners: Some(Scope::All) },
    Lists { shared_positives: true, ids: true, weights: true, owners: Some(Scope::Own) },
];

/// The results of all ranks. Loss and metrics must have the same bits everywhere.
fn outputs(spread: &Spread, dtype: DType, upstream: f64, reduction: Reduction) -> Vec<Outputs> {
    let ranks: Vec<_> = spread.run(dtype, upstream, reduction).into_iter().map(Result::unwrap).collect();
    assert!(ranks.iter().all(|rank| rank.evaluation == ranks[0].evaluation));
    ranks
}

fn judge(spread: &Spread, got: &Outputs, dtype: DType, upstream: f64) {
    let problem = spread.whole.rounded(dtype);
    let reference = backend::by_name("reference").unwrap();
    let want = Expected::from(problem.run(reference, DType::F64, upstream).unwrap());
    if let Err(message) = verdict(&against_definition(got, &want, &problem, dtype, upstream)) {
        panic!("{} ranks, {}, {dtype}: {message:?}", spread.parts.len(), problem.call.loss());
    }
}

#[test]
fn every_preset_in_every_spread() {
    for (name, ..) in Loss::PRESETS {
        for (at, shapes) in SHAPES.iter().enumerate() {
            let lists = LISTS[at % LISTS.len()];
            let spread = Spread::preset(name, Kind::Trained, shapes, lists);
            let ranks = outputs(&spread, DType::F32, -1.5, Reduction::Sum);
            judge(&spread, &joined(&ranks), DType::F32, -1.5);
            assert_eq!(ranks, outputs(&spread, DType::F32, -1.5, Reduction::Sum), "other bits in another run");
        }
    }
}

#[test]
fn every_type_kind_and_list() {
    let call = Call::new(Loss::samtone_both(), 0.03).with_margin(0.2);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (seed, kind) in Kind::ALL.into_iter().enumerate() {
            for lists in LISTS {
                let shapes = SHAPES[1 + seed % (SHAPES.len() - 1)];
                let spread = Spread::new(&call, kind, shapes, 16, seed as u64, lists);
                judge(&spread, &joined(&outputs(&spread, dtype, 1.0, Reduction::Sum)), dtype, 1.0);
            }
        }
    }
}

#[test]
fn prefixes_and_shared_ids() {
    for shapes in SHAPES {
        let lists = Lists { ids: true, ..Lists::default() };
        let call = Call::new(Loss::samtone_both(), 0.1).with_shared_ids(true);
        let call = call.with_prefixes([2, 5, 8]).with_prefix_weights([0.5, 0.0, 2.0]);
        let spread = Spread::new(&call, Kind::Random, shapes, 11, 3, lists);
        judge(&spread, &joined(&outputs(&spread, DType::F32, 1.0, Reduction::Sum)), DType::F32, 1.0);
    }
}

#[test]
fn many_tiles_have_the_bits_of_few_threads() {
    let shapes = [(150, 200), (90, 90), (0, 3)];
    let spread = Spread::preset("samtone_query", Kind::Random, &shapes, Lists::default());
    let ranks = outputs(&spread, DType::F32, 1.0, Reduction::Sum);
    judge(&spread, &joined(&ranks), DType::F32, 1.0);
    let alone = each(Threads::group(3), &spread.parts, |end, part| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        pool.install(|| part.run(&mut Distributed::new(end), DType::F32, 1.0)).unwrap()
    });
    assert_eq!(ranks, alone);
}

#[test]
fn what_is_averaged_is_w_times_as_large() {
    for shapes in SHAPES {
        let spread = Spread::preset("samtone_both", Kind::Trained, shapes, LISTS[1]);
        let (sum, mean) =
            (outputs(&spread, DType::F32, 0.5, Reduction::Sum), outputs(&spread, DType::F32, 0.5, Reduction::Mean));
        let w = shapes.len() as f64;
        let averaged = |x: &Outputs| {
            let by = |x: &[f64]| x.iter().map(|x| x / w).collect();
            let of = x.temperature;
            let temperature = TemperatureGradient { tau: of.tau / w, log_beta: of.log_beta / w };
            Outputs { grad_query: by(&x.grad_query), grad_passage: by(&x.grad_passage), temperature, ..x.clone() }
        };
        assert!(mean.iter().all(|rank| rank.temperature == mean[0].temperature), "the temperature gradient is whole");
        judge(&spread, &joined(&mean.iter().map(averaged).collect::<Vec<_>>()), DType::F32, 0.5);
        judge(&spread, &joined(&sum), DType::F32, 0.5);
    }
}

#[test]
fn frozen_towers_other_types_and_an_evaluation() {
    let spread = Spread::preset("samtone_both", Kind::Trained, SHAPES[5], LISTS[4]);
    let whole = outputs(&spread, DType::BF16, 1.0, Reduction::Sum);
    for (query, passage) in [(true, false), (false, true), (false, false)] {
        let results = each(Threads::group(4), &spread.parts, |end, part| {
            let nan = |x: &[f64]| Buffer::new(DType::BF16, &vec![f64::NAN; x.len()]);
            let mut gradients = [nan(&part.query), nan(&part.passage)];
            let mut rank = Distributed::new(end);
            let result = part.run_into(&mut rank, DType::BF16, 1.0, &mut gradients, [query, passage]).unwrap();
            let evaluation = rank.evaluate(&part.part(&part.buffers(DType::BF16)).unwrap()).unwrap();
            assert_eq!(evaluation, result.0, "an evaluation has the bits of a step");
            (result, gradients)
        });
        for (((evaluation, temperature), gradients), want) in results.into_iter().zip(&whole) {
            assert_eq!((&evaluation, temperature), (&want.evaluation, want.temperature));
            let towers = gradients.iter().zip([(query, &want.grad_query), (passage, &want.grad_passage)]);
            for (got, (wanted, want)) in towers {
                let untouched = Buffer::new(DType::BF16, &vec![f64::NAN; want.len()]);
                let want = if wanted { Buffer::new(DType::BF16, want) } else { untouched };
                assert_eq!(format!("{got:?}"), format!("{want:?}"));
            }
        }
    }
}

/// Some ranks may want gradients of their passages while others do not.
#[test]
fn one_rank_alone_wants_gradients_of_passages() {
    let spread = Spread::preset("samtone_both", Kind::Random, SHAPES[2], Lists::default());
    let whole = outputs(&spread, DType::F32, 1.0, Reduction::Sum);
    let results = each(Threads::group(2).into_iter().enumerate().collect(), &spread.parts, |(rank, end), part| {
        let mut gradients = part.buffers(DType::F32);
        part.run_into(&mut Distributed::new(end), DType::F32, 1.0, &mut gradients, [true, rank == 1]).unwrap();
        gradients
    });
    assert_eq!(results[1][1].to_f64(), whole[1].grad_passage);
    assert_eq!(results[0][0].to_f64(), whole[0].grad_query);
}

#[test]
fn numbers_are_summed_in_one_order() {
    for size in [1, 2, 3, 7] {
        let ranks: Vec<usize> = (0..size).collect();
        for count in [0, 1, 5, 30] {
            let sums = each(Threads::group(size), &ranks, |end, rank| {
                let mut numbers: Vec<f32> = (0..count).map(|i| ((rank * 31 + i) as f32).sin()).collect();
                Distributed::new(end).sum(&mut numbers).unwrap();
                numbers
            });
            assert!(sums.iter().all(|sum| *sum == sums[0]), "other bits on another rank");
            for (i, &got) in sums[0].iter().enumerate() {
                let want: f64 = (0..size).map(|rank| f64::from(((rank * 31 + i) as f32).sin())).sum();
                assert!((f64::from(got) - want).abs() < 1e-6);
            }
        }
    }
    let results = each(Threads::group(2), &[3, 4], |end, &count| Distributed::new(end).sum(&mut vec![1.0; count]));
    assert!(super::spread::same_error(results).to_string().contains("3 numbers on rank 0 and 4 on rank 1"));
}
