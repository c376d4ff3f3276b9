//! The operation that candle records: the loss of a call that is over, and the gradients it gave.

use crate::refused;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor};

/// Loss and gradients of one call. The call computes both at once, because a later one for the gradients would have to compute
/// every cosine again; what is kept for it is O((M + N)·d). All of it is on the device of the towers.
#[derive(Debug)]
pub(crate) struct Computed {
    /// A scalar, f32.
    pub loss: Tensor,
    /// ∂L/∂q and ∂L/∂p, if candle tracks them. f32 also for 16-bit embeddings: the upstream gradient, often a factor that
    /// keeps f16 from underflow, comes with the backward call and must act before the rounding.
    pub embeddings: [Option<Tensor>; 2],
    /// ∂L/∂τ or ∂L/∂log β, a scalar, f64, if candle tracks it.
    pub temperature: Option<Tensor>,
}

impl Computed {
    fn result(&self) -> Result<(CpuStorage, Shape)> {
        match &*self.loss.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok((storage.clone(), Shape::from(()))),
            _ => Err(candle_core::Error::msg("the loss of CPU tensors is elsewhere")),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_result(&self) -> Result<(CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (storage, layout) = self.loss.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, Shape::from(()))),
            _ => Err(candle_core::Error::msg("the loss of CUDA tensors is elsewhere")),
        }
    }

    /// The gradient of tower `k` times the upstream gradient, in the type of the tower.
    fn embedding(&self, k: usize, like: &Tensor, upstream: &Upstream) -> Result<Option<Tensor>> {
        let Some(gradient) = &self.embeddings[k] else { return Ok(None) };
        upstream.scale(gradient)?.to_dtype(like.dtype()).map(Some)
    }
}

/// The gradient that reaches the loss.
enum Upstream {
    Number(f64),
    /// On a device, where reading it would wait for all that is enqueued. One that is not finite makes gradients that are not.
    Device(Tensor),
}

impl Upstream {
    fn of(gradient: &Tensor) -> Result<Self> {
        let gradient = gradient.detach().reshape(())?;
        if !gradient.device().is_cpu() {
            return Ok(Self::Device(gradient));
        }
        let upstream: f64 = gradient.to_dtype(DType::F64)?.to_scalar()?;
        if upstream.is_finite() {
            return Ok(Self::Number(upstream));
        }
        Err(refused(samtone::Error::InvalidArgument {
            argument: "upstream",
            value: upstream.to_string(),
            allowed: "a finite number, as the gradient that reaches the loss".into(),
        }))
    }

    fn scale(&self, gradient: &Tensor) -> Result<Tensor> {
        match self {
            Self::Number(1.0) => Ok(gradient.clone()),
            Self::Number(upstream) => gradient.affine(*upstream, 0.0),
            Self::Device(upstream) => gradient.broadcast_mul(&upstream.to_dtype(gradient.dtype())?),
        }
    }
}

/// With a constant temperature.
impl CustomOp2 for Computed {
    fn name(&self) -> &'static str {
        "samtone"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.result()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda_result()
    }

    fn bwd(&self, q: &Tensor, p: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let upstream = Upstream::of(gradient)?;
        Ok((self.embedding(0, q, &upstream)?, self.embedding(1, p, &upstream)?))
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda_result()
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
        let Some(derivative) = &self.temperature else { return Ok((dq, dp, None)) };
        let derivative = Upstream::of(gradient)?.scale(derivative)?;
        let derivative = derivative.to_dtype(temperature.dtype())?.reshape(temperature.shape())?;
        Ok((dq, dp, Some(derivative)))
    }
}
