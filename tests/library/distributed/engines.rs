//! Engines that fail, ranks that leave or give up, and errors that must say where.

use super::spread::{Lists, SHAPES, Spread, Tapped, each, same_error};
use crate::support::data::Kind;
use crate::support::problem::Buffer;
use samtone::distributed::{Distributed, Group, Reduction, Threads};
use samtone::{DType, Error, Scope};
use std::time::{Duration, Instant};

#[test]
fn a_rank_gives_up_while_the_others_sum() {
    for count in [1, 2, 5] {
        let ends = Threads::group(2).into_iter().enumerate().collect();
        let results = each(ends, &[(); 2], |(rank, end), ()| {
            let mut end = Distributed::new(end.with_timeout(Duration::from_secs(2)));
            let first = if rank == 1 { Err(end.give_up("no gradient")) } else { end.sum(&mut vec![1.0; count]) };
            end.sum(&mut vec![1.0; count]).unwrap();
            first
        });
        assert_eq!(same_error(results), Error::Rank { rank: 1, reason: "no gradient".into() });
    }
}

#[test]
fn an_engine_that_failed_is_not_used_again_and_nothing_is_written() {
    let spread = Spread::preset("samtone_both", Kind::Random, SHAPES[1], Lists::default());
    for reduction in [Reduction::Sum, Reduction::Mean] {
        for left in 0.. {
            let results = each(Threads::group(2), &spread.parts, |inner, part| {
                // An error that only this engine has.
                let gone = Error::Framework { framework: "NCCL", call: "ncclSend", reason: "gone".into() };
                let end = if inner.rank() == 1 { Tapped::new(inner).cut(left, gone) } else { Tapped::new(inner) };
                let mut rank = Distributed::new(end).with_reduction(reduction);
                let nan = |x: &[f64]| Buffer::new(DType::F32, &vec![f64::NAN; x.len()]);
                let mut gradients = [nan(&part.query), nan(&part.passage)];
                let failed = part.run_into(&mut rank, DType::F32, 1.0, &mut gradients, [true; 2]).err()?;
                assert!(gradients.iter().all(|x| x.to_f64().iter().all(|x| x.is_nan())), "{left}: written");
                let calls = rank.group().sent.len();
                assert_eq!(part.run(&mut rank, DType::F32, 1.0).unwrap_err(), failed);
                assert_eq!(rank.group().sent.len(), calls, "{left}: used again");
                Some(failed)
            });
            if results[1].is_none() {
                break;
            }
        }
    }
}

#[test]
fn no_message_goes_to_a_rank_that_is_not_there() {
    let mut ends = Threads::group(3);
    // Place 0·3 + 4 of the mail is that of rank 1 to itself.
    let error = ends[0].exchange(4, &[9], 0, &mut [0]).unwrap_err();
    assert!(error.to_string().contains("no rank 4 among 3"), "{error}");
    let mut received = [0];
    ends[1].exchange(1, &[5], 1, &mut received).unwrap();
    assert_eq!(received, [5]);
}

#[test]
fn nobody_waits_for_a_rank_that_has_given_up_waiting() {
    let spread = Spread::preset("samtone_both", Kind::Random, SHAPES[1], Lists::default());
    let mut ends = Threads::group(2);
    let mut late = Distributed::new(ends.remove(1).with_timeout(Duration::from_secs(5)));
    let mut first = Distributed::new(ends.remove(0).with_timeout(Duration::from_millis(10)));
    spread.parts[0].run(&mut first, DType::F32, 1.0).unwrap_err();
    let start = Instant::now();
    let error = spread.parts[1].run(&mut late, DType::F32, 1.0).unwrap_err(); // `first` is still there
    assert!(start.elapsed() < Duration::from_secs(2), "{error}");
}

#[test]
fn errors_say_what_was_given_and_where() {
    let plain = Spread::preset("samtone_both", Kind::Random, SHAPES[4], Lists::default());
    let error = same_error(plain.run(DType::F64, 1.0, Reduction::Sum));
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let mut spread = plain.clone();
    spread.parts[3].call = spread.parts[3].call.clone().with_prefixes([3]);
    let error = same_error(spread.run(DType::F32, 1.0, Reduction::Sum)).to_string();
    assert!(!error.contains("2147483647"), "{error}");
    let mut spread = plain.clone();
    for (rank, scope) in [(1, Scope::All), (3, Scope::Own)] {
        spread.parts[rank].call = spread.parts[rank].call.clone().with_hard_negative_owners([-1; 4], scope);
    }
    let error = same_error(spread.run(DType::F32, 1.0, Reduction::Sum)).to_string();
    assert!(error.contains("rank 1") && error.contains("rank 3"), "{error}");
}
