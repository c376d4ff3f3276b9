//! The only table of tolerances. A commit that changes a kernel never changes it.

use samtone::DType;

/// How far outputs may be from the f64 definition on the same (rounded) embeddings.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Of the loss, relative.
    pub loss: f64,
    /// Of ∂L/∂q and ∂L/∂p, relative Frobenius, for τ ≥ 0.01. Below that it grows with 1/τ, as a logit's rounding error does.
    pub gradient: f64,
    /// Of a cosine, absolute: logits inherit it times β, and sums that cancel keep it.
    pub cosine: f64,
    /// A probability this small may count as 0.
    pub probability: f64,
    /// Of P@1 and MRR, absolute: a rank is a whole number, so only the sum over rows rounds.
    pub metric: f64,
}

impl Tolerance {
    /// The row of the table for embeddings of type `dtype`.
    pub const fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Self { loss: 1e-9, gradient: 1e-9, cosine: 1e-14, probability: 0.0, metric: 1e-12 },
            DType::F32 => Self { loss: 1e-6, gradient: 3e-5, cosine: 6e-8, probability: 1e-30, metric: 1e-9 },
            DType::F16 => Self { loss: 1e-5, gradient: 2e-4, cosine: 6e-8, probability: 1e-30, metric: 1e-9 },
            DType::BF16 => Self { loss: 1e-5, gradient: 1e-3, cosine: 6e-8, probability: 1e-30, metric: 1e-9 },
        }
    }
}

/// Of the reference against golden files: relative to the largest entry of the output.
pub const GOLDEN: f64 = 1e-9;
