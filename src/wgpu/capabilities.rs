//! What a device allows, as far as plans depend on it.

use super::shaders::{Products, Variant};
use crate::dtype::DType;

/// Limits and features of a device. The default is what every WebGPU device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// `maxStorageBufferBindingSize`.
    pub max_binding_bytes: u64,
    /// `maxBufferSize`.
    pub max_buffer_bytes: u64,
    /// `maxComputeWorkgroupsPerDimension`.
    pub max_workgroups: u32,
    /// `maxComputeWorkgroupStorageSize`.
    pub workgroup_bytes: u32,
    /// Whether shaders may use f16.
    pub f16: bool,
    /// Whether shaders may exchange within subgroups.
    pub subgroups: bool,
    /// What multiplies: cooperative matrices, if the device has them and they were checked.
    pub products: Products,
    /// Batches of at least this many queries or passages take tiles of 128 x 128, if the device has the memory for them. Smaller batches
    /// would have too few such tiles to occupy most GPUs. Besides, the shaders of small tiles compile sooner.
    pub large_tile_rows: usize,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            max_binding_bytes: 128 << 20,
            max_buffer_bytes: 256 << 20,
            max_workgroups: 65_535,
            workgroup_bytes: 16 << 10,
            f16: false,
            subgroups: false,
            products: Products::Fma,
            large_tile_rows: LARGE_TILE_ROWS,
        }
    }
}

/// With 2048 queries and as many passages, S has 256 large tiles.
const LARGE_TILE_ROWS: usize = 2048;

/// Workgroup memory of the shaders with tiles of 128 x 128.
const LARGE_TILE_BYTES: u32 = 32 << 10;

impl Capabilities {
    /// The variant that suits the device for large batches of embeddings of a type.
    pub fn variant(&self, dtype: DType) -> Variant {
        let large_tiles = self.workgroup_bytes >= LARGE_TILE_BYTES; // cooperative matrices need as much
        let f16 = self.f16 && dtype.bytes() == 2;
        let cooperative = self.products != Products::Fma && f16 && self.subgroups && large_tiles;
        Variant {
            f16,
            large_tiles: large_tiles && !cooperative,
            subgroups: self.subgroups,
            products: if cooperative { self.products } else { Products::Fma },
        }
    }

    /// Whether the device can run a variant.
    pub fn allow(&self, variant: Variant) -> bool {
        (self.f16 || !variant.f16)
            && (self.subgroups || !variant.subgroups)
            && (self.workgroup_bytes >= LARGE_TILE_BYTES || !variant.large_tiles)
            && (variant.products == Products::Fma || self.variant(DType::F16) == variant)
    }
}
