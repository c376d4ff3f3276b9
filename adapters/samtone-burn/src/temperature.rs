//! The temperature of the softmaxes: a constant, or a tensor that may be learned.

use crate::{Result, invalid};
use burn::tensor::Tensor;
use samtone::{Options, TemperatureGradient};

/// τ, which cosines are divided by, from 1e-6 to 1e6; SamToNe uses 0.01.
///
/// A tensor holds one number, in any float type, and gets its gradient in its own type. There is no conversion from a bare
/// tensor, because nothing tells τ from log β.
#[derive(Debug, Clone, Copy)]
pub enum Temperature<T = Tensor<1>> {
    /// A constant τ. An `f64` converts to it.
    Fixed(f64),
    /// A tensor that holds τ; its gradient is ∂L/∂τ.
    Tau(T),
    /// A tensor that holds log β = −log τ, the log-scale that CLIP learns; its gradient is ∂L/∂log β.
    LogBeta(T),
}

impl<T> From<f64> for Temperature<T> {
    fn from(tau: f64) -> Self {
        Self::Fixed(tau)
    }
}

impl<T> Temperature<T> {
    /// The tensor that holds it, if one does.
    pub fn tensor(&self) -> Option<&T> {
        match self {
            Self::Fixed(_) => None,
            Self::Tau(x) | Self::LogBeta(x) => Some(x),
        }
    }

    /// With another tensor, of another type.
    pub(crate) fn try_map<U>(self, map: impl FnOnce(T) -> Result<U>) -> Result<Temperature<U>> {
        Ok(match self {
            Self::Fixed(tau) => Temperature::Fixed(tau),
            Self::Tau(x) => Temperature::Tau(map(x)?),
            Self::LogBeta(x) => Temperature::LogBeta(map(x)?),
        })
    }

    /// The derivative with respect to what the tensor holds.
    pub(crate) fn derivative(&self, gradient: TemperatureGradient) -> f64 {
        match self {
            Self::Fixed(_) | Self::Tau(_) => gradient.tau,
            Self::LogBeta(_) => gradient.log_beta,
        }
    }
}

impl Temperature<f64> {
    /// The options of a call at this temperature, its tensor having been read.
    pub(crate) fn options(&self) -> Result<Options> {
        match *self {
            Self::Fixed(tau) | Self::Tau(tau) => Options::new(tau),
            Self::LogBeta(log_beta) => Options::new((-log_beta).exp()).map_err(|_| {
                let limit = Options::MAX_TEMPERATURE.ln();
                let allowed = format!("a number from -{limit:.3} to {limit:.3}, the logarithm of 1/τ");
                invalid("log_beta", log_beta.to_string(), allowed)
            }),
        }
    }
}
