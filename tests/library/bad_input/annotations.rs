//! What a call refuses: some of it when it is joined with M queries and N passages, some already when it is checked alone.

use super::{D, M, N, Outcome, batch, expect_invalid, good, present, refused, towers};
use crate::support::data::{Kind, problem};
use crate::support::problem::{Outputs, Problem};
use samtone::{Call, DType, Error, Loss, Scope, Tower, cpu};

/// The call joined with embeddings; with M and N alone it is refused for the same reason.
#[track_caller]
fn joined(call: Call) -> samtone::Result<()> {
    let (q, p) = towers();
    let joined = batch(&call, &q, &p).map(|_| ());
    assert_eq!(call.pairs(M, N).map(|_| ()), joined);
    joined
}

/// Refused when checked alone, and for the same reason when joined.
#[track_caller]
fn expect_unchecked(call: Call, argument: &str, value: &str, allowed: &str) {
    expect_invalid(call.check(), argument, value, allowed);
    assert_eq!(call.check(), joined(call));
}

/// Refused when joined, which nothing but the numbers of queries and passages can tell.
#[track_caller]
fn expect_unjoined(call: Call, argument: &str, value: &str, allowed: &str) {
    assert_eq!(call.check(), Ok(()), "nothing is wrong before M and N are known");
    expect_invalid(joined(call), argument, value, allowed);
}

#[test]
fn numbers_of_rows() {
    let most = i32::MAX as usize;
    let pairs = |rows: usize, passages: usize| good().pairs(rows, passages).map(|_| ());
    expect_invalid(pairs(0, 3), "rows", "0", "1 to 2147483647");
    expect_invalid(pairs(most + 1, most + 1), "rows", "2147483648", "1 to 2147483647");
    expect_invalid(pairs(5, 4), "passage", "4 rows", "at least as many rows as there are queries, 5");
    expect_invalid(pairs(5, most + 1), "passages", "2147483648", "5 to 2147483647");
    assert_eq!([pairs(1, 1), pairs(most, most)], [Ok(()), Ok(())]);
}

#[test]
fn positives_ids_and_owners() {
    let positives = |positives: &[u32]| good().with_positives(positives);
    expect_unjoined(positives(&[0, 1, 2]), "positives", "3 elements", "4, one for each query");
    expect_unjoined(positives(&[0, 1, 2, 3, 4]), "positives", "5 elements", "4, one for each query");
    expect_unjoined(positives(&[0, 1, 6, 3]), "positives", "6 at row 2", "0 to 5");
    expect_unjoined(positives(&[0, 1, 2, u32::MAX]), "positives", "4294967295 at row 3", "0 to 5");
    assert_eq!(joined(positives(&[5, 5, 5, 5])), Ok(()));

    expect_unjoined(good().with_query_ids([1; 3]), "query_ids", "3 elements", "4, one for each query");
    expect_unjoined(good().with_query_ids([1; 6]), "query_ids", "6 elements", "4, one for each query");
    expect_unjoined(good().with_passage_ids([1; 4]), "passage_ids", "4 elements", "6, one for each passage");
    expect_unjoined(good().with_passage_ids([]), "passage_ids", "0 elements", "6, one for each passage");
    assert_eq!(joined(good().with_query_ids([i64::MIN, i64::MAX, 0, -1])), Ok(()));
    let (of_queries, of_passages) = (good().with_query_ids([1; 4]), good().with_passage_ids([1; 6]));
    let allowed = "false, or query ids and passage ids with it";
    let shared = |call: &Call| call.clone().with_shared_ids(true);
    expect_unchecked(shared(&good()), "shared_ids", "without query ids and passage ids", allowed);
    expect_unchecked(shared(&of_queries), "shared_ids", "true without passage ids", allowed);
    expect_unchecked(shared(&of_passages), "shared_ids", "true without query ids", allowed);
    assert_eq!(joined(good().with_shared_ids(false)), Ok(()));
    // In any order.
    assert_eq!(joined(shared(&of_queries).with_passage_ids([1; 6])), Ok(()));
    assert_eq!(joined(shared(&of_passages.with_query_ids([1; 4]))), Ok(()));

    let owners = |owners: &[i32]| good().with_hard_negative_owners(owners, Scope::Own);
    expect_unjoined(owners(&[-1; 4]), "owners", "4 elements", "6, one for each passage");
    expect_unjoined(owners(&[-1, -1, -1, -1, 4, 0]), "owners", "4 at passage 4", "a row, 0 to 3");
    expect_unjoined(owners(&[-1, -1, -1, -1, 0, -2]), "owners", "-2 at passage 5", "-1 (everyone's)");
    expect_unjoined(owners(&[i32::MIN, 0, 0, 0, 0, 0]), "owners", "-2147483648 at passage 0", "0 to 3");
    let unused = good().with_hard_negative_owners([9, -1, -1, -1, -1, -1], Scope::All);
    expect_unjoined(unused, "owners", "9 at passage 0", "0 to 3");
}

