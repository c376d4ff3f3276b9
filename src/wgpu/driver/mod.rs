//! Runs plans on wgpu.

mod adapter;
mod backend;
mod buffers;
mod check;
mod engine;
mod host;
mod step;

pub use backend::{Wgpu, loss_and_gradients};
pub use buffers::{BufferRange, Buffers};
pub use engine::Engine;
pub use step::Step;
pub use wgpu;
