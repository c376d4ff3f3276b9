//! A rank that fails is named on every rank, and nobody waits for ever.

use super::spread::{Lists, Local, SHAPES, Spread, Tapped, each, same_error};
use crate::support::data::Kind;
use samtone::distributed::{Distributed, Group, Part, Reduction, Threads};
use samtone::{Call, DType, Error, Loss, NoNegative, Scope, ZeroNorm};
use std::time::Duration;

fn good() -> Spread {
    Spread::preset("samtone_both", Kind::Random, SHAPES[4], Lists::default())
}

/// Changes what one rank has, and gives the error that all ranks get. Afterwards the same group computes the right thing.
fn failure(spread: &Spread, rank: usize, change: impl FnOnce(&mut Local)) -> Error {
    let mut broken = spread.clone();
    change(&mut broken.parts[rank]);
    let want = spread.run(DType::F32, 1.0, Reduction::Sum);
    let both: Vec<_> = broken.parts.iter().zip(&spread.parts).collect();
    let results = each(Threads::group(both.len()), &both, |end, (broken, good)| {
        let mut rank = Distributed::new(end);
        let failed = broken.run(&mut rank, DType::F32, 1.0);
        (failed, good.run(&mut rank, DType::F32, 1.0))
    });
    let (failed, later): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    assert_eq!(later, want, "another result after an error");
    same_error(failed)
}

#[test]
fn embeddings_that_are_refused_name_their_rank() {
    let spread = good();
    let d = spread.whole.dim;
    let of = |rank, change: &dyn Fn(&mut Local)| failure(&spread, rank, change).to_string();
    let error = of(2, &|part| part.query[2 * d + 4] = f64::NAN);
    assert_eq!(
        error,
        "rank 2 has failed: the query embedding in row 2 contains NaN at column 4; allowed: finite numbers"
    );
    let error = of(3, &|part| part.passage[3 * d + 1] = f64::INFINITY);
    assert!(error.starts_with("rank 3 has failed: the passage embedding in row 3 contains inf at column 1"), "{error}");
    let error = of(1, &|part| part.passage[..d].fill(0.0));
    assert!(error.starts_with("rank 1 has failed: the passage embedding in row 0 has norm zero"), "{error}");
    let mut two = spread.clone();
    two.parts[3].query[0] = f64::NAN;
    two.parts[1].query[d] = f64::NAN;
    let error = same_error(two.run(DType::F32, 1.0, Reduction::Sum)).to_string();
    assert!(error.starts_with("rank 1 has failed: the query embedding in row 1"), "{error}");
}

#[test]
fn a_row_without_negatives_names_its_rank() {
    let call = Call::new(Loss::decoupled(), 0.1).with_margin(-5.0);
    let spread = Spread::new(&call, Kind::Random, &[(2, 2), (2, 2)], 4, 1, Lists::default());
    let error = same_error(spread.run(DType::F32, 1.0, Reduction::Sum)).to_string();
    assert!(error.starts_with("rank 0 has failed: row 0 has no negative left in group 0"), "{error}");
}

