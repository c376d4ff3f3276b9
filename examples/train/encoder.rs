//! Both towers of a dual encoder: hashed features → embedding table (weighted mean) → projection, and their gradient.
//!
//!     h = Σ_k w_k T[bucket_k]        T: buckets × width, one table for both towers (SDE) or one each (ADE-SPL)
//!     x = h P                        P: width × dim, shared by both towers in either architecture

use super::features::Features;
use super::matrix::{Matrix, multiply};
use rayon::prelude::*;
use samtone::Tower;
use serde::Serialize;

/// Texts that one task encodes.
const TEXTS_PER_TASK: usize = 64;

/// What the towers share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Architecture {
    /// Symmetric dual encoder: one tower for queries and passages.
    Sde,
    /// Asymmetric dual encoder with a shared projection layer: a table for each side.
    AdeSpl,
}

impl Architecture {
    /// As the paper writes it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Sde => "SDE",
            Self::AdeSpl => "ADE-SPL",
        }
    }

    /// In file names.
    pub fn slug(self) -> &'static str {
        match self {
            Self::Sde => "sde",
            Self::AdeSpl => "ade-spl",
        }
    }
}

/// Parameters of both towers.
#[derive(Debug, Clone)]
pub struct Towers {
    architecture: Architecture,
    /// Columns of a table.
    pub width: usize,
    /// Length of an embedding.
    pub dim: usize,
    /// One or two tables, buckets × width.
    pub tables: Vec<Vec<f32>>,
    /// width × dim.
    pub projection: Vec<f32>,
}

/// Embeddings with what the backward pass needs.
#[derive(Debug, Default)]
pub struct Encoded {
    /// h, texts × width.
    pub pooled: Vec<f32>,
    /// x, texts × dim.
    pub embeddings: Vec<f32>,
}

impl Towers {
    /// Uniform random parameters of variance 1 (tables) and 1/width (projection). Both tables of ADE-SPL start equal, as
    /// towers that start from one pretrained checkpoint do.
    pub fn new(architecture: Architecture, buckets: usize, width: usize, dim: usize, seed: u64) -> Self {
        let uniform = |count: usize, seed: u64, scale: f32| -> Vec<f32> {
            let mut values = vec![0.0; count];
            values.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, values)| {
                let mut rng = fastrand::Rng::with_seed(seed ^ (chunk as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
                values.iter_mut().for_each(|x| *x = (rng.f32() - 0.5) * 12f32.sqrt() * scale);
            });
            values
        };
        let table = uniform(buckets * width, seed, 1.0);
        let tables = match architecture {
            Architecture::Sde => vec![table],
            Architecture::AdeSpl => vec![table.clone(), table],
        };
        let projection = uniform(width * dim, seed.wrapping_add(0x5eed), (width as f32).sqrt().recip());
        Self { architecture, width, dim, tables, projection }
    }

    /// What the towers share.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Which of the tables a tower reads.
    pub fn table_of(&self, tower: Tower) -> usize {
        match (self.architecture, tower) {
            (Architecture::Sde, _) | (Architecture::AdeSpl, Tower::Query) => 0,
            (Architecture::AdeSpl, Tower::Passage) => 1,
        }
    }

    /// Embeddings of `texts`.
    pub fn encode(&self, tower: Tower, features: &Features, texts: &[u32]) -> Encoded {
        let table = &self.tables[self.table_of(tower)];
        let mut pooled = vec![0.0; texts.len() * self.width];
        let mut embeddings = vec![0.0; texts.len() * self.dim];
        let blocks = pooled
            .par_chunks_mut(TEXTS_PER_TASK * self.width)
            .zip(embeddings.par_chunks_mut(TEXTS_PER_TASK * self.dim))
            .zip(texts.par_chunks(TEXTS_PER_TASK));
        blocks.for_each(|((pooled, embeddings), texts)| {
            for (h, &text) in pooled.chunks_exact_mut(self.width).zip(texts) {
                for &(bucket, weight) in features.row(text as usize) {
                    let row = &table[bucket as usize * self.width..][..self.width];
                    h.iter_mut().zip(row).for_each(|(h, t)| *h += weight * t);
                }
            }
            multiply(embeddings, Matrix::new(pooled, self.width), Matrix::new(&self.projection, self.dim), false);
        });
        Encoded { pooled, embeddings }
    }

    /// Embeddings of all texts.
    pub fn encode_all(&self, tower: Tower, features: &Features) -> Vec<f32> {
        let texts: Vec<u32> = (0..features.len() as u32).collect();
        self.encode(tower, features, &texts).embeddings
    }

