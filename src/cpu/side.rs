//! What tiles need to know of the indices of a space: who they are as anchors and as candidates, and the numbers of each prefix.

use super::simd::LANES;
use super::tower::Norms;
use crate::mask::{COSINE_TIE, Key, threshold};

/// All that tiles need to know of the indices of a space. Every vector has [`LANES`] entries of padding.
#[derive(Debug, Clone)]
pub(super) struct Side {
    pub anchors: Anchors,
    pub candidates: Candidates,
    /// By prefix.
    pub numbers: Vec<Numbers>,
}

/// What a tile needs to know of indices as anchors, whose rows ask which candidates are their negatives.
#[derive(Debug, Clone)]
pub(super) struct Anchors {
    pub query_key: Vec<u32>,
    pub passage_key: Vec<u32>,
    pub row: Vec<u32>,
}

impl Anchors {
    /// The anchors of these rows. An index that anchors no row gets neutral keys. No region has it among its anchors.
    pub(super) fn new(rows: &[u32], keys: &[Key]) -> Self {
        let key = |r: u32, f: fn(&Key) -> u32| keys.get(r as usize).map_or(0, f);
        Self {
            query_key: padded(rows.iter().map(|&r| key(r, |k| k.query)), 0),
            passage_key: padded(rows.iter().map(|&r| key(r, |k| k.passage)), 0),
            row: padded(rows.iter().copied(), 0),
        }
    }

    /// Query keys and passage keys. They are exchanged if those of the candidates are.
    #[inline(always)]
    pub(super) fn keys(&self, candidates: &Candidates) -> (&[u32], &[u32]) {
        match candidates.swapped {
            false => (&self.query_key, &self.passage_key),
            true => (&self.passage_key, &self.query_key),
        }
    }
}

/// What a tile needs to know of indices as candidates.
#[derive(Debug, Clone)]
pub(super) struct Candidates {
    pub query_key: Vec<u32>,
    pub passage_key: Vec<u32>,
    /// Whether they are queries, whose keys are exchanged: see [`Key::swapped`].
    pub swapped: bool,
    /// The only row that may keep the candidate, or [`Candidates::EVERYONE`].
    pub owner: Vec<u32>,
}

impl Candidates {
    pub(super) const EVERYONE: u32 = u32::MAX;

    /// Queries as candidates. `keys` are those of their rows.
    pub(super) fn queries(keys: &[Key]) -> Self {
        Self { swapped: true, ..Self::passages(keys.iter().map(|k| k.swapped()), None) }
    }

    /// Passages as candidates.
    pub(super) fn passages(keys: impl Iterator<Item = Key> + Clone, owners: Option<Vec<i32>>) -> Self {
        let owner = match owners {
            Some(owners) => {
                padded(owners.into_iter().map(|o| u32::try_from(o).unwrap_or(Self::EVERYONE)), Self::EVERYONE)
            }
            None => padded(keys.clone().map(|_| Self::EVERYONE), Self::EVERYONE),
        };
        Self {
            query_key: padded(keys.clone().map(|k| k.query), 0),
            passage_key: padded(keys.map(|k| k.passage), 0),
            swapped: false,
            owner,
        }
    }
}

/// The numbers of the indices of a space for one prefix.
#[derive(Debug, Clone)]
pub(super) struct Numbers {
    /// 1/‖x‖ of the panel's row.
    pub inverse: Vec<f32>,
    /// Highest cosine that the row of the anchor keeps; +∞ without a margin.
    pub threshold: Vec<f32>,
    /// s⁺ of the row of the anchor.
    pub positive: Vec<f32>,
    /// A negative whose cosine is above this ranks above the positive.
    pub above: Vec<f32>,
}

impl Numbers {
    /// Those of prefix `k` for indices with these embeddings, which anchor these rows. `positive` is s⁺ of every row.
    pub(super) fn new(
        norms: &Norms,
        k: usize,
        embeddings: impl Iterator<Item = usize>,
        rows: &[u32],
        positive: &[f64],
        margin: Option<f64>,
    ) -> Self {
        let cosine = |r: &u32| positive.get(*r as usize).copied().unwrap_or(1.0); // neutral for an index that anchors no row
        let of = |f: &dyn Fn(f64) -> f64| padded(rows.iter().map(|r| f(cosine(r)) as f32), 0.0);
        Self {
            inverse: padded(embeddings.map(|row| norms.panel_inverse(k, row)), 0.0),
            threshold: of(&|s| threshold(s, margin)),
            positive: of(&|s| s),
            above: of(&|s| s + COSINE_TIE),
        }
    }
}

/// The values, and [`LANES`] more entries, so that the last chunk of a tile may read past the last index.
pub(super) fn padded<T: Copy>(values: impl Iterator<Item = T>, padding: T) -> Vec<T> {
    values.chain([padding; LANES]).collect()
}
