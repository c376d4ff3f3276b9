//! Partial sums: what the first pass leaves for each row and block, and what shards exchange.

use crate::error::{Error, Result};
use crate::identity::Identity;
use crate::loss::Block;
use std::ops::Range;

/// Σ exp(β s) over some of a row's negatives, held as `sum`·2^`exponent`. So no logit overflows, and two are merged by adding f64
/// numbers that are scaled without error. Without any negative the sum is 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpSum {
    sum: f64,
    exponent: i32,
}

impl ExpSum {
    /// The sum over no negatives.
    pub const EMPTY: Self = Self { sum: 0.0, exponent: 0 };

    /// The sum of value `sum`·2^`exponent`; `sum` must be finite and at least 0.
    pub fn new(sum: f64, exponent: i32) -> Self {
        Self { sum, exponent }
    }

    /// The sum as `sum`·2^`exponent`.
    pub(crate) fn parts(self) -> (f64, i32) {
        (self.sum, self.exponent)
    }

    /// Adds the terms of `other`.
    pub fn merge(&mut self, other: Self) {
        if other.sum == 0.0 {
            return;
        }
        if self.sum == 0.0 {
            *self = other;
            return;
        }
        let exponent = self.exponent.max(other.exponent);
        let scaled = |x: Self| x.sum * power_of_two(x.exponent.saturating_sub(exponent));
        *self = Self { sum: scaled(*self) + scaled(other), exponent };
    }

    /// log Σ exp(β s), in nats; −∞ without any negative.
    pub fn ln(self) -> f64 {
        if self.sum == 0.0 {
            f64::NEG_INFINITY
        } else {
            self.sum.ln() + f64::from(self.exponent) * std::f64::consts::LN_2
        }
    }
}

/// 2^n for n ≤ 0, exactly. Below the normal range it is 0, because such a term vanishes beside the one that it is added to.
fn power_of_two(n: i32) -> f64 {
    if n < -1022 { 0.0 } else { f64::from_bits(((n + 1023) as u64) << 52) }
}

/// The partial sums that the first pass leaves: O(M) numbers, which shards of different rows merge.
///
/// A shard gives the complete sums of its own rows in QP, QQ and PP. In PQ its queries are candidates of every row, so it gives a part of
/// every row's sum.
#[derive(Debug, Clone, PartialEq)]
pub struct Partials {
    /// One for each prefix of the problem, shortest first; one in all if it has none.
    pub(crate) prefixes: Vec<PrefixSums>,
    /// Rows of the shards that are merged here.
    pub(crate) covered: Vec<Range<usize>>,
    /// M.
    pub(crate) rows: usize,
    /// Identity of the problem that they were made from. Partial sums of different problems must not be merged.
    identity: Identity,
}

/// What [`Partials`] hold of one prefix.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PrefixSums {
    /// Σ exp(β s) of each row in each block, in the order of [`Block::ALL`]; empty for a block that the loss does not use.
    pub(crate) sums: [Vec<ExpSum>; 4],
    /// For each row, the number of negatives with a cosine above s⁺, in block QP and in block PQ.
    pub(crate) above: [Vec<u32>; 2],
    /// s⁺ᵢ of all M rows. They tell other embeddings of the same shape apart.
    pub(crate) positive: Vec<f64>,
}

/// Two backends compute cosines of the same embeddings that differ by less than this.
pub(crate) const SAME_COSINE: f64 = 1e-5;

impl Partials {
    /// Partial sums of the shard `covered`, without any negative yet. `positives` has, for each prefix, s⁺ᵢ of all rows of the batch.
    pub(crate) fn new(
        rows: usize,
        uses: impl Fn(Block) -> bool,
        covered: Range<usize>,
        identity: Identity,
        positives: Vec<Vec<f64>>,
    ) -> Self {
        let of_prefix = |positive| PrefixSums {
            sums: Block::ALL.map(|b| if uses(b) { vec![ExpSum::EMPTY; rows] } else { Vec::new() }),
            above: [vec![0; rows], vec![0; rows]],
            positive,
        };
        Self { prefixes: positives.into_iter().map(of_prefix).collect(), covered: vec![covered], rows, identity }
    }

