//! What host and kernels share: structs, parameters, constants. Each is declared here and in kernels/, which says what it means.
//! tests/emulator/cuda_abi.rs compares names, types, order, sizes and values with the PTX and with the C++ of the emulator. Padding of a
//! struct is a member called `padding`, so the order of the members alone says where they lie.
//!
//! This module is for the driver, for tests and for adapters. It is no part of the stable interface.
#![allow(missing_docs)] // kernels/ says what each means

use super::schedule::{Address, Argument};
use crate::candidates;
use crate::dtype::DType;
use crate::loss::Block;
use crate::mask;

/// A type that a kernel reads or writes.
pub trait Shared {
    const BYTES: usize;
    /// Appends the value as the kernel finds it in memory.
    fn put(&self, to: &mut Argument);
    /// The value as parameters of a kernel. A struct gives one parameter for each member.
    fn parameters(&self) -> Vec<Argument> {
        vec![Argument::of(self)]
    }
}

macro_rules! numbers {
    ($($type:ident)*) => {$(
        impl Shared for $type {
            const BYTES: usize = size_of::<$type>();
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
    fn put(&self, to: &mut Argument) {
        u32::from(*self).put(to);
    }
}

impl Shared for Address {
    const BYTES: usize = u64::BYTES;
    fn put(&self, to: &mut Argument) {
        to.pointers.push((to.bytes.len(), *self));
        0_u64.put(to);
    }
}

impl<T: Shared, const N: usize> Shared for [T; N] {
    const BYTES: usize = N * T::BYTES;
    fn put(&self, to: &mut Argument) {
        self.iter().for_each(|value| value.put(to));
    }
}

/// A count as kernels have it. It fits in 32 bits: [`Problem::new`](crate::cuda::Problem::new) bounds indices and numbers of a tower, and
/// [`Plan::new`](super::Plan::new) bounds the workspace, and with it tiles and squares of a wave, and the squares that may be skipped.
pub(super) fn number(count: usize) -> u32 {
    debug_assert!(u32::try_from(count).is_ok(), "{count}");
    count as u32
}

/// A struct as tests see it: its name and its members, each with name, type and size.
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
                const BYTES: usize = 0 $(+ <$type as Shared>::BYTES)*;
                fn put(&self, to: &mut Argument) {
                    $(self.$member.put(to);)*
                }
                fn parameters(&self) -> Vec<Argument> {
                    vec![$(Argument::of(&self.$member)),*]
                }
            }
        )*
        pub const STRUCTS: &[Table] =
            &[$((stringify!($name), &[$((stringify!($member), stringify!($type), <$type as Shared>::BYTES)),*])),*];
    };
}

macro_rules! constants {
    ($($type:ident: $($name:ident = $value:expr),*;)*) => {
        $($(pub const $name: $type = $value;)*)*
        pub const CONSTANTS: &[(&str, f64)] = &[$($((stringify!($name), $name as f64)),*),*];
    };
}

