// project.wgsl: makes gradients of the sums: the diagonal term, the projection onto the tangent of each embedding, the factor β, and the
// output type.
// Math     ∂L/∂x = β (I − x̂x̂ᵀ)(u + Σ D_i ŷ) / ‖x‖, times the upstream gradient. u = Σ_j G_j ŷ_j over the negatives
//          = sums·2^SHIFT·2^-12 / n, where n = 2^12/‖packed‖. ŷ is the other side of each positive pair that x belongs to
// In/out   own, other: packed embeddings; side: pairs; state: norms, D; sums of gradient_product.wgsl · out: f32, f16 or bf16, any
//          row stride, an even one for 16 bits
// Groups   an output row each
// Numerics f32 in units of 2^SHIFT, rounded once more to 16 bits, to the nearest. The part along x̂ is a Pair, because what is left without
//          it may be far smaller (in one dimension nothing) and inherits its error. The gradients may lie where the sums are: an invocation
//          reads an element before it writes it. A row without direction gets zeros. A call without results gets NaN

struct Params {
    zero: u32,
    count: u32,           // output rows of this part
    first: u32,           // the query or passage of the first one
    dim: u32,
    row_vectors: u32,
    own_base: u32,        // vectors from the start of `own` to index own_first
    own_first: u32,
    other_base: u32,
    other_first: u32,
    sums_base: u32,       // numbers from the start of the sums to index sums_first
    sums_first: u32,
    sums_stride: u32,
    out_base: u32,        // numbers
    out_stride: u32,
    out_type: u32,
    norms: u32,
    other_norms: u32,
    diagonal: u32,
    results: u32,
    passage: u32,         // 1 for passages
    positives: u32,       // queries: the index in the space of the passages of each row's positive; NONE for the identity
    candidates: u32,      // passages: those of the space of the passages
    occurrence_start: u32, // passages: the indices behind each passage; NONE for the identity
    occurrences: u32,
    row_begin: u32,       // the rows of the shard
    row_end: u32,
    factor: f32,          // β times the host's part of the upstream gradient is factor·2^factor_exponent
    factor_exponent: i32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> side: array<u32>;
@group(0) @binding(2) var<storage, read> state: array<u32>;
@group(0) @binding(3) var<storage, read> own: array<Packed>;
@group(0) @binding(4) var<storage, read> other: array<Packed>;
@group(0) @binding(5) var<storage, read_write> out: array<u32>;

const CANDIDATE_WORDS = 4u;
const TYPE_F32 = 0u;
const TYPE_F16 = 1u;

fn float_at(at: u32) -> f32 {
    return bitcast<f32>(state[at]);
}

// Four numbers of the sum of index `index`, as a direction: u in units of 2^SHIFT.
fn direction_sum(index: u32, vector: u32) -> vec4<f32> {
    let inverse = float_at(params.norms + NORM_WORDS * index);
    let at = params.sums_base + (index - params.sums_first) * params.sums_stride + 4u * vector;
    let columns = params.dim - 4u * vector;
    var sum = vec4<f32>();
    if inverse > 0.0 {
        for (var j = 0u; j < 4u; j += 1u) {
            if j < columns {
                sum[j] = sum_at(at + j);
            }
        }
        sum *= 2.44140625e-4 / inverse; // 2^-12
    }
    return sum;
}

// D_i ŷ, where ŷ is the direction of index `index` of the other tower.
fn positive_part(row: u32, index: u32, vector: u32, shift: i32) -> vec4<f32> {
    let at = params.diagonal + SCALED_WORDS * row;
    let diagonal = times_power_of_two(float_at(at), bitcast<i32>(state[at + 1u]) - shift);
    let y = widen(other[params.other_base + (index - params.other_first) * params.row_vectors + vector]);
    return (diagonal * float_at(params.other_norms + NORM_WORDS * index) * 2.44140625e-4) * y;
}

// Whether the indices behind a row are listed.
fn lists_occurrences() -> bool {
    return (params.passage != 0u) & (params.occurrence_start != NONE);
}

// This is written once for queries and passages, because what is written twice is compiled twice.
fn gather(row: u32, vector: u32, shift: i32) -> vec4<f32> {
    let of_query = params.passage == 0u;
    let listed = lists_occurrences();
    var first = row;
    var last = row + 1u;
    if listed {
        first = side[params.occurrence_start + row];
        last = side[params.occurrence_start + row + 1u];
    }
    var sum = vec4<f32>();
    for (var k = first; k < last; k += 1u) {
        var index = k;
        if listed {
            index = side[params.occurrences + k];
        }
        sum += direction_sum(index, vector);
        var anchor = row;
        var other_index = row;
        if !of_query {
            anchor = side[params.candidates + CANDIDATE_WORDS * index + 3u];
            other_index = anchor;
        } else if params.positives != NONE {
            other_index = side[params.positives + row];
        }
        if of_query || (anchor >= params.row_begin && anchor < params.row_end) { // not if it is NONE
            sum += positive_part(anchor, other_index, vector, shift);
        }
    }
    return sum;
}

// Rounds to the nearest, ties to even, because conversions of WGSL may round either way. It takes bits, because NaN has to arrive.
fn narrow_f16(bits: u32) -> u32 {
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return 0x7e00u;
    }
    if magnitude >= 0x47800000u {
        return sign | 0x7c00u;
    }
    if magnitude >= 0x38800000u {
        let rest = magnitude - 0x38000000u;
        return sign | ((rest + 0xfffu + ((rest >> 13u) & 1u)) >> 13u);
    }
    return sign | u32(round(bitcast<f32>(magnitude) * 16777216.0));
}

