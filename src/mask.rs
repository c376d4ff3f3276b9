//! The one mask rule: which candidate is a negative of which row.
//!
//! Every row and every candidate carries two keys; **a pair that agrees in either key is not a negative**.
//!
//! | | query key | passage key |
//! |---|---|---|
//! | row i, and query j as a candidate | id of the query | id of its positive |
//! | passage j as a candidate | query id of the lowest row that owns j as its positive; if none does, of the lowest row whose positive has j's passage id; else a key nobody has | its id |
//!
//! With default ids this is the structural mask (the row itself, its positive, rows that share a positive); with real ids
//! it is the false-negative mask. A passage that is nobody's positive but has the id of one is a copy of it, such as a mined
//! hard negative.
//!
//! Shared ids ([`Call::with_shared_ids`](crate::Call::with_shared_ids)) add one comparison, because a text is no negative of itself in
//! the other tower: row i drops passage j where j's id is the row's query id, and query j where j's id is the id of the row's positive.
//! Keys of queries and of passages are numbers of one space then, and of two disjoint ones otherwise, so that the comparison can always
//! be made.
//!
//! Two optional comparisons follow: a hard negative that belongs to another row ([`Scope::Own`](crate::Scope::Own)), and a
//! cosine above s⁺ᵢ + margin.

use crate::order::Order;
use crate::pairs::Pairs;
use std::collections::HashMap;

/// Cosines closer than this count as equal wherever a negative is compared with the positive (margin, ranks).
///
/// A repeated passage has exactly the cosine of the positive, but f32 arithmetic in another order gives it another last
/// bit; without the slack a margin of 0 would keep or drop duplicates by rounding. 2⁻²⁰ is 16 times the resolution of an
/// f32 cosine and 100 times below what any margin in use can tell apart.
pub const COSINE_TIE: f64 = 1.0 / (1 << 20) as f64;

/// The two keys of a row or of a candidate. Equal numbers mean equal texts; the numbers themselves mean nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Identity of the query.
    pub query: u32,
    /// Identity of the passage.
    pub passage: u32,
}

impl Key {
    /// The query key of a passage that is neither a positive nor a copy of one.
    pub const NOBODY: u32 = u32::MAX;

    /// Whether a row with this key drops a passage with the key `candidate`.
    pub const fn drops_passage(self, candidate: Self) -> bool {
        self.query == candidate.query || self.passage == candidate.passage || self.query == candidate.passage
    }

    /// Whether a row with this key drops a query with the key `candidate`.
    pub const fn drops_query(self, candidate: Self) -> bool {
        self.swapped().drops_passage(candidate.swapped())
    }

