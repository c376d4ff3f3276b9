//! Every backend of the library, and those that only tests have.

use super::cuda_emulated::CudaEmulated;
use super::problem::{Buffer, Problem};
use samtone::backend::{self, Backend};
use samtone::cuda::{self, Plan, Tile};
#[cfg(feature = "wgpu")]
use samtone::wgpu::{Capabilities, Products, Wgpu};
use samtone::{DType, Error, Result};

/// The WGSL backend on devices that have less than this one: every variant of the shaders, and buffers bound in many parts.
#[cfg(feature = "wgpu")]
const WGPU: [Wgpu; 6] = [
    Wgpu::restricted("wgpu-baseline", |device| {
        let max_workgroups = device.max_workgroups.min(65_535);
        Some(Capabilities { max_workgroups, ..Capabilities::default() })
    }),
    Wgpu::restricted("wgpu-large-tiles", |device| {
        let chosen = Capabilities { large_tile_rows: 0, ..device };
        chosen.variant(DType::F32).large_tiles.then_some(chosen)
    }),
    Wgpu::restricted("wgpu-f16", |device| {
        device.f16.then_some(Capabilities { workgroup_bytes: SMALL, subgroups: false, ..device })
    }),
    Wgpu::restricted("wgpu-subgroups", |device| {
        device.subgroups.then_some(Capabilities { workgroup_bytes: SMALL, f16: false, ..device })
    }),
    Wgpu::restricted("wgpu-cooperative-emulated", |device| {
        let chosen = Capabilities { products: Products::Emulated, ..device };
        (chosen.variant(DType::F16).products == Products::Emulated).then_some(chosen)
    }),
    // Windows of 256 KiB; grids of 7.
    Wgpu::restricted("wgpu-small-bindings", |device| {
        Some(Capabilities { max_binding_bytes: 256 << 10, max_workgroups: 7, workgroup_bytes: SMALL, ..device })
    }),
];

/// Workgroup memory that every device has.
#[cfg(feature = "wgpu")]
const SMALL: u32 = 16 << 10;

/// The reference first.
pub fn all() -> Vec<&'static dyn Backend> {
    let backends = backend::all().iter().copied().chain([&CudaEmulated::SM80 as &dyn Backend, &CudaEmulated::SM90A]);
    #[cfg(feature = "cuda")]
    let backends = {
        use samtone::cuda::Cuda;
        backends.chain([&Cuda::KEPT as &dyn Backend, &Cuda::CLUSTERS, &Cuda::KEPT_CLUSTERS])
    };
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

/// What a backend for CUDA launches for a problem, in a line: shape, tile, arithmetic. Nothing for other backends.
pub fn plan(backend: &dyn Backend, problem: &Problem, dtype: DType) -> Option<String> {
    let clusters = matches!(backend.name(), "cuda-clusters" | "cuda-emulated-sm90a");
    let (query, passage) = (Buffer::new(dtype, &problem.query), Buffer::new(dtype, &problem.passage));
    let batch = problem.batch(&query, &passage).ok()?;
    let planned = cuda::Problem::new(*batch.pairs(), dtype, problem.dim).ok()?;
    let planned = if clusters { planned.with_room_for(Tile::Cluster) } else { planned };
    let planned = match backend.name() {
        "cuda-emulated" => CudaEmulated::SM80.problem(planned),
        "cuda-emulated-sm90a" => CudaEmulated::SM90A.problem(planned),
        #[cfg(feature = "cuda")]
        "cuda" | "cuda-clusters" => {
            let planned = planned.with_architecture(cuda::Device::first().ok()?.architecture());
            if clusters { planned.with_tile(Tile::Cluster) } else { planned }
        }
        _ => return None,
    };
    Plan::new(&planned).ok().and_then(|plan| plan.to_string().lines().next().map(str::to_owned))
}
