// product_64.wgsl: sums of 64 indices x 64 numbers. A thread has 4 x 4 of them. The alternative is product_128.wgsl.

// part += the products, over four k, of the rows at + 16 A_ROW i of a with four numbers of b.
fn add_row_products(part: ptr<function, Totals>, at: u32, from_b: u32) {
    const STRIDE = 16u * A_ROW;
    (*part).block[0] = add_rows(
        (*part).block[0],
        a[at], a[at + STRIDE], a[at + 2u * STRIDE], a[at + 3u * STRIDE],
        b[from_b], b[from_b + VECTORS], b[from_b + 2u * VECTORS], b[from_b + 3u * VECTORS],
    );
}

// part += the products over one k.
fn add_column_products(part: ptr<function, Totals>, from_a: u32, from_b: u32) {
    (*part).block[0] = add_outer((*part).block[0], a[from_a], b[from_b]);
}
