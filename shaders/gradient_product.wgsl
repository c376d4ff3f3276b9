// gradient_product.wgsl: sums of gradients: products of the gradients of a super-block with the embeddings of its other axis.
// Math     rows     sum_m += Σ_k ĝ_mk·packed_k, where m is an index of the rows and k one of the columns
//          columns  sum_m += Σ_k ĝ_km·packed_k, where m is an index of the columns and k one of the rows
// In/out   gradients: row-major ĝ as vectors; packed: embeddings of the other axis · sums: f32, row-major with a stride
//          With prefixes each segment has a dispatch of its own, whose ĝ is the plane of its prefix
// Groups   EDGE indices x EDGE numbers of an embedding each: grid (⌈d / EDGE⌉, ⌈indices / EDGE⌉); product_64.wgsl, product_128.wgsl
// Shared   a: EDGE x 16 or 16 x EDGE of ĝ, as it lies; b: 16 rows of EDGE numbers
// Numerics f32. A sum ends after 64 terms, and is then added to the total. Each sum has one writer, and the super-blocks are added in the
//          order of the dispatches, so that every run gives the same bits. The alternative is gradient_product_cooperative.wgsl

@group(0) @binding(1) var<storage, read> gradients: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> packed: array<Packed>;

const EDGE = 64u * PARTS;
const VECTORS = EDGE / 4u;
const DEPTH = 16u;
const A_ROW = 5u; // vectors of a row of `a` along k. One of them is padding, so that rows 16 apart lie in different banks
const FLUSH = 4u;

var<workgroup> a: array<vec4<f32>, EDGE * A_ROW>;
var<workgroup> b: array<vec4<f32>, DEPTH * VECTORS>;

fn load_packed(first: u32, column: u32, index: u32) {
    for (var at = index; at < DEPTH * VECTORS; at += 256u) {
        let k = first + at / VECTORS;
        let vector = column / 4u + at % VECTORS;
        var x = vec4<f32>();
        if k < params.depth && vector < params.vectors {
            x = widen(packed[params.packed_base + k * params.row_vectors + vector]);
        }
        b[at] = x;
    }
}

// part + a·b, where a is four rows along k, and b is four of k.
fn add_rows(part: mat4x4<f32>, a0: vec4<f32>, a1: vec4<f32>, a2: vec4<f32>, a3: vec4<f32>, b0: vec4<f32>, b1: vec4<f32>, b2: vec4<f32>, b3: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        fma(vec4(a0.w), b3, fma(vec4(a0.z), b2, fma(vec4(a0.y), b1, fma(vec4(a0.x), b0, part[0])))),
        fma(vec4(a1.w), b3, fma(vec4(a1.z), b2, fma(vec4(a1.y), b1, fma(vec4(a1.x), b0, part[1])))),
        fma(vec4(a2.w), b3, fma(vec4(a2.z), b2, fma(vec4(a2.y), b1, fma(vec4(a2.x), b0, part[2])))),
        fma(vec4(a3.w), b3, fma(vec4(a3.z), b2, fma(vec4(a3.y), b1, fma(vec4(a3.x), b0, part[3])))),
    );
}

// part + m·n for one k, where m is four indices and n is four numbers.
fn add_outer(part: mat4x4<f32>, m: vec4<f32>, n: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        fma(vec4(m.x), n, part[0]),
        fma(vec4(m.y), n, part[1]),
        fma(vec4(m.z), n, part[2]),
        fma(vec4(m.w), n, part[3]),
    );
}

// Stores the blocks of a thread. Block (r, c) has four indices, `step` apart, and four numbers.
fn store(total: Totals, first: u32, between: u32, step: u32, column: u32) {
    var sums = total;
    for (var r = 0u; r < PARTS; r += 1u) {
        for (var c = 0u; c < PARTS; c += 1u) {
            for (var i = 0u; i < 4u; i += 1u) {
                for (var j = 0u; j < 4u; j += 1u) {
                    store_sum(first + between * r + step * i, column + 64u * c + j, sums.block[r * PARTS + c][i][j]);
                }
            }
        }
    }
}

@compute @workgroup_size(256)
fn product_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let x = index % 16u;
    let y = index / 16u;
    let column = group.x * EDGE;
    let row = group.y * EDGE;
    var total = Totals();
    var part = Totals();
    let stages = (params.depth + DEPTH - 1u) / DEPTH;
    for (var stage = 0u; stage < stages; stage += 1u) {
        for (var at = index; at < EDGE * DEPTH / 4u; at += 256u) {
            // Rows beyond the end of the axis have numbers of something else. Their products are not stored.
            a[at / 4u * A_ROW + at % 4u] =
                gradients[params.gradient_base + (row + at / 4u) * params.gradient_vectors + stage * (DEPTH / 4u) + at % 4u];
        }
        load_packed(stage * DEPTH, column, index);
        workgroupBarrier();
        for (var k = 0u; k < DEPTH / 4u; k += 1u) {
            add_row_products(&part, y * A_ROW + k, 4u * k * VECTORS + x);
        }
        workgroupBarrier();
        if stage % FLUSH == FLUSH - 1u || stage + 1u == stages {
            add_totals(&total, &part);
        }
    }
    store(total, row + y, 64u, 16u, column + 4u * x);
}

@compute @workgroup_size(256)
fn product_columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let x = index % 16u;
    let y = index / 16u;
    let column = group.x * EDGE;
    let row = group.y * EDGE;
    var total = Totals();
    var part = Totals();
    let stages = (params.depth + DEPTH - 1u) / DEPTH;
    for (var stage = 0u; stage < stages; stage += 1u) {
        for (var at = index; at < EDGE * DEPTH / 4u; at += 256u) {
            a[at] = gradients[params.gradient_base + (stage * DEPTH + at / VECTORS) * params.gradient_vectors + row / 4u + at % VECTORS];
        }
        load_packed(stage * DEPTH, column, index);
        workgroupBarrier();
        for (var k = 0u; k < DEPTH; k += 1u) {
            add_column_products(&part, k * VECTORS + y, k * VECTORS + x);
        }
        workgroupBarrier();
        if stage % FLUSH == FLUSH - 1u || stage + 1u == stages {
            add_totals(&total, &part);
        }
    }
    store(total, row + 4u * y, 64u, 1u, column + 4u * x);
}
