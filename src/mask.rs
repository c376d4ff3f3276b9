//! The one mask rule: which candidate is a negative of which row.
//!
//! Every row and every candidate carries two keys; **a pair that agrees in either key is not a negative**.
//!
//! | | query key | passage key |
//! |---|---|---|
//! | row i, and query j as a candidate | id of the query | id of its positive |
//! | passage j as a candidate | query id of the lowest row that owns j as its positive, else a key nobody has | its id |
//!
//! With default ids this is the structural mask (the row itself, its positive, rows that share a positive); with real ids
//! it is the false-negative mask. Two optional comparisons follow: a hard negative that belongs to another row
//! ([`Scope::Own`](crate::Scope::Own)), and a cosine above s⁺ᵢ + margin.

use crate::batch::Pairs;
use std::collections::HashMap;

/// Cosines closer than this count as equal wherever a negative is compared with the positive (margin, ranks).
///
/// A repeated passage has exactly the cosine of the positive, but f32 arithmetic in another order gives it another last
/// bit; without the slack a margin of 0 would keep or drop duplicates by rounding. 2⁻²⁰ is 16 times the resolution of an
/// f32 cosine and 100 times below what any margin in use can tell apart.
pub const COSINE_TIE: f64 = 1.0 / (1 << 20) as f64;

/// The two keys of a row or of a candidate. Equal numbers mean equal ids, across queries and passages alike; the numbers
/// themselves mean nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Identity of the query.
    pub query: u32,
    /// Identity of the passage.
    pub passage: u32,
}

impl Key {
    /// The query key of a passage that is nobody's positive.
    pub const NOBODY: u32 = u32::MAX;

    /// Whether the two agree in either key.
    pub const fn excludes(self, other: Self) -> bool {
        self.query == other.query || self.passage == other.passage
    }
}

/// The keys of a batch: O(M + N), never M × N.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// Of row i, also when it is a candidate in a query block.
    pub rows: Vec<Key>,
    /// Of passage j as a candidate in a passage block.
    pub passages: Vec<Key>,
}

/// Numbers ids by first appearance. At most i32::MAX of them by [`Pairs`]' limits, so [`Key::NOBODY`] stays free.
fn number(ids: &[i64]) -> Vec<u32> {
    let mut seen = HashMap::with_capacity(ids.len());
    ids.iter()
        .map(|id| {
            let next = seen.len() as u32;
            *seen.entry(id).or_insert(next)
        })
        .collect()
}

impl Keys {
    /// Keys from the ids of the batch; without ids every query and every passage is its own.
    pub fn new(pairs: &Pairs<'_>) -> Self {
        let (rows, passages) = (pairs.rows(), pairs.passages());
        let query = pairs.query_ids().map_or_else(|| (0..rows as u32).collect(), number);
        let passage = pairs.passage_ids().map_or_else(|| (0..passages as u32).collect(), number);
        let mut owner = vec![Key::NOBODY; passages];
        for i in (0..rows).rev() {
            owner[pairs.positive(i)] = query[i]; // descending, so the lowest row that owns the passage wins
        }
        Self {
            rows: (0..rows).map(|i| Key { query: query[i], passage: passage[pairs.positive(i)] }).collect(),
            passages: owner.into_iter().zip(passage).map(|(query, passage)| Key { query, passage }).collect(),
        }
    }
}

/// The highest cosine that row keeps, given that of its positive: s⁺ + margin, with the slack of [`COSINE_TIE`];
/// +∞ without a margin.
pub fn threshold(positive_cosine: f64, margin: Option<f64>) -> f64 {
    margin.map_or(f64::INFINITY, |m| positive_cosine + m + COSINE_TIE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Embeddings};

    #[test]
    fn keys_follow_the_rule() {
        let (q, p) = ([1.0_f32; 4], [1.0_f32; 6]);
        let batch = Batch::new(Embeddings::new(&q[..], 4, 1).unwrap(), Embeddings::new(&p[..], 6, 1).unwrap()).unwrap();
        let plain = Keys::new(&batch);
        for i in 0..4 {
            for j in 0..6 {
                assert_eq!(plain.rows[i].excludes(plain.passages[j]), i == j, "({i}, {j}) with default ids");
            }
            for j in 0..4 {
                assert_eq!(plain.rows[i].excludes(plain.rows[j]), i == j, "({i}, {j}) with default ids");
            }
        }

        // Rows 0 and 2 share passage 5; passages 1 and 3 carry the same text.
        let batch = batch.with_positives(&[5, 1, 5, 0]).unwrap().with_passage_ids(&[7, 8, 9, 8, 10, 11]).unwrap();
        let keys = Keys::new(&batch);
        assert!(keys.rows[0].excludes(keys.rows[2]), "rows that share a positive");
        assert!(keys.rows[1].excludes(keys.passages[3]), "a copy of the positive's text");
        assert!(!keys.rows[0].excludes(keys.passages[3]), "another row's duplicate is a negative");
        assert_eq!(keys.passages[2].query, Key::NOBODY);
        assert_eq!(keys.passages[5].query, keys.rows[0].query, "the lowest row owns a shared passage");
        assert!(keys.rows[2].excludes(keys.passages[5]), "through the passage key");
    }
}
