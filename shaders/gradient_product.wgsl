// gradient_product.wgsl: products of the gradients of a super-block with the embeddings across: sums of gradients.
// Math     rows     sum_m += Σ_k ĝ_mk·packed_k, m an index of the row edge, k one of the column edge
//          columns  sum_m += Σ_k ĝ_km·packed_k, m an index of the column edge, k one of the row edge
// In/out   gradients: row-major ĝ as vectors; packed: embeddings of the edge across · sums: f32, row-major with a stride
// Groups   64 indices x 64 numbers of an embedding each: grid (⌈d / 64⌉, ⌈indices / 64⌉)
// Shared   a: 64 x 16 of ĝ, as it lies; b: 16 rows of 64 numbers
// Numerics f32; sums end after 64 terms and are added to the total. One writer for each sum, super-blocks in the order of the
//          dispatches: same bits on every run. The alternative is gradient_product_cooperative.wgsl

@group(0) @binding(1) var<storage, read> gradients: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> packed: array<Packed>;

const EDGE = 64u;
const DEPTH = 16u;
const A_ROW = 5u; // vectors of a row of `a` along k, with one of padding
const FLUSH = 4u;

var<workgroup> a: array<vec4<f32>, EDGE * A_ROW>;
var<workgroup> b: array<vec4<f32>, DEPTH * EDGE / 4u>;

fn load_packed(start: u32, column: u32, index: u32) {
    let k = start + index / 16u;
    let vector = column / 4u + index % 16u;
    var x = vec4<f32>();
    if k < params.depth && vector < params.row_vectors {
        x = widen(packed[params.packed_base + k * params.row_vectors + vector]);
    }
    b[index] = x;
}

// Four rows first, first + step, … of sums, four numbers of each.
fn store(total: mat4x4<f32>, first: u32, step: u32, column: u32) {
    for (var i = 0u; i < 4u; i += 1u) {
        for (var j = 0u; j < 4u; j += 1u) {
            store_sum(first + step * i, column + j, total[i][j]);
        }
    }
}

@compute @workgroup_size(256)
fn product_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let x = index % 16u;
    let y = index / 16u;
    let column = group.x * EDGE;
    let row = group.y * EDGE;
    var total = mat4x4<f32>();
    var part = mat4x4<f32>();
    let stages = (params.depth + DEPTH - 1u) / DEPTH;
    for (var stage = 0u; stage < stages; stage += 1u) {
        a[index / 4u * A_ROW + index % 4u] =
            gradients[params.gradient_base + (row + index / 4u) * params.gradient_vectors + stage * (DEPTH / 4u) + index % 4u];
        load_packed(stage * DEPTH, column, index);
        workgroupBarrier();
        for (var k = 0u; k < DEPTH / 4u; k += 1u) {
            let a0 = a[y * A_ROW + k];
            let a1 = a[(y + 16u) * A_ROW + k];
            let a2 = a[(y + 32u) * A_ROW + k];
            let a3 = a[(y + 48u) * A_ROW + k];
            let b0 = b[k * 64u + x];
            let b1 = b[k * 64u + 16u + x];
            let b2 = b[k * 64u + 32u + x];
            let b3 = b[k * 64u + 48u + x];
            part[0] = fma(vec4(a0.w), b3, fma(vec4(a0.z), b2, fma(vec4(a0.y), b1, fma(vec4(a0.x), b0, part[0]))));
            part[1] = fma(vec4(a1.w), b3, fma(vec4(a1.z), b2, fma(vec4(a1.y), b1, fma(vec4(a1.x), b0, part[1]))));
            part[2] = fma(vec4(a2.w), b3, fma(vec4(a2.z), b2, fma(vec4(a2.y), b1, fma(vec4(a2.x), b0, part[2]))));
            part[3] = fma(vec4(a3.w), b3, fma(vec4(a3.z), b2, fma(vec4(a3.y), b1, fma(vec4(a3.x), b0, part[3]))));
        }
        workgroupBarrier();
        if stage % FLUSH == FLUSH - 1u || stage + 1u == stages {
            total += part;
            part = mat4x4<f32>();
        }
    }
    store(total, row + y, 16u, column + 4u * x);
}

@compute @workgroup_size(256)
fn product_columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let x = index % 16u;
    let y = index / 16u;
    let column = group.x * EDGE;
    let row = group.y * EDGE;
    var total = mat4x4<f32>();
    var part = mat4x4<f32>();
    let stages = (params.depth + DEPTH - 1u) / DEPTH;
    for (var stage = 0u; stage < stages; stage += 1u) {
        a[index] = gradients[params.gradient_base + (stage * DEPTH + index / 16u) * params.gradient_vectors + row / 4u + index % 16u];
        load_packed(stage * DEPTH, column, index);
        workgroupBarrier();
        for (var k = 0u; k < DEPTH; k += 1u) {
            let m = a[k * 16u + y];
            let n = b[k * 16u + x];
            part[0] = fma(vec4(m.x), n, part[0]);
            part[1] = fma(vec4(m.y), n, part[1]);
            part[2] = fma(vec4(m.z), n, part[2]);
            part[3] = fma(vec4(m.w), n, part[3]);
        }
        workgroupBarrier();
        if stage % FLUSH == FLUSH - 1u || stage + 1u == stages {
            total += part;
            part = mat4x4<f32>();
        }
    }
    store(total, row + 4u * y, 1u, column + 4u * x);
}
