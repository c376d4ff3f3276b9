//! The shaders: which pieces make a module, and the variants that a device's features and limits allow.
//!
//! WGSL has no includes. Every file of `shaders/` is a piece of WGSL. A module is some of these files, one after the other.

use std::fmt;

/// How a device stores packed embeddings, how large tiles are, and how workgroups reduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Variant {
    /// Packed embeddings are f16 instead of f32. This is for inputs of 16 bits on devices with the feature.
    pub f16: bool,
    /// Tiles have 128 x 128 cosines instead of 64 x 64.
    pub large_tiles: bool,
    /// Workgroups reduce by exchanges within subgroups instead of in workgroup memory.
    pub subgroups: bool,
    /// What multiplies.
    pub products: Products,
}

/// What multiplies tiles of embeddings and of gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Products {
    /// Fused multiply-add on f32.
    #[default]
    Fma,
    /// Cooperative matrices of f16 with f32 sums. Plans use them if the adapter has them and they pass a check. They need f16 storage,
    /// small tiles and subgroups. Gradients of logits are sums of two f16.
    Cooperative,
    /// The shaders of `Cooperative`, but with fragments that need no such matrices. They are slow, and serve tests.
    Emulated,
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
        let products = match self.products {
            Products::Fma => "",
            Products::Cooperative => ", cooperative matrices",
            Products::Emulated => ", emulated cooperative matrices",
        };
        write!(f, "{storage} storage, tiles of {t} x {t}{subgroups}{products}", t = self.tile())
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
    /// gradient_tile.wgsl: gradients of logits, tile by tile.
    GradientTile,
    /// gradient_product.wgsl: their products with the embeddings.
    GradientProduct,
    /// project.wgsl: gradients of the embeddings, from sums in a buffer of their own.
    Project,
    /// project.wgsl, from sums that lie where the gradients will be.
    ProjectInPlace,
    /// prepare.wgsl for several prefixes.
    PreparePrefixes,
    /// logsumexp.wgsl for several prefixes.
    LogSumExpPrefixes,
    /// gradient_tile.wgsl for several prefixes.
    GradientTilePrefixes,
    /// prefixes.wgsl: sums over prefixes, of what belongs to rows and embeddings.
    Prefixes,
    /// project_prefixes.wgsl: as [`Module::Project`], for calls with prefixes.
    ProjectPrefixes,
    /// project_prefixes.wgsl, from sums that lie where the gradients will be.
    ProjectPrefixesInPlace,
}

impl Module {
    /// All modules.
    pub const ALL: [Self; 13] = [
        Self::Prepare,
        Self::LogSumExp,
        Self::Combine,
        Self::GradientTile,
        Self::GradientProduct,
        Self::Project,
        Self::ProjectInPlace,
        Self::PreparePrefixes,
        Self::LogSumExpPrefixes,
        Self::GradientTilePrefixes,
        Self::Prefixes,
        Self::ProjectPrefixes,
        Self::ProjectPrefixesInPlace,
    ];