    /// ∂L/∂h from ∂L/∂x, and adds ∂L/∂P to `projection_gradient`.
    pub fn backward(&self, encoded: &Encoded, gradient: &[f32], projection_gradient: &mut [f32]) -> Vec<f32> {
        let mut pooled_gradient = vec![0.0; encoded.pooled.len()];
        let blocks = pooled_gradient
            .par_chunks_mut(TEXTS_PER_TASK * self.width)
            .zip(gradient.par_chunks(TEXTS_PER_TASK * self.dim));
        blocks.for_each(|(pooled, gradient)| {
            multiply(pooled, Matrix::new(gradient, self.dim), Matrix::new(&self.projection, self.dim).t(), false);
        });
        let (h, g) = (Matrix::new(&encoded.pooled, self.width), Matrix::new(gradient, self.dim));
        multiply(projection_gradient, h.t(), g, true);
        pooled_gradient
    }
}

/// Which texts of a batch touch which row of a table: the batch's features, transposed.
#[derive(Debug)]
pub struct TouchedRows {
    offsets: Vec<u32>,
    entries: Vec<(u32, f32)>,
}

/// Rows of a table that one task updates.
const BUCKETS_PER_TASK: usize = 512;

impl TouchedRows {
    /// From one or more (features, texts); the texts are numbered through, in the order given.
    pub fn new(buckets: usize, parts: &[(&Features, &[u32])]) -> Self {
        let rows = || parts.iter().flat_map(|(features, texts)| texts.iter().map(|t| features.row(*t as usize)));
        let mut offsets = vec![0u32; buckets + 1];
        for (bucket, _) in rows().flatten() {
            offsets[*bucket as usize + 1] += 1;
        }
        for b in 0..buckets {
            offsets[b + 1] += offsets[b];
        }
        let mut next = offsets.clone();
        let mut entries = vec![(0, 0.0); offsets[buckets] as usize];
        for (source, row) in rows().enumerate() {
            for &(bucket, weight) in row {
                let slot = &mut next[bucket as usize];
                entries[*slot as usize] = (source as u32, weight);
                *slot += 1;
            }
        }
        Self { offsets, entries }
    }

    /// Calls `update(row of the table, its state, gradient of the row)` for every touched row. `pooled_gradient` is ∂L/∂h of
    /// the numbered texts.
    pub fn update<F>(&self, table: &mut [f32], state: &mut [f32], width: usize, pooled_gradient: &[f32], update: F)
    where
        F: Fn(&mut [f32], &mut f32, &[f32]) + Sync,
    {
        let tasks = table
            .par_chunks_mut(BUCKETS_PER_TASK * width)
            .zip(state.par_chunks_mut(BUCKETS_PER_TASK))
            .zip(self.offsets.par_windows_of(BUCKETS_PER_TASK));
        tasks.for_each(|((table, state), offsets)| {
            let mut gradient = vec![0.0; width];
            for ((row, state), span) in table.chunks_exact_mut(width).zip(state).zip(offsets.windows(2)) {
                let entries = &self.entries[span[0] as usize..span[1] as usize];
                if entries.is_empty() {
                    continue;
                }
                gradient.fill(0.0);
                for &(source, weight) in entries {
                    let h = &pooled_gradient[source as usize * width..][..width];
                    gradient.iter_mut().zip(h).for_each(|(g, h)| *g += weight * h);
                }
                update(row, state, &gradient);
            }
        });
    }
}

/// Overlapping chunks: `size` items and the first of the next chunk, as offsets of compressed rows need.
trait Offsets {
    fn par_windows_of(&self, size: usize) -> impl IndexedParallelIterator<Item = &[u32]>;
}

impl Offsets for Vec<u32> {
    fn par_windows_of(&self, size: usize) -> impl IndexedParallelIterator<Item = &[u32]> {
        let rows = self.len() - 1;
        (0..rows.div_ceil(size)).into_par_iter().map(move |k| &self[k * size..=rows.min((k + 1) * size)])
    }
}

#[cfg(test)]
mod tests {
    use super::super::features::{Featuriser, InverseFrequency};
    use super::*;

    const BUCKETS: usize = 1024;

    fn setup(architecture: Architecture) -> (Towers, Features, Features) {
        let featuriser = Featuriser { buckets: BUCKETS, max_words: 16, ngram: 3 };
        let queries = featuriser.counts(["read the file", "write the file", "read"]);
        let passages = featuriser.counts(["fn read(file: File)", "fn write()", "fn read_all(file)"]);
        let idf = InverseFrequency::fit(BUCKETS, &[&queries, &passages]);
        (Towers::new(architecture, BUCKETS, 6, 4, 7), idf.weigh(queries), idf.weigh(passages))
    }

