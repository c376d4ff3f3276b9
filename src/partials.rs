//! What the logsumexp pass produces and shards exchange: per row and block, a sum of exponentials that merges exactly.

use crate::error::{Error, Result};
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
    /// The inputs it was made from, in words; partials with different ones say nothing together.
    origin: String,
}

impl Partials {
    pub(crate) fn new(rows: usize, uses: impl Fn(Block) -> bool, covered: Range<usize>, origin: String) -> Self {
        Self {
            sums: Block::ALL.map(|b| if uses(b) { vec![ExpSum::EMPTY; rows] } else { Vec::new() }),
            above: [vec![0; rows], vec![0; rows]],
            covered: vec![covered],
            rows,
            origin,
        }
    }

    /// Adds the partials of a shard of other rows of the same batch.
    ///
    /// # Errors
    /// `other` was made from a batch of another shape or type, from another loss, temperature or margin, or covers a row that is already covered. `self` is unchanged then.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        other.expect_origin(&self.origin)?;
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

    /// An error unless made from the inputs that `origin` describes.
    pub(crate) fn expect_origin(&self, origin: &str) -> Result<()> {
        if self.origin != origin {
            return Err(Error::StateMismatch { saved: self.origin.clone(), given: origin.into() });
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut a = Partials::new(4, |_| true, 0..2, "a".into());
        let error = a.clone().merge(&Partials::new(4, |_| true, 1..4, "a".into())).unwrap_err();
        assert!(error.to_string().contains("1..4"), "{error}");
        assert!(a.expect_complete().is_err());
        a.merge(&Partials::new(4, |_| true, 2..4, "a".into())).unwrap();
        assert!(a.expect_complete().is_ok());
        assert!(a.merge(&Partials::new(5, |_| true, 0..5, "b".into())).is_err());
    }
}
