// prefixes.wgsl: the O(M + N) steps that only calls with prefixes have: what an entry gets from all prefixes that have it.
// Math     t^k, n^k: power and inverse norm of prefix k of a packed row (state.wgsl)
//          join           F_i^s = Σ_{k≥s} D_i^k n_i^k n_π(i)^k 2^-24·2^(t_i^k − t_i^s + t_π(i)^k − t_π(i)^s), in place of D
//          clear_radials, merge_radials   Σ of the radial sums of gradient_tile.wgsl over tiles and super-blocks
//          radials        R_x^s = Σ_{s≤k<K−1} ρ_x^k (n_x^k)² 2^-24·2^(2 (t_x^k − t_x^s)), where ρ_x^k = x̂·∂L/∂x̂ of prefix k over β: the
//                         radial sums of every index of x, and what combine.wgsl says of every positive pair of x in the shard
//          docs/loss.md, "Prefixes", has Σ ρ/‖x‖². Here both sums are in units of the packed rows of segment s
// In/out   scratch: radial sums of tiles; side: pairs · state
// Groups   join, clear_radials, merge_radials, radials: 64 rows, words, indices of an axis, embeddings each
// Numerics ρ cancels where all cosines are close, so its sums are Pairs. They have one fixed order

struct Params {
    zero: u32,
    count: u32,           // join: rows; clear_radials: words; merge_radials: indices of the axis; radials: embeddings
    begin: u32,           // merge_radials: the first of them
    prefixes: u32,
    prefix_words: u32,
    norms: u32,
    other_norms: u32,     // join: those of the passages
    diagonal: u32,
    positives: u32,       // join: the index in the space of the passages of each row's positive; NONE for the identity
    radials: u32,
    across: u32,          // merge_radials: tiles of the other axis
    along: u32,           // indices of the axis, padded to tiles
    tile: u32,
    triangle: u32,        // 0 for a rectangle, 1 for the rows of a triangle, 2 for its columns
    partials: u32,
    prefix_partials: u32, // words from those of a prefix to those of the next
    radial: u32,          // radials: two Scaled of each row
    results: u32,
    passage: u32,         // 1 for passages
    candidates: u32,
    occurrence_start: u32, // the indices behind each passage; NONE for the identity
    occurrences: u32,
    row_begin: u32,       // the rows of the shard
    row_end: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> side: array<u32>;
@group(0) @binding(2) var<storage, read_write> state: array<u32>;
@group(0) @binding(3) var<storage, read> scratch: array<u32>;

const CANDIDATE_WORDS = 4u;
const UNIT = 5.9604644775390625e-8; // 2^-24

fn float_at(at: u32) -> f32 {
    return bitcast<f32>(state[at]);
}

fn scaled_at(at: u32) -> Scaled {
    return Scaled(bitcast<f32>(state[at]), bitcast<i32>(state[at + 1u]));
}

fn pair_at(at: u32) -> Pair {
    return Pair(float_at(at), float_at(at + 1u));
}

fn store_pair(at: u32, x: Pair) {
    state[at] = bitcast<u32>(x.high);
    state[at + 1u] = bitcast<u32>(x.low);
}

@compute @workgroup_size(64)
fn join(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = id.y * groups.x * 64u + id.x;
    if row >= params.count {
        return;
    }
    var index = row;
    if params.positives != NONE {
        index = side[params.positives + row];
    }
    var sum = ZERO;
    for (var k = params.prefixes; k > 0u; k -= 1u) {
        let words = (k - 1u) * params.prefix_words;
        let norm = words + params.norms + NORM_WORDS * row;
        let other = words + params.other_norms + NORM_WORDS * index;
        let at = words + params.diagonal + SCALED_WORDS * row;
        let norms = scaled(float_at(norm) * float_at(other) * UNIT, 0);
        sum = scaled_sum(sum, scaled_product(scaled_at(at), norms));
        state[at] = bitcast<u32>(sum.part);
        state[at + 1u] = bitcast<u32>(sum.exponent);
        // On to the next shorter prefix.
        let steps = scaled_product(scaled(float_at(norm + NORM_STEP), 0), scaled(float_at(other + NORM_STEP), 0));
        sum = scaled_product(sum, steps);
    }
}

@compute @workgroup_size(64)
fn clear_radials(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let word = id.y * groups.x * 64u + id.x;
    if word < params.count {
        for (var k = 0u; k + 1u < params.prefixes; k += 1u) {
            state[k * params.prefix_words + params.radials + word] = 0u;
        }
    }
}

// Adds the sums of an axis of a super-block, over the tiles of the other axis.
@compute @workgroup_size(64)
fn merge_radials(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let local = id.y * groups.x * 64u + id.x;
    if local >= params.count {
        return;
    }
    for (var k = 0u; k + 1u < params.prefixes; k += 1u) {
        let to = k * params.prefix_words + params.radials + RADIAL_WORDS * (params.begin + local);
        var sum = pair_at(to);
        // In a triangle, the tiles right of the diagonal have sums of rows, and the tiles above it sums of columns.
        var tile = select(0u, local / params.tile, params.triangle == 1u);
        let end = select(params.across, local / params.tile, params.triangle == 2u);
        for (; tile < end; tile += 1u) {
            let part = scratch[k * params.prefix_partials + params.partials + tile * params.along + local];
            sum = pair_sum(sum, Pair(bitcast<f32>(part), 0.0));
        }
        store_pair(to, sum);
    }
}

@compute @workgroup_size(64)
fn radials(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let row = id.y * groups.x * 64u + id.x;
    if row >= params.count {
        return;
    }
    let listed = (params.passage != 0u) & (params.occurrence_start != NONE);
    var first = row;
    var last = row + 1u;
    if listed {
        first = side[params.occurrence_start + row];
        last = side[params.occurrence_start + row + 1u];
    }
    var own = row; // the first index, which has the same packed row as the others
    if listed {
        own = side[params.occurrences + first];
    }
    let shift = bitcast<i32>(state[params.results + SHIFT]);
    var sum = Pair(0.0, 0.0);
    for (var k = params.prefixes - 1u; k > 0u; k -= 1u) {
        let words = (k - 1u) * params.prefix_words;
        var along = Pair(0.0, 0.0);
        for (var n = first; n < last; n += 1u) {
            var index = n;
            if listed {
                index = side[params.occurrences + n];
            }
            along = pair_sum(along, pair_at(words + params.radials + RADIAL_WORDS * index));
            var anchor = row;
            if params.passage != 0u {
                anchor = side[params.candidates + CANDIDATE_WORDS * index + 3u];
            }
            if anchor >= params.row_begin && anchor < params.row_end { // not if it is NONE
                let part = scaled_at(words + params.radial + SCALED_WORDS * (2u * anchor + params.passage));
                along = pair_sum(along, Pair(times_power_of_two(part.part, part.exponent - shift), 0.0));
            }
        }
        let norm = words + params.norms + NORM_WORDS * own;
        let inverse = pair_at(norm);
        sum = pair_sum(sum, pair_times(pair_product(along, pair_product(inverse, inverse)), UNIT));
        store_pair(words + params.radials + RADIAL_WORDS * own, sum);
        let step = float_at(norm + NORM_STEP);
        sum = Pair(sum.high * step * step, sum.low * step * step);
    }
}
