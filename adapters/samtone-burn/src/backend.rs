//! What a backend of burn does for the loss.

use crate::{Report, Result, SamToNe, Temperature};
use burn::backend::{Backend, tensor::FloatTensor};

/// A backend that computes the losses.
///
/// Implemented for burn's CPU backend, `Flex`; for its `CubeBackend`, whose tensors must be on a wgpu or a CUDA device and the feature of
/// that name on; and for `Autodiff` and `Fusion` of any backend that implements it. Programs call [`SamToNe::forward`], which finds the
/// backend of its tensors; this is for those that work with backends' own tensors.
pub trait SamToNeBackend: Backend {
    /// Loss, what the call found, and the gradients that are `wanted` or, on a backend with autodiff, tracked.
    ///
    /// # Errors
    /// As [`SamToNe::forward`].
    fn samtone(samtone: &SamToNe, inputs: Inputs<Self>, wanted: Wanted) -> Result<Outputs<Self>>;
}

/// The tensors of a call.
#[derive(Debug, Clone)]
pub struct Inputs<B: Backend> {
    /// q, M × d.
    pub query: FloatTensor<B>,
    /// p, N × d.
    pub passage: FloatTensor<B>,
    /// That of the call, or a tensor that holds τ or log β, one number.
    pub temperature: Temperature<FloatTensor<B>>,
}

/// Whose gradients a call computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// ∂L/∂q.
    pub query: bool,
    /// ∂L/∂p.
    pub passage: bool,
    /// ∂L/∂τ or ∂L/∂log β, whichever the call's tensor holds.
    pub temperature: bool,
}

/// What a call gives.
#[derive(Debug, Clone)]
pub struct Outputs<B: Backend> {
    /// The loss, f32, of shape \[1\]. On a backend with autodiff its backward pass reaches the inputs that are tracked.
    pub loss: FloatTensor<B>,
    /// Gradients of query, passage and temperature for an upstream gradient of 1, f32: constants to autodiff. That of the
    /// temperature is of shape \[1\].
    pub gradients: [Option<FloatTensor<B>>; 3],
    /// Row losses and metrics.
    pub report: Report,
}
