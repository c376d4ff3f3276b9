//! What only CUDA lets one choose in a problem: the arithmetic, the tile, the architecture, and whether cosines are stored.

use super::waves::{Contents, bounded_bytes};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::prefix::Prefix;
use crate::super_blocks::Tiling;

/// What multiplies. In all of them, sums of products are f32 and are rounded to nearest at least every 64 terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Tensor cores on f16. Every row is scaled by a power of two to a norm near 2¹², so bf16 inputs are exact down to 2⁻³⁷ of their
    /// norm, too. Gradients of logits are rounded to the 11 bits of f16. On the golden files this changes gradients by up to 2.7e-4 of
    /// their size, as measured on the emulator. But it is too much where a negative points in the direction of its row's positive, such as
    /// a copy of the positive without ids. The gradients of the two cancel but for this rounding, and in a trained batch with copies the
    /// rounding is larger than all the rest. So it is the default of no type.
    F16,
    /// Like `F16`, but gradients of logits are sums of two f16, which have 22 bits. That takes 18 B²d operations instead of 12. The
    /// default of f16 and bf16.
    F16x2,
    /// Tensor cores on sums of two f16, which have 22 bits. Each product takes three of f16, which makes 36 B²d operations. The default of
    /// f32.
    F16x3,
    /// Fused multiply-add on f32. It is slow, and serves to check the others.
    Exact,
}

impl Arithmetic {
    /// Its name in the names of kernels.
    pub(super) const fn suffix(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F16x2 => "f16x2",
            Self::F16x3 => "f16x3",
            Self::Exact => "f32",
        }
    }

    /// The arithmetic whose kernels compute its cosines. Two that differ in the gradients alone share them.
    pub(super) const fn of_cosines(self) -> Self {
        match self {
            Self::F16x2 => Self::F16,
            Self::F16 | Self::F16x3 | Self::Exact => self,
        }
    }

    /// The arithmetic whose kernels turn its stored cosines into gradients. Two that differ in how cosines are multiplied share them.
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
    /// The first pass stores as many as the workspace holds, in f32. The gradient recomputes the others, with the same bits. If the
    /// workspace holds all, there are 9 B²d operations instead of 12.
    Kept,
    /// The gradient recomputes all of them.
    Recomputed,
}

/// Which kernels a plan may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Architecture {
    /// The kernels of compute capability 8.0, which run on every later device, too.
    #[default]
    Sm80,
    /// These, and the kernels of 9.0 (H100, H200), which run on no other device.
    Sm90a {
        /// Multiprocessors of the device. Two make a cluster, so this says how many clusters share the work. Any number is right.
        multiprocessors: u32,
    },
}

/// The tile of cosines that a thread block computes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tile {
    /// 64 x 64. Small batches get more thread blocks by it.
    Small,
    /// 128 x 128. Each product reads half as much memory as with `Small`.
    Large,
    /// 128 x 128, of which a cluster of two thread blocks computes a square of 256 x 256 together. Only for [`Architecture::Sm90a`].
    Cluster,
}

