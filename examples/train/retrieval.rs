//! Retrieval quality of held-out queries against all candidates.

use super::data::TestSet;
use super::matrix::{Matrix, multiply, normalise_rows};
use rayon::prelude::*;
use serde::Serialize;

/// Queries whose cosines one task holds.
const QUERIES_PER_TASK: usize = 64;
const CUTOFF: usize = 10;

/// Means over queries.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scores {
    /// Share of queries whose first candidate is relevant.
    pub p_at_1: f64,
    /// Mean of 1 / rank of the first relevant candidate.
    pub mrr: f64,
    /// Normalised discounted cumulative gain of the first 10 candidates, binary relevance.
    pub ndcg_at_10: f64,
}

/// Scores, and what the histograms need.
#[derive(Debug)]
pub struct Retrieval {
    /// Means over queries.
    pub scores: Scores,
    /// Cosine of each query with its first candidate.
    pub top_cosines: Vec<f32>,
}

/// Searches for each query (queries × dim) among the candidates (candidates × dim) by cosine. Equal cosines rank in the order
/// of the candidates.
pub fn retrieve(test: &TestSet, mut queries: Vec<f32>, mut candidates: Vec<f32>, dim: usize) -> Retrieval {
    normalise_rows(&mut queries, dim);
    normalise_rows(&mut candidates, dim);
    let count = test.candidates.len();
    let blocks: Vec<Vec<(Scores, f32)>> = queries
        .par_chunks(QUERIES_PER_TASK * dim)
        .enumerate()
        .map(|(block, queries)| {
            let mut cosines = vec![0.0; queries.len() / dim * count];
            multiply(&mut cosines, Matrix::new(queries, dim), Matrix::new(&candidates, dim).t(), false);
            let rows = cosines.chunks_exact(count).enumerate();
            rows.map(|(i, row)| {
                let relevant = &test.relevant[block * QUERIES_PER_TASK + i];
                let is_relevant: Vec<bool> =
                    test.candidate_ids.iter().map(|id| relevant.binary_search(id).is_ok()).collect();
                (score(row, &is_relevant), row.iter().copied().fold(f32::NEG_INFINITY, f32::max))
            })
            .collect()
        })
        .collect();
    let rows: Vec<(Scores, f32)> = blocks.into_iter().flatten().collect();
    let mean = |f: fn(&Scores) -> f64| rows.iter().map(|(s, _)| f(s)).sum::<f64>() / rows.len() as f64;
    let scores = Scores { p_at_1: mean(|s| s.p_at_1), mrr: mean(|s| s.mrr), ndcg_at_10: mean(|s| s.ndcg_at_10) };
    Retrieval { scores, top_cosines: rows.into_iter().map(|(_, c)| c).collect() }
}

/// Scores of one query; 0 if nothing is relevant.
fn score(cosines: &[f32], relevant: &[bool]) -> Scores {
    // Only the best few matter for the gain, and only the best relevant one for the rank: no full sort.
    let mut top: Vec<(f32, usize)> = Vec::with_capacity(CUTOFF + 1);
    let mut best: Option<(f32, usize)> = None;
    for (j, &cosine) in cosines.iter().enumerate() {
        if top.len() < CUTOFF || cosine > top[CUTOFF - 1].0 {
            let at = top.partition_point(|(other, _)| *other >= cosine);
            top.insert(at, (cosine, j));
            top.truncate(CUTOFF);
        }
        if relevant[j] && best.is_none_or(|(other, _)| cosine > other) {
            best = Some((cosine, j));
        }
    }
    let Some((best, at)) = best else { return Scores { p_at_1: 0.0, mrr: 0.0, ndcg_at_10: 0.0 } };
    let rank = 1 + cosines.iter().enumerate().filter(|(j, c)| **c > best || (**c == best && *j < at)).count();
    let discount = |place: usize| 1.0 / ((place + 2) as f64).log2();
    let gain: f64 = top.iter().enumerate().filter(|(_, (_, j))| relevant[*j]).map(|(place, _)| discount(place)).sum();
    let ideal: f64 = (0..relevant.iter().filter(|r| **r).count().min(CUTOFF)).map(discount).sum();
    Scores { p_at_1: f64::from(u8::from(rank == 1)), mrr: 1.0 / rank as f64, ndcg_at_10: gain / ideal }
}

#[cfg(test)]
mod tests {
    use super::super::data::Pair;
    use super::*;

    fn near(x: f64, y: f64) -> bool {
        (x - y).abs() < 1e-12
    }

    #[test]
    fn one_relevant_candidate() {
        let s = score(&[0.1, 0.9, 0.5], &[false, false, true]);
        assert!(near(s.p_at_1, 0.0) && near(s.mrr, 0.5) && near(s.ndcg_at_10, 1.0 / 3f64.log2()));
        let s = score(&[0.1, 0.9, 0.5], &[false, true, false]);
        assert!(near(s.p_at_1, 1.0) && near(s.mrr, 1.0) && near(s.ndcg_at_10, 1.0));
    }

    #[test]
    fn several_relevant_candidates_by_hand() {
        // Places 2 and 4 of five are relevant: (1/log2 3 + 1/log2 5) / (1 + 1/log2 3).
        let s = score(&[0.2, 0.8, 0.9, 0.3, 0.1], &[true, true, false, false, false]);
        let expected = (1.0 / 3f64.log2() + 1.0 / 5f64.log2()) / (1.0 + 1.0 / 3f64.log2());
        assert!(near(s.ndcg_at_10, expected) && near(s.mrr, 0.5), "{s:?}");
    }

    #[test]
    fn beyond_the_cutoff() {
        let cosines: Vec<f32> = (0..20).map(|j| -(j as f32)).collect();
        let mut relevant = [false; 20];
        relevant[10] = true;
        let s = score(&cosines, &relevant);
        assert!(near(s.ndcg_at_10, 0.0) && near(s.mrr, 1.0 / 11.0));
        relevant = [true; 20];
        assert!(near(score(&cosines, &relevant).ndcg_at_10, 1.0), "the ideal is cut off as well");
        assert!(near(score(&cosines, &[false; 20]).mrr, 0.0));
    }

    #[test]
    fn ties_rank_in_order() {
        assert!(near(score(&[0.5, 0.5, 0.5], &[false, false, true]).mrr, 1.0 / 3.0));
        assert!(near(score(&[0.5, 0.5, 0.5], &[true, false, false]).mrr, 1.0));
    }

    #[test]
    fn duplicates_of_the_positive_are_found() {
        let pair = |q: &str, p: &str| Pair { query: q.into(), passage: p.into(), group: None };
        let test = TestSet::from_pairs(vec![pair("a", "same"), pair("b", "other"), pair("c", "same")]);
        // Query a points at candidate 2, whose text is that of its positive.
        let queries = vec![0.0, 2.0, 1.0, 0.0, 0.0, 3.0];
        let candidates = vec![1.0, 1.0, 5.0, 0.0, 0.0, 1.0];
        let found = retrieve(&test, queries, candidates, 2);
        assert!(near(found.scores.p_at_1, 1.0), "{found:?}");
        assert!(found.top_cosines.iter().all(|c| (c - 1.0).abs() < 1e-6));
    }
}
