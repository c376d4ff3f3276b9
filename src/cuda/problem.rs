//! What is particular to CUDA in a problem: what multiplies, and in tiles of which size.

use super::waves::bounded_bytes;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::super_blocks::Tiling;

/// What multiplies. Sums of products are f32, rounded to nearest at least every 64 terms, whatever multiplies them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Tensor cores on f16. Every row is scaled by a power of two to a norm near 2¹², so bf16 inputs, too, are exact down to 2⁻³⁷
    /// of their norm. Gradients of logits are rounded to f16, 11 bits: up to 2.7e-4 of the gradients on the golden files, on the
    /// emulator. But where a negative points as its row's positive does, such as a copy of it without ids, the two cancel but for the
    /// rounding: in a trained batch with copies that is more than all the rest. So no type has it as its default.
    F16,
    /// As `F16`, but gradients of logits are sums of two f16, 22 bits: 18 B²d operations instead of 12. The default for f16 and bf16.
    F16x2,
    /// Tensor cores on sums of two f16, 22 bits, by three products: 36 B²d operations. The default for f32.
    F16x3,
    /// Fused multiply-add on f32: slow, for checking the others.
    Exact,
}

impl Arithmetic {
    /// As in the names of kernels.
    pub(super) const fn suffix(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F16x2 => "f16x2",
            Self::F16x3 => "f16x3",
            Self::Exact => "f32",
        }
    }

    /// The one that computes the same cosines.
    pub(super) const fn of_cosines(self) -> Self {
        match self {
            Self::F16x2 => Self::F16,
            Self::F16 | Self::F16x3 | Self::Exact => self,
        }
    }

    /// The one that turns the same cosines into the same gradients.
    pub(super) const fn of_gradients(self) -> Self {
        match self {
            Self::F16x3 => Self::F16x2,
            Self::F16 | Self::F16x2 | Self::Exact => self,
        }
    }

    /// Bytes of an element.
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::F16x2 | Self::F16x3 => 2,
            Self::Exact => 4,
        }
    }

    /// Planes of packed embeddings.
    pub(super) const fn planes(self) -> usize {
        match self {
            Self::F16 | Self::F16x2 | Self::Exact => 1,
            Self::F16x3 => 2,
        }
    }

    /// Planes of gradients of logits.
    pub(super) const fn gradient_planes(self) -> usize {
        match self {
            Self::F16 | Self::Exact => 1,
            Self::F16x2 | Self::F16x3 => 2,
        }
    }
}

/// Where the gradient takes its cosines from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cosines {
    /// The first pass keeps them in f32, as many as the workspace holds: 9 B²d operations instead of 12, if it holds all. The others
    /// are recomputed, with the same bits.
    Kept,
    /// They are multiplied again.
    Recomputed,
}

/// Which kernels a plan may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Architecture {
    /// Those of compute capability 8.0, which run on every later device too.
    #[default]
    Sm80,
    /// Also those of 9.0 (H100, H200), which run on no other device.
    Sm90a {
        /// Multiprocessors of the device, two of which make a cluster: how many clusters share the work. Any number is right.
        multiprocessors: u32,
    },
}

/// Tile of cosines, which one block of threads computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tile {
    /// 64 x 64: more blocks for small batches.
    Small,
    /// 128 x 128: half the traffic for each product.
    Large,
    /// 256 x 256 by a cluster of two blocks, in tiles of 128 x 128: only for [`Architecture::Sm90a`].
    Cluster,
}

/// A set of kernels, one for each pass that multiplies. Another tile, or another architecture, is a row of [`Tile::kernels`].
pub(super) struct KernelSet {
    /// Length of a tile, in rows and columns.
    pub edge: usize,
    /// A square of so many tiles along either axis is visited by one cluster of as many thread blocks.
    pub together: usize,
    /// Threads of a block.
    pub threads: u32,
    /// End of the kernels' names.
    pub suffix: &'static str,
    /// Their files in kernels/: of sums, of gradient tiles, of their products.
    pub files: [&'static str; 3],
    /// How their embeddings are packed.
    pub packing: Packing,
    /// Whether a launch has as many clusters as the device holds, which share its squares, instead of a block for each tile.
    pub persistent: bool,
    /// Dynamic shared memory of a block.
    shared_bytes: fn(&Self, Pass, Arithmetic) -> u32,
}

/// Where the bytes of packed embeddings lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// Row after row.
    Rows,
    /// Panels of 128 bytes of every row, swizzled as wgmma reads them. Every part of the passages begins at a whole square.
    Panels,
}

