//! Fused contrastive losses for dual-encoder retrieval models.
//!
//! ```text
//!  loss (preset or custom)     temperature, ids, weights, margin, …       embeddings
//!         loss.rs ──────────────────────► call.rs ──────────────► batch.rs  (or, on a device, problem.rs)
//!                           ┌─────────────────────────────────────────┘
//!           backend: reference (f64, dense) · cpu (tiled, f32) · cuda (tiled, tensor cores) · wgpu (tiled, WGSL)
//!                           │
//!        loss, row losses, P@1, MRR, ∂L/∂q, ∂L/∂p, ∂L/∂τ        never a B × B matrix beyond the workspace bound
//! ```
//!
//! Start with [`loss_and_gradients`]; [`cpu`] has the split, sharded and memory-reusing forms, [`cuda`] and [`mod@wgpu`] those on
//! device memory. The definition is in docs/loss.md of the repository, and [`mod@reference`] is its executable form.

#![warn(missing_docs, clippy::undocumented_unsafe_blocks, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod backend;
pub mod batch;
pub mod call;
mod candidates;
mod combine;
pub mod cpu;
pub mod cuda;
pub mod distributed;
pub mod dtype;
pub mod error;
mod identity;
pub mod loss;
pub mod mask;
mod memory;
mod order;
pub mod output;
mod pairs;
pub mod partials;
mod prefix;
pub mod problem;
pub mod reference;
mod refusal;
mod regions;
mod super_blocks;
mod temperature;
mod tower;
pub mod wgpu;

pub use batch::{Batch, Data, DataMut, Embeddings, EmbeddingsMut};
pub use call::{Call, NoNegative, Scope, ZeroNorm};
pub use cpu::loss_and_gradients;
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use loss::{Block, Group, Loss};
pub use output::{
    Evaluation, GradientBuffers, Gradients, LossAndGradients, Metrics, PrefixEvaluation, TemperatureGradient,
};
pub use pairs::Pairs;
pub use partials::{ExpSum, Partials};
pub use prefix::Prefix;
pub use problem::GradientOutput;
pub use temperature::Temperature;
pub use tower::Tower;

/// What any GPU backend plans for.
pub type Problem<'a> = problem::Problem<'a, ()>;

/// The crates whose types appear in this one's signatures.
pub use half;

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// So do those of the CUDA guide.
#[cfg(doctest)]
#[doc = include_str!("../docs/cuda.md")]
struct CudaGuide;

/// And of the WGSL guide.
#[cfg(all(doctest, feature = "wgpu"))]
#[doc = include_str!("../docs/wgpu.md")]
struct WgpuGuide;

/// And of the guide to many ranks.
#[cfg(doctest)]
#[doc = include_str!("../docs/distributed.md")]
struct DistributedGuide;
