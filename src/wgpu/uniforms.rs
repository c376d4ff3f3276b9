//! What each dispatch tells its shader: the structs `Params` of shaders/*.wgsl. All members have four bytes, so that host and shader lay
//! them out alike. agreement.rs compares names, types and order with the shaders, which say what each member means.

use bytemuck::{Pod, Zeroable};

macro_rules! uniforms {
    ($($(#[$doc:meta])* struct $name:ident { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
        pub(super) struct $name {
            $(pub $field: $type,)*
        }

        #[cfg(test)]
        impl $name {
            pub(super) const MEMBERS: &[(&str, &str)] = &[$((stringify!($field), stringify!($type)),)*];
        }
    )*};
}

uniforms! {
    /// `Params` of prepare.wgsl.
    struct Prepare {
        zero: u32,
        count: u32,
        first: u32,
        dim: u32,
        dtype: u32,
        row_stride: u32,
        raw_base: u32,
        raw_first: u32,
        limit: u32,
        order: u32,
        packed_base: u32,
        row_vectors: u32,
        norms: u32,
        passage: u32,
        other_base: u32,
        other_first: u32,
        other_norms: u32,
        positives: u32,
        row_keys: u32,
        positive: u32,
        anchors: u32,
        margin: f32,
        prefixes: u32,
        segments: u32,
        prefix_words: u32,
    }

    /// `Params` of tile.wgsl.
    struct Tiles {
        zero: u32,
        tiles: u32,
        triangle: u32,
        row_begin: u32,
        row_end: u32,
        col_begin: u32,
        col_end: u32,
        row_tiles: u32,
        col_tiles: u32,
        row_base: u32,
        col_base: u32,
        row_vectors: u32,
        row_candidates: u32,
        col_candidates: u32,
        row_norms: u32,
        col_norms: u32,
        anchors: u32,
        row_anchors: u32,
        col_anchors: u32,
        row_sums: u32,
        col_sums: u32,
        ranks: u32,
        counted: u32,
        masked: u32,
        row_partials: u32,
        col_partials: u32,
        row_coefficients: u32,
        col_coefficients: u32,
        positive: u32,
        results: u32,
        gradient: u32,
        dots: u32,
        plane: u32,
        prefixes: u32,
        segments: u32,
        prefix_words: u32,
        prefix_partials: u32,
        prefix_plane: u32,
        row_radials: u32,
        col_radials: u32,
        prefix_radials: u32,
        beta_head: f32,
        beta_middle: f32,
        beta_tail: f32,
    }

    /// `Params` of combine.wgsl.
    struct Combine {
        zero: u32,
        count: u32,
        begin: u32,
        across: u32,
        along: u32,
        tile: u32,
        triangle: u32,
        partials: u32,
        candidates: u32,
        block_sums: u32,
        ranks: u32,
        sums: u32,
        positive: u32,
        weights: u32,
        groups: u32,
        group_count: u32,
        coefficients: u32,
        diagonal: u32,
        row_losses: u32,
        group_results: u32,
        workgroups: u32,
        results: u32,
        zero_is_error: u32,
        empty_is_error: u32,
        dots: u32,
        tiles: u32,
        first: u32,
        factor: f32,
        factor_exponent: i32,
        beta: f32,
        beta_head: f32,
        beta_middle: f32,
        beta_tail: f32,
        prefix: u32,
        prefixes: u32,
        prefix_partials: u32,
        prefix_sums: u32,
        room: i32,
        radial: u32,
        prefix_weight: f32,
        prefix_exponent: i32,
    }

    /// `Params` of gradient_product.wgsl.
    struct Product {
        zero: u32,
        indices: u32,
        depth: u32,
        gradient_base: u32,
        gradient_vectors: u32,
        packed_base: u32,
        row_vectors: u32,
        vectors: u32,
        sums_base: u32,
        sums_stride: u32,
        dim: u32,
        accumulate: u32,
        plane: u32,
    }

    /// `Params` of project.wgsl.
    struct Project {
        zero: u32,
        count: u32,
        first: u32,
        dim: u32,
        row_vectors: u32,
        own_base: u32,
        own_first: u32,
        other_base: u32,
        other_first: u32,
        sums_base: u32,
        sums_first: u32,
        sums_stride: u32,
        out_base: u32,
        out_stride: u32,
        out_type: u32,
        norms: u32,
        other_norms: u32,
        diagonal: u32,
        results: u32,
        passage: u32,
        positives: u32,
        candidates: u32,
        occurrence_start: u32,
        occurrences: u32,
        row_begin: u32,
        row_end: u32,
        factor: f32,
        factor_exponent: i32,
        prefixes: u32,
        segments: u32,
        prefix_words: u32,
        radials: u32,
    }

    /// `Params` of prefixes.wgsl.
    struct Prefixes {
        zero: u32,
        count: u32,
        begin: u32,
        prefixes: u32,
        prefix_words: u32,
        norms: u32,
        other_norms: u32,
        diagonal: u32,
        positives: u32,
        radials: u32,
        across: u32,
        along: u32,
        tile: u32,
        triangle: u32,
        partials: u32,
        prefix_partials: u32,
        radial: u32,
        results: u32,
        passage: u32,
        candidates: u32,
        occurrence_start: u32,
        occurrences: u32,
        row_begin: u32,
        row_end: u32,
    }
}

/// A number as part·2^exponent with 1 ≤ |part| < 2, or as 0. The shaders call this `Scaled`.
pub(super) fn scaled(x: f64) -> (f32, i32) {
    if x == 0.0 {
        return (0.0, 0);
    }
    // The exponent of a subnormal number cannot be read from its bits, so it is made larger first.
    let (x, shift) = if x.abs() < f64::MIN_POSITIVE { (x * (1_u64 << 54) as f64, -54) } else { (x, 0) };
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let part = f64::from_bits((x.to_bits() & !(0x7ff << 52)) | (1023 << 52)) as f32;
    // Rounding to f32 may give 2.
    if part.abs() == 2.0 { (part / 2.0, exponent + shift + 1) } else { (part, exponent + shift) }
}

/// x as the sum of three f32, of which the first has 12 bits.
pub(super) fn split(x: f64) -> [f32; 3] {
    let nearest = x as f32;
    let head = f32::from_bits(nearest.to_bits() & 0xffff_f000);
    [head, nearest - head, (x - f64::from(nearest)) as f32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_split_without_loss() {
        for x in [1.0, -0.3, 144.269_504_088_896_34, 1e-6, 5e-324, -1e308, 1.999_999_999_999] {
            let (part, exponent) = scaled(x);
            let back = f64::from(part) * 2_f64.powi(exponent / 2) * 2_f64.powi(exponent - exponent / 2);
            approx::assert_relative_eq!(back, x, max_relative = 1e-7);
            assert!((1.0..2.0).contains(&part.abs()));
        }
        assert_eq!(scaled(0.0), (0.0, 0));
        let x = 100.0 * std::f64::consts::LOG2_E;
        let [head, middle, tail] = split(x);
        assert_eq!(head.to_bits() & 0xfff, 0);
        approx::assert_relative_eq!(f64::from(head) + f64::from(middle) + f64::from(tail), x, max_relative = 1e-14);
    }
}
