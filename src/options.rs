//! What a caller may set beside the loss and the batch.

use crate::error::{Error, Result};

/// What to do with an embedding of norm zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ZeroNorm {
    /// [`Error::ZeroNorm`] names the row.
    #[default]
    Error,
    /// Its direction counts as 0: all its cosines are 0, and so is its gradient.
    ZeroGradient,
}

/// What to do with a row whose softmax has no term at all: every negative is masked, and the group holds no copy of the positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NoNegative {
    /// [`Error::NoNegative`] names the row and the group.
    #[default]
    Error,
    /// The row gets 0 from that group, for the loss and for the gradient. Its weight still counts in Σw, so the other rows
    /// get what they would get beside any other row.
    Zero,
}

/// Scalars of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    temperature: f64,
    margin: Option<f64>,
    zero_norm: ZeroNorm,
    no_negative: NoNegative,
    workspace_bytes: Option<usize>,
    tile_skipping: Option<f64>,
}

impl Options {
    /// Smallest temperature. Below it f32 cosines, which resolve 6e-8, no longer determine the softmax.
    pub const MIN_TEMPERATURE: f64 = 1e-6;
    /// Largest temperature.
    pub const MAX_TEMPERATURE: f64 = 1e6;

    /// Softmax temperature τ, from 1e-6 to 1e6; SamToNe uses 0.01. Logits are cosines divided by it.
    pub fn new(temperature: f64) -> Result<Self> {
        if !(Self::MIN_TEMPERATURE..=Self::MAX_TEMPERATURE).contains(&temperature) {
            let allowed = format!("a number from {:e} to {:e}", Self::MIN_TEMPERATURE, Self::MAX_TEMPERATURE);
            return Err(Error::invalid("temperature", temperature.to_string(), allowed));
        }
        Ok(Self {
            temperature,
            margin: None,
            zero_norm: ZeroNorm::Error,
            no_negative: NoNegative::Error,
            workspace_bytes: None,
            tile_skipping: None,
        })
    }

    /// Drops every negative whose cosine exceeds s⁺ᵢ + margin: a filter of false negatives. Of either sign; Qwen3 uses 0.1.
    pub fn with_margin(mut self, margin: f64) -> Result<Self> {
        if !margin.is_finite() {
            return Err(Error::invalid("margin", margin.to_string(), "a finite number"));
        }
        self.margin = Some(margin);
        Ok(self)
    }

    /// Policy for embeddings of norm zero.
    pub fn with_zero_norm(mut self, policy: ZeroNorm) -> Self {
        self.zero_norm = policy;
        self
    }

    /// Policy for rows of weight above 0 whose softmax has no term. It matters for groups without a copy of the positive alone,
    /// such as that of [`Loss::decoupled`](crate::Loss::decoupled): a last batch of one row, or one of duplicates.
    pub fn with_no_negative(mut self, policy: NoNegative) -> Self {
        self.no_negative = policy;
        self
    }

    /// Bound on the memory a backend may take beyond O((M + N)·d). More lets it keep logits instead of computing them twice.
    /// Without one, a backend takes its own default: [`cpu::DEFAULT_WORKSPACE_BYTES`](crate::cpu::DEFAULT_WORKSPACE_BYTES).
    ///
    /// On the CPU it bounds tiles and panels. Outside it are some megabytes that do not grow with the batch: the sums of the
    /// tiles in flight, and the packing buffers that the matrix-product library keeps for each thread.
    ///
    /// The tighter the bound, the more pieces the work is cut into, and a plan lists the pieces on the host. So the least that works
    /// grows with the square of the batch, once there are more than 262,144 tiles on the CPU or 16,384 super-blocks on a GPU: a
    /// smaller bound is [`WorkspaceTooSmall`](crate::Error::WorkspaceTooSmall), which names the least.
    pub fn with_workspace_bytes(mut self, bytes: usize) -> Self {
        self.workspace_bytes = Some(bytes);
        self
    }

    /// Lets a backend leave out of the gradient what tiles of cosines with little softmax mass would add: for every row i at most
    /// the share η, `share`, of what its negatives get. Off by default; above 0 and below 1, such as 1e-3.
    ///
    /// Precisely: the derivatives ∂L/∂(β s_ij) that are left out, summed over all blocks and negatives j of row i, are at most
    /// η·Σ_j ∂L/∂(β s_ij) = η·|∂L/∂(β s⁺ᵢ)|. Loss, row losses, metrics and the derivative of the positive do not change, to the
    /// bit. What follows for the gradients of embeddings and temperature is derived in docs/skipping.md of the repository.
    ///
    /// It pays for batches that come in clusters at τ of 0.02 or less, ordered so that neighbouring rows belong together; batches
    /// of independent pairs lose nothing and gain nothing. Only the CUDA backend makes use of it; the others compute every tile,
    /// whose error of 0 is within any η.
    pub fn with_tile_skipping(mut self, share: f64) -> Result<Self> {
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::invalid("tile_skipping", share.to_string(), "a number above 0 and below 1"));
        }
        self.tile_skipping = Some(share);
        Ok(self)
    }

    /// τ.
    pub fn temperature(&self) -> f64 {
        self.temperature
    }

    /// β = 1/τ.
    pub fn beta(&self) -> f64 {
        1.0 / self.temperature
    }

    /// m, if set.
    pub fn margin(&self) -> Option<f64> {
        self.margin
    }

    /// Policy for embeddings of norm zero.
    pub fn zero_norm(&self) -> ZeroNorm {
        self.zero_norm
    }

    /// Policy for rows whose softmax has no term.
    pub fn no_negative(&self) -> NoNegative {
        self.no_negative
    }

    /// η of [`Options::with_tile_skipping`], if set.
    pub fn tile_skipping(&self) -> Option<f64> {
        self.tile_skipping
    }

    /// Bound on the workspace, in bytes, if set.
    pub fn workspace_bytes(&self) -> Option<usize> {
        self.workspace_bytes
    }
}