#[test]
fn prefixes() -> Outcome {
    let of = |dims: &[usize]| good().with_prefixes(dims);
    expect_unchecked(of(&[]), "prefixes", "an empty list", "at least one prefix");
    expect_unchecked(of(&[0, 2]), "prefixes", "0 at position 0", "ascending numbers of entries, here at least 1");
    expect_unchecked(of(&[2, 2]), "prefixes", "2 at position 1", "ascending numbers of entries, here at least 3");
    expect_unchecked(of(&[3, 1]), "prefixes", "1 at position 1", "here at least 4");
    let (q, p) = towers();
    let allowed = "at most 3, the dimension of the embeddings";
    for call in [of(&[1, 4]), of(&[1, 4]).with_prefix_weights([1.0, 0.0])] {
        expect_invalid(batch(&call, &q, &p), "prefixes", "4 at position 1", allowed);
        let pairs = call.pairs(M, N)?;
        expect_invalid(samtone::Problem::new(pairs, DType::F32, D), "prefixes", "4 at position 1", allowed);
    }

    let weights = |weights: &[f64]| of(&[1, 3]).with_prefix_weights(weights);
    let alone = good().with_prefix_weights([1.0]);
    expect_unchecked(alone, "prefix_weights", "given without `prefixes`", "none, or `prefixes` with them");
    expect_unchecked(weights(&[1.0]), "prefix_weights", "a slice of 1 elements", "2, one for each prefix");
    expect_unchecked(weights(&[0.0, 0.0]), "prefix_weights", "0 for every prefix", "at least one weight above 0");
    for bad in [-1.0, f64::NAN, f64::INFINITY, 1e31, 1e-31] {
        let value = format!("{bad:?} at position 1");
        expect_unchecked(weights(&[1.0, bad]), "prefix_weights", &value, "0, or from 1e-30 to 1e30");
    }
    assert_eq!(joined(weights(&[0.0, 1e30])), Ok(()));

    // A prefix without a direction is named; so is one whose norm vanishes beside the rest.
    let (call, mut zero, mut tiny) = (of(&[1, 3]), p.clone(), p);
    (zero[2 * D], tiny[2 * D]) = (0.0, 1e-30);
    for backend in [backend("cpu"), backend("reference")] {
        let error = refused(backend, &batch(&call, &q, &zero)?, 1.0);
        assert_eq!(error, Error::ZeroNorm { tower: Tower::Passage, row: 2, prefix: Some(1) });
        let sentence = "the passage embedding in row 2 has norm zero in its first 1 entries";
        assert!(error.to_string().starts_with(sentence), "{error}");
    }
    let of_cpu = |call: &Call| samtone::loss_and_gradients(&batch(call, &q, &tiny)?, 1.0).map(|_| ());
    expect_invalid(of_cpu(&call), "passage", "e-30 in its first 1 entries", "at least 2^-40 of that of the longest");
    // Nobody asks for that prefix.
    assert_eq!(of_cpu(&call.with_prefix_weights([0.0, 1.0])), Ok(()));
    Ok(())
}

fn backend(name: &str) -> &'static dyn samtone::backend::Backend {
    samtone::backend::by_name(name).unwrap()
}

#[test]
fn weights() -> Outcome {
    let weights = |weights: &[f32]| good().with_loss(Loss::samtone_both()).with_weights(weights);
    expect_unjoined(weights(&[1.0; 5]), "weights", "5 elements", "4, one for each query");
    expect_unchecked(weights(&[1.0, -0.5, 1.0, 1.0]), "weights", "-0.5 at row 1", "at least 0");
    expect_unchecked(weights(&[1.0, 1.0, f32::NAN, 1.0]), "weights", "NaN at row 2", "finite");
    expect_unchecked(weights(&[1.0, 1.0, 1.0, f32::INFINITY]), "weights", "inf at row 3", "finite");
    expect_unchecked(weights(&[0.0; 4]), "weights", "0 in every row", "above 0");
    expect_unchecked(weights(&[0.0, -0.0, 0.0, 0.0]), "weights", "0 in every row", "above 0");
    // The smallest sum above 0 is a sum above 0.
    let (q, p) = towers();
    let [tiny, same] = [f32::from_bits(1), 7.0].map(|weight| {
        let call = weights(&[0.0, weight, 0.0, 0.0]);
        samtone::loss_and_gradients(&batch(&call, &q, &p)?, 1.0)
    });
    assert_eq!(tiny?, same?);
    Ok(())
}

