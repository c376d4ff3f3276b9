//! From tensors that say at run time which backend they are of to that backend's own.

use crate::backend::{Inputs, SamToNeBackend, Wanted};
use crate::{Report, Result, SamToNe, Temperature, invalid};
use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, NoCheckpointing};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, BackendTensor, DispatchAutodiffContext, DispatchKindConversion, DispatchTensor,
    DispatchTensorKind, Flex, GradientCheckpointingStrategy, TensorMetadata,
};
use burn::tensor::Tensor;

/// Which devices there are kernels for.
pub(crate) const ALLOWED: &str = match (cfg!(feature = "wgpu"), cfg!(feature = "cuda")) {
    (true, true) => {
        "tensors of `Device::flex()`, `Device::cuda`, or `Device::wgpu` where burn compiles WGSL, that is without its features \
         `vulkan` and `metal`: `to_device` is differentiable"
    }
    (true, false) => {
        "tensors of `Device::flex()`, of `Device::cuda` with the feature `cuda`, or of `Device::wgpu` where burn compiles WGSL, \
         that is without its features `vulkan` and `metal`: `to_device` is differentiable"
    }
    (false, true) => {
        "tensors of `Device::flex()` or `Device::cuda`, or of `Device::wgpu` with the feature `wgpu`: `to_device` is \
         differentiable"
    }
    (false, false) => {
        "tensors of `Device::flex()`, or of `Device::wgpu` or `Device::cuda` with the feature `wgpu` or `cuda`: `to_device` is \
         differentiable"
    }
};

/// The tensors of a call.
pub(crate) struct Tensors {
    pub query: DispatchTensor,
    pub passage: DispatchTensor,
    pub temperature: Temperature<DispatchTensor>,
}

impl Tensors {
    /// The loss, which autodiff knows of if it knows of one of the tensors, and what the call found.
    pub(crate) fn run(self, samtone: &SamToNe) -> Result<(Tensor<1>, Report)> {
        let kind = match &self.query.kind {
            DispatchTensorKind::Autodiff(inner) => inner,
            kind => kind,
        };
        match kind {
            DispatchTensorKind::Flex(_) => self.on::<Flex>(samtone),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            DispatchTensorKind::Cube(_) => self.on::<burn::backend::Cube>(samtone),
            #[allow(unreachable_patterns)]
            // Which variants there are depends on the features of burn in the whole build.
            other => Err(invalid("query", format!("on {:?}", other.device()), ALLOWED)),
        }
    }

    fn on<B>(self, samtone: &SamToNe) -> Result<(Tensor<1>, Report)>
    where
        B: SamToNeBackend,
        DispatchTensor: DispatchKindConversion<B>
            + DispatchKindConversion<Autodiff<B, NoCheckpointing>>
            + DispatchKindConversion<Autodiff<B, BalancedCheckpointing>>,
    {
        match self.autodiff()? {
            DispatchAutodiffContext::Disabled => self.finish::<B>(samtone, own::<B>),
            DispatchAutodiffContext::Enabled(GradientCheckpointingStrategy::Disabled) => {
                self.finish::<Autodiff<B, NoCheckpointing>>(samtone, lifted::<B, Autodiff<B, NoCheckpointing>>)
            }
            DispatchAutodiffContext::Enabled(GradientCheckpointingStrategy::Balanced) => {
                self.finish::<Autodiff<B, BalancedCheckpointing>>(
                    samtone,
                    lifted::<B, Autodiff<B, BalancedCheckpointing>>,
                )
            }
        }
    }

    /// Whether autodiff knows of a tensor, and how it checkpoints.
    fn autodiff(&self) -> Result<DispatchAutodiffContext> {
        let mut found = DispatchAutodiffContext::Disabled;
        let others = [("query", &self.query), ("passage", &self.passage)];
        let others = others.into_iter().chain(self.temperature.tensor().map(|x| ("temperature", x)));
        for (argument, tensor) in others {
            match (found, tensor.autodiff) {
                (_, DispatchAutodiffContext::Disabled) => {}
                (DispatchAutodiffContext::Disabled, enabled) => found = enabled,
                (found, enabled) if found == enabled => {}
                (found, enabled) => {
                    let value = format!("a tensor with gradient checkpointing {enabled:?}");
                    return Err(invalid(argument, value, format!("that of the other tensors, {found:?}")));
                }
            }
        }
        Ok(found)
    }

    fn finish<B: SamToNeBackend>(
        self,
        samtone: &SamToNe,
        take: fn(&'static str, DispatchTensor) -> Result<FloatTensor<B>>,
    ) -> Result<(Tensor<1>, Report)>
    where
        DispatchTensor: DispatchKindConversion<B>,
    {
        let inputs = Inputs::<B> {
            query: take("query", self.query)?,
            passage: take("passage", self.passage)?,
            temperature: self.temperature.try_map(|tensor| take("temperature", tensor))?,
        };
        let outputs = B::samtone(samtone, inputs, Wanted::default())?;
        let loss = DispatchTensor::from_backend(BackendTensor::Float(outputs.loss));
        Ok((Tensor::from_dispatch(loss), outputs.report))
    }
}

/// A backend's own tensor.
fn own<B: Backend>(argument: &'static str, tensor: DispatchTensor) -> Result<FloatTensor<B>>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    let place = format!("{:?}", tensor.kind.device());
    match DispatchTensor::try_into_backend(tensor) {
        Ok(BackendTensor::Float(tensor)) => Ok(tensor),
        Ok(other) => Err(invalid(argument, format!("of type {}", other.dtype().name()), "f32, f16 or bf16")),
        Err(_) => Err(invalid(
            argument,
            format!("on {place}"),
            "tensors of one backend, that of `query`: `to_device` is differentiable",
        )),
    }
}

/// A backend's own tensor for autodiff; a constant, if autodiff does not know of it.
fn lifted<B, A>(argument: &'static str, tensor: DispatchTensor) -> Result<FloatTensor<A>>
where
    B: Backend,
    A: AutodiffBackend<InnerBackend = B>,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<A>,
{
    match tensor.autodiff {
        DispatchAutodiffContext::Disabled => own::<B>(argument, tensor).map(A::from_inner),
        DispatchAutodiffContext::Enabled(_) => own::<A>(argument, tensor),
    }
}