    /// Its name in messages. It is that of its file, if the file makes only one module.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::LogSumExp => "logsumexp",
            Self::Combine => "combine",
            Self::GradientTile => "gradient_tile",
            Self::GradientProduct => "gradient_product",
            Self::Project => "project",
            Self::ProjectInPlace => "project_in_place",
            Self::PreparePrefixes => "prepare_prefixes",
            Self::LogSumExpPrefixes => "logsumexp_prefixes",
            Self::GradientTilePrefixes => "gradient_tile_prefixes",
            Self::Prefixes => "prefixes",
            Self::ProjectPrefixes => "project_prefixes",
            Self::ProjectPrefixesInPlace => "project_prefixes_in_place",
        }
    }

    /// Its entry points.
    pub const fn entries(self) -> &'static [&'static str] {
        match self {
            Self::Prepare | Self::PreparePrefixes => &["reset", "pack", "positives"],
            Self::LogSumExp | Self::LogSumExpPrefixes => &["logsumexp"],
            Self::Combine => &["merge", "combine", "finish_forward", "load_upstream", "sum_dots", "finish_backward"],
            Self::GradientTile | Self::GradientTilePrefixes => &["gradient_tile"],
            Self::Prefixes => &["join", "clear_radials", "merge_radials", "radials"],
            Self::GradientProduct => &["product_rows", "product_columns", "clear"],
            Self::Project | Self::ProjectInPlace | Self::ProjectPrefixes | Self::ProjectPrefixesInPlace => &["project"],
        }
    }

    /// Its WGSL. `enable_subgroups` adds a directive that browsers demand for subgroups, and that naga does not know.
    pub fn source(self, variant: Variant, enable_subgroups: bool) -> String {
        const NUMBERS: &str = include_str!("../../shaders/common/numbers.wgsl");
        const LOGIT: &str = include_str!("../../shaders/common/logit.wgsl");
        const STATE: &str = include_str!("../../shaders/common/state.wgsl");
        const TILE: &str = include_str!("../../shaders/common/tile.wgsl");
        const SUMS: &str = include_str!("../../shaders/common/sums.wgsl");
        let storage = match variant.f16 {
            true => include_str!("../../shaders/common/storage_f16.wgsl"),
            false => include_str!("../../shaders/common/storage_f32.wgsl"),
        };
        let reduce = match variant.subgroups {
            true => include_str!("../../shaders/common/reduce_subgroup.wgsl"),
            false => include_str!("../../shaders/common/reduce_shared.wgsl"),
        };
        let blocks = match variant.large_tiles {
            true => include_str!("../../shaders/common/blocks_4.wgsl"),
            false => include_str!("../../shaders/common/blocks_1.wgsl"),
        };
        // The next two pairs are what multiplies, first tiles of embeddings, then tiles of gradients. The pieces before them say what a
        // tile of 64 or of 128 is for fused multiply-add, or what a fragment is for cooperative matrices.
        let plain = [
            include_str!("../../shaders/common/multiply_f32.wgsl"),
            include_str!("../../shaders/gradient_product.wgsl"),
        ];
        let cooperative = [
            include_str!("../../shaders/common/multiply_cooperative.wgsl"),
            include_str!("../../shaders/gradient_product_cooperative.wgsl"),
        ];
        const MATRICES: &str = include_str!("../../shaders/common/cooperative.wgsl");
        const EMULATED: &str = include_str!("../../shaders/common/emulated.wgsl");
        let ([tile_parts, product_parts], [multiply, product]) = match (variant.products, variant.large_tiles) {
            (Products::Fma, true) => (
                [
                    include_str!("../../shaders/common/tile_128.wgsl"),
                    include_str!("../../shaders/common/product_128.wgsl"),
                ],
                plain,
            ),
            (Products::Fma, false) => (
                [
                    include_str!("../../shaders/common/tile_64.wgsl"),
                    include_str!("../../shaders/common/product_64.wgsl"),
                ],
                plain,
            ),
            (Products::Cooperative, _) => ([MATRICES; 2], cooperative),
            (Products::Emulated, _) => ([EMULATED; 2], cooperative),
        };
        const ONE: &str = include_str!("../../shaders/common/one_prefix.wgsl");
        const SEVERAL: &str = include_str!("../../shaders/common/several_prefixes.wgsl");
        const LOGSUMEXP: &str = include_str!("../../shaders/logsumexp.wgsl");
        const GRADIENT_TILE: &str = include_str!("../../shaders/gradient_tile.wgsl");
        let tiles =
            |prefixes, pass| vec![NUMBERS, LOGIT, STATE, storage, blocks, TILE, prefixes, tile_parts, multiply, pass];
        const PROJECTION: &str = include_str!("../../shaders/common/projection.wgsl");
        const PROJECT: &str = include_str!("../../shaders/project.wgsl");
        const PROJECT_PREFIXES: &str = include_str!("../../shaders/project_prefixes.wgsl");
        const APART: &str = include_str!("../../shaders/common/sums_apart.wgsl");
        const IN_PLACE: &str = include_str!("../../shaders/common/sums_in_place.wgsl");
        let prepare =
            |prefixes| vec![NUMBERS, STATE, storage, reduce, prefixes, include_str!("../../shaders/prepare.wgsl")];
        let project = |sums, pass| vec![NUMBERS, STATE, storage, reduce, PROJECTION, sums, pass];
        let pieces = match self {
            Self::Prepare => prepare(include_str!("../../shaders/common/prepare_one.wgsl")),
            Self::PreparePrefixes => prepare(include_str!("../../shaders/common/prepare_several.wgsl")),
            Self::LogSumExp => tiles(ONE, LOGSUMEXP),
            Self::LogSumExpPrefixes => tiles(SEVERAL, LOGSUMEXP),
            Self::Combine => vec![NUMBERS, LOGIT, STATE, reduce, include_str!("../../shaders/combine.wgsl")],
            Self::GradientTile => tiles(ONE, GRADIENT_TILE),
            Self::GradientTilePrefixes => tiles(SEVERAL, GRADIENT_TILE),
            Self::Prefixes => vec![NUMBERS, STATE, include_str!("../../shaders/prefixes.wgsl")],
            Self::GradientProduct => vec![storage, SUMS, blocks, product_parts, product],
            Self::Project => project(APART, PROJECT),
            Self::ProjectInPlace => project(IN_PLACE, PROJECT),
            Self::ProjectPrefixes => project(APART, PROJECT_PREFIXES),
            Self::ProjectPrefixesInPlace => project(IN_PLACE, PROJECT_PREFIXES),
        };
        let mut source = String::new();
        if variant.f16 && !matches!(self, Self::Combine | Self::Prefixes) {
            source.push_str("enable f16;\n");
        }
        // Cooperative matrices need the directive, too, because each subgroup multiplies fragments of its own.
        let exchanges = [reduce, MATRICES, EMULATED].iter().any(|piece| pieces.contains(piece));
        if variant.subgroups && enable_subgroups && exchanges {
            source.push_str("enable subgroups;\n");
        }
        if pieces.contains(&MATRICES) {
            source.push_str("enable wgpu_cooperative_matrix;\n");
        }
        source.push_str(&pieces.join("\n"));
        source
    }
}
