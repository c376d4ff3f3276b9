//! The contrastive losses of [`samtone`] as a differentiable [candle](candle_core) operation.
//!
//! ```text
//!  query  M × d ──┐                        ┌── loss, a scalar        L = Σ_g c_g Σᵢ w̃ᵢ (ℓ_gi − β s⁺ᵢ),   β = 1/τ
//!  passage N × d ─┼── SamToNe::forward ────┤
//!  τ or log β ────┘                        └── backward():  ∂L/∂query, ∂L/∂passage, ∂L/∂τ or ∂L/∂log β
//! ```
//!
//! s are cosines of the raw embeddings: do not normalise them first. [`Loss`] has the presets and their formulas, [`Call`] all
//! options, [`SamToNe`] shapes and errors. No matrix of M × N is ever made.

#![warn(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(feature = "cuda")]
mod cuda;
mod loss;
mod op;
mod temperature;
mod view;

pub use loss::SamToNe;
pub use temperature::Temperature;

/// What calls take and give.
pub use samtone::{Block, Call, Evaluation, Group, Loss, Metrics, NoNegative, PrefixEvaluation, Scope, ZeroNorm};

/// The crate behind this one.
pub use samtone;

/// As an error of candle whose text is the sentence alone.
fn refused(error: samtone::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// The sentence for an argument outside its domain.
fn invalid(argument: &'static str, value: impl Into<String>, allowed: impl Into<String>) -> candle_core::Error {
    refused(samtone::Error::InvalidArgument { argument, value: value.into(), allowed: allowed.into() })
}

/// The README's examples compile and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
