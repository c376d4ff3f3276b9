// multiply_f32.wgsl: products of the rows of a tile with its columns, by fused multiply-add on f32. The alternative is
// multiply_cooperative.wgsl.
//
// Shared   pool: TILE rows of the left tower, then TILE rows of the right one, with 16 numbers of k each. A row has four vectors, and one
//          of padding, so that rows 16 apart lie in different banks
// Numerics A sum ends after 64 terms, and is then added to the total

@group(0) @binding(1) var<storage, read> left: array<Packed>;
@group(0) @binding(2) var<storage, read> right: array<Packed>;

const ROW_VECTORS = 5u; // of an operand in shared memory
const OPERAND = TILE * ROW_VECTORS;
const STEP = 4u;  // vectors of k in a stage
const FLUSH = 4u; // stages whose products are summed before they are added to the total

var<workgroup> pool: array<vec4<f32>, 2u * OPERAND>;

struct Invocation {
    @builtin(local_invocation_index) index: u32,
}

// Loads one stage of both operands: 16 numbers of k of every row, and zeros beyond the last row.
fn load_stage(place: Place, stage: u32, thread: u32) {
    for (var k = thread; k < TILE * STEP; k += THREADS) {
        let row = k / STEP;
        let vector = k % STEP;
        var a = vec4<f32>();
        var b = vec4<f32>();
        let left_row = place.row * TILE + row;
        let right_row = place.col * TILE + row;
        if left_row < params.row_end - params.row_begin {
            a = widen(left[params.row_base + left_row * params.row_vectors + stage * STEP + vector]);
        }
        if right_row < params.col_end - params.col_begin {
            b = widen(right[params.col_base + right_row * params.row_vectors + stage * STEP + vector]);
        }
        pool[row * ROW_VECTORS + vector] = a;
        pool[OPERAND + row * ROW_VECTORS + vector] = b;
    }
}

// The products of four rows with four columns over one vector of k.
fn products_of(a0: vec4<f32>, a1: vec4<f32>, a2: vec4<f32>, a3: vec4<f32>, b0: vec4<f32>, b1: vec4<f32>, b2: vec4<f32>, b3: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        dot(a0, b0), dot(a0, b1), dot(a0, b2), dot(a0, b3),
        dot(a1, b0), dot(a1, b1), dot(a1, b2), dot(a1, b3),
        dot(a2, b0), dot(a2, b1), dot(a2, b2), dot(a2, b3),
        dot(a3, b0), dot(a3, b1), dot(a3, b2), dot(a3, b3),
    );
}

// Adds the products of rows with columns over these vectors. At the end, workgroup memory is free.
fn multiply(total: ptr<function, Totals>, place: Place, thread: Thread, invocation: Invocation, begin: u32, end: u32) {
    var part = Totals();
    let stages = end / STEP;
    for (var stage = begin / STEP; stage < stages; stage += 1u) {
        load_stage(place, stage, thread.index);
        workgroupBarrier();
        for (var k = 0u; k < STEP; k += 1u) {
            add_products(&part, thread.y * ROW_VECTORS + k, OPERAND + thread.x * ROW_VECTORS + k);
        }
        workgroupBarrier();
        if stage % FLUSH == FLUSH - 1u || stage + 1u == stages {
            add_totals(total, &part);
        }
    }
}

// Stores an element of the matrix of gradients of a super-block, for prefix k.
fn store_gradient(k: u32, at: u32, g: f32) {
    scratch[params.gradient + k * params.prefix_plane + at] = bitcast<u32>(g);
}

fn load_gradient(k: u32, at: u32) -> f32 {
    return bitcast<f32>(scratch[params.gradient + k * params.prefix_plane + at]);
}
