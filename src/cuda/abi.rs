//! What host and kernels share: structs, parameters, constants. Each is declared here and in kernels/. tests/cuda_abi.rs compares names,
//! types, order, sizes and values with the PTX and with the C++ of the emulator. What members mean is said in kernels/.
//!
//! For the driver, for tests and for adapters; no part of the stable interface.
#![allow(missing_docs)] // kernels/ says it

use super::schedule::{Address, Argument};
use crate::dtype::DType;
use crate::loss::Block;

/// A type that a kernel reads or writes.
pub trait Shared {
    const BYTES: usize;
    const ALIGNMENT: usize;
    /// Appends the value as the kernel finds it in memory.
    fn put(&self, to: &mut Argument);
}

macro_rules! numbers {
    ($($type:ident)*) => {$(
        impl Shared for $type {
            const BYTES: usize = size_of::<$type>();
            const ALIGNMENT: usize = Self::BYTES;
            fn put(&self, to: &mut Argument) {
                to.bytes.extend(self.to_le_bytes());
            }
        }
    )*};
}
numbers! { u32 i32 u64 f32 f64 }

/// A flag is a u32 in kernels.
impl Shared for bool {
    const BYTES: usize = u32::BYTES;
    const ALIGNMENT: usize = u32::ALIGNMENT;
    fn put(&self, to: &mut Argument) {
        u32::from(*self).put(to);
    }
}

impl Shared for Address {
    const BYTES: usize = u64::BYTES;
    const ALIGNMENT: usize = u64::ALIGNMENT;
    fn put(&self, to: &mut Argument) {
        to.pointers.push((to.bytes.len(), *self));
        0_u64.put(to);
    }
}

impl<T: Shared, const N: usize> Shared for [T; N] {
    const BYTES: usize = N * T::BYTES;
    const ALIGNMENT: usize = T::ALIGNMENT;
    fn put(&self, to: &mut Argument) {
        self.iter().for_each(|value| value.put(to));
    }
}

/// A count as kernels have it. Plans check that every count fits; a saturated one would be refused by the kernel's own bounds.
pub(super) fn number(count: usize) -> u32 {
    count.try_into().unwrap_or(u32::MAX)
}

/// Size and alignment of a struct of members of these sizes and alignments.
const fn layout(members: &[(usize, usize)]) -> (usize, usize) {
    let (mut bytes, mut alignment, mut k) = (0, 1, 0);
    while k < members.len() {
        assert!(bytes % members[k].1 == 0, "padding before a member is a member");
        bytes += members[k].0;
        alignment = if alignment < members[k].1 { members[k].1 } else { alignment };
        k += 1;
    }
    assert!(bytes % alignment == 0, "padding at the end is a member");
    (bytes, alignment)
}

/// A struct, or the parameters of kernels: its name and its members, each with name, type and size. For tests.
pub type Table = (&'static str, &'static [(&'static str, &'static str, usize)]);

