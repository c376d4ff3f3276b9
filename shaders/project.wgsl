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
        let pair = pair_of(row, index);
        if is_of_shard(pair.anchor) {
            sum += positive_part(pair.anchor, pair.other, vector, shift);
        }
    }
    return sum;
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