constants! {
    u32: NONE = candidates::NONE;
    u64: NOT_KEPT = u64::MAX;
    f64: COSINE_TIE = mask::COSINE_TIE;
    usize: QP = Block::QP.index(), PQ = Block::PQ.index(), QQ = Block::QQ.index(), PP = Block::PP.index(), BLOCKS = Block::ALL.len();
    usize: MAX_CUTS = 8, MAX_SUPER_BLOCKS = 8;
    u32: TYPE_F32 = DType::F32.code(), TYPE_F16 = DType::F16.code(), TYPE_BF16 = DType::BF16.code();
    u32: PACK_F16 = 0, PACK_F16X3 = 1, PACK_F32 = 2;
    // Threads and shared memory of a thread block of the kernels that visit rows; rows of a thread block; numbers that a thread block of
    // `combine` leaves for the last one.
    u32: REDUCE_THREADS = 256, REDUCE_BYTES = 64;
    usize: ROWS_PER_BLOCK = 8, COMBINED_ROWS = 64, FOUND = 11;
    // Words of the array `status`.
    usize: NON_FINITE_QUERY = 0, NON_FINITE_PASSAGE = 1, ZERO_QUERY = 2, ZERO_PASSAGE = 3, NO_NEGATIVE = 4, NO_NEGATIVE_GROUP = 5;
    usize: REPACKED_QUERY = 6, REPACKED_PASSAGE = 7, CHANGED_QUERY = 8, CHANGED_PASSAGE = 9, STATUS_WORDS = 10;
    // Numbers of the array `results`.
    usize: LOSS = 0, PRECISION_QP = 1, MRR_QP = 2, PRECISION_PQ = 3, MRR_PQ = 4, SHIFT = 5, BETA_SUM = 6, GRAD_TAU = 7;
    usize: GRAD_LOG_BETA = 8, SQUARES = 9, SKIPPED = 10, LARGEST = 11, RESULTS = 16;
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
    struct Prefixes {
        segments: Address, dims: Address, scales: [Address; 2], count: u32, rows: u32, indices: [u32; 2], partials: u64, cosines: u64,
        gradients: u64,
    }
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
    struct Product {
        of: [Outputs; 2], dim: u32, tiles_along_dim: u32, accumulate: bool, padding: u32, columns: Address,
        prefix_gradients: u64,
    }
    struct Raw { data: Address, row_bytes: u64, dim: u32, dtype: u32, }

    // prepare.cu
    struct Packing {
        raw: Raw, order: Address, packed: Address, plane: u64, inverse: Address, inverse_norm: Address, faults: Address,
        row_pitch: u64, panel: u64, indices: u32, padded: u32, row_bytes: u32, format: u32, swizzled: bool, parts: u32,
        index: [u32; MAX_CUTS], row: [u32; MAX_CUTS],
    }
    struct Positives {
        positives: Address, row_keys: Address, positive: Address, anchors: Address, ticket: Address, status: Address,
        margin: f64, wanted: bool, padding: u32,
    }
    struct Prepare { of: [Packing; 2], positives: Positives, }

    // combine.cu
    struct Merge { partials: Address, counts: Address, anchor_index: Address, tile: u32, first: bool, prefix_partials: u64, }
    struct Combine {
        sums: Address, above: Address, positive: Address, weight: Address, groups: Address, prefix_weights: Address, row_losses: Address, diagonal: Address,
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

    // project_prefixes.cu, prefixes.cu
    struct Joined { factors: Address, radials: [Address; 2], element_bytes: u32, padding: u32, }
    struct Join {
        sums: Address, log_coefficients: Address, diagonal: Address, positive: Address, prefix_row_losses: Address,
        prefix_weights: Address, inverse_norm: [Address; 2], anchor_index: Address, row_losses: Address, factors: Address,
        positive_radials: [Address; 2], results: Address, status: Address,
    }
    struct Radials { partials: Address, sums: [Address; 2], tile: u32, first: bool, }
    struct JoinRadials {
        sums: [Address; 2], positive_radials: [Address; 2], inverse_norm: [Address; 2], radials: [Address; 2], results: Address,
        occurrence_start: Address, occurrences: Address, anchor_row: Address, rows: [u32; 2], row_begin: u32, row_end: u32,
    }

    // skip_squares.cu
    struct Masses { row: Partial, col: Partial, }
    struct Choice {
        log_coefficients: Address, diagonal: Address, masses: Address, skipped: Address, log2_share: f64, rows: u32, step: u32,
        together: u32, padding: u32,
    }
}

/// Lists of parameters of kernels. A kernel has the parameters of every list whose name begins its own name, in the order of the lists.
#[allow(non_camel_case_types)] // the names of the kernels
pub mod kernels {
    use super::*;

    structs! {
        struct prepare { all: Prepare, }
        struct prepare_prefixes { prefixes: Prefixes, }
        struct logsumexp {
            wave: Wave, towers: Towers, rows: Address, beta: Beta, partials: Address, counts: Address, cosines: Cosines,
        }
        struct logsumexp_prefixes { prefixes: Prefixes, }
        struct combine { wave: Wave, m: Merge, c: Combine, }
        struct square_masses { wave: Wave, partials: Address, masses: Address, tile: u32, together: u32, }
        struct choose_skipped { wave: Wave, towers: Towers, c: Choice, }
        struct count_skipped { wave: Wave, skipped: Address, results: Address, together: u32, first: bool, }
        struct gradient_tile {
            wave: Wave, towers: Towers, rows: Address, beta: Beta, log_coefficients: Address, positive: Address,
            results: Address, row_count: u32, gradients: Address, plane: u64, dots: Address, skipped: Address,
        }
        struct gradient_tile_kept { cosines: Cosines, }
        struct gradient_tile_prefixes { cosines: Cosines, prefixes: Prefixes, radials: Address, }
        struct gradient_product {
            wave: Wave, towers: Towers, gradients: Address, plane: u64, product: Product, skipped: Address,
        }
        struct sum_dots { dots: Dots, }
        struct project { b: Backward, }
        struct project_prefixes { prefixes: Prefixes, joined: Joined, }
        struct join_prefixes { j: Join, prefixes: Prefixes, }
        struct merge_radials { wave: Wave, r: Radials, prefixes: Prefixes, }
        struct join_radials { j: JoinRadials, prefixes: Prefixes, }
    }
}
