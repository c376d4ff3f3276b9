//! Everything about a call that takes O(M + N) memory: norms, keys and thresholds, by the indices of both spaces.

use super::side::{Anchors, Candidates, Numbers, Side};
use super::simd::Beta;
use super::tower::{Norms, Panels, dot};
use super::workspace::expect_room;
use crate::batch::Batch;
use crate::call::NoNegative;
use crate::combine::{self, Combined, Rows};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::identity::Identity;
use crate::loss::Loss;
use crate::mask::{Keys, may_mask};
use crate::order::{Order, Space};
use crate::partials::{Partials, SAME_COSINE, expect_positives};
use crate::prefix::Prefix;
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
    /// Those of weight above 0, shortest first.
    pub prefixes: Vec<Prefix>,
    /// By prefix: s⁺ᵢ of every row.
    pub positive: Vec<Vec<f64>>,
    /// Identity of the problem. A batch and partial sums must have the same to be used with this state.
    pub identity: Identity,
    /// Whether the call names prefixes.
    named: bool,
    inverse_temperature: f64,
    no_negative: NoNegative,
    weight: Vec<f64>,
}

/// Norms of both towers, and s⁺ᵢ of every row, by prefix.
fn measure(batch: &Batch<'_>, prefixes: &[Prefix]) -> Result<([Norms; 2], Vec<Vec<f64>>)> {
    let query = Norms::new(Tower::Query, batch.query(), prefixes, batch.call())?;
    let passage = Norms::new(Tower::Passage, batch.passage(), prefixes, batch.call())?;
    let (mut products, mut start) = (vec![0.0; batch.rows()], 0);
    let of_prefix = |(k, prefix): (usize, &Prefix)| {
        let columns = start..prefix.dim;
        start = prefix.dim;
        products.par_iter_mut().enumerate().for_each(|(i, product)| {
            *product += dot(batch.query(), i, batch.passage(), batch.pairs().positive(i), columns.clone());
        });
        let cosine =
            |(i, product): (usize, &f64)| product * query.inverse[k][i] * passage.inverse[k][batch.pairs().positive(i)];
        products.iter().enumerate().map(cosine).collect()
    };
    let positive = prefixes.iter().enumerate().map(of_prefix).collect();
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
        let prefixes = batch.prefixes();
        expect_room(batch.rows() + batch.passages(), prefixes.len())?;
        let ([query_norms, passage_norms], positive) = measure(batch, &prefixes)?;
        let (call, pairs) = (batch.call(), batch.pairs());
        let order = Order::new(pairs);
        let keys = Keys::new(pairs);
        let all_rows: Vec<u32> = (0..batch.rows() as u32).collect();
        let margin = call.margin();
        let of_query = |(k, positive): (usize, &Vec<f64>)| {
            Numbers::new(&query_norms, k, 0..batch.rows(), &all_rows, positive, margin)
        };
        let query_side = Side {
            anchors: Anchors::new(&all_rows, &keys.rows),
            candidates: Candidates::queries(&keys.rows),
            numbers: positive.iter().enumerate().map(of_query).collect(),
        };
        let index = || (0..order.len()).map(|k| order.passage(k));
        let owners = pairs.exclusive_owners();
        let of_passage = |(k, positive): (usize, &Vec<f64>)| {
            Numbers::new(&passage_norms, k, index(), &order.anchor_row, positive, margin)
        };
        let passage_side = Side {
            anchors: Anchors::new(&order.anchor_row, &keys.rows),
            candidates: Candidates::passages(
                index().map(|n| keys.passages[n]),
                owners.map(|o| index().map(|n| o[n]).collect()),
            ),
            numbers: positive.iter().enumerate().map(of_passage).collect(),
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
            prefixes,
            positive,
            identity: identity(batch, &keys),
            named: call.prefixes().is_some(),
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
        if (batch.rows(), batch.passages()) == (self.weight.len(), order.passages) {
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
        let (norms, positive) = measure(batch, &self.prefixes)?;
        let towers = [(Tower::Query, &self.query_norms), (Tower::Passage, &self.passage_norms)];
        for ((tower, saved), given) in towers.into_iter().zip(&norms) {
            for (saved, given) in saved.inverse.iter().zip(&given.inverse) {
                let mut rows = saved.iter().zip(given).enumerate();
                if let Some((row, (a, b))) = rows.find(|(_, (a, b))| a != b) {
                    let sentence = |inverse: f64| format!("a {tower} embedding in row {row} of norm {}", 1.0 / inverse);
                    return Err(Error::StateMismatch { saved: sentence(*a), given: sentence(*b) });
                }
            }
        }
        let mut both = self.positive.iter().zip(&positive);
        both.try_for_each(|(saved, given)| expect_positives(saved, given, 0.0))
    }

    /// Entries of the longest prefix. No pass reads further ones.
    pub(super) fn dim(&self) -> usize {
        self.prefixes.last().map_or(0, |p| p.dim)
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
        let mut both = partials.prefixes.iter().zip(&self.positive);
        both.try_for_each(|(sums, positive)| expect_positives(&sums.positive, positive, SAME_COSINE))?;
        let rows = Rows {
            loss: &self.loss,
            beta: self.inverse_temperature,
            weight: &self.weight,
            no_negative: self.no_negative,
            prefixes: &self.prefixes,
            named: self.named,
        };
        combine::combine(&rows, partials)
    }
}
