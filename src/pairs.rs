//! Who belongs to whom: a [`Call`] joined with the numbers of queries and passages, whose embeddings may lie on any device.

use crate::call::{Call, Scope};

/// A call that was checked against M queries and N ≥ M passages, with its defaults filled in. [`Call::pairs`] makes it.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a> {
    call: &'a Call,
    rows: usize,
    passages: usize,
}

impl<'a> Pairs<'a> {
    /// Only for lists of these lengths.
    pub(crate) fn of(call: &'a Call, rows: usize, passages: usize) -> Self {
        Self { call, rows, passages }
    }

    /// What is to be computed.
    pub fn call(&self) -> &'a Call {
        self.call
    }

    /// M, the number of queries.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// N, the number of passages.
    pub fn passages(&self) -> usize {
        self.passages
    }

    /// π(row).
    pub fn positive(&self, row: usize) -> usize {
        self.call.positives.as_ref().map_or(row, |p| p[row] as usize)
    }

    /// Weight of `row` as given; 1 by default.
    pub fn weight(&self, row: usize) -> f64 {
        self.call.weights.as_ref().map_or(1.0, |w| f64::from(w[row]))
    }

    /// w̃ = w / Σw.
    pub fn normalized_weights(&self) -> Vec<f64> {
        let total: f64 = (0..self.rows()).map(|i| self.weight(i)).sum();
        (0..self.rows()).map(|i| self.weight(i) / total).collect()
    }

    /// The ids of the queries, if any were given.
    pub fn query_ids(&self) -> Option<&'a [i64]> {
        self.call.query_ids.as_deref()
    }

    /// The ids of the passages, if any were given.
    pub fn passage_ids(&self) -> Option<&'a [i64]> {
        self.call.passage_ids.as_deref()
    }

    /// The owners of hard negatives, if any were given and only their owners see them.
    pub fn exclusive_owners(&self) -> Option<&'a [i32]> {
        match self.call.owners.as_ref()? {
            (_, Scope::All) => None,
            (owners, Scope::Own) => Some(owners),
        }
    }
}
