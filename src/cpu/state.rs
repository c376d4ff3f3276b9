//! Everything about a call that takes O(M + N) memory: norms, keys and thresholds, by the indices of both spaces.

use super::epilogue::{Anchors, Candidates, Side};
use super::simd::{Beta, LANES};
use super::tower::{Norms, Panels, dot};
use super::workspace::expect_room;
use crate::batch::Batch;
use crate::call::NoNegative;
use crate::combine::{self, Combined, Rows};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::identity::Identity;
use crate::loss::Loss;
use crate::mask::{COSINE_TIE, Keys, may_mask, threshold};
use crate::order::{Order, Space};
use crate::partials::{Partials, SAME_COSINE, expect_positives};
use crate::tower::Tower;
use rayon::prelude::*;
use std::ops::Range;

/// The state of a call for the rows of one shard.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub loss: Loss,
    /// Rows of the shard. One device has all rows.
    pub rows: Range<usize>,
    pub query_norms: Norms,
    pub passage_norms: Norms,
    pub order: Order,
    pub query_side: Side,
    pub passage_side: Side,
    /// Whether any pair of different indices may be masked: see [`may_mask`].
    pub masked: bool,
    pub beta: Beta,
    /// s⁺ᵢ of every row.
    pub positive: Vec<f64>,
    /// Identity of the problem. A batch and partial sums must have the same to be used with this state.
    pub identity: Identity,
    dim: usize,
    inverse_temperature: f64,
    no_negative: NoNegative,
    weight: Vec<f64>,
}

/// Norms of both towers, and s⁺ᵢ of every row.
fn measure(batch: &Batch<'_>) -> Result<([Norms; 2], Vec<f64>)> {
    let query = Norms::new(Tower::Query, batch.query(), batch.call().zero_norm())?;
    let passage = Norms::new(Tower::Passage, batch.passage(), batch.call().zero_norm())?;
    let mut positive = vec![0.0; batch.rows()];
    positive.par_iter_mut().enumerate().for_each(|(i, s)| {
        let n = batch.pairs().positive(i);
        *s = dot(batch.query(), i, batch.passage(), n) * query.inverse[i] * passage.inverse[n];
    });
    Ok(([query, passage], positive))
}

fn identity(batch: &Batch<'_>, keys: &Keys) -> Identity {
    Identity::new(batch.pairs(), keys, batch.dtype(), batch.dim())
}