fn narrow_bf16(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return 0x7fc0u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

fn narrow_bits(bits: u32) -> u32 {
    if params.out_type == TYPE_F16 {
        return narrow_f16(bits);
    }
    return narrow_bf16(bits);
}

fn store_vector(at: u32, vector: u32, x: vec4<u32>) {
    var bits = x;
    let columns = min(4u, params.dim - 4u * vector);
    if params.out_type == TYPE_F32 {
        for (var j = 0u; j < columns; j += 1u) {
            out[at + 4u * vector + j] = bits[j];
        }
        return;
    }
    let word = (at + 4u * vector) / 2u;
    for (var j = 0u; j < columns; j += 2u) {
        var high = out[word + j / 2u] & 0xffff0000u; // what follows an odd row stays as it is
        if j + 1u < columns {
            high = narrow_bits(bits[j + 1u]) << 16u;
        }
        out[word + j / 2u] = narrow_bits(bits[j]) | high;
    }
}

@compute @workgroup_size(64)
fn project(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let local = group.y * groups.x + group.x;
    if local >= params.count {
        return;
    }
    let row = params.first + local;
    var index = row;
    if lists_occurrences() {
        index = side[params.occurrences + side[params.occurrence_start + row]];
    }
    let shift = bitcast<i32>(state[params.results + SHIFT]);
    let refused = state[params.results + ACCEPTED] == 0u || state[params.results + UPSTREAM] == NOT_A_NUMBER;
    let norm = params.norms + NORM_WORDS * index;
    let inverse = Pair(float_at(norm), float_at(norm + 1u));
    let unit = inverse.high * 2.44140625e-4; // x̂ = packed·unit
    let vectors = (params.dim + 3u) / 4u;
    let start = params.own_base + (index - params.own_first) * params.row_vectors;

    // [1] x̂·g·unit
    var along = Pair(0.0, 0.0);
    for (var vector = lane.index; vector < vectors; vector += LANES) {
        let g = gather(row, vector, shift);
        let direction = widen(own[start + vector]);
        for (var j = 0u; j < 4u; j += 1u) {
            along = pair_sum(along, two_product(g[j], direction[j]));
        }
    }
    along = reduce_sum(along, lane);
    along = pair_times(pair_product(along, pair_product(inverse, inverse)), 5.9604644775390625e-8); // 2^-24

    // [2] tangent and store
    let factor = params.factor * float_at(params.results + UPSTREAM) * unit;
    let exponent = shift + params.factor_exponent + bitcast<i32>(state[params.results + UPSTREAM + 1u])
        + bitcast<i32>(state[norm + NORM_POWER]);
    for (var vector = lane.index; vector < vectors; vector += LANES) {
        var tangent = gather(row, vector, shift);
        let direction = widen(own[start + vector]);
        for (var j = 0u; j < 4u; j += 1u) {
            let part = two_product(along.high, direction[j]);
            tangent[j] = opaque(tangent[j] - part.high) - (part.low + along.low * direction[j]);
        }
        let half = exponent / 2;
        var x = bitcast<vec4<u32>>(tangent * factor * power_of_two(half) * power_of_two(exponent - half));
        if refused {
            x = vec4<u32>(NOT_A_NUMBER);
        }
        store_vector(params.out_base + local * params.out_stride, vector, x);
    }
}
