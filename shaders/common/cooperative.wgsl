// cooperative.wgsl: fragments of 16 x 16 as cooperative matrices, each of which a subgroup holds. emulated.wgsl does the same without
// cooperative matrices. Matrix a is 16 x k, and b is k x 16. "Rows" lie row by row, "columns" column by column, `stride` numbers apart. The
// module has the buffers `left` and `right` of f16, and `products` in workgroup memory.

alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

// Every invocation calls this first.
fn enter(invocation: Invocation) {
}

fn rows_of_left(at: u32, stride: u32) -> Left {
    return coopLoadT<coop_mat16x16<f16, A>>(&left[at], stride);
}

fn columns_of_left(at: u32, stride: u32) -> Left {
    return coopLoad<coop_mat16x16<f16, A>>(&left[at], stride);
}

fn rows_of_right(at: u32, stride: u32) -> Right {
    return coopLoadT<coop_mat16x16<f16, B>>(&right[at], stride);
}

fn columns_of_right(at: u32, stride: u32) -> Right {
    return coopLoad<coop_mat16x16<f16, B>>(&right[at], stride);
}

// a·b + c.
fn multiply_add(a: Left, b: Right, c: Sums) -> Sums {
    return coopMultiplyAdd(a, b, c);
}

fn add_sums(a: Sums, b: Sums) -> Sums {
    return a + b;
}

fn store_sums(x: Sums, at: u32, stride: u32) {
    coopStoreT(x, &products[at], stride);
}
