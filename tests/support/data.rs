//! Seeded embeddings of the kinds at which implementations of losses fail.

use super::problem::Problem;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use samtone::{Call, Loss};

/// How the rows of the two towers lie to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Independent directions.
    Random,
    /// Positives near their queries, negatives far: losses and gradients are tiny.
    Trained,
    /// A narrow cone: every cosine near 0.9.
    Anisotropic,
    /// Cosines between the towers near −1, within a tower near 1: the positives' logits are the smallest.
    Opposed,
    /// Rows from three directions: exact ties, also with the positive, in every type.
    Ties,
    /// One passage close to all queries: a softmax with a single large term.
    Dominant,
    /// Norms over many decades.
    Norms,
    /// Repeated queries and passages.
    Duplicates,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Random,
        Self::Trained,
        Self::Anisotropic,
        Self::Opposed,
        Self::Ties,
        Self::Dominant,
        Self::Norms,
        Self::Duplicates,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Trained => "trained",
            Self::Anisotropic => "anisotropic",
            Self::Opposed => "opposed",
            Self::Ties => "ties",
            Self::Dominant => "dominant",
            Self::Norms => "norms",
            Self::Duplicates => "duplicates",
        }
    }
}

/// A stream of numbers, the same on every machine.
pub struct Source(ChaCha8Rng);

impl Source {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in low..high.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        self.0.random_range(low..high)
    }

    /// Uniform in 0..end.
    pub fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }

    /// `len` standard normal numbers.
    pub fn normal(&mut self, len: usize) -> Vec<f64> {
        let mut one = || {
            let (radius, angle) = (self.uniform(f64::MIN_POSITIVE, 1.0), self.uniform(0.0, std::f64::consts::TAU));
            (-2.0 * radius.ln()).sqrt() * angle.cos()
        };
        (0..len).map(|_| one()).collect()
    }
}

/// x + scale·noise for `rows` rows around the single row `centre`.
fn around(source: &mut Source, centre: &[f64], scale: f64, rows: usize) -> Vec<f64> {
    let noise = source.normal(rows * centre.len());
    noise.iter().enumerate().map(|(k, z)| centre[k % centre.len()] + scale * z).collect()
}

/// Embeddings q (rows × dim) and p (passages × dim) whose positives are the rows `positives` of p. Norms spread over
/// ± `decades` powers of ten in [`Kind::Norms`], and over a factor of 25 elsewhere.
pub fn towers(
    kind: Kind,
    source: &mut Source,
    (rows, passages, dim): (usize, usize, usize),
    positives: &[u32],
    decades: f64,
) -> (Vec<f64>, Vec<f64>) {
    let (mut q, mut p) = (source.normal(rows * dim), source.normal(passages * dim));
    match kind {
        Kind::Random | Kind::Norms => {}
        Kind::Trained => {
            let noise = source.normal(rows * dim);
            for (i, &n) in positives.iter().enumerate() {
                for k in 0..dim {
                    p[n as usize * dim + k] = q[i * dim + k] + 0.3 * noise[i * dim + k];
                }
            }
        }
        Kind::Anisotropic => {
            let centre: Vec<f64> = source.normal(dim).iter().map(|z| 3.0 * z).collect();
            (q, p) = (around(source, &centre, 1.0, rows), around(source, &centre, 1.0, passages));
        }
        Kind::Opposed => {
            let centre: Vec<f64> = source.normal(dim).iter().map(|z| 5.0 * z).collect();
            let mirrored: Vec<f64> = centre.iter().map(|z| -z).collect();
            (q, p) = (around(source, &centre, 1.0, rows), around(source, &mirrored, 1.0, passages));
        }
        Kind::Ties => {
            // Small whole numbers, so that every type holds them and every order of summation gives the same cosines.
            let prototypes: Vec<f64> = (0..3 * dim).map(|_| source.below(7) as f64 - 3.0).collect();
            for x in [&mut q, &mut p] {
                for row in x.chunks_mut(dim) {
                    let start = source.below(3) * dim;
                    row.copy_from_slice(&prototypes[start..start + dim]);
                    row[0] = if row.iter().all(|v| *v == 0.0) { 1.0 } else { row[0] };
                }
            }
        }
        Kind::Dominant => {
            let centre: Vec<f64> = source.normal(dim).iter().map(|z| 3.0 * z).collect();
            q = around(source, &centre, 0.5, rows);
            p[(passages - 1) * dim..].copy_from_slice(&centre);
        }
        Kind::Duplicates => {
            for (x, count) in [(&mut q, rows), (&mut p, passages)] {
                for i in 0..count {
                    let original = i % duplicates_of(count);
                    x.copy_within(original * dim..(original + 1) * dim, i * dim);
                }
            }
        }
    }
    if kind != Kind::Ties {
        for row in q.chunks_mut(dim).chain(p.chunks_mut(dim)) {
            let factor = match kind {
                Kind::Norms => 10_f64.powf(source.uniform(-decades, decades)),
                _ => source.uniform(0.2, 5.0),
            };
            row.iter_mut().for_each(|v| *v *= factor);
        }
    }
    (q, p)
}

/// Number of different rows among `count` in [`Kind::Duplicates`].
fn duplicates_of(count: usize) -> usize {
    (2 * count).div_ceil(3)
}

/// Ids that name the duplicates of [`Kind::Duplicates`].
pub fn duplicate_ids(count: usize) -> Vec<i64> {
    (0..count).map(|i| (i % duplicates_of(count)) as i64 * 10 - 3).collect()
}

/// A problem without options or margin: row i's positive is passage i.
pub fn problem(
    loss: Loss,
    kind: Kind,
    (rows, passages, dim): (usize, usize, usize),
    temperature: f64,
    seed: u64,
    decades: f64,
) -> samtone::Result<Problem> {
    let identity: Vec<u32> = (0..rows as u32).collect();
    let (query, passage) = towers(kind, &mut Source::new(seed), (rows, passages, dim), &identity, decades);
    Ok(Problem {
        name: format!("{} {} {rows}x{passages}x{dim} τ={temperature}", loss.name(), kind.name()),
        call: Call::new(loss, temperature).with_margin(f64::INFINITY),
        rows,
        passages,
        dim,
        query,
        passage,
    })
}
