// product_128.wgsl: sums of 128 indices x 128 numbers. A thread has four blocks of 4 x 4, which halves the traffic for each product. The
// alternative is product_64.wgsl.

// part += the products, over four k, of the rows at + 16 A_ROW i of a with twice four numbers of b.
fn add_row_products(part: ptr<function, Totals>, at: u32, from_b: u32) {
    const STRIDE = 16u * A_ROW;
    let a0 = a[at];
    let a1 = a[at + STRIDE];
    let a2 = a[at + 2u * STRIDE];
    let a3 = a[at + 3u * STRIDE];
    let a4 = a[at + 4u * STRIDE];
    let a5 = a[at + 5u * STRIDE];
    let a6 = a[at + 6u * STRIDE];
    let a7 = a[at + 7u * STRIDE];
    let b0 = b[from_b];
    let b1 = b[from_b + VECTORS];
    let b2 = b[from_b + 2u * VECTORS];
    let b3 = b[from_b + 3u * VECTORS];
    let c0 = b[from_b + 16u];
    let c1 = b[from_b + VECTORS + 16u];
    let c2 = b[from_b + 2u * VECTORS + 16u];
    let c3 = b[from_b + 3u * VECTORS + 16u];
    (*part).block[0] = add_rows((*part).block[0], a0, a1, a2, a3, b0, b1, b2, b3);
    (*part).block[1] = add_rows((*part).block[1], a0, a1, a2, a3, c0, c1, c2, c3);
    (*part).block[2] = add_rows((*part).block[2], a4, a5, a6, a7, b0, b1, b2, b3);
    (*part).block[3] = add_rows((*part).block[3], a4, a5, a6, a7, c0, c1, c2, c3);
}

// part += the products over one k.
fn add_column_products(part: ptr<function, Totals>, from_a: u32, from_b: u32) {
    let m = a[from_a];
    let further_m = a[from_a + 16u];
    let n = b[from_b];
    let further_n = b[from_b + 16u];
    (*part).block[0] = add_outer((*part).block[0], m, n);
    (*part).block[1] = add_outer((*part).block[1], m, further_n);
    (*part).block[2] = add_outer((*part).block[2], further_m, n);
    (*part).block[3] = add_outer((*part).block[3], further_m, further_n);
}
