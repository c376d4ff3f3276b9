//! The WGSL backend: hand-written compute shaders for Vulkan, Metal, DX12 and browsers.
//!
//! ```text
//! Problem    a call, M and N, types, strides, rows of the shard           validated                       ../problem.rs
//! Plan       variant, super-blocks, buffers, dispatches: all as data      no GPU needed, prints itself    plan.rs, dispatches.rs
//! prepare    pack: norms, powers of two; positives                        O((M+N)·d)                      prepare.wgsl
//! [1] sums       products → cosines → mask → exponential sums, ranks      3 B²d (one same-tower block)    logsumexp.wgsl
//! [2] combine    loss, row losses, metrics, coefficients                  O(M)                            combine.wgsl
//! [3] gradients  products again → gradient tiles in a super-block         3 B²d                           gradient_tile.wgsl
//!                products of the super-block with Q and P                 6 B²d                           gradient_product.wgsl
//! [4] project    diagonal, tangent, β, output type                        O((M+N)·d)                      project.wgsl
//! ```
//!
//! With K prefixes the passes 1 and 3 visit each tile once. A tile has its products up to each prefix, one after the other. Pass 2 runs
//! for each prefix. prefixes.wgsl adds up over prefixes what belongs to rows and embeddings. Their pass 4 is project_prefixes.wgsl
//! (docs/wgpu.md).
//!
//! WGSL has no f64. Where CUDA uses f64, shaders use sums of two f32, or f32 with an exponent beside it. The host adds up loss and
//! metrics of the rows in f64 when it reads them.
//!
//! [`Plan`] has everything that decides what runs: buffers, bindings, parameters, workgroups. It follows from a
//! [`Problem`](crate::Problem) and a device's [`Capabilities`] alone, and needs no GPU. It can be exported, so a page in a browser can run
//! the same dispatches.

#[cfg(test)]
mod agreement;
mod bindings;
mod capabilities;
mod dispatches;
#[cfg(feature = "wgpu")]
mod driver;
mod embeddings;
mod layout;
mod parts;
mod plan;
mod prefixes;
mod readout;
mod schedule;
mod shaders;
mod uniforms;

pub use crate::refusal::Refusal;
pub use capabilities::Capabilities;
#[cfg(feature = "wgpu")]
pub use driver::Wgpu;
#[cfg(feature = "wgpu")]
pub use driver::{BufferRange, Buffers, Engine, Step, loss_and_gradients, wgpu};
pub use plan::Plan;
pub use schedule::{ALIGNMENT, Binding, Dispatch, Slot};
pub use shaders::{Module, Products, Variant};

/// Places of the results in the slot `State`: each is an f32, counted in words from [`FIRST_BYTE`](results::FIRST_BYTE) on. This is for
/// tests and adapters. It is no part of the stable interface.
#[doc(hidden)]
#[allow(missing_docs)] // shaders/common/state.wgsl says what each is
pub mod results {
    pub const FIRST_BYTE: u64 = super::layout::STATUS_BYTES;
    pub const LOSS: usize = 0;
    pub const PRECISION_QP: usize = 1;
    pub const MRR_QP: usize = 2;
    pub const PRECISION_PQ: usize = 3;
    pub const MRR_PQ: usize = 4;
    pub const GRAD_TAU: usize = 5;
    pub const GRAD_LOG_BETA: usize = 6;
}

/// Default bound on the slot `Scratch`: 128 MiB, which every device can bind. That is the size of about 5760² gradients of logits.
pub const DEFAULT_WORKSPACE_BYTES: usize = 128 << 20;