#[test]
fn temperature_margin_and_skipping() {
    for tau in [0.0, -0.0, -0.01, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e-300, 0.99e-6, 1.01e6] {
        expect_unchecked(good().with_temperature(tau), "temperature", &tau.to_string(), "1e-6 to 1e6");
        expect_unchecked(Call::new(Loss::gte(), tau), "temperature", &tau.to_string(), "1e-6 to 1e6");
    }
    for tau in [Call::MIN_TEMPERATURE, Call::MAX_TEMPERATURE] {
        assert_eq!(joined(good().with_temperature(tau)), Ok(()));
    }
    for margin in [f64::NAN, f64::NEG_INFINITY] {
        let allowed = "a finite number, or infinity for no margin";
        expect_unchecked(good().with_margin(margin), "margin", &margin.to_string(), allowed);
    }
    for margin in [-2.5, f64::MAX, f64::MIN] {
        assert_eq!(joined(good().with_margin(margin)), Ok(()));
        assert_eq!(good().with_margin(margin).margin(), Some(margin));
    }
    for share in [0.0, 1.0, -1e-3, f64::NAN, f64::INFINITY] {
        let allowed = "a number above 0 and below 1";
        expect_unchecked(good().with_tile_skipping(share), "tile_skipping", &share.to_string(), allowed);
    }
    assert_eq!(good().tile_skipping(), None);
    assert_eq!(joined(good().with_tile_skipping(1e-300)), Ok(()));
    assert_eq!(good().with_tile_skipping(1e-300).tile_skipping(), Some(1e-300));
}

/// A problem of which a margin of 0.1 masks some negatives, and what every backend of this machine gives for it with another call.
fn outputs(call: Call) -> samtone::Result<Vec<Outputs>> {
    let plain = problem(Loss::info_nce(), Kind::Random, (9, 14, 8), 0.05, 1, 0.0)?;
    let problem = Problem { call, ..plain };
    present().into_iter().map(|backend| problem.run(backend, DType::F32, 1.0)).collect()
}

#[test]
fn an_infinite_margin_is_none() -> Outcome {
    for loss in [Loss::samtone_both(), Loss::gte()] {
        let plain = Call::new(loss, 0.05);
        let infinite = plain.clone().with_margin(f64::INFINITY);
        assert_eq!((infinite.margin(), joined(infinite.clone())), (None, Ok(())));
        assert_eq!(outputs(infinite.clone())?, outputs(plain.clone())?);
        assert_ne!(outputs(plain.clone().with_margin(0.1))?, outputs(plain.clone())?, "the margin masks nothing");
        // It is the same problem, too.
        let (q, p) = towers();
        let (plain, infinite) = (batch(&plain, &q, &p)?, batch(&infinite, &q, &p)?);
        let (a, b) = (cpu::Shard::new(&plain, 0..2)?, cpu::Shard::new(&infinite, 2..M)?);
        let mut merged = a.partials()?;
        merged.merge(&b.partials()?)?;
        let forward = cpu::forward(&plain)?;
        assert_eq!(forward.backward(&infinite, 1.0)?, samtone::loss_and_gradients(&plain, 1.0)?.gradients);
    }
    Ok(())
}

#[test]
fn qwen3_has_a_margin_of_its_own() -> Outcome {
    let own = Call::new(Loss::qwen3(), 0.05);
    assert_eq!(own.margin(), Some(0.1));
    assert_eq!(outputs(own.clone())?, outputs(own.clone().with_margin(0.1))?);
    let without = Call::new(Loss::custom("groups of qwen3", Loss::qwen3().groups().to_vec())?, 0.05);
    assert_eq!(without.margin(), None);
    assert_eq!(outputs(own.clone().with_margin(f64::INFINITY))?, outputs(without.clone())?);
    assert_ne!(outputs(own.clone())?, outputs(without)?, "the margin masks nothing");
    // Another loss has another margin, unless the call was given one.
    assert_eq!(own.clone().with_loss(Loss::info_nce()).margin(), None);
    assert_eq!(good().with_loss(Loss::qwen3()).margin(), Some(0.1));
    assert_eq!(own.with_margin(0.3).with_loss(Loss::info_nce()).margin(), Some(0.3));
    for (name, ..) in Loss::PRESETS {
        assert_eq!(Loss::by_name(name)?.margin().is_some(), *name == "qwen3", "{name}");
    }
    Ok(())
}
