//! The backend `wgpu` for batches in host memory. It copies them to the first device, and the results back.

use super::engine::Engine;
use super::host::run;
use crate::Problem;
use crate::backend::Backend;
use crate::batch::{Batch, EmbeddingsMut};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::output::{Evaluation, GradientBuffers, Gradients, LossAndGradients, TemperatureGradient, check_upstream};
use crate::problem::GradientOutput;
use crate::wgpu::{Capabilities, Plan};
use std::sync::{Mutex, PoisonError};

/// The backend `wgpu` for batches in host memory. It computes on the first device.
#[derive(Debug, Clone, Copy)]
pub struct Wgpu {
    name: &'static str,
    choose: Option<Choose>,
}

/// Says what is used of what a device allows; `None` if the device lacks what the backend is for.
type Choose = fn(Capabilities) -> Option<Capabilities>;

impl Wgpu {
    /// The backend with everything that the device has.
    pub const fn new() -> Self {
        Self { name: "wgpu", choose: None }
    }

    #[doc(hidden)]
    /// The backend with what `choose` leaves of the device's limits and features, under another name. It is for tests of variants and of
    /// smaller devices. If `choose` gives `None`, the backend is not available. It does not run another variant instead.
    pub const fn restricted(name: &'static str, choose: fn(Capabilities) -> Option<Capabilities>) -> Self {
        Self { name, choose: Some(choose) }
    }
}

impl Wgpu {
    fn capabilities(&self, engine: &Engine) -> Result<Capabilities> {
        let device = *engine.capabilities();
        let Some(choose) = self.choose else { return Ok(device) };
        choose(device).ok_or_else(|| Error::Unsupported {
            backend: self.name,
            what: "this device".into(),
            allowed: "devices with the features and limits of its variant".into(),
        })
    }
}

impl Default for Wgpu {
    fn default() -> Self {
        Self::new()
    }
}

/// The device of all calls. The first call finds it, and the others share it, so that shaders are compiled once. After it was lost, the
/// next call looks for one again. But if no device was found, no call looks again, because looking takes long.
static ENGINE: Mutex<Option<Result<Engine>>> = Mutex::new(None);

fn engine() -> Result<Engine> {
    ENGINE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Engine::first).clone()
}

/// Loss, metrics and gradients of a batch in host memory, in one call on the first device. [`mod@crate::reference`] has the formulas.
/// [`Step`](crate::wgpu::Step) takes embeddings that are on a device.
///
/// q is M × d, p is N × d, in f32, f16 or bf16; gradients come back as f32, multiplied by `upstream`.
///
/// # Errors
/// [`Error::WgpuUnavailable`] if there is no device. [`Error::Wgpu`] if it was lost; the next call takes a new one. Otherwise as
/// [`cpu::loss_and_gradients`](crate::cpu::loss_and_gradients).
pub fn loss_and_gradients(batch: &Batch<'_>, upstream: f64) -> Result<LossAndGradients> {
    let backend = Wgpu::new();
    let compute = |buffers: GradientBuffers<'_>| backend.loss_and_gradients_into(batch, upstream, buffers);
    let (evaluation, gradients) = Gradients::computed(batch.rows(), batch, compute)?;
    Ok(LossAndGradients { evaluation, gradients })
}

impl Backend for Wgpu {
    fn name(&self) -> &'static str {
        self.name
    }

    fn dtypes(&self) -> &'static [DType] {
        &[DType::F32, DType::F16, DType::BF16]
    }

    fn available(&self) -> Result<()> {
        self.capabilities(&engine()?).map(drop)
    }

    fn loss_and_gradients_into(
        &self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        check_upstream(upstream)?;
        buffers.expect_shapes(batch.rows(), batch)?;
        let GradientBuffers { query, passage } = buffers;
        // Gradients come back as f32 and are rounded here. Gradients of 16 bits from the device would need even row strides.
        let output = |x: &Option<EmbeddingsMut<'_>>| {
            x.as_ref().map(|x| GradientOutput { dtype: DType::F32, row_stride: x.dim() })
        };
        let problem = Problem::new(*batch.pairs(), batch.dtype(), batch.dim())?
            .with_row_strides(batch.query().row_stride(), batch.passage().row_stride())?
            .with_gradients(output(&query), output(&passage))?
            .with_upstream(upstream)?;
        let engine = engine()?;
        let plan = Plan::new(&problem, &self.capabilities(&engine)?)?;
        let result = run(&engine, plan, batch, GradientBuffers { query, passage });
        if let Err(Error::Wgpu { .. }) = result {
            *ENGINE.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        result
    }
}
