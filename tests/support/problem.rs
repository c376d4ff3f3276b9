//! A loss, a batch that owns its data, and options: what a backend is asked to compute.

use samtone::backend::Backend;
use samtone::half::{bf16, f16};
use samtone::mask::COSINE_TIE;
use samtone::{
    Batch, DType, Element, Embeddings, EmbeddingsMut, Evaluation, GradientBuffers, Loss, Options, Result, Scope,
    TemperatureGradient,
};

/// Inputs of a call, embeddings in f64, row-major.
#[derive(Debug, Clone)]
pub struct Problem {
    pub name: String,
    pub loss: Loss,
    pub rows: usize,
    pub passages: usize,
    pub dim: usize,
    pub query: Vec<f64>,
    pub passage: Vec<f64>,
    pub positives: Option<Vec<u32>>,
    pub weights: Option<Vec<f32>>,
    pub query_ids: Option<Vec<i64>>,
    pub passage_ids: Option<Vec<i64>>,
    pub shared_ids: bool,
    pub owners: Option<(Vec<i32>, Scope)>,
    pub options: Options,
}

/// Results of a call, widened to f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Outputs {
    pub evaluation: Evaluation,
    pub grad_query: Vec<f64>,
    pub grad_passage: Vec<f64>,
    pub temperature: TemperatureGradient,
}

impl Outputs {
    /// P@1 and MRR of query → passage and of passage → query.
    pub fn metrics(&self) -> [f64; 4] {
        let (there, back) = (self.evaluation.query_to_passage, self.evaluation.passage_to_query);
        [there.precision_at_1, there.mrr, back.precision_at_1, back.mrr]
    }
}

/// Owned elements of any type.
#[derive(Debug, Clone, PartialEq)]
pub enum Buffer {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Buffer {
    /// `x` rounded to `dtype`.
    pub fn new(dtype: DType, x: &[f64]) -> Self {
        match dtype {
            DType::F64 => Self::F64(x.to_vec()),
            DType::F32 => Self::F32(x.iter().map(|&v| v as f32).collect()),
            DType::F16 => Self::F16(x.iter().map(|&v| Element::from_f64(v)).collect()),
            DType::BF16 => Self::BF16(x.iter().map(|&v| Element::from_f64(v)).collect()),
        }
    }

    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Self::F64(x) => x.clone(),
            Self::F32(x) => x.iter().map(|&v| v.into()).collect(),
            Self::F16(x) => x.iter().map(|&v| v.into()).collect(),
            Self::BF16(x) => x.iter().map(|&v| v.into()).collect(),
        }
    }

    pub fn embeddings(&self, rows: usize, dim: usize) -> Result<Embeddings<'_>> {
        match self {
            Self::F64(x) => Embeddings::new(x, rows, dim),
            Self::F32(x) => Embeddings::new(x, rows, dim),
            Self::F16(x) => Embeddings::new(x, rows, dim),
            Self::BF16(x) => Embeddings::new(x, rows, dim),
        }
    }

    pub fn embeddings_mut(&mut self, rows: usize, dim: usize) -> Result<EmbeddingsMut<'_>> {
        match self {
            Self::F64(x) => EmbeddingsMut::new(x, rows, dim),
            Self::F32(x) => EmbeddingsMut::new(x, rows, dim),
            Self::F16(x) => EmbeddingsMut::new(x, rows, dim),
            Self::BF16(x) => EmbeddingsMut::new(x, rows, dim),
        }
    }
}

