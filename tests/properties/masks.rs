//! The keys of src/mask.rs against the rule as docs/loss.md words it, read pair by pair.

use super::setup::{config, failed, positives, setup, solve};
use super::support::problem::{Buffer, Problem};
use proptest::prelude::*;
use samtone::DType;
use samtone::mask::{Key, Keys};

/// What the rule says of a batch.
struct Rule<'a> {
    problem: &'a Problem,
    positives: Vec<usize>,
}

impl Rule<'_> {
    fn query_id(&self, i: usize) -> i64 {
        self.problem.query_ids.as_ref().map_or(i as i64, |ids| ids[i])
    }

    fn passage_id(&self, j: usize) -> i64 {
        self.problem.passage_ids.as_ref().map_or(j as i64, |ids| ids[j])
    }

    fn positive_id(&self, i: usize) -> i64 {
        self.passage_id(self.positives[i])
    }

    /// Query key of passage j; `None`: a key nobody has.
    fn query_key(&self, j: usize) -> Option<i64> {
        let rows = || 0..self.positives.len();
        let owner = rows().find(|&i| self.positives[i] == j);
        let of_a_copy = || rows().find(|&i| self.positive_id(i) == self.passage_id(j));
        owner.or_else(of_a_copy).map(|i| self.query_id(i))
    }

    fn drops_passage(&self, i: usize, j: usize) -> bool {
        self.query_key(j) == Some(self.query_id(i))
            || self.passage_id(j) == self.positive_id(i)
            || (self.problem.shared_ids && self.passage_id(j) == self.query_id(i))
    }

    fn drops_query(&self, i: usize, j: usize) -> bool {
        self.query_id(j) == self.query_id(i)
            || self.positive_id(j) == self.positive_id(i)
            || (self.problem.shared_ids && self.query_id(j) == self.positive_id(i))
    }
}

proptest! {
    #![proptest_config(config(512))]

    /// Every pair, with any ids, shared or not, and any positives. Owners and margins are no matter of keys.
    #[test]
    fn keys_are_the_rule(setup in setup()) {
        let problem = setup.problem()?;
        let (query, passage) = (Buffer::new(DType::F32, &problem.query), Buffer::new(DType::F32, &problem.passage));
        let keys = Keys::new(problem.batch(&query, &passage).map_err(failed)?.pairs());
        let rule = Rule { problem: &problem, positives: positives(&problem) };
        prop_assert!(keys.rows.iter().all(|k| k.query != Key::NOBODY && k.passage != Key::NOBODY));
        prop_assert!(keys.passages.iter().all(|k| k.passage != Key::NOBODY));
        for (i, row) in keys.rows.iter().enumerate() {
            for (j, passage) in keys.passages.iter().enumerate() {
                prop_assert_eq!(row.drops_passage(*passage), rule.drops_passage(i, j), "row {}, passage {}", i, j);
            }
            for (j, query) in keys.rows.iter().enumerate() {
                prop_assert_eq!(row.drops_query(*query), rule.drops_query(i, j), "row {}, query {}", i, j);
            }
        }
    }
}

proptest! {
    #![proptest_config(config(64))]

    /// Both columns the same texts, as in SimCSE: shared ids change no bit, also with repeated texts and further passages.
    #[test]
    fn shared_ids_of_the_same_texts_mask_nothing_more(setup in setup(), distinct in prop::bool::ANY) {
        let mut problem = setup.problem()?;
        problem.positives = None;
        let ids = |count: usize| (0..count).map(|i| if distinct { i as i64 } else { (i * i % 7) as i64 }).collect();
        (problem.query_ids, problem.passage_ids) = (Some(ids(problem.rows)), Some(ids(problem.passages)));
        problem.shared_ids = false;
        let want = solve(&problem, 1.0)?;
        problem.shared_ids = true;
        prop_assert_eq!(solve(&problem, 1.0)?, want);
    }
}
