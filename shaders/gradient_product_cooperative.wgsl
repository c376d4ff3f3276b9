// gradient_product_cooperative.wgsl: gradient_product.wgsl on cooperative matrices, with ĝ as two planes of f16.
// Math     rows     sum_m += Σ_k ĝ_mk·packed_k;  columns  sum_m += Σ_k ĝ_km·packed_k
// In/out   left: ĝ, row-major, where the second plane has what the first leaves; right: packed embeddings of the other axis · sums
// Groups   64 indices x 64 numbers of an embedding each
// Threads  subgroup s computes the fragments s, s + (number of subgroups), … of the 4 x 4, each 16 x 16
// Shared   products: the 64 x 64 sums, row by row
// Numerics A sum in f32 ends after 64 terms, and is then added to the total. The plane of the small numbers comes first
// Limits   ĝ has zeros, and packed rows have finite numbers, up to a multiple of 64 indices

@group(0) @binding(1) var<storage, read> left: array<f16>;
@group(0) @binding(2) var<storage, read> right: array<f16>;

const EDGE = 64u;
const FRAGMENT = 16u;
const ACROSS = EDGE / FRAGMENT;
const FLUSH = 64u;

var<workgroup> products: array<f32, EDGE * EDGE>;

struct Invocation {
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) lanes: u32,
}

// Σ over k for one fragment, over both planes.
fn sum_fragment(of_columns: bool, row: u32, column: u32) -> Sums {
    let stride = 4u * params.gradient_vectors;
    let row_numbers = 4u * params.row_vectors;
    let depth = (params.depth + EDGE - 1u) / EDGE * EDGE;
    var total = Sums();
    for (var plane = 0u; plane < 2u; plane += 1u) {
        let start = 4u * params.gradient_base + select(0u, params.plane, plane == 0u);
        for (var first = 0u; first < depth; first += FLUSH) {
            var part = Sums();
            for (var k = first; k < first + FLUSH; k += FRAGMENT) {
                let b = rows_of_right(4u * params.packed_base + k * row_numbers + column, row_numbers);
                if of_columns {
                    part = multiply_add(columns_of_left(start + k * stride + row, stride), b, part);
                } else {
                    part = multiply_add(rows_of_left(start + row * stride + k, stride), b, part);
                }
            }
            total = add_sums(total, part);
        }
    }
    return total;
}

fn product(of_columns: bool, group: vec3<u32>, invocation: Invocation) {
    enter(invocation);
    for (var f = invocation.subgroup; f < ACROSS * ACROSS; f += invocation.subgroups) {
        let row = FRAGMENT * (f / ACROSS);
        let column = FRAGMENT * (f % ACROSS);
        if group.x * EDGE + column < 4u * params.vectors {
            store_sums(sum_fragment(of_columns, group.y * EDGE + row, group.x * EDGE + column), row * EDGE + column, EDGE);
        }
    }
    workgroupBarrier();
    for (var k = invocation.index; k < EDGE * EDGE; k += 256u) {
        store_sum(group.y * EDGE + k / EDGE, group.x * EDGE + k % EDGE, products[k]);
    }
}

@compute @workgroup_size(256)
fn product_rows(@builtin(workgroup_id) group: vec3<u32>, invocation: Invocation) {
    product(false, group, invocation);
}

@compute @workgroup_size(256)
fn product_columns(@builtin(workgroup_id) group: vec3<u32>, invocation: Invocation) {
    product(true, group, invocation);
}