macro_rules! structs {
    ($($(#[$meta:meta])* struct $name:ident { $($member:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Debug, Clone, Copy, PartialEq)]
            pub struct $name {
                $(pub $member: $type,)*
            }

            impl Shared for $name {
                const BYTES: usize = layout(&[$((<$type as Shared>::BYTES, <$type as Shared>::ALIGNMENT)),*]).0;
                const ALIGNMENT: usize = layout(&[$((<$type as Shared>::BYTES, <$type as Shared>::ALIGNMENT)),*]).1;
                fn put(&self, to: &mut Argument) {
                    $(self.$member.put(to);)*
                }
            }
        )*
        pub const STRUCTS: &[Table] =
            &[$((stringify!($name), &[$((stringify!($member), stringify!($type), <$type as Shared>::BYTES)),*])),*];
        const _: &[usize] = &[$($name::BYTES),*];
    };
}

macro_rules! parameters {
    ($($(#[$meta:meta])* $kernel:ident: struct $name:ident { $($member:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            pub struct $name {
                $(pub $member: $type,)*
            }

            impl Parameters for $name {
                fn arguments(&self) -> Vec<Argument> {
                    vec![$(Argument::of(&self.$member)),*]
                }
            }
        )*
        /// A kernel has the parameters of every entry whose name its own begins with, in order.
        pub const PARAMETERS: &[Table] =
            &[$((stringify!($kernel), &[$((stringify!($member), stringify!($type), <$type as Shared>::BYTES)),*])),*];
    };
}

macro_rules! constants {
    ($($name:ident: $type:ty = $value:expr;)*) => {
        $(pub const $name: $type = $value;)*
        pub const CONSTANTS: &[(&str, f64)] = &[$((stringify!($name), $name as f64)),*];
    };
}

constants! {
    NONE: u32 = crate::candidates::NONE;
    NOT_KEPT: u64 = u64::MAX;
    COSINE_TIE: f64 = crate::mask::COSINE_TIE;
    QP: usize = Block::QP.index();
    PQ: usize = Block::PQ.index();
    QQ: usize = Block::QQ.index();
    PP: usize = Block::PP.index();
    BLOCKS: usize = Block::ALL.len();
    MAX_CUTS: usize = 8;
    MAX_SUPER_BLOCKS: usize = 8;
    TYPE_F32: u32 = DType::F32.code();
    TYPE_F16: u32 = DType::F16.code();
    TYPE_BF16: u32 = DType::BF16.code();
    PACK_F16: u32 = 0;
    PACK_F16X3: u32 = 1;
    PACK_F32: u32 = 2;

    // Threads and shared memory of the kernels that visit rows, rows of their blocks, numbers that a block of `combine` leaves.
    REDUCE_THREADS: u32 = 256;
    REDUCE_BYTES: u32 = 64;
    ROWS_PER_BLOCK: usize = 8;
    COMBINED_ROWS: usize = 64;
    FOUND: usize = 11;

    // Words of the array `status`.
    NON_FINITE_QUERY: usize = 0;
    NON_FINITE_PASSAGE: usize = 1;
    ZERO_QUERY: usize = 2;
    ZERO_PASSAGE: usize = 3;
    NO_NEGATIVE: usize = 4;
    NO_NEGATIVE_GROUP: usize = 5;
    STATUS_WORDS: usize = 8;

    // Numbers of the array `results`.
    LOSS: usize = 0;
    PRECISION_QP: usize = 1;
    MRR_QP: usize = 2;
    PRECISION_PQ: usize = 3;
    MRR_PQ: usize = 4;
    SHIFT: usize = 5;
    BETA_SUM: usize = 6;
    GRAD_TAU: usize = 7;
    GRAD_LOG_BETA: usize = 8;
    SQUARES: usize = 9;
    SKIPPED: usize = 10;
    RESULTS: usize = 16;
}

structs! {
    // problem.cuh
    #[derive(Default)]
    struct Edge {
        begin: u32, end: u32, space: u32, block: u32, anchors: bool, sums: bool, gradients: bool, tiles: u32, packed: u32,
    }
    #[derive(Default)]
    struct SuperBlock {
        row: Edge, col: Edge, first_tile: u32, tiles: u32, triangle: bool, ranks: bool, counted: bool, first_square: u32,
        row_partials: u64, col_partials: u64, gradient: u64,
    }
    struct Wave { count: u32, tiles: u32, blocks: [SuperBlock; MAX_SUPER_BLOCKS], }
    struct Tower { packed: Address, plane: u64, panel: u64, inverse: Address, candidates: Address, }
    struct Towers { of: [Tower; 2], row_bytes: u32, masked: bool, }
    struct Beta { high: f32, low: f32, }
    struct Partial { sum: f32, exponent: i32, }
    #[repr(C)]
    #[derive(bytemuck::Pod, bytemuck::Zeroable)]
    struct ExpSum { sum: f64, exponent: i32, padding: u32, }
    #[repr(C)]
    #[derive(bytemuck::Pod, bytemuck::Zeroable)]
    struct Group { coefficient: f64, blocks: u32, copies: u32, }

    // cosines.cuh, outputs.cuh, raw.cuh
    struct Cosines { kept: Address, first: [u64; MAX_SUPER_BLOCKS], }
    struct Outputs {
        count: u32, blocks: u32, cuts: [u32; MAX_CUTS], first_block: [u32; MAX_CUTS], sums: Address, stride: u64,
    }
    struct Product { of: [Outputs; 2], dim: u32, tiles_along_dim: u32, accumulate: bool, padding: u32, }
    struct Raw { data: Address, row_bytes: u64, dim: u32, dtype: u32, }

    // prepare.cu
    struct Packing {
        raw: Raw, order: Address, packed: Address, plane: u64, inverse: Address, inverse_norm: Address, faults: Address,
        row_pitch: u64, panel: u64, indices: u32, padded: u32, row_bytes: u32, format: u32, swizzled: bool, parts: u32,
        index: [u32; MAX_CUTS], row: [u32; MAX_CUTS],
    }
    struct Positives {
        positives: Address, row_keys: Address, positive: Address, anchors: Address, ticket: Address, margin: f64, wanted: bool,
        padding: u32,
    }
    struct Prepare { of: [Packing; 2], positives: Positives, }

    // combine.cu
    struct Merge { partials: Address, counts: Address, anchor_index: Address, tile: u32, first: bool, }
    struct Combine {
        sums: Address, above: Address, positive: Address, weight: Address, groups: Address, row_losses: Address, diagonal: Address,
        log_coefficients: Address, results: Address, faults: [Address; 2], found: Address, status: Address, ticket: Address,
        beta: f64, rows: u32, group_count: u32, indices: [u32; 2], zero_is_error: bool, empty_is_error: bool, merges_only: bool,
        padding: u32,
    }

    // project.cu
    struct Projection {
        own: Raw, other: Raw, sums: Address, sums_stride: u64, inverse: Address, inverse_norm: Address,
        other_inverse_norm: Address, out: Address, out_row_bytes: u64, out_type: u32, rows: u32, first_row: u32, is_passage: bool,
    }
    struct Dots { dots: Address, results: Address, count: u32, first: bool, }
    struct Backward {
        of: [Projection; 2], dots: Dots, diagonal: Address, positives: Address, anchor_index: Address, occurrence_start: Address,
        occurrences: Address, anchor_row: Address, upstream: Address, status: Address, beta: f64, factor: f64, row_begin: u32,
        row_end: u32, zero_is_error: bool, padding: u32,
    }

    // skip_squares.cu
    struct Masses { row: Partial, col: Partial, }
    struct Choice {
        log_coefficients: Address, diagonal: Address, masses: Address, skipped: Address, log2_share: f64, rows: u32, step: u32,
        together: u32, padding: u32,
    }
}

/// What a kernel is launched with.
pub mod kernels {
    use super::*;

    /// Parameters of a kernel, or the last of them.
    pub trait Parameters {
        fn arguments(&self) -> Vec<Argument>;
    }

    parameters! {
        prepare: struct Preparation { all: Prepare, }
        logsumexp: struct LogSumExp {
            wave: Wave, towers: Towers, rows: Address, beta: Beta, partials: Address, counts: Address, cosines: Cosines,
        }
        combine: struct Combination { wave: Wave, m: Merge, c: Combine, }
        square_masses: struct SquareMasses { wave: Wave, partials: Address, masses: Address, tile: u32, together: u32, }
        choose_skipped: struct ChooseSkipped { wave: Wave, towers: Towers, c: Choice, }
        count_skipped: struct CountSkipped { wave: Wave, skipped: Address, results: Address, together: u32, first: bool, }
        gradient_tile: struct GradientTile {
            wave: Wave, towers: Towers, rows: Address, beta: Beta, log_coefficients: Address, positive: Address,
            results: Address, row_count: u32, gradients: Address, plane: u64, dots: Address, skipped: Address,
        }
        gradient_tile_kept: struct Kept { cosines: Cosines, }
        gradient_product: struct GradientProduct {
            wave: Wave, towers: Towers, gradients: Address, plane: u64, product: Product, skipped: Address,
        }
        sum_dots: struct SumDots { dots: Dots, }
        project: struct Projecting { b: Backward, }
    }
}
