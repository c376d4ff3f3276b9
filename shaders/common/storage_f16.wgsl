// storage_f16.wgsl: packed embeddings as f16, for inputs of 16 bits. Rows are scaled to a norm of 2^12 … 2^13 by a power of two,
// so f16 inputs lose nothing, and bf16 inputs only what lies 2^-37 below a row's norm (2^-26 where a device flushes subnormal
// numbers). The alternative is storage_f32.wgsl. Needs `enable f16;` at the head of the module.

alias Packed = vec4<f16>;

fn widen(x: Packed) -> vec4<f32> {
    return vec4<f32>(x);
}

fn narrow(x: vec4<f32>) -> Packed {
    return vec4<f16>(x);
}