impl Tile {
    /// The kernels that compute in tiles of this kind.
    pub(super) const fn kernels(self) -> KernelSet {
        let sm80 = KernelSet {
            edge: 64,
            together: 1,
            threads: 128,
            suffix: "64",
            files: ["logsumexp_sm80", "gradient_tile_sm80", "gradient_product_sm80"],
            packing: Packing::Rows,
            persistent: false,
            shared_bytes: |set, pass, arithmetic| match pass {
                // Both axes, the tile's gradients in padded rows, and four bytes for each warp.
                Pass::KeptGradientTile => {
                    let (edge, bytes) = (set.edge as u32, arithmetic.bytes() as u32);
                    2 * 48 * edge + arithmetic.gradient_planes() as u32 * edge * (edge * bytes + 16) + set.threads / 8
                }
                // Three stages of both operands, 128 bytes of each row.
                Pass::LogSumExp | Pass::GradientTile | Pass::GradientProduct => 3 * 2 * 128 * set.edge as u32,
            },
        };
        match self {
            Self::Small => sm80,
            Self::Large => KernelSet { edge: 128, threads: 256, suffix: "128", ..sm80 },
            Self::Cluster => KernelSet {
                edge: 128,
                together: 2,
                threads: 384, // one warpgroup copies, two multiply
                suffix: "sm90a",
                files: ["logsumexp_sm90a", "gradient_tile_sm90a", "gradient_product_sm90a"],
                packing: Packing::Panels,
                persistent: true,
                // Stages of 48 KiB, or as much, and what the headers of the kernels list.
                shared_bytes: |_, pass, _| match pass {
                    Pass::LogSumExp => 231_504,
                    Pass::GradientTile | Pass::KeptGradientTile => 200_848,
                    Pass::GradientProduct => 196_672,
                },
            },
        }
    }

    /// In rows and columns.
    pub const fn edge(self) -> usize {
        self.kernels().edge
    }

    /// What one super-block of this tile takes of the bounded workspace in any arithmetic, in bytes.
    fn room(self) -> usize {
        let arithmetics = [Arithmetic::F16, Arithmetic::F16x2, Arithmetic::F16x3, Arithmetic::Exact];
        let bytes = arithmetics.map(|arithmetic| bounded_bytes(self.step(), self.step(), arithmetic));
        bytes.into_iter().max().unwrap_or(0)
    }

    pub(super) const fn tiling(self) -> Tiling {
        Tiling { edge: self.edge(), together: self.kernels().together }
    }

    /// What edges of super-blocks, blocks of rows of the sums, and tiles along the dimension are multiples of.
    pub(super) const fn step(self) -> usize {
        self.edge() * self.kernels().together
    }

    /// Threads of a block.
    pub(super) const fn threads(self) -> u32 {
        self.kernels().threads
    }

    /// Dynamic shared memory of a block of a pass.
    pub(super) fn shared_bytes(self, pass: Pass, arithmetic: Arithmetic) -> u32 {
        let set = self.kernels();
        (set.shared_bytes)(&set, pass, arithmetic)
    }
}

/// The passes that multiply, and the one that need not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    LogSumExp,
    GradientTile,
    KeptGradientTile,
    GradientProduct,
}

impl Pass {
    /// Kernel and its file, without `.cu`.
    pub(super) fn kernel(self, arithmetic: Arithmetic, tile: Tile) -> (String, &'static str) {
        let KernelSet { suffix, files: [sums, tiles, products], .. } = tile.kernels();
        let (name, file) = match self {
            Self::LogSumExp => ("logsumexp", sums),
            Self::GradientTile => ("gradient_tile", tiles),
            Self::KeptGradientTile => ("gradient_tile_kept", tiles),
            Self::GradientProduct => ("gradient_product", products),
        };
        let arithmetic = match self {
            Self::KeptGradientTile => arithmetic.of_gradients(),
            Self::LogSumExp | Self::GradientTile | Self::GradientProduct => arithmetic,
        };
        (format!("{name}_{}_{suffix}", arithmetic.suffix()), file)
    }
}

