//! The operation that candle records: the loss of a call that is over, and the gradients it gave.

use crate::refused;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};

/// Loss and gradients of one call. The call computes both at once, because a later one for the gradients would have to compute
/// every cosine again; what is kept for it is O((M + N)·d).
#[derive(Debug)]
pub(crate) struct Computed {
    pub loss: f32,
    /// ∂L/∂q and ∂L/∂p, if candle tracks them. f32 also for 16-bit embeddings: the upstream gradient, often a factor that
    /// keeps f16 from underflow, comes with the backward call and must act before the rounding.
    pub embeddings: [Option<Tensor>; 2],
    /// ∂L/∂τ or ∂L/∂log β, if candle tracks it.
    pub temperature: Option<f64>,
}

impl Computed {
    fn result(&self) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.loss]), Shape::from(())))
    }

    /// The gradient of tower `k` times the upstream gradient, in the type of the tower.
    fn embedding(&self, k: usize, like: &Tensor, upstream: f64) -> Result<Option<Tensor>> {
        let Some(gradient) = &self.embeddings[k] else { return Ok(None) };
        let scaled = if upstream == 1.0 { gradient.clone() } else { gradient.affine(upstream, 0.0)? };
        scaled.to_dtype(like.dtype()).map(Some)
    }
}

fn upstream(gradient: &Tensor) -> Result<f64> {
    let upstream: f64 = gradient.detach().to_dtype(DType::F64)?.reshape(())?.to_scalar()?;
    if upstream.is_finite() {
        return Ok(upstream);
    }
    Err(refused(samtone::Error::InvalidArgument {
        argument: "upstream",
        value: upstream.to_string(),
        allowed: "a finite number, as the gradient that reaches the loss".into(),
    }))
}

/// With a constant temperature.
impl CustomOp2 for Computed {
    fn name(&self) -> &'static str {
        "samtone"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.result()
    }

    fn bwd(&self, q: &Tensor, p: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let upstream = upstream(gradient)?;
        Ok((self.embedding(0, q, upstream)?, self.embedding(1, p, upstream)?))
    }
}

/// With a tensor as temperature.
impl CustomOp3 for Computed {
    fn name(&self) -> &'static str {
        "samtone"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.result()
    }

    fn bwd(
        &self,
        q: &Tensor,
        p: &Tensor,
        temperature: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dq, dp) = CustomOp2::bwd(self, q, p, result, gradient)?;
        let Some(derivative) = self.temperature else { return Ok((dq, dp, None)) };
        let derivative = Tensor::new(derivative * upstream(gradient)?, temperature.device())?;
        let derivative = derivative.to_dtype(temperature.dtype())?.reshape(temperature.shape())?;
        Ok((dq, dp, Some(derivative)))
    }
}
