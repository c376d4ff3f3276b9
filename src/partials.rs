//! What the logsumexp pass produces and shards exchange: per row and block, a sum of exponentials that merges exactly.

use crate::error::{Error, Result};
use crate::identity::Identity;
use crate::loss::Block;
use std::ops::Range;

/// Σ exp(β s) over some kept negatives, held as `sum`·2^`exponent`, so that no logit overflows and merging two is an
/// addition of exactly scaled f64 numbers. Without any negative the sum is 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpSum {
    sum: f64,
    exponent: i32,
}

impl ExpSum {
    /// The sum over no negatives.
    pub const EMPTY: Self = Self { sum: 0.0, exponent: 0 };

    /// `sum`·2^`exponent`, `sum` ≥ 0 and finite.
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

/// 2^n for n ≤ 0, exactly; 0 below the normal range, where a term is invisible beside the one it is added to.
fn power_of_two(n: i32) -> f64 {
    if n < -1022 { 0.0 } else { f64::from_bits(((n + 1023) as u64) << 52) }
}

/// The state that the logsumexp pass leaves: O(M) numbers, mergeable across shards that cover different rows.
///
/// A shard of rows fills QP, QQ and PP of what it owns, and adds its queries to PQ of every row.
#[derive(Debug, Clone, PartialEq)]
pub struct Partials {
    /// Σ exp(β s) of each row in each block, ordered as [`Block::ALL`]; empty for a block the loss does not use.
    pub(crate) sums: [Vec<ExpSum>; 4],
    /// Kept negatives above the positive, in block QP and in block PQ.
    pub(crate) above: [Vec<u32>; 2],
    /// Rows whose shards are in here.
    pub(crate) covered: Vec<Range<usize>>,
    /// M.
    pub(crate) rows: usize,
    /// The problem it was made from; partials of different ones say nothing together.
    identity: Identity,
    /// s⁺ᵢ of all M rows, by which other embeddings of the same shape are told apart.
    pub(crate) positive: Vec<f64>,
}

/// Cosines that the backends compute of the same embeddings differ by less.
pub(crate) const SAME_COSINE: f64 = 1e-5;

impl Partials {
    /// Without any negative yet. `positive` is s⁺ᵢ of all rows, of the shard or not.
    pub(crate) fn new(
        rows: usize,
        uses: impl Fn(Block) -> bool,
        covered: Range<usize>,
        identity: Identity,
        positive: Vec<f64>,
    ) -> Self {
        Self {
            sums: Block::ALL.map(|b| if uses(b) { vec![ExpSum::EMPTY; rows] } else { Vec::new() }),
            above: [vec![0; rows], vec![0; rows]],
            covered: vec![covered],
            rows,
            identity,
            positive,
        }
    }

    /// Adds the partials of a shard of other rows of the same batch, whichever backend they are from.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] that names what differs if `other` is of another problem: shape, type, groups of the loss,
    /// temperature, margin, policies, positives, weights, ids, owners, or embeddings, by the cosines of the positives.
    /// [`Error::InvalidArgument`] if it covers a row that is covered already. `self` is unchanged then.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        other.expect_problem(&self.identity)?;
        expect_positives(&other.positive, &self.positive, SAME_COSINE)?;
        for a in &self.covered {
            if let Some(b) = other.covered.iter().find(|b| a.start < b.end && b.start < a.end) {
                return Err(Error::invalid(
                    "other",
                    format!("partials of rows {b:?}"),
                    format!("rows outside {a:?}, merged already"),
                ));
            }
        }
        for (mine, theirs) in self.sums.iter_mut().zip(&other.sums) {
            mine.iter_mut().zip(theirs).for_each(|(a, b)| a.merge(*b));
        }
        for (mine, theirs) in self.above.iter_mut().zip(&other.above) {
            mine.iter_mut().zip(theirs).for_each(|(a, b)| *a += b);
        }
        self.covered.extend(other.covered.iter().cloned());
        Ok(())
    }

    /// log Σ exp(β s) of each of the M rows over its kept negatives of `block`, in nats; `None` if the loss does not use it.
    pub fn log_sum_exp(&self, block: Block) -> Option<Vec<f64>> {
        let sums = &self.sums[block.index()];
        (!sums.is_empty()).then(|| sums.iter().map(|s| s.ln()).collect())
    }

    /// An error unless made from this problem.
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

/// An error unless the cosines of all rows with their positives differ by no more than `slack`, as those of the same embeddings do.
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
            Partials::new(4, |_| true, covered, identity, vec![0.5, 0.5, positive, 0.5])
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