    /// The key with query and passage exchanged. Between exchanged keys, the rule for queries reads as that for passages, so
    /// that a backend needs one of them.
    pub const fn swapped(self) -> Self {
        Self { query: self.passage, passage: self.query }
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

/// Numbers ids by first appearance, from `first` on; `None`: `len` different ones.
fn number(ids: Option<&[i64]>, len: usize, first: usize, seen: &mut HashMap<i64, u32>) -> Vec<u32> {
    let Some(ids) = ids else { return (first..first + len).map(|k| k as u32).collect() };
    let mut next = first as u32;
    let mut of = |id: &i64| {
        *seen.entry(*id).or_insert_with(|| {
            next += 1;
            next - 1
        })
    };
    ids.iter().map(&mut of).collect()
}

impl Keys {
    /// Keys from the ids of the batch; without ids every query and every passage is its own.
    pub fn new(pairs: &Pairs<'_>) -> Self {
        let (rows, passages) = (pairs.rows(), pairs.passages());
        let mut seen = HashMap::with_capacity(pairs.query_ids().map_or(0, <[i64]>::len));
        let query = number(pairs.query_ids(), rows, 0, &mut seen);
        if !pairs.call().shared_ids() {
            seen.clear();
        }
        // Passages are numbered from M on, queries below: at most M + N - 1 < 2^32 - 1 by the limits of `Pairs`, so that
        // `Key::NOBODY` stays free.
        let passage = number(pairs.passage_ids(), passages, rows, &mut seen);
        let mut owner = vec![Key::NOBODY; passages];
        if pairs.passage_ids().is_some() {
            // Of copies, of which some own the positive and are overwritten below.
            let mut lowest = HashMap::with_capacity(rows);
            (0..rows).for_each(|i| _ = lowest.entry(passage[pairs.positive(i)]).or_insert(query[i]));
            owner.iter_mut().zip(&passage).for_each(|(o, p)| *o = *lowest.get(p).unwrap_or(&Key::NOBODY));
        }
        for i in (0..rows).rev() {
            owner[pairs.positive(i)] = query[i]; // descending, so the lowest row that owns the passage wins
        }
        Self {
            rows: (0..rows).map(|i| Key { query: query[i], passage: passage[pairs.positive(i)] }).collect(),
            passages: owner.into_iter().zip(passage).map(|(query, passage)| Key { query, passage }).collect(),
        }
    }
}

/// Whether pairs of different indices of a call can be masked at all. Default keys mask a pair only where both indices are the
/// same: the order of the passages sees to it.
pub(crate) fn may_mask(pairs: &Pairs<'_>, order: &Order) -> bool {
    let ids = pairs.query_ids().is_some() || pairs.passage_ids().is_some(); // also where ids are shared
    ids || order.len() != order.passages || pairs.call().margin().is_some() || pairs.exclusive_owners().is_some()
}

/// The highest cosine that row keeps, given that of its positive: s⁺ + margin, with the slack of [`COSINE_TIE`];
/// +∞ without a margin.
pub fn threshold(positive_cosine: f64, margin: Option<f64>) -> f64 {
    margin.map_or(f64::INFINITY, |m| positive_cosine + m + COSINE_TIE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;
    use crate::loss::Loss;

    fn keys(rows: usize, passages: usize, annotate: impl FnOnce(Call) -> Call) -> Keys {
        Keys::new(&annotate(Call::new(Loss::gte(), 0.1)).pairs(rows, passages).unwrap())
    }

    #[test]
    fn keys_follow_the_rule() {
        let plain = keys(4, 6, |call| call);
        for i in 0..4 {
            for j in 0..6 {
                assert_eq!(plain.rows[i].drops_passage(plain.passages[j]), i == j, "({i}, {j}) with default ids");
            }
            for j in 0..4 {
                assert_eq!(plain.rows[i].drops_query(plain.rows[j]), i == j, "({i}, {j}) with default ids");
            }
        }

        // Rows 0 and 2 share passage 5; passages 1 and 3 carry the same text.
        let keys = keys(4, 6, |call| call.with_positives([5, 1, 5, 0]).with_passage_ids([7, 8, 9, 8, 10, 11]));
        assert!(keys.rows[0].drops_query(keys.rows[2]), "rows that share a positive");
        assert!(keys.rows[1].drops_passage(keys.passages[3]), "a copy of the positive's text");
        assert!(!keys.rows[0].drops_passage(keys.passages[3]), "another row's duplicate is a negative");
        assert_eq!(keys.passages[2].query, Key::NOBODY);
        assert_eq!(keys.passages[5].query, keys.rows[0].query, "the lowest row owns a shared passage");
        assert!(keys.rows[2].drops_passage(keys.passages[5]), "through the passage key");
    }

    #[test]
    fn a_copy_of_a_positive_belongs_to_its_query() {
        // Rows 0 and 1 ask the same; passage 3 is a mined hard negative with the text of row 0's positive.
        let keys = keys(3, 5, |call| call.with_query_ids([7, 7, 8]).with_passage_ids([1, 2, 3, 1, 4]));
        assert!(keys.rows[1].drops_passage(keys.passages[3]), "row 0's positive answers row 1's query too");
        assert!(!keys.rows[2].drops_passage(keys.passages[3]));
        assert_eq!(keys.passages[4].query, Key::NOBODY);
    }

    #[test]
    fn shared_ids_drop_the_own_text_in_the_other_tower() {
        // (X0, X1), (X1, X2), (X2, X3): passage 0 has the text of query 1, and query 1 that of row 0's positive.
        for shared in [false, true] {
            let ids = |call: Call| call.with_query_ids([0, 1, 2]).with_passage_ids([1, 2, 3]);
            let keys = keys(3, 3, |call| ids(call).with_shared_ids(shared));
            for i in 0..3 {
                for j in 0..3 {
                    let own = i == j;
                    assert_eq!(
                        keys.rows[i].drops_passage(keys.passages[j]),
                        own || (shared && j + 1 == i),
                        "({i}, {j})"
                    );
                    assert_eq!(keys.rows[i].drops_query(keys.rows[j]), own || (shared && j == i + 1), "({i}, {j})");
                }
            }
        }
    }
}