    /// Adds the partial sums of a shard of other rows of the same batch. They may come from another backend.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] if `other` is of another problem. It names what differs: shape, type, groups of the loss, temperature,
    /// margin, policies, positives, weights, ids, owners, or embeddings, which are told apart by the cosines of the positives.
    /// [`Error::InvalidArgument`] if `other` covers a row that is covered already. `self` is unchanged after either.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        other.expect_problem(&self.identity)?;
        for (other, own) in other.prefixes.iter().zip(&self.prefixes) {
            expect_positives(&other.positive, &own.positive, SAME_COSINE)?;
        }
        for a in &self.covered {
            if let Some(b) = other.covered.iter().find(|b| a.start < b.end && b.start < a.end) {
                return Err(Error::invalid(
                    "other",
                    format!("partials of rows {b:?}"),
                    format!("rows outside {a:?}, merged already"),
                ));
            }
        }
        for (own, other) in self.prefixes.iter_mut().zip(&other.prefixes) {
            for (mine, theirs) in own.sums.iter_mut().zip(&other.sums) {
                mine.iter_mut().zip(theirs).for_each(|(a, b)| a.merge(*b));
            }
            for (mine, theirs) in own.above.iter_mut().zip(&other.above) {
                mine.iter_mut().zip(theirs).for_each(|(a, b)| *a += b);
            }
        }
        self.covered.extend(other.covered.iter().cloned());
        Ok(())
    }

    /// log Σ exp(β s) of each of the M rows over its negatives in `block`, in nats; `None` if the loss does not use the block. With
    /// prefixes it is that of the longest.
    pub fn log_sum_exp(&self, block: Block) -> Option<Vec<f64>> {
        self.log_sum_exp_of_prefix(self.prefixes.len().checked_sub(1)?, block)
    }

    /// [`Partials::log_sum_exp`] of prefix `k`, counted from 0 over those of weight above 0; `None` beyond the last, too.
    pub fn log_sum_exp_of_prefix(&self, k: usize, block: Block) -> Option<Vec<f64>> {
        let sums = &self.prefixes.get(k)?.sums[block.index()];
        (!sums.is_empty()).then(|| sums.iter().map(|s| s.ln()).collect())
    }

    /// An error unless they were made from this problem.
    pub(crate) fn expect_problem(&self, problem: &Identity) -> Result<()> {
        self.identity.expect(problem)
    }

    /// An error unless every one of the M rows is covered.
    pub(crate) fn expect_complete(&self) -> Result<()> {
        let covered: usize = self.covered.iter().map(|r| r.len()).sum(); // merged ranges are disjoint
        if covered != self.rows {
            let value = format!("merged from the shards {:?}", self.covered);
            return Err(Error::invalid("partials", value, format!("shards that cover all rows, 0..{}", self.rows)));
        }
        Ok(())
    }
}

/// An error if a row's cosine with its positive differs from the saved one by more than `slack`. Those of the same embeddings do not.
pub(crate) fn expect_positives(saved: &[f64], given: &[f64], slack: f64) -> Result<()> {
    let Some(row) = saved.iter().zip(given).position(|(a, b)| (a - b).abs() > slack) else { return Ok(()) };
    let sentence = |s: f64| format!("embeddings whose row {row} has a cosine of {s} with its positive");
    Err(Error::StateMismatch { saved: sentence(saved[row]), given: sentence(given[row]) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;
    use crate::dtype::DType;
    use crate::loss::Loss;
    use crate::mask::Keys;

    #[test]
    fn merging_neither_overflows_nor_loses_the_smaller_term() {
        let mut a = ExpSum::new(1.5, 1400);
        a.merge(ExpSum::new(1.0, 1399));
        assert_eq!(a, ExpSum::new(2.0, 1400));
        a.merge(ExpSum::EMPTY);
        assert_eq!(a, ExpSum::new(2.0, 1400));
        a.merge(ExpSum::new(1.0, -1400));
        assert_eq!(a.ln(), 1401.0 * std::f64::consts::LN_2);
        assert_eq!(ExpSum::EMPTY.ln(), f64::NEG_INFINITY);
        let mut ends = ExpSum::new(1.5, i32::MIN);
        ends.merge(ExpSum::new(1.25, i32::MAX));
        ends.merge(ExpSum::new(1.0, i32::MIN));
        assert_eq!(ends, ExpSum::new(1.25, i32::MAX));
    }

    #[test]
    fn a_row_is_merged_once() {
        let of = |covered: Range<usize>, positive: f64| {
            let call = Call::new(Loss::gte(), 0.1);
            let pairs = call.pairs(4, 5).unwrap();
            let identity = Identity::new(&pairs, &Keys::new(&pairs), DType::F16, 3);
            Partials::new(4, |_| true, covered, identity, vec![vec![0.5; 4], vec![0.5, 0.5, positive, 0.5]])
        };
        let mut a = of(0..2, 0.5);
        let error = a.merge(&of(1..4, 0.5)).unwrap_err();
        assert!(error.to_string().contains("1..4"), "{error}");
        assert!(a.expect_complete().is_err());
        let error = a.merge(&of(2..4, 0.25)).unwrap_err();
        assert!(error.to_string().contains("row 2 has a cosine of 0.25"), "{error}");
        a.merge(&of(2..4, 0.5 + 1e-6)).unwrap();
        assert!(a.expect_complete().is_ok());
    }
}
