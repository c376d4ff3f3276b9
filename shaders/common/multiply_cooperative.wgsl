// multiply_cooperative.wgsl: products of the rows of a tile with its columns on cooperative matrices, with f16 operands and f32 sums. It
// serves only tiles of 64 x 64 and f16 storage. The alternative is multiply_f32.wgsl.
//
// Threads  subgroup s computes the fragments s, s + (number of subgroups), … of the tile's 4 x 4, each 16 x 16
// Shared   products: the tile, row by row, from which the threads read their elements
// Numerics Tensor cores may cut sums towards zero. So a sum ends after 64 terms, and is then added to the total with rounding
// Limits   whole tiles are read: packed rows beyond the last index exist and are finite

@group(0) @binding(1) var<storage, read> left: array<f16>;
@group(0) @binding(2) var<storage, read> right: array<f16>;
@group(0) @binding(6) var<storage, read_write> gradients: array<f16>;

const FRAGMENT = 16u;
const FLUSH = 64u; // numbers of k

var<workgroup> products: array<f32, TILE * TILE>;
var<workgroup> pool: array<vec4<f32>, 512>;

struct Invocation {
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) lanes: u32,
}

// Adds the products of rows with columns over these vectors, where nothing is added for vector 0.
fn multiply(total: ptr<function, Totals>, place: Place, thread: Thread, invocation: Invocation, begin: u32, end: u32) {
    enter(invocation);
    let stride = 4u * params.row_vectors;
    const ACROSS = TILE / FRAGMENT;
    for (var f = invocation.subgroup; f < ACROSS * ACROSS; f += invocation.subgroups) {
        let row = FRAGMENT * (f / ACROSS);
        let col = FRAGMENT * (f % ACROSS);
        let a_start = 4u * params.row_base + (place.row * TILE + row) * stride;
        let b_start = 4u * params.col_base + (place.col * TILE + col) * stride;
        var sums = Sums();
        for (var start = 4u * begin; start < 4u * end; start += FLUSH) {
            var part = Sums();
            for (var k = start; k < min(start + FLUSH, 4u * end); k += FRAGMENT) {
                part = multiply_add(rows_of_left(a_start + k, stride), columns_of_right(b_start + k, stride), part);
            }
            sums = add_sums(sums, part);
        }
        store_sums(sums, row * TILE + col, TILE);
    }
    workgroupBarrier();
    for (var i = 0u; i < 4u; i += 1u) {
        for (var j = 0u; j < 4u; j += 1u) {
            let product = products[(thread.y + 16u * i) * TILE + thread.x + 16u * j];
            (*total).block[0][i][j] = select((*total).block[0][i][j] + product, product, begin == 0u);
        }
    }
}

// Stores an element of the matrix of gradients of a super-block, for prefix k: an f16, and in the second plane what the first leaves.
fn store_gradient(k: u32, at: u32, g: f32) {
    let high = f16(g);
    let to = k * params.prefix_plane + at;
    gradients[to] = high;
    gradients[params.plane + to] = f16(g - f32(high));
}

fn load_gradient(k: u32, at: u32) -> f32 {
    let from_here = k * params.prefix_plane + at;
    return f32(gradients[from_here]) + f32(gradients[params.plane + from_here]);
}
