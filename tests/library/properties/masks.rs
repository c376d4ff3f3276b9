//! The keys of src/mask.rs, compared pair by pair with the rule in the words of docs/loss.md.

use super::setup::{config, different, failed, pairs, setup, solve};
use crate::support::problem::Buffer;
use proptest::prelude::*;
use samtone::mask::{Key, Keys};
use samtone::{DType, Pairs};

/// What the rule says of a batch.
struct Rule<'a> {
    pairs: Pairs<'a>,
}

impl Rule<'_> {
    fn query_id(&self, i: usize) -> i64 {
        self.pairs.query_ids().map_or(i as i64, |ids| ids[i])
    }

    fn passage_id(&self, j: usize) -> i64 {
        self.pairs.passage_ids().map_or(j as i64, |ids| ids[j])
    }

    fn positive_id(&self, i: usize) -> i64 {
        self.passage_id(self.pairs.positive(i))
    }

    /// Query key of passage j; `None`: a key nobody has.
    fn query_key(&self, j: usize) -> Option<i64> {
        let rows = || 0..self.pairs.rows();
        let owner = rows().find(|&i| self.pairs.positive(i) == j);
        let of_a_copy = || rows().find(|&i| self.positive_id(i) == self.passage_id(j));
        owner.or_else(of_a_copy).map(|i| self.query_id(i))
    }

    fn drops_passage(&self, i: usize, j: usize) -> bool {
        self.query_key(j) == Some(self.query_id(i))
            || self.passage_id(j) == self.positive_id(i)
            || (self.pairs.call().shared_ids() && self.passage_id(j) == self.query_id(i))
    }

    fn drops_query(&self, i: usize, j: usize) -> bool {
        self.query_id(j) == self.query_id(i)
            || self.positive_id(j) == self.positive_id(i)
            || (self.pairs.call().shared_ids() && self.query_id(j) == self.positive_id(i))
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
        let rule = Rule { pairs: pairs(&problem) };
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
        let problem = setup.problem()?;
        let (own, of_queries) = ((0..problem.rows as u32).collect::<Vec<_>>(), different(problem.rows));
        let ids = |ids: Vec<i64>| if distinct { ids } else { ids.into_iter().map(|i| i * i % 7).collect() };
        let of_passages = ids(different(problem.passages));
        let problem = problem.with(|call| {
            call.with_positives(own).with_query_ids(ids(of_queries)).with_passage_ids(of_passages)
        });
        let [want, got] = [false, true].map(|shared| solve(&problem.clone().with(|call| call.with_shared_ids(shared)), 1.0));
        prop_assert_eq!(got?, want?);
    }
}
