//! The temperature of the softmaxes: a constant, or a tensor that may be learned.

use crate::invalid;
use crate::view::check_device;
use candle_core::{DType, Result, Tensor};

/// τ, which cosines are divided by, from 1e-6 to 1e6; SamToNe uses 0.01.
///
/// A tensor holds one element of any shape, in f64, f32, f16 or bf16, and gets its gradient in its own type and shape.
///
/// Its number has to be known before anything is enqueued. A tensor on a CUDA device is read, which waits for whatever computes it
/// and everything enqueued before. So keep one that is not learned on the CPU, also for towers on a device; one that is learned
/// and on the CPU is read at once, but its gradient is then waited for by `backward`. A constant never waits.
pub type Temperature<'a> = samtone::Temperature<&'a Tensor>;

/// The number that a tensor holds.
pub(crate) fn scalar(tensor: &Tensor) -> Result<f64> {
    check_device("temperature", tensor.device().location())?;
    if tensor.elem_count() != 1 || !matches!(tensor.dtype(), DType::F64 | DType::F32 | DType::F16 | DType::BF16) {
        let value = format!("a tensor of shape {:?} and type {}", tensor.dims(), tensor.dtype().as_str());
        return Err(invalid("temperature", value, "one number, f64, f32, f16 or bf16"));
    }
    tensor.detach().to_dtype(DType::F64)?.reshape(())?.to_scalar()
}
