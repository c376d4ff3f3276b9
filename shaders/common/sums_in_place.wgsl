// sums_in_place.wgsl: sums of gradients where the gradients go, of type f32. The alternative is sums_apart.wgsl.

fn sum_at(at: u32) -> f32 {
    return bitcast<f32>(out[at]);
}
