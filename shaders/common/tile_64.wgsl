// tile_64.wgsl: tiles of 64 x 64, 4 x 4 elements for each thread: 15 KiB of workgroup memory, within every device's limits.

const TILE = 64u;
const PARTS = 1u;
const BLOCKS = 1u;

struct Totals {
    block: array<mat4x4<f32>, BLOCKS>,
}

// part += products over one vector of k of rows a, a + 16, … with columns b, b + 16, …
fn add_products(part: ptr<function, Totals>, a: u32, b: u32) {
    const STRIDE = 16u * ROW_VECTORS;
    let a0 = pool[a];
    let a1 = pool[a + STRIDE];
    let a2 = pool[a + 2u * STRIDE];
    let a3 = pool[a + 3u * STRIDE];
    let b0 = pool[b];
    let b1 = pool[b + STRIDE];
    let b2 = pool[b + 2u * STRIDE];
    let b3 = pool[b + 3u * STRIDE];
    (*part).block[0] += mat4x4<f32>(
        dot(a0, b0), dot(a0, b1), dot(a0, b2), dot(a0, b3),
        dot(a1, b0), dot(a1, b1), dot(a1, b2), dot(a1, b3),
        dot(a2, b0), dot(a2, b1), dot(a2, b2), dot(a2, b3),
        dot(a3, b0), dot(a3, b1), dot(a3, b2), dot(a3, b3),
    );
}

// total += part, part ← 0.
fn add_totals(total: ptr<function, Totals>, part: ptr<function, Totals>) {
    (*total).block[0] += (*part).block[0];
    *part = Totals();
}