impl Problem {
    /// The batch over embeddings of this problem's shape, with its ids, weights, positives and owners.
    pub fn batch<'a>(&'a self, query: &'a Buffer, passage: &'a Buffer) -> Result<Batch<'a>> {
        self.over(query.embeddings(self.rows, self.dim)?, passage.embeddings(self.passages, self.dim)?)
    }

    /// The same over embeddings that live elsewhere.
    pub fn over<'a>(&'a self, query: Embeddings<'a>, passage: Embeddings<'a>) -> Result<Batch<'a>> {
        let mut batch = Batch::new(query, passage)?;
        if let Some(positives) = &self.positives {
            batch = batch.with_positives(positives)?;
        }
        if let Some(weights) = &self.weights {
            batch = batch.with_weights(weights)?;
        }
        if let Some(ids) = &self.query_ids {
            batch = batch.with_query_ids(ids)?;
        }
        if let Some(ids) = &self.passage_ids {
            batch = batch.with_passage_ids(ids)?;
        }
        batch = batch.with_shared_ids(self.shared_ids)?;
        if let Some((owners, scope)) = &self.owners {
            batch = batch.with_hard_negative_owners(owners, *scope)?;
        }
        Ok(batch)
    }

    /// An error unless the parts fit together.
    pub fn check(&self) -> Result<()> {
        let (query, passage) = (Buffer::new(DType::F64, &self.query), Buffer::new(DType::F64, &self.passage));
        self.batch(&query, &passage).map(|_| ())
    }

    /// The same problem with embeddings that `dtype` holds exactly.
    pub fn rounded(&self, dtype: DType) -> Self {
        let round = |x: &[f64]| Buffer::new(dtype, x).to_f64();
        Self { query: round(&self.query), passage: round(&self.passage), ..self.clone() }
    }

    /// Whether `dtype` holds the embeddings exactly.
    pub fn is_exact_in(&self, dtype: DType) -> bool {
        self.inexact_in(dtype).is_none()
    }

    /// The first entry of the embeddings that `dtype` does not hold exactly, as words: "q[0][3] is 0.1, no f32 number".
    pub fn inexact_in(&self, dtype: DType) -> Option<String> {
        [("q", &self.query), ("p", &self.passage)].into_iter().find_map(|(name, x)| {
            let at = Buffer::new(dtype, x).to_f64().iter().zip(x).position(|(rounded, x)| rounded != x)?;
            Some(format!("{name}[{}][{}] is {}, no {dtype} number", at / self.dim, at % self.dim, x[at]))
        })
    }

    /// Whether no cosine is within `slack` of where a rank or the margin changes its mind.
    pub fn is_decided(&self, slack: f64) -> bool {
        let unit = |x: &[f64]| -> Vec<Vec<f64>> {
            let direction = |row: &[f64]| {
                let scale = row.iter().fold(f64::MIN_POSITIVE, |max, v| max.max(v.abs()));
                let norm = row.iter().map(|v| (v / scale).powi(2)).sum::<f64>().sqrt();
                row.iter().map(|v| v / scale / norm).collect()
            };
            x.chunks(self.dim).map(direction).collect()
        };
        let (query, passage) = (unit(&self.query), unit(&self.passage));
        let cosine = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
        (0..self.rows).all(|i| {
            let own = &passage[self.positives.as_ref().map_or(i, |p| p[i] as usize)];
            let positive = cosine(&query[i], own);
            let far = |s: f64, edge: f64| (s - edge - COSINE_TIE).abs() >= slack;
            let clear = |anchor: &[f64], candidates: &[Vec<f64>], ranked: bool| {
                candidates.iter().map(|c| cosine(anchor, c)).all(|s| {
                    (!ranked || far(s, positive)) && self.options.margin().is_none_or(|m| far(s, positive + m))
                })
            };
            let towers =
                self.options.margin().is_none() || (clear(&query[i], &query, false) && clear(own, &passage, false));
            towers && clear(&query[i], &passage, true) && clear(own, &query, true)
        })
    }

    /// w̃ = w / Σw.
    pub fn normalized_weights(&self) -> Vec<f64> {
        let weights = self.weights.clone().unwrap_or_else(|| vec![1.0; self.rows]);
        let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        weights.iter().map(|&w| f64::from(w) / total).collect()
    }

    /// Runs `backend` on embeddings of type `dtype`. Gradients are taken in f64 for f64 embeddings, else in f32, and start
    /// as NaN, so whatever the backend leaves out fails every comparison.
    pub fn run(&self, backend: &dyn Backend, dtype: DType, upstream: f64) -> Result<Outputs> {
        let (query, passage) = (Buffer::new(dtype, &self.query), Buffer::new(dtype, &self.passage));
        let batch = self.batch(&query, &passage)?;
        let of_gradient = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let mut grad_query = Buffer::new(of_gradient, &vec![f64::NAN; self.query.len()]);
        let mut grad_passage = Buffer::new(of_gradient, &vec![f64::NAN; self.passage.len()]);
        let buffers = GradientBuffers {
            query: Some(grad_query.embeddings_mut(self.rows, self.dim)?),
            passage: Some(grad_passage.embeddings_mut(self.passages, self.dim)?),
        };
        let (evaluation, temperature) =
            backend.loss_and_gradients_into(&self.loss, &batch, &self.options, upstream, buffers)?;
        Ok(Outputs { evaluation, grad_query: grad_query.to_f64(), grad_passage: grad_passage.to_f64(), temperature })
    }
}
