//! The contrastive losses of [`samtone`] as a differentiable [burn] operation.
//!
//! ```text
//!  query  M × d ──┐                        ┌── loss, of shape [1]    L = Σ_g c_g Σᵢ w̃ᵢ (ℓ_gi − β s⁺ᵢ),   β = 1/τ
//!  passage N × d ─┼── SamToNe::forward ────┤
//!  τ or log β ────┘                        └── backward():  ∂L/∂query, ∂L/∂passage, ∂L/∂τ or ∂L/∂log β
//! ```
//!
//! s are cosines of the raw embeddings: do not normalise them first. [`Loss`] has the presets and their formulas, [`Call`] all
//! options, [`SamToNe`] shapes and errors. No matrix of M × N is ever made.
//!
//! burn's tensors say at run time which backend they are of. [`SamToNe`] asks them, and calls [`SamToNeBackend`], which
//! burn's backends implement here: on a concrete one it computes loss and gradients, on `Autodiff` of it, it also
//! records the backward step.

#![warn(missing_docs, clippy::undocumented_unsafe_blocks, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod autodiff;
mod backend;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod cube;
mod flex;
mod loss;
mod report;
mod route;

pub use backend::{Inputs, Outputs, SamToNeBackend, Wanted};
pub use loss::{SamToNe, Temperature};
pub use report::Report;

/// What calls take and give.
pub use samtone::{
    Block, Call, Error, Evaluation, Group, Loss, Metrics, NoNegative, PrefixEvaluation, Result, Scope, ZeroNorm,
};

/// The crates whose types appear in this one's signatures.
pub use {burn, samtone};

/// The sentence for an argument outside its domain.
fn invalid(argument: &'static str, value: impl Into<String>, allowed: impl Into<String>) -> Error {
    Error::InvalidArgument { argument, value: value.into(), allowed: allowed.into() }
}

/// The README's examples compile and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
