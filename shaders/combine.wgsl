// combine.wgsl: the O(M) steps between the heavy passes. Partial sums become loss, metrics and coefficients. Also the dot of ∂L/∂β.
// Math     src/combine.rs, without logarithms except for the loss: E = exp(β s⁺), D_g = Σ_b S_b / E, ℓ_g − β s⁺ = log(e + D_g),
//          D_i = −Σ_g c w̃ D_g / (e + D_g), a^b = Σ_{g∋b} c w̃ / (E (e + D_g))
//          With prefixes all but merge runs for one after the other, shortest first. Coefficients and D are those of the prefix times its
//          weight. So is what the loss on the device adds up
// In/out   scratch: partials of logsumexp.wgsl, dots of gradient_tile.wgsl; side: weights, groups, candidates · state, status
// Groups   merge: 64 indices of an axis each; combine: 64 rows each; the others: one
// Numerics Scaled numbers: f32 whose exponent is a whole number of its own. Sums of many are Pairs. Tiles, super-blocks and rows are
//          added in one fixed order, so that every run gives the same bits

struct Params {
    zero: u32,
    count: u32,           // merge: indices of the axis; combine: rows
    begin: u32,           // the first of them
    across: u32,          // tiles of the other axis
    along: u32,           // indices of the axis, padded to tiles
    tile: u32,
    triangle: u32,        // 0 for a rectangle, 1 for the rows of a triangle, 2 for its columns
    partials: u32,
    candidates: u32,
    block_sums: u32,      // those of the block in which the anchors of the axis take part
    ranks: u32,
    sums: u32,
    positive: u32,
    weights: u32,
    groups: u32,
    group_count: u32,
    coefficients: u32,
    diagonal: u32,
    row_losses: u32,
    group_results: u32,
    workgroups: u32,      // of combine
    results: u32,
    zero_is_error: u32,
    empty_is_error: u32,  // whether a row without any term in its softmax is a fault. Such a row has loss and gradient 0
    dots: u32,
    tiles: u32,
    first: u32,           // whether the sum of dots starts here
    factor: f32,          // the host's part of the upstream gradient is factor·2^factor_exponent
    factor_exponent: i32,
    beta: f32,
    beta_head: f32,
    beta_middle: f32,
    beta_tail: f32,
    prefix: u32,          // number of the prefix, shortest first
    prefixes: u32,
    prefix_partials: u32, // merge: words from the partial sums of a prefix to those of the next
    prefix_sums: u32,     // the same in `state`
    room: i32,            // the binary logarithm of the number of prefixes: sums over prefixes are that much larger
    radial: u32,          // NONE if nobody needs the radial parts of positives
    prefix_weight: f32,   // the weight of the prefix is prefix_weight·2^prefix_exponent
    prefix_exponent: i32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> side: array<u32>;
@group(0) @binding(2) var<storage, read_write> state: array<u32>;
@group(0) @binding(3) var<storage, read_write> status: array<atomic<u32>>;
@group(0) @binding(4) var<storage, read> scratch: array<u32>;
@group(0) @binding(5) var<storage, read> upstream: array<u32>; // bits of f32

const PARTIAL_WORDS = 3u; // logsumexp.wgsl
const GROUP_WORDS = 3u;   // coefficient, bits of the blocks, copies of the positive
const CANDIDATE_WORDS = 4u;
const BLOCKS = 4u;
const QP = 0u;
const PQ = 1u;
const QQ = 2u;
const PP = 3u;
const RESULT_WORDS = 12u; // of a workgroup: five Pairs, and the exponent of the largest share of the gradient
const RESULTS = 5u;
const NOWHERE = -1000000000;
// The largest share of the gradient becomes about 2^13 in units of 2^SHIFT.
const TARGET = 13;

fn float_at(at: u32) -> f32 {
    return bitcast<f32>(state[at]);
}

fn store_float(at: u32, x: f32) {
    state[at] = bitcast<u32>(x);
}

fn scaled_at(at: u32) -> Scaled {
    return Scaled(bitcast<f32>(state[at]), bitcast<i32>(state[at + 1u]));
}

fn store_scaled(at: u32, x: Scaled) {
    state[at] = bitcast<u32>(x.part);
    state[at + 1u] = bitcast<u32>(x.exponent);
}

fn pair_at(at: u32) -> Pair {
    return Pair(float_at(at), float_at(at + 1u));
}

fn store_pair(at: u32, x: Pair) {
    store_float(at, x.high);
    store_float(at + 1u, x.low);
}

fn pair_times_power(x: Pair, exponent: i32) -> Pair {
    let power = power_of_two(exponent);
    return Pair(x.high * power, x.low * power);
}

// Adds the partial sums of an axis of a super-block, over the tiles of the other axis, to the sums of the rows that it anchors.
@compute @workgroup_size(64)
fn merge(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let local = id.y * groups.x * 64u + id.x;
    if local >= params.count {
        return;
    }
    let row = side[params.candidates + CANDIDATE_WORDS * (params.begin + local) + 3u];
    if row == NONE {
        return;
    }
    for (var k = 0u; k < params.prefixes; k += 1u) {
        let to = params.block_sums + k * params.prefix_sums + SUM_WORDS * row;
        var sum = pair_at(to);
        var exponent = bitcast<i32>(state[to + 2u]);
        var above = state[to + 3u];
        // In a triangle, the tiles right of the diagonal have sums of rows, and the tiles above it sums of columns.
        var tile = select(0u, local / params.tile, params.triangle == 1u);
        let end = select(params.across, local / params.tile, params.triangle == 2u);
        for (; tile < end; tile += 1u) {
            let at = params.partials + k * params.prefix_partials + PARTIAL_WORDS * (tile * params.along + local);
            let part = bitcast<f32>(scratch[at]);
            if part > 0.0 {
                let of_part = bitcast<i32>(scratch[at + 1u]);
                let top = select(max(exponent, of_part), of_part, sum.high == 0.0);
                let added = Pair(part * power_of_two(of_part - top), 0.0);
                sum = pair_sum(pair_times_power(sum, exponent - top), added);
                exponent = top;
            }
            if params.ranks != 0u {
                above += scratch[at + 2u];
            }
        }
        store_pair(to, sum);
        state[to + 2u] = bitcast<u32>(exponent);
        state[to + 3u] = above;
    }
}

fn prefix_weight() -> Scaled {
    return Scaled(params.prefix_weight, params.prefix_exponent);
}

fn sums_at(row: u32) -> array<Scaled, BLOCKS> {
    var sums: array<Scaled, BLOCKS>;
    for (var b = 0u; b < BLOCKS; b += 1u) {
        let at = params.sums + SUM_WORDS * (b * params.count + row);
        sums[b] = scaled(float_at(at) + float_at(at + 1u), bitcast<i32>(state[at + 2u]));
    }
    return sums;
}

fn sum_of_blocks(sums: array<Scaled, BLOCKS>, blocks: u32) -> Scaled {
    var of_blocks = sums;
    var sum = ZERO;
    for (var b = 0u; b < BLOCKS; b += 1u) {
        if ((blocks >> b) & 1u) != 0u {
            sum = scaled_sum(sum, of_blocks[b]);
        }
    }
    return sum;
}

@compute @workgroup_size(64)
fn combine(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let workgroup = group.y * groups.x + group.x;
    if workgroup >= params.workgroups {
        return;
    }
    let row = workgroup * LANES + lane.index;
    var results: array<Pair, RESULTS>;
    var magnitude = NOWHERE;
    if row < params.count {
        let weight = Scaled(bitcast<f32>(side[params.weights + 2u * row]), bitcast<i32>(side[params.weights + 2u * row + 1u]));
        let sums = sums_at(row);
        let positive = exponential_of(pair_at(params.positive + POSITIVE_WORDS * row));
        var coefficients: array<Scaled, BLOCKS>;
        var loss = ZERO;
        var diagonal = ZERO;
        for (var g = 0u; g < params.group_count; g += 1u) {
            let at = params.groups + GROUP_WORDS * g;
            let coefficient = scaled(bitcast<f32>(side[at]), 0);
            let blocks = side[at + 1u];
            let copies = f32(side[at + 2u]);
            if coefficient.part == 0.0 {
                continue;
            }
            let negatives = scaled_quotient(sum_of_blocks(sums, blocks), positive);
            if copies == 0.0 && negatives.part == 0.0 {
                // The prefix is written behind this dispatch. So rows of one prefix are counted.
                if params.empty_is_error != 0u && weight.part != 0.0 && atomicLoad(&status[NO_NEGATIVE_PREFIX]) == NONE {
                    atomicMin(&status[NO_NEGATIVE], row);
                }
                continue;
            }
            var relative = ZERO;
            if copies == 0.0 {
                relative = scaled(log_of(negatives), 0);
            } else {
                relative = scaled_sum(scaled(select(0.0, LN_2, copies == 2.0), 0), log_1p(scaled(negatives.part / copies, negatives.exponent)));
            }
            loss = scaled_sum(loss, scaled_product(coefficient, relative));
            if weight.part == 0.0 {
                continue;
            }
            let of_prefix = scaled_product(coefficient, prefix_weight());
            let share = scaled_quotient(scaled_product(of_prefix, weight), scaled_sum(scaled(copies, 0), negatives));
            diagonal = scaled_sum(diagonal, scaled_product(share, Scaled(-negatives.part, negatives.exponent)));
            let of_blocks = scaled_quotient(share, positive);
            for (var b = 0u; b < BLOCKS; b += 1u) {
                if ((blocks >> b) & 1u) != 0u {
                    coefficients[b] = scaled_sum(coefficients[b], of_blocks);
                }
            }
        }
        store_scaled(params.row_losses + SCALED_WORDS * row, loss);
        store_scaled(params.diagonal + SCALED_WORDS * row, diagonal);
        var of_row = sums;
        var shares: array<Scaled, BLOCKS>;
        for (var b = 0u; b < BLOCKS; b += 1u) {
            store_scaled(params.coefficients + SCALED_WORDS * (b * params.count + row), coefficients[b]);
            let share = scaled_product(coefficients[b], of_row[b]);
            shares[b] = share;
            magnitude = max(magnitude, select(NOWHERE, share.exponent, share.part != 0.0));
        }
        if params.radial != NONE {
            // (D + Σ of the blocks of an anchor) s⁺. D is minus the sum of all shares, so what is left is minus those of the other two.
            let s = pair_at(params.positive + POSITIVE_WORDS * row).high;
            let at = params.radial + 2u * SCALED_WORDS * row;
            store_scaled(at, scaled_product(scaled(-s, 0), scaled_sum(shares[PQ], shares[PP])));
            store_scaled(at + SCALED_WORDS, scaled_product(scaled(-s, 0), scaled_sum(shares[QP], shares[QQ])));
        }
        let w = value_of(weight);
        results[0] = two_product(w, value_of(loss));
        for (var k = 0u; k < 2u; k += 1u) { // for QP, then for PQ
            let above = state[params.sums + SUM_WORDS * (k * params.count + row) + 3u];
            results[1u + 2u * k] = Pair(select(0.0, w, above == 0u), 0.0);
            // A division in WGSL may be off by some ulps, also a division by 1.
            results[2u + 2u * k] = Pair(select(w / (1.0 + f32(above)), w, above == 0u), 0.0);
        }
    }
    let to = params.group_results + RESULT_WORDS * workgroup;
    for (var k = 0u; k < RESULTS; k += 1u) {
        let all = reduce_sum(results[k], lane);
        if lane.index == 0u {
            store_pair(to + 2u * k, all);
        }
    }
    magnitude = reduce_max(magnitude, lane);
    if lane.index == 0u {
        state[to + 2u * RESULTS] = bitcast<u32>(magnitude);
    }
}

// Makes results of what the workgroups found. The loss is added up over prefixes, metrics are those of the longest.
@compute @workgroup_size(64)
fn finish_forward(lane: Lane) {
    var magnitude = NOWHERE;
    var sums: array<Pair, RESULTS>;
    for (var k = 0u; k < RESULTS; k += 1u) {
        var sum = Pair(0.0, 0.0);
        for (var w = lane.index; w < params.workgroups; w += LANES) {
            sum = pair_sum(sum, pair_at(params.group_results + RESULT_WORDS * w + 2u * k));
            magnitude = max(magnitude, bitcast<i32>(state[params.group_results + RESULT_WORDS * w + 2u * RESULTS]));
        }
        sums[k] = reduce_sum(sum, lane);
    }
    magnitude = reduce_max(magnitude, lane);
    if lane.index != 0u {
        return;
    }
    // As in `Metrics::from_sums`: P@1 and MRR are equal where every positive wins. Then both are 1, whatever the rounded weights add up to.
    for (var k = 1u; k < RESULTS; k += 2u) {
        if sums[k].high == sums[k + 1u].high && sums[k].low == sums[k + 1u].low {
            sums[k] = Pair(1.0, 0.0);
            sums[k + 1u] = sums[k];
        }
    }
    let begins = params.prefix == 0u;
    let ends = params.prefix + 1u == params.prefixes;
    var loss = pair_times(sums[0], value_of(prefix_weight()));
    if !begins {
        loss = pair_sum(pair_at(params.results + LOSS_SUM), loss);
        magnitude = max(magnitude, bitcast<i32>(state[params.results + SHIFT]));
    }
    store_pair(params.results + LOSS_SUM, loss);
    store_float(params.results + LOSS, loss.high);
    for (var k = 1u; k < RESULTS; k += 1u) {
        store_float(params.results + LOSS + k, sums[k].high);
    }
    let shift = select(magnitude - TARGET + params.room, 0, magnitude == NOWHERE);
    state[params.results + SHIFT] = bitcast<u32>(select(magnitude, shift, ends));
    store_scaled(params.results + UPSTREAM, Scaled(1.0, 0));

    let row = atomicLoad(&status[NO_NEGATIVE]);
    if row != NONE && atomicLoad(&status[NO_NEGATIVE_PREFIX]) == NONE {
        atomicStore(&status[NO_NEGATIVE_PREFIX], params.prefix);
        let sums = sums_at(row);
        for (var g = 0u; g < params.group_count; g += 1u) {
            let at = params.groups + GROUP_WORDS * g;
            if bitcast<f32>(side[at]) > 0.0 && side[at + 2u] == 0u && sum_of_blocks(sums, side[at + 1u]).part == 0.0 {
                atomicStore(&status[NO_NEGATIVE_GROUP], g);
                break;
            }
        }
    }
    var refused = row != NONE;
    for (var word = 0u; word < select(ZERO_NORM, NO_NEGATIVE, params.zero_is_error != 0u); word += 1u) {
        refused = refused || atomicLoad(&status[word]) != NONE;
    }
    state[params.results + ACCEPTED] = select(0u, 1u, ends && !refused);
    if refused {
        state[params.results + LOSS] = NOT_A_NUMBER;
    }
}

// This takes the number apart by whole numbers, so that subnormal ones count on every device. With infinity or NaN all gradients are NaN.
@compute @workgroup_size(1)
fn load_upstream() {
    let bits = upstream[params.begin];
    let field = (bits >> 23u) & 255u;
    let sign = bits & 0x80000000u;
    if field == 255u {
        state[params.results + UPSTREAM] = NOT_A_NUMBER;
        return;
    }
    var x = Scaled(bitcast<f32>(sign | 0x3f800000u | (bits & 0x7fffffu)), i32(field) - 127);
    if field == 0u {
        x = scaled(f32(bits & 0x7fffffu), -149);
        x.part = bitcast<f32>(bitcast<u32>(x.part) | sign);
    }
    store_scaled(params.results + UPSTREAM, x);
}

// BETA_SUM ← (first ? 0 : BETA_SUM) + Σ of the tiles of a super-block.
@compute @workgroup_size(64)
fn sum_dots(lane: Lane) {
    var sum = Pair(0.0, 0.0);
    for (var tile = lane.index; tile < params.tiles; tile += LANES) {
        sum = pair_sum(sum, Pair(bitcast<f32>(scratch[params.dots + tile]), 0.0));
    }
    sum = reduce_sum(sum, lane);
    if lane.index == 0u {
        if params.first == 0u {
            sum = pair_sum(pair_at(params.results + BETA_SUM), sum);
        }
        store_pair(params.results + BETA_SUM, sum);
    }
}

// ∂L/∂τ and ∂L/∂log β from Σ G (s − s⁺). That is ∂L/∂β without the cancellation of the negatives and the positive.
@compute @workgroup_size(1)
fn finish_backward() {
    let upstream = scaled_at(params.results + UPSTREAM);
    let exponent = bitcast<i32>(state[params.results + SHIFT]) + params.factor_exponent + upstream.exponent;
    let sum = scaled(float_at(params.results + BETA_SUM) * params.factor * upstream.part, exponent);
    let log_beta = scaled_product(sum, scaled(params.beta, 0));
    if state[params.results + ACCEPTED] == 0u || state[params.results + UPSTREAM] == NOT_A_NUMBER {
        state[params.results + GRAD_TAU] = NOT_A_NUMBER;
        state[params.results + GRAD_LOG_BETA] = NOT_A_NUMBER;
        return;
    }
    store_float(params.results + GRAD_LOG_BETA, value_of(log_beta));
    store_float(params.results + GRAD_TAU, -value_of(scaled_product(log_beta, scaled(params.beta, 0))));
}
