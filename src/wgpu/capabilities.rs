//! What a device allows, in the numbers that a plan depends on.

use super::shaders::Variant;
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
        }
    }
}

/// Workgroup memory of the shaders with tiles of 128 x 128.
const LARGE_TILE_BYTES: u32 = 32 << 10;

impl Capabilities {
    /// The variant that suits the device for embeddings of a type.
    pub fn variant(&self, dtype: DType) -> Variant {
        Variant {
            f16: self.f16 && dtype.bytes() == 2,
            large_tiles: self.workgroup_bytes >= LARGE_TILE_BYTES,
            subgroups: self.subgroups,
        }
    }

    /// Whether the device can run a variant.
    pub fn allow(&self, variant: Variant) -> bool {
        (self.f16 || !variant.f16)
            && (self.subgroups || !variant.subgroups)
            && (self.workgroup_bytes >= LARGE_TILE_BYTES || !variant.large_tiles)
    }
}
