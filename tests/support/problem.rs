//! A call and the embeddings that belong to it: what a backend is asked to compute.

use samtone::backend::Backend;
use samtone::half::{bf16, f16};
use samtone::mask::COSINE_TIE;
use samtone::{
    Batch, Call, DType, Element, Embeddings, EmbeddingsMut, Evaluation, GradientBuffers, Pairs, PrefixEvaluation,
    Result, TemperatureGradient,
};

/// Inputs of a call, embeddings in f64, row-major.
#[derive(Debug, Clone)]
pub struct Problem {
    pub name: String,
    pub call: Call,
    pub rows: usize,
    pub passages: usize,
    pub dim: usize,
    pub query: Vec<f64>,
    pub passage: Vec<f64>,
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

impl Outputs {
    /// Length and loss of each prefix.
    pub fn prefix_losses(&self) -> Vec<(usize, f64)> {
        self.evaluation.prefixes.iter().map(|p| (p.dim, p.loss)).collect()
    }

    /// The metrics of each prefix, in the order of [`Outputs::metrics`].
    pub fn prefix_metrics(&self) -> Vec<f64> {
        let of = |p: &PrefixEvaluation| [p.query_to_passage, p.passage_to_query].map(|m| [m.precision_at_1, m.mrr]);
        self.evaluation.prefixes.iter().flat_map(|p| of(p).concat()).collect()
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
    /// The same problem with another call.
    pub fn with(self, change: impl FnOnce(Call) -> Call) -> Self {
        Self { call: change(self.call), ..self }
    }

    /// Who belongs to whom.
    pub fn pairs(&self) -> Result<Pairs<'_>> {
        self.call.pairs(self.rows, self.passages)
    }

    /// The batch over embeddings of this problem's shape.
    pub fn batch<'a>(&'a self, query: &'a Buffer, passage: &'a Buffer) -> Result<Batch<'a>> {
        let (query, passage) = (query.embeddings(self.rows, self.dim)?, passage.embeddings(self.passages, self.dim)?);
        Batch::new(&self.call, query, passage)
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
        let dims = self.call.prefixes().map_or_else(|| vec![self.dim], |dims| dims.to_vec());
        dims.into_iter().all(|dim| self.is_prefix_decided(dim, slack))
    }

    /// The same for the first `dim` entries of every embedding.
    fn is_prefix_decided(&self, dim: usize, slack: f64) -> bool {
        let unit = |x: &[f64]| -> Vec<Vec<f64>> {
            let direction = |row: &[f64]| {
                let scale = row.iter().fold(f64::MIN_POSITIVE, |max, v| max.max(v.abs()));
                let norm = row.iter().map(|v| (v / scale).powi(2)).sum::<f64>().sqrt();
                row.iter().map(|v| if norm > 0.0 { v / scale / norm } else { 0.0 }).collect()
            };
            x.chunks(self.dim).map(|row| direction(&row[..dim])).collect()
        };
        let (query, passage) = (unit(&self.query), unit(&self.passage));
        let cosine = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
        let Ok(pairs) = self.pairs() else { return false };
        (0..self.rows).all(|i| {
            let own = &passage[pairs.positive(i)];
            let positive = cosine(&query[i], own);
            let far = |s: f64, edge: f64| (s - edge - COSINE_TIE).abs() >= slack;
            let clear = |anchor: &[f64], candidates: &[Vec<f64>], ranked: bool| {
                candidates
                    .iter()
                    .map(|c| cosine(anchor, c))
                    .all(|s| (!ranked || far(s, positive)) && self.call.margin().is_none_or(|m| far(s, positive + m)))
            };
            let towers =
                self.call.margin().is_none() || (clear(&query[i], &query, false) && clear(own, &passage, false));
            towers && clear(&query[i], &passage, true) && clear(own, &query, true)
        })
    }

    /// w̃ = w / Σw; nothing for a problem that no backend takes.
    pub fn normalized_weights(&self) -> Vec<f64> {
        self.pairs().map(|pairs| pairs.normalized_weights()).unwrap_or_default()
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
        let (evaluation, temperature) = backend.loss_and_gradients_into(&batch, upstream, buffers)?;
        Ok(Outputs { evaluation, grad_query: grad_query.to_f64(), grad_passage: grad_passage.to_f64(), temperature })
    }
}
