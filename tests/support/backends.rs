//! Every backend of the library, and those that only tests have.

use super::cuda_emulated::CudaEmulated;
use samtone::backend::{self, Backend};
#[cfg(feature = "wgpu")]
use samtone::wgpu::{Capabilities, Products, Wgpu};
use samtone::{Error, Result};

/// The WGSL backend on devices that have less than this one: every variant of the shaders, and buffers bound in many parts.
#[cfg(feature = "wgpu")]
const WGPU: [Wgpu; 6] = [
    Wgpu::restricted("wgpu-baseline", |device| Capabilities {
        max_workgroups: device.max_workgroups.min(65_535),
        ..Capabilities::default()
    }),
    Wgpu::restricted("wgpu-large-tiles", |device| Capabilities { f16: false, subgroups: false, ..device }),
    Wgpu::restricted("wgpu-f16", |device| Capabilities { workgroup_bytes: 16 << 10, subgroups: false, ..device }),
    Wgpu::restricted("wgpu-subgroups", |device| Capabilities { workgroup_bytes: 16 << 10, f16: false, ..device }),
    Wgpu::restricted("wgpu-cooperative-emulated", |device| Capabilities { products: Products::Emulated, ..device }),
    // Windows of 256 KiB; grids of 7.
    Wgpu::restricted("wgpu-small-bindings", |device| Capabilities {
        max_binding_bytes: 256 << 10,
        max_workgroups: 7,
        workgroup_bytes: 16 << 10,
        ..device
    }),
];

/// The reference first.
pub fn all() -> Vec<&'static dyn Backend> {
    let backends = backend::all().iter().copied().chain([&CudaEmulated as &dyn Backend]);
    #[cfg(feature = "wgpu")]
    let backends = backends.chain(WGPU.iter().map(|b| b as &dyn Backend));
    backends.collect()
}

/// The backend of that name; an error that lists all names otherwise.
pub fn by_name(name: &str) -> Result<&'static dyn Backend> {
    all().into_iter().find(|b| b.name() == name).ok_or_else(|| {
        let names: Vec<_> = all().iter().map(|b| b.name()).collect();
        let (argument, value, allowed) = ("backend", format!("{name:?}"), names.join(", "));
        Error::InvalidArgument { argument, value, allowed }
    })
}
