// blocks_1.wgsl: what a thread computes of a tile of 64 x 64: 4 x 4 elements. The alternative is blocks_4.wgsl.

const PARTS = 1u;
const BLOCKS = PARTS * PARTS;

struct Totals {
    block: array<mat4x4<f32>, BLOCKS>, // block PARTS·r + c has the r-th four of the thread's rows and the c-th four of its columns
}

// total += part, part ← 0.
fn add_totals(total: ptr<function, Totals>, part: ptr<function, Totals>) {
    (*total).block[0] += (*part).block[0];
    *part = Totals();
}
