//! Who belongs to whom: everything about a batch but its embeddings, which may lie in the memory of any device.

use crate::error::{Error, Result};

/// Who sees a hard negative that has an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scope {
    /// Every row.
    #[default]
    All,
    /// Only the row that owns it; in the blocks QP and PP the others drop it.
    Own,
}

/// M queries and N ≥ M passages, and who is whose positive, duplicate and hard negative.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a> {
    rows: usize,
    passages: usize,
    positives: Option<&'a [u32]>,
    weights: Option<&'a [f32]>,
    query_ids: Option<&'a [i64]>,
    passage_ids: Option<&'a [i64]>,
    shared_ids: bool,
    owners: Option<&'a [i32]>,
    scope: Scope,
}

impl<'a> Pairs<'a> {
    /// M = `rows` queries against N = `passages` passages, 1 ≤ M ≤ N < 2³¹; row i's positive is passage i, every other pair is
    /// a negative.
    pub fn new(rows: usize, passages: usize) -> Result<Self> {
        if rows == 0 || rows > i32::MAX as usize {
            return Err(Error::invalid("rows", rows.to_string(), format!("1 to {}", i32::MAX)));
        }
        if rows > passages {
            return Err(Error::invalid(
                "passage",
                format!("{passages} rows"),
                format!("at least as many rows as there are queries, {rows}"),
            ));
        }
        if passages > i32::MAX as usize {
            return Err(Error::invalid("passages", passages.to_string(), format!("{rows} to {}", i32::MAX)));
        }
        Ok(Self {
            rows,
            passages,
            positives: None,
            weights: None,
            query_ids: None,
            passage_ids: None,
            shared_ids: false,
            owners: None,
            scope: Scope::All,
        })
    }

    fn check_len(argument: &'static str, len: usize, wanted: usize, what: &str) -> Result<()> {
        if len != wanted {
            return Err(Error::invalid(
                argument,
                format!("a slice of {len} elements"),
                format!("{wanted}, one for each {what}"),
            ));
        }
        Ok(())
    }

    /// π: for each row the passage of its positive, 0 ≤ π(i) < N. Several rows may share one.
    pub fn with_positives(mut self, positives: &'a [u32]) -> Result<Self> {
        Self::check_len("positives", positives.len(), self.rows(), "query")?;
        if let Some(i) = positives.iter().position(|&n| n as usize >= self.passages()) {
            return Err(Error::invalid(
                "positives",
                format!("{} at row {i}", positives[i]),
                format!("0 to {}, the rows of the passages", self.passages() - 1),
            ));
        }
        self.positives = Some(positives);
        Ok(self)
    }

    /// w: a weight ≥ 0 for each row, with a sum above 0; the loss uses w / Σw. A row of weight 0 still is a negative of the
    /// others.
    pub fn with_weights(mut self, weights: &'a [f32]) -> Result<Self> {
        Self::check_len("weights", weights.len(), self.rows(), "query")?;
        if let Some(i) = weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
            return Err(Error::invalid(
                "weights",
                format!("{} at row {i}", weights[i]),
                "finite numbers of at least 0",
            ));
        }
        if weights.iter().all(|&w| w == 0.0) {
            return Err(Error::invalid("weights", "0 in every row", "at least one weight above 0"));
        }
        self.weights = Some(weights);
        Ok(self)
    }

    /// An identity for each query; queries of equal id are never negatives of each other, nor of each other's positives.
    /// Default: all different.
    pub fn with_query_ids(mut self, ids: &'a [i64]) -> Result<Self> {
        Self::check_len("query_ids", ids.len(), self.rows(), "query")?;
        self.query_ids = Some(ids);
        Ok(self)
    }

    /// An identity for each passage; passages of equal id are never negatives of each other, nor of each other's queries.
    /// Default: all different.
    pub fn with_passage_ids(mut self, ids: &'a [i64]) -> Result<Self> {
        Self::check_len("passage_ids", ids.len(), self.passages(), "passage")?;
        self.passage_ids = Some(ids);
        Ok(self)
    }

    /// Whether query ids and passage ids name the same texts. If so, a passage with the id of row i's query, and a query with the
    /// id of its positive, are no negatives of row i either: pairs of sentences, or queries that are other rows' passages.
    /// Default: no, a query and a passage may have one id and nothing in common. To be called after
    /// [`Pairs::with_query_ids`] and [`Pairs::with_passage_ids`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for `true` without ids of both.
    pub fn with_shared_ids(mut self, shared: bool) -> Result<Self> {
        let missing = match (self.query_ids, self.passage_ids) {
            (Some(_), Some(_)) => None,
            (None, Some(_)) => Some("query ids"),
            (Some(_), None) => Some("passage ids"),
            (None, None) => Some("query ids and passage ids"),
        };
        if let Some(missing) = missing.filter(|_| shared) {
            return Err(Error::invalid(
                "shared_ids",
                format!("true without {missing}"),
                "false, or query ids and passage ids before it",
            ));
        }
        self.shared_ids = shared;
        Ok(self)
    }

    /// For each passage the row whose hard negative it is, or −1 for everyone's; with [`Scope::Own`] the other rows drop it.
    pub fn with_hard_negative_owners(mut self, owners: &'a [i32], scope: Scope) -> Result<Self> {
        Self::check_len("owners", owners.len(), self.passages(), "passage")?;
        if let Some(n) = owners.iter().position(|&o| o < -1 || o as i64 >= self.rows() as i64) {
            return Err(Error::invalid(
                "owners",
                format!("{} at passage {n}", owners[n]),
                format!("-1 (everyone's) or a row, 0 to {}", self.rows() - 1),
            ));
        }
        self.owners = Some(owners);
        self.scope = scope;
        Ok(self)
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
        self.positives.map_or(row, |p| p[row] as usize)
    }

    /// Weight of `row` as given; 1 by default.
    pub fn weight(&self, row: usize) -> f64 {
        self.weights.map_or(1.0, |w| f64::from(w[row]))
    }

    /// w̃ = w / Σw.
    pub fn normalized_weights(&self) -> Vec<f64> {
        let total: f64 = (0..self.rows()).map(|i| self.weight(i)).sum();
        (0..self.rows()).map(|i| self.weight(i) / total).collect()
    }

    /// The ids of the queries, if any were given.
    pub fn query_ids(&self) -> Option<&'a [i64]> {
        self.query_ids
    }

    /// The ids of the passages, if any were given.
    pub fn passage_ids(&self) -> Option<&'a [i64]> {
        self.passage_ids
    }

    /// Whether query ids and passage ids name the same texts.
    pub fn shared_ids(&self) -> bool {
        self.shared_ids
    }

    /// The owners of hard negatives, if any were given and only their owners see them.
    pub fn exclusive_owners(&self) -> Option<&'a [i32]> {
        match self.scope {
            Scope::All => None,
            Scope::Own => self.owners,
        }
    }
}