impl State {
    pub(super) fn new(batch: &Batch<'_>, rows: Range<usize>) -> Result<Self> {
        match batch.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => {}
            dtype @ DType::F64 => return Err(Error::dtype("cpu", dtype, "f32, f16 and bf16; the reference takes f64")),
        }
        if rows.start >= rows.end || rows.end > batch.rows() {
            let allowed = format!("a non-empty range within 0..{}", batch.rows());
            return Err(Error::invalid("rows", format!("{rows:?}"), allowed));
        }
        expect_room(batch.rows() + batch.passages())?;
        let ([query_norms, passage_norms], positive) = measure(batch)?;
        let (call, pairs) = (batch.call(), batch.pairs());
        let order = Order::new(pairs);
        let keys = Keys::new(pairs);
        let anchors = |rows: &[u32]| Anchors::new(rows, &keys.rows, &positive, call.margin());
        let all_rows: Vec<u32> = (0..batch.rows() as u32).collect();
        let query_side = Side {
            inverse: padded((0..batch.rows()).map(|i| query_norms.panel_inverse(i)), 0.0),
            anchors: anchors(&all_rows),
            candidates: Candidates::queries(&keys.rows),
        };
        let index = || (0..order.len()).map(|k| order.passage(k));
        let owners = pairs.exclusive_owners();
        let passage_side = Side {
            inverse: padded(index().map(|n| passage_norms.panel_inverse(n)), 0.0),
            anchors: anchors(&order.anchor_row),
            candidates: Candidates::passages(
                index().map(|n| keys.passages[n]),
                owners.map(|o| index().map(|n| o[n]).collect()),
            ),
        };
        Ok(Self {
            loss: call.loss().clone(),
            rows,
            masked: may_mask(pairs, &order),
            beta: Beta::new(call.beta()),
            query_norms,
            passage_norms,
            order,
            query_side,
            passage_side,
            positive,
            identity: identity(batch, &keys),
            dim: batch.dim(),
            inverse_temperature: call.beta(),
            no_negative: call.no_negative(),
            weight: pairs.normalized_weights(),
        })
    }

    /// An error unless the state was made from `batch`. The problem must be the same, and so must norms and cosines of the positives,
    /// which have the same bits for the same embeddings.
    pub(super) fn expect_batch(&self, batch: &Batch<'_>) -> Result<()> {
        // If a positive differs, the error can name its row, which the identity cannot.
        let order = &self.order;
        if (batch.rows(), batch.passages()) == (self.positive.len(), order.passages) {
            let mut anchors = (0..order.anchors).chain(order.passages..order.len());
            if let Some(k) = anchors.find(|&k| batch.pairs().positive(order.anchor_row[k] as usize) != order.passage(k))
            {
                let row = order.anchor_row[k] as usize;
                let describe = |n: usize| format!("a batch where row {row} has passage {n} as its positive");
                let (saved, given) = (describe(order.passage(k)), describe(batch.pairs().positive(row)));
                return Err(Error::StateMismatch { saved, given });
            }
        }
        self.identity.expect(&identity(batch, &Keys::new(batch.pairs())))?;
        let (norms, positive) = measure(batch)?;
        let towers = [(Tower::Query, &self.query_norms), (Tower::Passage, &self.passage_norms)];
        for ((tower, saved), given) in towers.into_iter().zip(&norms) {
            let mut rows = saved.inverse.iter().zip(&given.inverse).enumerate();
            if let Some((row, (a, b))) = rows.find(|(_, (a, b))| a != b) {
                let sentence = |inverse: f64| format!("a {tower} embedding in row {row} of norm {}", 1.0 / inverse);
                return Err(Error::StateMismatch { saved: sentence(*a), given: sentence(*b) });
            }
        }
        expect_positives(&self.positive, &positive, 0.0)
    }

    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    /// The embeddings behind a space of indices.
    pub(super) fn panels<'a>(&'a self, space: Space, batch: &Batch<'a>) -> Panels<'a> {
        match space {
            Space::Query => Panels { x: batch.query(), norms: &self.query_norms, order: None },
            Space::Passage => {
                Panels { x: batch.passage(), norms: &self.passage_norms, order: self.order.passage.as_deref() }
            }
        }
    }

    pub(super) fn side(&self, space: Space) -> &Side {
        match space {
            Space::Query => &self.query_side,
            Space::Passage => &self.passage_side,
        }
    }

    /// Row that the index anchors.
    pub(super) fn anchor_row(&self, space: Space, index: usize) -> usize {
        match space {
            Space::Query => index,
            Space::Passage => self.order.anchor_row[index] as usize,
        }
    }

    pub(super) fn combine(&self, partials: &Partials) -> Result<Combined> {
        partials.expect_problem(&self.identity)?;
        expect_positives(&partials.positive, &self.positive, SAME_COSINE)?;
        let positive_logit: Vec<f64> = self.positive.iter().map(|s| self.inverse_temperature * s).collect();
        let (weight, no_negative) = (self.weight.as_slice(), self.no_negative);
        combine::combine(&self.loss, &Rows { positive_logit: &positive_logit, weight, no_negative }, partials)
    }
}

/// The values, and [`LANES`] more entries, so that the last chunk of a tile may read past the last index.
pub(super) fn padded<T: Copy>(values: impl Iterator<Item = T>, padding: T) -> Vec<T> {
    values.chain([padding; LANES]).collect()
}

impl Anchors {
    fn new(rows: &[u32], keys: &[crate::mask::Key], positive: &[f64], margin: Option<f64>) -> Self {
        // An index that anchors no row gets neutral values. No region has it among its anchors.
        let get = |r: u32| (r as usize) < positive.len();
        let key = |r: u32, f: fn(&crate::mask::Key) -> u32| if get(r) { f(&keys[r as usize]) } else { 0 };
        let cosine = |r: u32| if get(r) { positive[r as usize] } else { 1.0 };
        Self {
            query_key: padded(rows.iter().map(|&r| key(r, |k| k.query)), 0),
            passage_key: padded(rows.iter().map(|&r| key(r, |k| k.passage)), 0),
            row: padded(rows.iter().copied(), 0),
            threshold: padded(rows.iter().map(|&r| threshold(cosine(r), margin) as f32), 0.0),
            positive: padded(rows.iter().map(|&r| cosine(r) as f32), 0.0),
            above: padded(rows.iter().map(|&r| (cosine(r) + COSINE_TIE) as f32), 0.0),
        }
    }
}
