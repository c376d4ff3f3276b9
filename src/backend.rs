//! What computes a loss: the one list that conformance tests and tools walk over.

use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::output::{Evaluation, GradientBuffers, TemperatureGradient};
use crate::{cpu, reference};

/// One implementation of the loss family.
pub trait Backend: Sync {
    /// Name for command lines: lower case, one word.
    fn name(&self) -> &'static str;

    /// Element types of embeddings it takes. Others give [`Error::Unsupported`].
    fn dtypes(&self) -> &'static [DType];

    /// Whether this machine can run it: an [`Error::Unsupported`] that says what is missing (a device, a driver), if not.
    fn available(&self) -> Result<()> {
        Ok(())
    }

    /// Loss, metrics and gradients; the latter times `upstream`, into the caller's `buffers`. See
    /// [`reference::loss_and_gradients_into`] for formulas and errors.
    fn loss_and_gradients_into(
        &self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)>;
}

/// The definition in f64, see [`mod@reference`].
struct Reference;

impl Backend for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn dtypes(&self) -> &'static [DType] {
        &DType::ALL
    }

    fn loss_and_gradients_into(
        &self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        reference::loss_and_gradients_into(batch, upstream, buffers)
    }
}

/// Tiles over all cores, see [`cpu`].
struct Cpu;

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn dtypes(&self) -> &'static [DType] {
        &[DType::F32, DType::F16, DType::BF16]
    }

    fn loss_and_gradients_into(
        &self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        cpu::loss_and_gradients_into(batch, upstream, buffers)
    }
}

/// Every backend of this build, the reference first.
pub fn all() -> &'static [&'static dyn Backend] {
    &[
        &Reference,
        &Cpu,
        #[cfg(feature = "cuda")]
        &crate::cuda::Cuda::PLANNED,
        #[cfg(feature = "wgpu")]
        &const { crate::wgpu::Wgpu::new() },
    ]
}

/// The backend of that name; an error that lists all names otherwise.
pub fn by_name(name: &str) -> Result<&'static dyn Backend> {
    all().iter().copied().find(|b| b.name() == name).ok_or_else(|| {
        let names: Vec<_> = all().iter().map(|b| b.name()).collect();
        Error::invalid("backend", format!("{name:?}"), names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_found_by_its_name_alone() {
        for backend in all() {
            assert_eq!(by_name(backend.name()).map(|b| b.name()), Ok(backend.name()));
        }
        let names: Vec<_> = all().iter().map(|b| b.name()).collect();
        let error = by_name("abacus").err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("abacus") && names.iter().all(|n| error.contains(n)), "{error}");
    }
}
