// sums.wgsl: the sums that gradient_product.wgsl and gradient_product_cooperative.wgsl add to.

struct Params {
    zero: u32,
    indices: u32,         // of the axis whose sums these are
    depth: u32,           // indices of the other axis
    gradient_base: u32,   // vectors of four numbers from the start of the gradients
    gradient_vectors: u32, // of a row of ĝ
    packed_base: u32,     // vectors from the start of the packed embeddings to the first index of the other axis
    row_vectors: u32,     // of a packed row
    vectors: u32,         // that are multiplied here: those of a segment
    sums_base: u32,       // numbers from the start of `sums` to the first index of the axis
    sums_stride: u32,
    dim: u32,
    accumulate: u32,      // whether to add to what is there
    plane: u32,           // cooperative: numbers from the first to the second plane of ĝ
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read_write> sums: array<f32>;

// Sets number `column` of the sum of index m, or adds to it. Parameters are read outside of branches, because calls share them there.
fn store_sum(m: u32, column: u32, sum: f32) {
    let at = params.sums_base + m * params.sums_stride + column;
    let within = (m < params.indices) & (column < params.dim);
    let accumulate = params.accumulate != 0u;
    if within {
        var x = sum;
        if accumulate {
            x += sums[at];
        }
        sums[at] = x;
    }
}

// Stores zeros where nothing else writes.
@compute @workgroup_size(64)
fn clear(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let row = group.y * groups.x + group.x;
    if row < params.indices {
        for (var column = index; column < params.dim; column += 64u) {
            sums[params.sums_base + row * params.sums_stride + column] = 0.0;
        }
    }
}