/// A set of kernels, one for each pass that multiplies. Another tile, or another architecture, is a row of [`Tile::kernels`].
pub(super) struct KernelSet {
    /// Length of a tile in rows and in columns.
    pub edge: usize,
    /// A cluster of this many thread blocks visits a square of this many by this many tiles together.
    pub together: usize,
    /// Threads of a thread block.
    pub threads: u32,
    /// How the names of the kernels end.
    pub suffix: &'static str,
    /// The files of the kernels, without `.cu`: of the sums, of the gradients of logits, of both with prefixes, and of the products of
    /// gradients.
    pub files: [&'static str; 5],
    /// How the embeddings are packed that the kernels read.
    pub packing: Packing,
    /// Whether a launch has no more clusters than the device holds, which take its squares in turn. If not, it has a thread block for each
    /// tile.
    pub persistent: bool,
    /// Dynamic shared memory of a thread block, in bytes.
    shared_bytes: fn(&Self, Pass, Arithmetic) -> u32,
}

/// Where the bytes of packed embeddings lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// One row after the other.
    Rows,
    /// Panels of 128 bytes of every row, swizzled as wgmma reads them. Every part of a space begins at a multiple of a square's length.
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
            files: [
                "logsumexp_sm80",
                "gradient_tile_sm80",
                "logsumexp_prefixes_sm80",
                "gradient_tile_prefixes_sm80",
                "gradient_product_sm80",
            ],
            packing: Packing::Rows,
            persistent: false,
            shared_bytes: |set, pass, arithmetic| match pass {
                // What is known of the indices on both axes, the tile's gradients in padded rows, and four bytes for each warp.
                Pass::KeptGradientTile => {
                    let (edge, bytes) = (set.edge as u32, arithmetic.bytes() as u32);
                    2 * 48 * edge + arithmetic.gradient_planes() as u32 * edge * (edge * bytes + 16) + set.threads / 8
                }
                // The same, and for each column of warps and each row of warps as many numbers as a tile is long.
                Pass::GradientTilePrefixes => {
                    let (edge, kept) = (set.edge as u32, (set.shared_bytes)(set, Pass::KeptGradientTile, arithmetic));
                    kept + (edge / 32 + 2) * 4 * edge
                }
                // Three stages of both operands, 128 bytes of each row.
                Pass::LogSumExp | Pass::LogSumExpPrefixes | Pass::GradientTile | Pass::GradientProduct => {
                    3 * 2 * 128 * set.edge as u32
                }
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
                files: [
                    "logsumexp_sm90a",
                    "gradient_tile_sm90a",
                    "logsumexp_prefixes_sm90a",
                    "gradient_tile_prefixes_sm90a",
                    "gradient_product_sm90a",
                ],
                packing: Packing::Panels,
                persistent: true,
                // Stages of operands, and what the headers of the kernels list.
                shared_bytes: |_, pass, _| match pass {
                    Pass::LogSumExp => 231_504,
                    Pass::LogSumExpPrefixes => 203_856,
                    Pass::GradientTilePrefixes => 230_560,
                    Pass::GradientTile | Pass::KeptGradientTile => 200_848,
                    Pass::GradientProduct => 196_672,
                },
            },
        }
    }

    /// Its length in rows and in columns.
    pub const fn edge(self) -> usize {
        self.kernels().edge
    }

    /// Bytes of the bounded workspace that hold the smallest super-block of this tile in every arithmetic.
    fn room(self, prefixes: Option<usize>) -> usize {
        let arithmetics = [Arithmetic::F16, Arithmetic::F16x2, Arithmetic::F16x3, Arithmetic::Exact];
        let bytes =
            arithmetics.map(|arithmetic| bounded_bytes(self.step(), self.step(), Contents { arithmetic, prefixes }));
        bytes.into_iter().max().unwrap_or(0)
    }

    pub(super) const fn tiling(self) -> Tiling {
        Tiling { edge: self.edge(), together: self.kernels().together }
    }

    /// Length of a square, which kernels visit at once. Super-blocks, blocks of rows of the sums, and tiles along the dimension are cut at
    /// multiples of it.
    pub(super) const fn step(self) -> usize {
        self.edge() * self.kernels().together
    }

    /// Threads of a thread block.
    pub(super) const fn threads(self) -> u32 {
        self.kernels().threads
    }

    /// Dynamic shared memory of a thread block of a pass, in bytes.
    pub(super) fn shared_bytes(self, pass: Pass, arithmetic: Arithmetic) -> u32 {
        let set = self.kernels();
        (set.shared_bytes)(&set, pass, arithmetic)
    }
}

/// The kernels that are compiled for every arithmetic and tile. All multiply matrices, but for those that read stored cosines:
/// `KeptGradientTile` and `GradientTilePrefixes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    LogSumExp,
    LogSumExpPrefixes,
    GradientTile,
    KeptGradientTile,
    GradientTilePrefixes,
    GradientProduct,
}

impl Pass {
    /// Name of the kernel, and of its file without `.cu`.
    pub(super) fn kernel(self, arithmetic: Arithmetic, tile: Tile) -> (String, &'static str) {
        let KernelSet { suffix, files: [sums, tiles, prefix_sums, prefix_tiles, products], .. } = tile.kernels();
        let (name, file) = match self {
            Self::LogSumExp => ("logsumexp", sums),
            Self::LogSumExpPrefixes => ("logsumexp_prefixes", prefix_sums),
            Self::GradientTile => ("gradient_tile", tiles),
            Self::KeptGradientTile => ("gradient_tile_kept", tiles),
            Self::GradientTilePrefixes => ("gradient_tile_prefixes", prefix_tiles),
            Self::GradientProduct => ("gradient_product", products),
        };
        let arithmetic = match self {
            Self::LogSumExp | Self::LogSumExpPrefixes => arithmetic.of_cosines(),
            Self::KeptGradientTile | Self::GradientTilePrefixes => arithmetic.of_gradients(),
            Self::GradientTile | Self::GradientProduct => arithmetic,
        };
        (format!("{name}_{}_{suffix}", arithmetic.suffix()), file)
    }
}

/// Batches of at least this many queries take large tiles. Smaller ones take small tiles, which give the multiprocessors four times as
/// many thread blocks to share. The number follows from counts: 2048² cosines are 256 large tiles, two for each multiprocessor of the
/// largest GPUs. It has not been measured yet.
const LARGE_TILE_ROWS: usize = 2048;
/// Batches of at least this many queries take clusters: 2048² cosines are 64 squares, about as many as a device has clusters.
const CLUSTER_ROWS: usize = 2048;

/// A problem for this backend. It also says how the backend computes it: see the methods that begin with `with_`.
pub type Problem<'a> = crate::problem::Problem<'a, Choices>;

