//! The temperature of the softmaxes: a constant, or a tensor that may be learned.

use crate::view::check_device;
use crate::{invalid, refused};
use candle_core::{DType, Result, Tensor};
use samtone::{Options, TemperatureGradient};

/// τ, which cosines are divided by, from 1e-6 to 1e6; SamToNe uses 0.01.
///
/// A tensor holds one element of any shape, in f64, f32, f16 or bf16, and gets its gradient in its own type and shape. There
/// is no conversion from a bare tensor, because nothing tells τ from log β.
///
/// Its number has to be known before anything is enqueued. A tensor on a CUDA device is read, which waits for whatever computes it
/// and everything enqueued before. So keep one that is not learned on the CPU, also for towers on a device; one that is learned
/// and on the CPU is read at once, but its gradient is then waited for by `backward`. A constant never waits.
#[derive(Debug, Clone, Copy)]
pub enum Temperature<'a> {
    /// A constant τ. An `f64` converts to it.
    Fixed(f64),
    /// A tensor that holds τ; its gradient is ∂L/∂τ.
    Tau(&'a Tensor),
    /// A tensor that holds log β = −log τ, the log-scale that CLIP learns; its gradient is ∂L/∂log β.
    LogBeta(&'a Tensor),
}

impl From<f64> for Temperature<'_> {
    fn from(tau: f64) -> Self {
        Self::Fixed(tau)
    }
}

impl<'a> Temperature<'a> {
    /// The tensor that holds it, if one does.
    pub(crate) fn tensor(self) -> Option<&'a Tensor> {
        match self {
            Self::Fixed(_) => None,
            Self::Tau(x) | Self::LogBeta(x) => Some(x),
        }
    }

    /// The options of a call at this temperature.
    pub(crate) fn options(self) -> Result<Options> {
        match self {
            Self::Fixed(tau) => Options::new(tau).map_err(refused),
            Self::Tau(x) => Options::new(scalar("temperature", x)?).map_err(refused),
            Self::LogBeta(x) => {
                let log_beta = scalar("log_beta", x)?;
                Options::new((-log_beta).exp()).map_err(|_| {
                    let limit = Options::MAX_TEMPERATURE.ln();
                    invalid(
                        "log_beta",
                        log_beta.to_string(),
                        format!("a number from -{limit:.3} to {limit:.3}, the logarithm of 1/τ"),
                    )
                })
            }
        }
    }

    /// The derivative with respect to what the tensor holds.
    pub(crate) fn gradient(self, gradient: TemperatureGradient) -> f64 {
        match self {
            Self::Fixed(_) | Self::Tau(_) => gradient.tau,
            Self::LogBeta(_) => gradient.log_beta,
        }
    }
}

fn scalar(argument: &'static str, tensor: &Tensor) -> Result<f64> {
    check_device(argument, tensor.device().location())?;
    if tensor.elem_count() != 1 || !matches!(tensor.dtype(), DType::F64 | DType::F32 | DType::F16 | DType::BF16) {
        let value = format!("a tensor of shape {:?} and type {}", tensor.dims(), tensor.dtype().as_str());
        return Err(invalid(argument, value, "one number, f64, f32, f16 or bf16"));
    }
    tensor.detach().to_dtype(DType::F64)?.reshape(())?.to_scalar()
}
