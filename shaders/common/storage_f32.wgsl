// storage_f32.wgsl: packed embeddings as f32. The alternative is storage_f16.wgsl.

alias Packed = vec4<f32>;

fn widen(x: Packed) -> vec4<f32> {
    return x;
}

fn narrow(x: vec4<f32>) -> Packed {
    return x;
}
