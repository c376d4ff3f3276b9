// emulated.wgsl: what cooperative.wgsl does, without cooperative matrices. It is slow, and serves tests on devices that have none. Operands
// stay where they lie. The elements of sums are dealt out to the invocations of a subgroup, as a real device may hold them.

struct Operand {
    at: u32,
    along: u32, // numbers to the next row of a, or to the next column of b
    deep: u32,  // numbers to the next k
}

alias Left = Operand;
alias Right = Operand;
alias Sums = array<f32, 64>; // number n is element lane + lanes·n; a subgroup has four invocations or more

var<private> lane: u32;
var<private> lanes: u32;

fn enter(invocation: Invocation) {
    lane = invocation.lane;
    lanes = invocation.lanes;
}

fn rows_of_left(at: u32, stride: u32) -> Left {
    return Operand(at, stride, 1u);
}

fn columns_of_left(at: u32, stride: u32) -> Left {
    return Operand(at, 1u, stride);
}

fn rows_of_right(at: u32, stride: u32) -> Right {
    return Operand(at, 1u, stride);
}

fn columns_of_right(at: u32, stride: u32) -> Right {
    return Operand(at, stride, 1u);
}

fn multiply_add(a: Left, b: Right, c: Sums) -> Sums {
    var sums = c;
    for (var n = 0u; n * lanes < 256u; n += 1u) {
        let element = lane + lanes * n;
        for (var k = 0u; k < 16u; k += 1u) {
            sums[n] += f32(left[a.at + element / 16u * a.along + k * a.deep]) * f32(right[b.at + element % 16u * b.along + k * b.deep]);
        }
    }
    return sums;
}

fn add_sums(a: Sums, b: Sums) -> Sums {
    var x = a;
    var y = b;
    for (var n = 0u; n * lanes < 256u; n += 1u) {
        x[n] += y[n];
    }
    return x;
}

fn store_sums(x: Sums, at: u32, stride: u32) {
    var sums = x;
    for (var n = 0u; n * lanes < 256u; n += 1u) {
        let element = lane + lanes * n;
        products[at + element / 16u * stride + element % 16u] = sums[n];
    }
}
