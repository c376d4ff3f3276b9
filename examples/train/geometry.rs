//! How the two towers lie in the embedding space: the numbers behind Figures 1, 5 and 6 of the paper.

use super::data::TestSet;
use super::matrix::dot;
use serde::Serialize;

/// Pairs of different rows that the ratio is measured on.
const RATIO_PAIRS: usize = 20_000;

/// Counts of values in equal bins; what lies outside is counted apart.
#[derive(Debug, Clone, Serialize)]
pub struct Histogram {
    /// Lower end of the first bin.
    pub low: f64,
    /// Upper end of the last bin.
    pub high: f64,
    /// Count of each bin.
    pub counts: Vec<u64>,
    /// Values outside.
    pub outside: u64,
    /// Middle value of all, those outside included; NaN if there are none.
    pub median: f64,
}

impl Histogram {
    /// From values, NaN excluded.
    pub fn new(mut values: Vec<f64>, low: f64, high: f64, bins: usize) -> Self {
        values.retain(|x| !x.is_nan());
        values.sort_unstable_by(f64::total_cmp);
        let mut counts = vec![0; bins];
        let mut outside = 0;
        for x in &values {
            let bin = (x - low) / (high - low) * bins as f64;
            if (0.0..bins as f64).contains(&bin) {
                counts[bin as usize] += 1;
            } else if *x == high {
                counts[bins - 1] += 1;
            } else {
                outside += 1;
            }
        }
        let median = values.get(values.len() / 2).copied().unwrap_or(f64::NAN);
        Self { low, high, counts, outside, median }
    }

    /// Share of all values in each bin.
    pub fn shares(&self) -> Vec<f64> {
        let total = (self.counts.iter().sum::<u64>() + self.outside).max(1) as f64;
        self.counts.iter().map(|n| *n as f64 / total).collect()
    }

    /// Share of the values outside.
    pub fn outside_share(&self) -> f64 {
        self.outside as f64 / (self.counts.iter().sum::<u64>() + self.outside).max(1) as f64
    }
}

/// Distance between the centres of the towers, ‖mean q̂ − mean p̂‖ over held-out pairs (rows of norm 1): 0 when they cover the
/// same space on average, 2 when they are opposite points.
pub fn tower_gap(queries: &[f32], positives: &[f32], dim: usize) -> f64 {
    let mean = |rows: &[f32]| {
        let mut sum = vec![0.0f64; dim];
        for row in rows.chunks_exact(dim) {
            sum.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x));
        }
        let count = (rows.len() / dim).max(1) as f64;
        sum.iter_mut().for_each(|s| *s /= count);
        sum
    };
    mean(queries).iter().zip(mean(positives)).map(|(q, p)| (q - p).powi(2)).sum::<f64>().sqrt()
}

/// Rows of the candidates that are the positives of the queries, in order.
pub fn positives_of(test: &TestSet, candidates: &[f32], dim: usize) -> Vec<f32> {
    test.positives.iter().flat_map(|p| &candidates[p * dim..][..dim]).copied().collect()
}

/// sim(qᵢ, qⱼ) / sim(qᵢ, pⱼ) for random i ≠ j, pⱼ the positive of j; rows of norm 1. Without same-tower negatives nothing holds
/// queries apart in the way that queries and passages are.
pub fn same_tower_ratios(queries: &[f32], positives: &[f32], dim: usize, seed: u64) -> Vec<f64> {
    let count = queries.len() / dim;
    if count < 2 {
        return Vec::new();
    }
    let mut rng = fastrand::Rng::with_seed(seed);
    let row = |x: &'_ [f32], i: usize| x[i * dim..][..dim].to_vec();
    (0..RATIO_PAIRS)
        .map(|_| {
            let i = rng.usize(..count);
            let j = (i + rng.usize(1..count)) % count;
            let q = row(queries, i);
            f64::from(dot(&q, &row(queries, j))) / f64::from(dot(&q, &row(positives, j)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_counts_every_value_once() {
        let h = Histogram::new(vec![-1.0, 0.0, 0.1, 0.5, 0.99, 1.0, 7.0, f64::NAN], 0.0, 1.0, 4);
        assert_eq!((h.counts.clone(), h.outside), (vec![2, 0, 1, 2], 2));
        assert_eq!(h.median, 0.5);
        assert!((h.shares().iter().sum::<f64>() + h.outside_share() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn gap_and_ratio() {
        let q = [1.0, 0.0, 1.0, 0.0];
        let p = [0.0, 1.0, 0.0, -1.0];
        assert!((tower_gap(&q, &p, 2) - 1.0).abs() < 1e-9);
        assert_eq!(tower_gap(&q, &q, 2), 0.0);
        assert!(same_tower_ratios(&q, &q, 2, 1).iter().all(|r| (r - 1.0).abs() < 1e-6));
    }
}
