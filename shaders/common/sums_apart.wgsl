// sums_apart.wgsl: sums of gradients in a buffer of their own. The alternative is sums_in_place.wgsl.

@group(0) @binding(6) var<storage, read> sums: array<f32>;

fn sum_at(at: u32) -> f32 {
    return sums[at];
}
