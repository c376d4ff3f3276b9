// storage_f16.wgsl: packed embeddings as f16, for inputs of 16 bits. A power of two scales each row to a norm of 2^12 … 2^13. So f16 inputs
// lose nothing, and bf16 inputs only what lies 2^-37 below the norm of a row (2^-26 on a device that flushes subnormal numbers). The
// alternative is storage_f32.wgsl. Needs `enable f16;` at the head of the module.

alias Packed = vec4<f16>;

fn widen(x: Packed) -> vec4<f32> {
    return vec4<f32>(x);
}

fn narrow(x: vec4<f32>) -> Packed {
    return vec4<f16>(x);
}
