// tile_128.wgsl: tiles of 128 x 128. A thread has four blocks of 4 x 4 elements, which halves the traffic for each product. It takes 31 KiB
// of workgroup memory. The alternative is tile_64.wgsl.

// part += the products, over one vector of k, of the rows a, a + 16, … with the columns b, b + 16, …
fn add_products(part: ptr<function, Totals>, a: u32, b: u32) {
    const STRIDE = 16u * ROW_VECTORS;
    let b0 = pool[b];
    let b1 = pool[b + STRIDE];
    let b2 = pool[b + 2u * STRIDE];
    let b3 = pool[b + 3u * STRIDE];
    let b4 = pool[b + 4u * STRIDE];
    let b5 = pool[b + 5u * STRIDE];
    let b6 = pool[b + 6u * STRIDE];
    let b7 = pool[b + 7u * STRIDE];
    let a0 = pool[a];
    let a1 = pool[a + STRIDE];
    let a2 = pool[a + 2u * STRIDE];
    let a3 = pool[a + 3u * STRIDE];
    (*part).block[0] += products_of(a0, a1, a2, a3, b0, b1, b2, b3);
    (*part).block[1] += products_of(a0, a1, a2, a3, b4, b5, b6, b7);
    let a4 = pool[a + 4u * STRIDE];
    let a5 = pool[a + 5u * STRIDE];
    let a6 = pool[a + 6u * STRIDE];
    let a7 = pool[a + 7u * STRIDE];
    (*part).block[2] += products_of(a4, a5, a6, a7, b0, b1, b2, b3);
    (*part).block[3] += products_of(a4, a5, a6, a7, b4, b5, b6, b7);
}
