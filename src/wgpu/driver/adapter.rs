//! Which device an engine is on, and whether it uses the device's cooperative matrices.

use super::check;
use super::engine::Engine;
use crate::error::{Error, Result};
use crate::wgpu::Products;

impl Engine {
    /// An engine on the first device that is found, with every feature and the highest limits that help. Discrete GPUs come first, then
    /// integrated ones, then software.
    ///
    /// # Errors
    /// [`Error::WgpuUnavailable`] if there is no adapter, or none that gives a device.
    pub fn first() -> Result<Self> {
        let unavailable = |reason: String| Error::WgpuUnavailable { reason };
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::PRIMARY;
        let instance = wgpu::Instance::new(descriptor.with_env());
        let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
        let rank = |kind| match kind {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        adapters.sort_by_key(|adapter| rank(adapter.get_info().device_type));
        let mut reasons = Vec::new();
        for adapter in &adapters {
            match Self::on(adapter) {
                Ok(engine) => return Ok(engine),
                Err(error) => reasons.push(format!("{}: {error}", adapter.get_info().name)),
            }
        }
        Err(unavailable(if reasons.is_empty() { "no adapter was found".into() } else { reasons.join("; ") }))
    }

    /// An engine on a new device of an adapter, with every feature and the highest limits that help. It uses cooperative matrices if the
    /// adapter has them and they give what plain arithmetic gives on a small batch.
    ///
    /// # Errors
    /// [`Error::WgpuUnavailable`] if the adapter gives no device.
    pub fn on(adapter: &wgpu::Adapter) -> Result<Self> {
        if has_cooperative_matrices(adapter)
            && let Ok(engine) = Self::request(adapter, wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
        {
            return Ok(engine.with_cooperative_matrices(adapter));
        }
        Self::request(adapter, wgpu::Features::empty())
    }

    /// The engine with cooperative matrices. The device must have been asked for the feature, its adapter must multiply the fragments
    /// that the shaders need, and they must give what plain arithmetic gives on a small batch. Otherwise the engine stays as it was.
    /// Clones that were made earlier do not change.
    pub fn with_cooperative_matrices(self, adapter: &wgpu::Adapter) -> Self {
        let asked = self.device().features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        if !asked || !has_cooperative_matrices(adapter) || !self.agrees(Products::Cooperative) {
            return self;
        }
        self.with_products(Products::Cooperative)
    }

    /// Whether `products` give what plain arithmetic gives on this device, on a small batch. They do not if either fails, or if the device
    /// lacks what they need.
    pub fn agrees(&self, products: Products) -> bool {
        check::agrees(self, products)
    }

    fn request(adapter: &wgpu::Adapter, experimental: wgpu::Features) -> Result<Self> {
        let wanted = wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP | wgpu::Features::TIMESTAMP_QUERY;
        let experimental_features = if experimental.is_empty() {
            wgpu::ExperimentalFeatures::disabled()
        } else {
            // SAFETY: the only experimental feature that is asked for are cooperative matrices. A driver may compute them wrongly, or may
            // not check their bounds. The engine checks their results before it uses them. Shaders load and store whole fragments within
            // what plans bind (`Tower::padded`, whole tiles of scratch).
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("samtone"),
            required_features: (adapter.features() & wanted) | experimental,
            required_limits: adapter.limits(),
            experimental_features,
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|error| Error::WgpuUnavailable { reason: error.to_string() })?;
        Ok(Self::new(&device, &queue))
    }
}

/// Whether the adapter multiplies fragments of 16 x 16 f16 into f32, as shaders/common/cooperative.wgsl does.
fn has_cooperative_matrices(adapter: &wgpu::Adapter) -> bool {
    use wgpu::CooperativeScalarType::{F16, F32};
    adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
        && adapter
            .cooperative_matrix_properties()
            .iter()
            .any(|p| (p.m_size, p.n_size, p.k_size) == (16, 16, 16) && (p.ab_type, p.cr_type) == (F16, F32))
}
