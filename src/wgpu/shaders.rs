//! The shaders: which pieces make a module, and the variants that a device's features and limits allow.
//!
//! WGSL has no includes. Every file of `shaders/` is WGSL; a module is some of them, one after the other.

use std::fmt;

/// How a device stores packed embeddings, how large tiles are, and how workgroups reduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Variant {
    /// Packed embeddings as f16 instead of f32: for inputs of 16 bits on devices with the feature.
    pub f16: bool,
    /// Tiles of 128 x 128 cosines instead of 64 x 64.
    pub large_tiles: bool,
    /// Reductions within subgroups by exchanges instead of workgroup memory.
    pub subgroups: bool,
}

impl Variant {
    /// Edge of a tile of cosines.
    pub const fn tile(self) -> usize {
        if self.large_tiles { 128 } else { 64 }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let storage = if self.f16 { "f16" } else { "f32" };
        let subgroups = if self.subgroups { ", subgroups" } else { "" };
        write!(f, "{storage} storage, tiles of {t} x {t}{subgroups}", t = self.tile())
    }
}

/// A shader module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    /// prepare.wgsl: packed embeddings, norms, positives.
    Prepare,
    /// logsumexp.wgsl: exponential sums of tiles of cosines.
    LogSumExp,
    /// combine.wgsl: loss, metrics, coefficients.
    Combine,
    /// gradient_tile.wgsl: gradients of tiles of cosines.
    GradientTile,
    /// gradient_product.wgsl: their products with the embeddings.
    GradientProduct,
    /// project.wgsl: gradients of the embeddings, from sums in a buffer of their own.
    Project,
    /// project.wgsl, from sums that lie where the gradients go.
    ProjectInPlace,
}

impl Module {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Prepare,
        Self::LogSumExp,
        Self::Combine,
        Self::GradientTile,
        Self::GradientProduct,
        Self::Project,
        Self::ProjectInPlace,
    ];

    /// Its name in messages: that of its file, where there is one module of the file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::LogSumExp => "logsumexp",
            Self::Combine => "combine",
            Self::GradientTile => "gradient_tile",
            Self::GradientProduct => "gradient_product",
            Self::Project => "project",
            Self::ProjectInPlace => "project_in_place",
        }
    }

    /// Entry points.
    pub const fn entries(self) -> &'static [&'static str] {
        match self {
            Self::Prepare => &["reset", "pack", "positives"],
            Self::LogSumExp => &["logsumexp"],
            Self::Combine => &["merge", "combine", "finish_forward", "load_upstream", "sum_dots", "finish_backward"],
            Self::GradientTile => &["gradient_tile"],
            Self::GradientProduct => &["product_rows", "product_columns", "clear"],
            Self::Project | Self::ProjectInPlace => &["project"],
        }
    }

    /// Its WGSL. `enable_subgroups`: with the directive that browsers require and naga does not know.
    pub fn source(self, variant: Variant, enable_subgroups: bool) -> String {
        const NUMBERS: &str = include_str!("../../shaders/common/numbers.wgsl");
        const LOGIT: &str = include_str!("../../shaders/common/logit.wgsl");
        const STATE: &str = include_str!("../../shaders/common/state.wgsl");
        const TILE: &str = include_str!("../../shaders/common/tile.wgsl");
        const MULTIPLY: &str = include_str!("../../shaders/common/multiply_f32.wgsl");
        let storage = match variant.f16 {
            true => include_str!("../../shaders/common/storage_f16.wgsl"),
            false => include_str!("../../shaders/common/storage_f32.wgsl"),
        };
        let reduce = match variant.subgroups {
            true => include_str!("../../shaders/common/reduce_subgroup.wgsl"),
            false => include_str!("../../shaders/common/reduce_shared.wgsl"),
        };
        let tile_size = match variant.large_tiles {
            true => include_str!("../../shaders/common/tile_128.wgsl"),
            false => include_str!("../../shaders/common/tile_64.wgsl"),
        };
        let project = include_str!("../../shaders/project.wgsl");
        let pieces: &[&str] = match self {
            Self::Prepare => &[NUMBERS, STATE, storage, reduce, include_str!("../../shaders/prepare.wgsl")],
            Self::LogSumExp => &[
                NUMBERS,
                LOGIT,
                STATE,
                storage,
                tile_size,
                TILE,
                MULTIPLY,
                include_str!("../../shaders/logsumexp.wgsl"),
            ],
            Self::Combine => &[NUMBERS, LOGIT, STATE, reduce, include_str!("../../shaders/combine.wgsl")],
            Self::GradientTile => &[
                NUMBERS,
                LOGIT,
                STATE,
                storage,
                tile_size,
                TILE,
                MULTIPLY,
                include_str!("../../shaders/gradient_tile.wgsl"),
            ],
            Self::GradientProduct => &[storage, include_str!("../../shaders/gradient_product.wgsl")],
            Self::Project => {
                &[NUMBERS, STATE, storage, reduce, include_str!("../../shaders/common/sums_apart.wgsl"), project]
            }
            Self::ProjectInPlace => {
                &[NUMBERS, STATE, storage, reduce, include_str!("../../shaders/common/sums_in_place.wgsl"), project]
            }
        };
        let mut source = String::new();
        if variant.f16 && self != Self::Combine {
            source.push_str("enable f16;\n");
        }
        if variant.subgroups && enable_subgroups && pieces.contains(&reduce) {
            source.push_str("enable subgroups;\n");
        }
        source.push_str(&pieces.join("\n"));
        source
    }
}