/// Batches of as many queries or more take large tiles; below, small tiles give four times as many blocks of threads to share
/// among the multiprocessors. From the counts alone (2048² are 256 large tiles, two for each multiprocessor of the largest
/// GPUs); not measured yet.
const LARGE_TILE_ROWS: usize = 2048;
/// Likewise for clusters: 2048² are 64 squares, about as many as there are clusters.
const CLUSTER_ROWS: usize = 2048;

/// What a caller may choose; the plan does otherwise.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Choice {
    arithmetic: Option<Arithmetic>,
    tile: Option<Tile>,
    architecture: Option<Architecture>,
    cosines: Option<Cosines>,
}

/// How the CUDA backend computes it.
impl Problem<'_> {
    /// Another arithmetic than the default of the type: `F16x3` and `Exact` hold every type, `F16` and `F16x2` round f32.
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.cuda.arithmetic = Some(arithmetic);
        self
    }

    /// Another tile than the plan would take. [`Plan::new`](super::Plan::new) refuses [`Tile::Cluster`] without
    /// [`Architecture::Sm90a`]; [`Arithmetic::Exact`] has [`Tile::Small`] alone and takes that.
    pub fn with_tile(mut self, tile: Tile) -> Self {
        self.cuda.tile = Some(tile);
        self
    }

    /// A workspace bound, if there is one, of at least what one super-block of `tile` takes in any arithmetic: for whoever chooses
    /// the tile and not the bound.
    pub fn with_room_for(mut self, tile: Tile) -> Self {
        self.workspace_bytes = self.workspace_bytes.map(|bytes| bytes.max(tile.room()));
        self
    }

    /// Keeps cosines for the gradient or computes them again, whatever the plan would do: it keeps them where that saves time, by its
    /// own estimate. Loss and metrics alone want [`Cosines::Recomputed`]: whatever is kept for a gradient is written in vain then.
    ///
    /// The workspace of a plan that keeps holds smaller waves, and so adds the terms of a gradient up in another order.
    pub fn with_cosines(mut self, cosines: Cosines) -> Self {
        self.cuda.cosines = Some(cosines);
        self
    }

    pub(super) fn cosines(&self) -> Option<Cosines> {
        self.cuda.cosines
    }

    pub(super) fn arithmetic(&self) -> Arithmetic {
        self.cuda.arithmetic.unwrap_or(match self.dtype {
            DType::F32 | DType::F64 => Arithmetic::F16x3, // problems refuse f64
            DType::F16 | DType::BF16 => Arithmetic::F16x2,
        })
    }

    /// Kernels that a plan may take. [`Plan`](super::Plan) takes those of 8.0 unless told; whatever plans for a device takes the
    /// device's own.
    pub fn with_architecture(mut self, architecture: Architecture) -> Self {
        self.cuda.architecture = Some(architecture);
        self
    }

    /// The same on a device, unless the caller chose.
    #[cfg(feature = "cuda")]
    pub(super) fn on(mut self, architecture: Architecture) -> Self {
        self.cuda.architecture.get_or_insert(architecture);
        self
    }

    /// Clusters that share the work of kernels of 9.0.
    pub(super) fn clusters(&self) -> usize {
        match self.cuda.architecture.unwrap_or_default() {
            Architecture::Sm80 => 0,
            Architecture::Sm90a { multiprocessors } => (multiprocessors as usize / 2).max(1),
        }
    }

    /// The tile that a plan takes: the one chosen, or the first by size whose smallest super-block the workspace holds; if none
    /// does, the last.
    pub(super) fn tile(&self, fits: impl Fn(Tile) -> bool) -> Result<Tile> {
        let (hopper, m) = (self.clusters() > 0, self.pairs.rows());
        Ok(match (self.cuda.tile, self.arithmetic()) {
            (_, Arithmetic::Exact) => Tile::Small, // the only one it is compiled for
            (Some(Tile::Cluster), _) if !hopper => {
                let allowed =
                    "Small and Large; Cluster with Architecture::Sm90a, on a device of compute capability 9.0";
                return Err(Error::invalid("tile", "Cluster", allowed));
            }
            (Some(tile), _) => tile,
            (None, _) if hopper && m >= CLUSTER_ROWS && fits(Tile::Cluster) => Tile::Cluster,
            (None, _) if m >= LARGE_TILE_ROWS && fits(Tile::Large) => Tile::Large,
            (None, _) => Tile::Small,
        })
    }
}