    /// Σ cos-like weights · embeddings: linear in the embeddings, so its gradient with respect to them is `C`.
    fn coefficients(tower: Tower) -> Vec<f32> {
        (0..8).map(|i| (i as f32 * 1.7 + if tower == Tower::Query { 0.0 } else { 0.9 }).sin()).collect()
    }

    const TEXTS: [u32; 2] = [2, 0];

    fn objective(towers: &Towers, features: [&Features; 2]) -> f64 {
        [Tower::Query, Tower::Passage]
            .into_iter()
            .zip(features)
            .flat_map(|(tower, f)| {
                let x = towers.encode(tower, f, &TEXTS).embeddings;
                x.into_iter().zip(coefficients(tower)).map(|(x, c)| f64::from(x) * f64::from(c)).collect::<Vec<_>>()
            })
            .sum()
    }

    #[test]
    fn backward_agrees_with_finite_differences() {
        for architecture in [Architecture::Sde, Architecture::AdeSpl] {
            let (towers, q, p) = setup(architecture);
            let mut d_projection = vec![0.0; towers.projection.len()];
            let mut d_pooled = Vec::new();
            for (tower, f) in [(Tower::Query, &q), (Tower::Passage, &p)] {
                let encoded = towers.encode(tower, f, &TEXTS);
                d_pooled.push(towers.backward(&encoded, &coefficients(tower), &mut d_projection));
            }
            // The update writes the gradient into a zeroed table: untouched rows stay 0, as their gradient is.
            let mut d_tables: Vec<Vec<f32>> = towers.tables.iter().map(|t| vec![0.0; t.len()]).collect();
            let mut state = vec![0.0; BUCKETS];
            let copy = |row: &mut [f32], _: &mut f32, g: &[f32]| row.copy_from_slice(g);
            match architecture {
                Architecture::Sde => {
                    let touched = TouchedRows::new(BUCKETS, &[(&q, &TEXTS), (&p, &TEXTS)]);
                    touched.update(&mut d_tables[0], &mut state, towers.width, &d_pooled.concat(), copy);
                }
                Architecture::AdeSpl => {
                    for (k, f) in [&q, &p].into_iter().enumerate() {
                        let touched = TouchedRows::new(BUCKETS, &[(f, &TEXTS)]);
                        touched.update(&mut d_tables[k], &mut state, towers.width, &d_pooled[k], copy);
                    }
                }
            }

            let step = 0.05;
            let mut checked = 0;
            // The objective is linear in each parameter alone, so a large step loses nothing to curvature.
            let mut check = |analytic: f32, nudge: &dyn Fn(&mut Towers, f32)| {
                let mut moved = [towers.clone(), towers.clone()];
                nudge(&mut moved[0], step);
                nudge(&mut moved[1], -step);
                let numeric =
                    (objective(&moved[0], [&q, &p]) - objective(&moved[1], [&q, &p])) / (2.0 * f64::from(step));
                assert!((numeric - f64::from(analytic)).abs() <= 2e-5, "{architecture:?}: {numeric} {analytic}");
                checked += usize::from(analytic != 0.0);
            };
            for (i, g) in d_projection.iter().enumerate() {
                check(*g, &|t, step| t.projection[i] += step);
            }
            for (k, d_table) in d_tables.iter().enumerate() {
                for (i, g) in d_table.iter().enumerate().filter(|(i, g)| **g != 0.0 || i % 97 == 0) {
                    check(*g, &|t, step| t.tables[k][i] += step);
                }
            }
            assert!(checked > 100, "only {checked} gradients differ from 0");
        }
    }

    #[test]
    fn same_bits_for_any_thread_count() {
        let (towers, q, _) = setup(Architecture::Sde);
        let texts: Vec<u32> = (0..300).map(|i| i % 3).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let encoded = towers.encode(Tower::Query, &q, &texts);
                let mut table = towers.tables[0].clone();
                let touched = TouchedRows::new(BUCKETS, &[(&q, &texts)]);
                touched.update(&mut table, &mut vec![0.0; BUCKETS], towers.width, &encoded.pooled, |row, _, g| {
                    row.iter_mut().zip(g).for_each(|(x, g)| *x -= g);
                });
                (encoded.embeddings, table)
            })
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn towers_of_an_asymmetric_encoder_start_equal() {
        let (towers, q, _) = setup(Architecture::AdeSpl);
        assert_eq!(towers.encode_all(Tower::Query, &q), towers.encode_all(Tower::Passage, &q));
        assert_ne!(towers.table_of(Tower::Query), towers.table_of(Tower::Passage));
    }
}
