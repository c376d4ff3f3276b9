// blocks_4.wgsl: what a thread computes of a tile of 128 x 128: four blocks of 4 x 4 elements. The alternative is blocks_1.wgsl.

const PARTS = 2u;
const BLOCKS = PARTS * PARTS;

struct Totals {
    block: array<mat4x4<f32>, BLOCKS>, // block PARTS·r + c has the r-th four of the thread's rows and the c-th four of its columns
}

// total += part, part ← 0.
fn add_totals(total: ptr<function, Totals>, part: ptr<function, Totals>) {
    (*total).block[0] += (*part).block[0];
    (*total).block[1] += (*part).block[1];
    (*total).block[2] += (*part).block[2];
    (*total).block[3] += (*part).block[3];
    *part = Totals();
}