/// A problem for any backend, with the choices left to the plan.
impl<'a> From<crate::Problem<'a>> for Problem<'a> {
    fn from(problem: crate::Problem<'a>) -> Self {
        let choices = Choices::default();
        let crate::Problem {
            pairs,
            dtype,
            dim,
            prefixes,
            row_strides,
            rows,
            gradients,
            upstream,
            device_upstream,
            workspace_bytes,
            ..
        } = problem;
        Self {
            pairs,
            dtype,
            dim,
            prefixes,
            row_strides,
            rows,
            gradients,
            upstream,
            device_upstream,
            workspace_bytes,
            choices,
        }
    }
}

/// What a caller may choose. The plan chooses what is `None`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choices {
    arithmetic: Option<Arithmetic>,
    tile: Option<Tile>,
    architecture: Option<Architecture>,
    cosines: Option<Cosines>,
}

/// How the CUDA backend computes a problem.
impl Problem<'_> {
    /// Another arithmetic than the default of the type. `F16x3` and `Exact` hold embeddings of every type. `F16` and `F16x2` round those
    /// of f32.
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.choices.arithmetic = Some(arithmetic);
        self
    }

    /// Another tile than the plan would take. [`Plan::new`](super::Plan::new) refuses [`Tile::Cluster`] without [`Architecture::Sm90a`].
    /// [`Arithmetic::Exact`] exists for [`Tile::Small`] alone, and takes it whatever is asked for.
    pub fn with_tile(mut self, tile: Tile) -> Self {
        self.choices.tile = Some(tile);
        self
    }

    /// Raises the bound on the workspace, if there is one, to what the smallest super-block of `tile` takes in any arithmetic. It is for
    /// callers who choose the tile, but not the bound.
    pub fn with_room_for(mut self, tile: Tile) -> Self {
        let room = tile.room(self.several().map(<[_]>::len));
        self.workspace_bytes = self.workspace_bytes.map(|bytes| bytes.max(room));
        self
    }

    /// Says whether cosines are stored for the gradient or recomputed. By itself a plan stores them where it estimates that this saves
    /// time. Callers of loss and metrics alone want [`Cosines::Recomputed`], because nothing reads stored cosines then.
    ///
    /// Stored cosines leave less of the workspace to waves. Smaller waves add the terms of a gradient up in another order, so its last
    /// bits may differ.
    pub fn with_cosines(mut self, cosines: Cosines) -> Self {
        self.choices.cosines = Some(cosines);
        self
    }

    /// The prefixes of a call that needs the kernels of prefixes; `None` for the whole embedding alone, with weight 1.
    pub(super) fn several(&self) -> Option<&[Prefix]> {
        let whole = Prefix { dim: self.dim, weight: 1.0 };
        (*self.prefixes != [whole]).then_some(&self.prefixes)
    }

    /// How many entries of an embedding are read: those of the longest prefix.
    pub(super) fn entries(&self) -> usize {
        self.prefixes.last().map_or(self.dim, |prefix| prefix.dim)
    }

    /// What memory must hold for each cosine follows from this.
    pub(super) fn contents(&self) -> Contents {
        Contents { arithmetic: self.arithmetic(), prefixes: self.several().map(<[_]>::len) }
    }

    pub(super) fn cosines(&self) -> Option<Cosines> {
        self.choices.cosines
    }

    pub(super) fn arithmetic(&self) -> Arithmetic {
        self.choices.arithmetic.unwrap_or(match self.dtype {
            DType::F32 | DType::F64 => Arithmetic::F16x3, // problems refuse f64
            DType::F16 | DType::BF16 => Arithmetic::F16x2,
        })
    }

    /// Says which kernels the plan may take. The default is [`Architecture::Sm80`]. Calls that make the plan for a device take the kernels
    /// of that device.
    pub fn with_architecture(mut self, architecture: Architecture) -> Self {
        self.choices.architecture = Some(architecture);
        self
    }

    /// The problem on a device of this architecture, unless the caller chose another.
    #[cfg(feature = "cuda")]
    pub(super) fn on(mut self, architecture: Architecture) -> Self {
        self.choices.architecture.get_or_insert(architecture);
        self
    }

    /// Number of clusters that share the work of the kernels of 9.0; 0 without these kernels.
    pub(super) fn clusters(&self) -> usize {
        match self.choices.architecture.unwrap_or_default() {
            Architecture::Sm80 => 0,
            Architecture::Sm90a { multiprocessors } => (multiprocessors as usize / 2).max(1),
        }
    }

    /// The tile that a plan takes: the caller's choice, or else the largest that suits the batch and whose smallest super-block the
    /// workspace holds. If it holds none of these, the smallest tile.
    pub(super) fn tile(&self, fits: impl Fn(Tile) -> bool) -> Result<Tile> {
        let (hopper, m) = (self.clusters() > 0, self.pairs.rows());
        Ok(match (self.choices.tile, self.arithmetic()) {
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
