// tile_64.wgsl: tiles of 64 x 64. A thread has 4 x 4 elements. It takes 15 KiB of workgroup memory, which is within every device's limits.

// part += the products, over one vector of k, of the rows a, a + 16, … with the columns b, b + 16, …
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
    (*part).block[0] += products_of(a0, a1, a2, a3, b0, b1, b2, b3);
}