#[test]
fn what_is_wrong_with_the_lists_of_a_part_names_its_rank() {
    let spread =
        Spread::preset("samtone_both", Kind::Random, SHAPES[4], Lists { ids: true, weights: true, ..Lists::default() });
    for (part, change) in [
        (
            "`positives` is 5 at row 1; allowed: 0 to 4",
            &(|c: Call| c.with_positives([0, 5, 1])) as &dyn Fn(Call) -> Call,
        ),
        ("`positives` is a slice of 2 elements", &|c| c.with_positives([0, 1])),
        ("`weights` is NaN at row 2", &|c| c.with_weights([1.0, 1.0, f32::NAN])),
        ("`query_ids` is a slice of 4 elements", &|c| c.with_query_ids([1, 2, 3, 4])),
        ("`passage_ids` is a slice of 1 elements", &|c| c.with_passage_ids([1])),
        ("`owners` is 3 at passage 4; allowed: -1", &|c| c.with_hard_negative_owners([-1, -1, -1, -1, 3], Scope::Own)),
        ("`temperature` is 0; allowed", &|c| c.with_temperature(0.0)),
        ("`prefixes` is 10 at position 1", &|c| c.with_prefixes([2, 10])),
        ("option `workspace_bytes` is 100, but", &|c| c.with_workspace_bytes(100)),
    ] {
        let error = failure(&spread, 2, |local| local.call = change(local.call.clone())).to_string();
        assert!(error.starts_with("rank 2 has failed: ") && error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_part_with_more_queries_than_passages_is_refused() {
    let spread = good();
    let few = |local: &mut Local| {
        local.shape.1 = 2;
        local.passage.truncate(2 * local.dim);
    };
    let error = failure(&spread, 1, few).to_string();
    assert!(error.starts_with("rank 1 has failed: argument `passage` is 2 rows; allowed: at least as many"), "{error}");
    let none = |local: &mut Local| {
        local.shape.1 = 0;
        local.passage.clear();
        local.call = local.call.clone().with_positives([0, 1, 2]);
    };
    let error = failure(&spread, 3, none).to_string();
    assert!(error.starts_with("rank 3 has failed: argument `passage` is 0 rows"), "{error}");
}

#[test]
fn parts_that_do_not_fit_together_are_told_apart() {
    let spread = Spread::preset("samtone_both", Kind::Random, SHAPES[4], Lists { ids: true, ..Lists::default() });
    for (part, change) in [
        ("rank 2, which has temperature 0.06;", &(|c: Call| c.with_temperature(0.06)) as &dyn Fn(Call) -> Call),
        ("rank 2, which has margin 0.5;", &|c| c.with_margin(0.5)),
        ("rank 2, which has the loss 1·{qp};", &|c| c.with_loss(Loss::info_nce())),
        ("rank 2, which has the policy `zero_norm` ZeroGradient;", &|c| c.with_zero_norm(ZeroNorm::ZeroGradient)),
        ("rank 2, which has the policy `no_negative` Zero;", &|c| c.with_no_negative(NoNegative::Zero)),
        ("rank 2, which has `shared_ids` true;", &|c| c.with_shared_ids(true)),
        ("`prefixes` 3 (weight 1)", &|c| c.with_prefixes([3])),
    ] {
        let error = failure(&spread, 2, |local| local.call = change(local.call.clone())).to_string();
        let whole = error.starts_with("argument `call` is another on rank 2")
            && error.contains("the same on all ranks; rank 0 has");
        assert!(whole && error.contains(part), "{part}: {error}");
    }
    let bare = |local: &mut Local| local.call = Call::new(Loss::samtone_both(), 0.05);
    let error = failure(&spread, 1, bare).to_string();
    assert!(error.contains("`query_ids` is given by rank 0 and not by rank 1"), "{error}");
    let owners = |scope| {
        move |local: &mut Local| {
            local.call = local.call.clone().with_hard_negative_owners([-1; 4], scope);
        }
    };
    let mut other = spread.clone();
    owners(Scope::All)(&mut other.parts[0]);
    let results = {
        owners(Scope::Own)(&mut other.parts[1]);
        other.run(DType::F32, 1.0, Reduction::Sum)
    };
    assert!(same_error(results).to_string().contains("`owners` is of scope Own"), "scopes");
    let narrow = |local: &mut Local| {
        local.dim = 3;
        local.query.truncate(local.shape.0 * 3);
        local.passage.truncate(local.shape.1 * 3);
    };
    let error = failure(&spread, 3, narrow).to_string();
    assert!(
        error.contains("of dimension 3 and type f32 on rank 3; allowed: the same on all ranks, 9 and f32"),
        "{error}"
    );
}

#[test]
fn ranks_that_ask_for_different_things_are_told_apart() {
    let spread = good();
    /// Upstream gradient, reduction and type that a rank asks for.
    type Ask = fn(usize) -> (f64, Reduction, DType);
    let asks: [(&str, Ask); 4] = [
        ("rank 1, which has gradients, and `upstream` 2.0;", |r| {
            (if r == 1 { 2.0 } else { 1.0 }, Reduction::Sum, DType::F32)
        }),
        ("rank 3, which has the reduction `Mean`;", |r| {
            (1.0, if r == 3 { Reduction::Mean } else { Reduction::Sum }, DType::F32)
        }),
        ("type f16 on rank 2", |r| (1.0, Reduction::Sum, if r == 2 { DType::F16 } else { DType::F32 })),
        ("rank 1 has failed: argument `upstream` is NaN", |r| {
            (if r == 1 { f64::NAN } else { 1.0 }, Reduction::Sum, DType::F32)
        }),
    ];
    for (part, ask) in asks {
        let ends = Threads::group(4).into_iter().enumerate().collect();
        let results = each(ends, &spread.parts, |(rank, end), local| {
            let (upstream, reduction, dtype) = ask(rank);
            local.run(&mut Distributed::new(end).with_reduction(reduction), dtype, upstream).map(drop)
        });
        let error = same_error(results).to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    let nothing = vec![Call::new(Loss::clip(), 0.1); 2];
    let results = each(Threads::group(2), &nothing, |end, call| {
        Distributed::new(end).evaluate(&Part { call, query: None, passage: None })
    });
    assert!(same_error(results).to_string().contains("`query` is without a row on every rank"));
}

#[test]
fn a_rank_that_leaves_or_is_late_ends_the_others_with_a_sentence() {
    let spread = good();
    let results = each(Threads::group(4).into_iter().enumerate().collect(), &spread.parts, |(rank, end), part| {
        if rank == 2 {
            return None;
        }
        let mut rank = Distributed::new(end);
        let first = part.run(&mut rank, DType::F32, 1.0).unwrap_err();
        let second = part.run(&mut rank, DType::F32, 1.0).unwrap_err();
        assert_eq!(first, second, "the group is of no more use");
        Some(first.to_string())
    });
    for error in results.into_iter().flatten() {
        assert!(error.contains("has left, and rank"), "{error}");
    }
    let mut ends = Threads::group(2);
    let _late = ends.pop();
    let mut rank = Distributed::new(ends.remove(0).with_timeout(Duration::from_millis(30)));
    let error = spread.parts[0].run(&mut rank, DType::F32, 1.0).unwrap_err().to_string();
    assert!(error.contains("rank 0 has waited for rank 1 for 30ms"), "{error}");
}

#[test]
fn a_rank_may_give_up_before_its_call() {
    let spread = good();
    let results = each(Threads::group(4).into_iter().enumerate().collect(), &spread.parts, |(rank, end), part| {
        let mut end = Distributed::new(end);
        match rank {
            1 => Err(end.give_up("its encoder is out of memory")),
            _ => part.run(&mut end, DType::F32, 1.0).map(drop),
        }
    });
    assert_eq!(same_error(results), Error::Rank { rank: 1, reason: "its encoder is out of memory".into() });
}

/// Wherever the network is cut, every rank ends with an error.
#[test]
fn an_engine_may_fail_at_any_exchange() {
    let spread = Spread::preset("samtone_both", Kind::Random, SHAPES[2], Lists { ids: true, ..Lists::default() });
    let mut cuts = 0;
    loop {
        let results = each(Threads::group(2), &spread.parts, |inner, part| {
            let gone = Error::Engine { engine: "a network", reason: "its cable is cut".into() };
            let end = if inner.rank() == 1 { Tapped::new(inner).cut(cuts, gone) } else { Tapped::new(inner) };
            part.run(&mut Distributed::new(end), DType::F32, 1.0).map(drop)
        });
        match &results[..] {
            [Ok(()), Ok(())] => break,
            // The other may have all that it needs of this rank.
            [other, Err(Error::Engine { .. })] => assert!(other.is_ok() || matches!(other, Err(Error::Engine { .. }))),
            other => panic!("{cuts}: {other:?}"),
        }
        cuts += 1;
    }
    assert_eq!(cuts, 10, "exchanges of a call");
}
