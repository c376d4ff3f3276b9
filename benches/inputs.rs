//! Seeded embeddings as they are in the middle of a training: each positive is about as near as the nearest negative, so that
//! neither the loss nor any gradient vanishes, whatever the shape.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use samtone::{Batch, Call, Data, Element, Embeddings, Result};

/// Two row-major towers of the same shape.
pub struct Towers<T> {
    pub query: Vec<T>,
    pub passage: Vec<T>,
    rows: usize,
    dim: usize,
}

impl Towers<f32> {
    /// q standard normal, p = c·q + √(1 − c²)·noise, where c = √(2 ln B / d) is the expected largest cosine of a query with
    /// B independent directions.
    pub fn new(rows: usize, dim: usize, seed: u64) -> Self {
        let mut source = ChaCha8Rng::seed_from_u64(seed);
        let cosine = (2.0 * (rows as f64).ln() / dim as f64).sqrt().min(0.9);
        let rest = (1.0 - cosine * cosine).sqrt();
        let query: Vec<f32> = (0..rows * dim).map(|_| normal(&mut source) as f32).collect();
        let passage = query.iter().map(|q| (cosine * f64::from(*q) + rest * normal(&mut source)) as f32).collect();
        Self { query, passage, rows, dim }
    }

    /// The same in another type.
    pub fn rounded<T: Element>(&self) -> Towers<T> {
        let round = |x: &[f32]| x.iter().map(|v| T::from_f64(f64::from(*v))).collect();
        Towers { query: round(&self.query), passage: round(&self.passage), rows: self.rows, dim: self.dim }
    }
}

impl<T: Element> Towers<T>
where
    for<'a> &'a [T]: Into<Data<'a>>,
{
    pub fn batch<'b>(&'b self, call: &'b Call) -> Result<Batch<'b>> {
        self.prefix(call, self.dim)
    }

    /// A batch of embeddings that are cut off after `dim` entries.
    pub fn prefix<'b>(&'b self, call: &'b Call, dim: usize) -> Result<Batch<'b>> {
        let embeddings = |x| Embeddings::with_row_stride(x, self.rows, dim, self.dim);
        Batch::new(call, embeddings(self.query.as_slice())?, embeddings(self.passage.as_slice())?)
    }
}

/// Box and Muller.
fn normal(source: &mut ChaCha8Rng) -> f64 {
    let (radius, angle) =
        (source.random_range(f64::MIN_POSITIVE..1.0), source.random_range(0.0..std::f64::consts::TAU));
    (-2.0 * f64::ln(radius)).sqrt() * f64::cos(angle)
}
