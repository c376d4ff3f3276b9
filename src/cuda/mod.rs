//! The CUDA backend: hand-written kernels for every NVIDIA GPU of compute capability 8.0 and later, and others for 9.0 alone.
//!
//! ```text
//! Problem    a call, M and N, types, strides, rows of the shard           validated                       ../problem.rs, problem.rs
//! Plan       tile, super-blocks, waves, arrays, launches: all as data     no GPU needed, prints itself    plan.rs, waves.rs, arrays.rs,
//!                                                                                                         launches.rs, per_row.rs
//! prepare    pack: norms, powers of two, f16; positives in f64            O((M+N)·d)                      prepare.cu
//! [1] sums       products → cosines → mask → exponential sums, ranks      3 B²d (one same-tower block)    logsumexp_sm*.cu
//! [2] combine    loss, row losses, metrics, coefficients, f64             O(M)                            combine.cu
//!     skip       which squares hold next to no softmax mass, if asked     O(B²/128)                       skip_squares.cu
//! [3] gradients  cosines, stored or recomputed → gradients of logits      0 or 3 B²d                      gradient_tile_sm*.cu
//!                products of the super-block with Q and P                 6 B²d                           gradient_product_sm*.cu
//! [4] project    diagonal, tangent, β, output type                        O((M+N)·d)                      project.cu
//! ```
//!
//! With Matryoshka prefixes a plan has other kernels for some steps, `prepare_prefixes.cu`, `project_prefixes.cu` and `prefixes.cu` among
//! them (prefixes.rs). docs/cuda.md says what they do.
//!
//! Memory beyond inputs and outputs is O((M+N)·d) for packed embeddings, and a part of the workspace that the caller bounds
//! ([`DEFAULT_WORKSPACE_BYTES`] by default). In it, the first pass stores cosines for the gradient where that saves time. Results have the
//! same bits on every run on one kind of device.
//!
//! A call neither allocates nor waits. [`Plan`] says how much memory it needs and what it launches. The caller owns memory and stream.
//! Some inputs are refused: NaN and infinities, a norm of zero, a row without negative. They leave the number of the lowest such row in
//! the state, and NaN in loss and gradients.

#[doc(hidden)]
pub mod abi;
mod arrays;
#[cfg(feature = "cuda")]
mod driver;
mod launches;
mod per_row;
mod plan;
mod prefixes;
mod problem;
mod schedule;
mod waves;

pub use crate::problem::GradientOutput;
#[cfg(feature = "cuda")]
pub use driver::*;
pub use plan::Plan;
pub use problem::{Architecture, Arithmetic, Choices, Cosines, Problem, Tile};
pub use schedule::{Address, Argument, Array, ArrayId, Launch, Slot};

/// Default bound on the workspace beyond packed embeddings: 512 MiB. That is the size of 16384² gradients of logits in 16 bits.
pub const DEFAULT_WORKSPACE_BYTES: usize = 512 << 20;
