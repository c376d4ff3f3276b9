// project_prefixes.wgsl: project.wgsl for calls with prefixes.
// Math     In the columns of segment s, ∂L/∂x = β·2^(t^s)·(u − packed·A (n^K)² 2^-24·2^(2 (t^K − t^s))), times the upstream gradient, with
//          u = 2^-24·sums + Σ F^s·packed of the other side of each positive pair − packed·R^s, where F and R are those of prefixes.wgsl.
//          A = Σ packed·u over all columns is what is left along the embedding: the radial part of the longest prefix, K
//          Columns behind the longest prefix get 0
// In/out   As project.wgsl. The columns of a segment begin anywhere in the output, but at whole vectors in packed rows. So this goes
//          element by element, four of the output by an invocation, because two of 16 bits share a word
// Groups   an output row each
// Numerics As project.wgsl

const SEGMENT_WORDS = 4u;
const UNIT = 5.9604644775390625e-8; // 2^-24

// Columns first … end − 1 of an output. In a packed row, they begin with element `packed`.
struct Segment {
    words: u32, // to the numbers of the prefix in `state`
    first: u32,
    end: u32,
    packed: u32,
}

fn segment_at(k: u32) -> Segment {
    let at = params.segments + SEGMENT_WORDS * k;
    var segment = Segment(k * params.prefix_words, 0u, side[at + 1u], 0u);
    if k > 0u {
        segment.first = side[at - SEGMENT_WORDS + 1u];
        segment.packed = 4u * side[at - SEGMENT_WORDS];
    }
    return segment;
}

fn dim() -> u32 {
    return side[params.segments + SEGMENT_WORDS * (params.prefixes - 1u) + 1u];
}

fn own_element(index: u32, element: u32) -> f32 {
    return widen(own[params.own_base + (index - params.own_first) * params.row_vectors + element / 4u])[element % 4u];
}

fn other_element(index: u32, element: u32) -> f32 {
    return widen(other[params.other_base + (index - params.other_first) * params.row_vectors + element / 4u])[element % 4u];
}

// u of a column. `own_index` is the first index behind the row.
fn gather(row: u32, own_index: u32, segment: Segment, column: u32, shift: i32) -> f32 {
    let element = segment.packed + column - segment.first;
    let of_query = params.passage == 0u;
    let listed = lists_occurrences();
    var first = row;
    var last = row + 1u;
    if listed {
        first = side[params.occurrence_start + row];
        last = side[params.occurrence_start + row + 1u];
    }
    var sum = 0.0;
    for (var k = first; k < last; k += 1u) {
        var index = k;
        if listed {
            index = side[params.occurrences + k];
        }
        sum += UNIT * sum_at(params.sums_base + (index - params.sums_first) * params.sums_stride + column);
        let pair = pair_of(row, index);
        if is_of_shard(pair.anchor) {
            let at = segment.words + params.diagonal + SCALED_WORDS * pair.anchor;
            let factor = times_power_of_two(float_at(at), bitcast<i32>(state[at + 1u]) - shift);
            sum += factor * other_element(pair.other, element);
        }
    }
    if segment.words < (params.prefixes - 1u) * params.prefix_words { // of no other there are radial parts
        let at = segment.words + params.radials + RADIAL_WORDS * own_index;
        return minus_along(sum, own_element(own_index, element), Pair(float_at(at), float_at(at + 1u)));
    }
    return sum;
}

// x − direction·along.
fn minus_along(x: f32, direction: f32, along: Pair) -> f32 {
    let part = two_product(along.high, direction);
    return opaque(x - part.high) - (part.low + along.low * direction);
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
    let longest = (params.prefixes - 1u) * params.prefix_words + params.norms + NORM_WORDS * index;
    let inverse = Pair(float_at(longest), float_at(longest + 1u));
    let power = bitcast<i32>(state[longest + NORM_POWER]);
    let columns = dim();

    // [1] along the embedding
    var along = Pair(0.0, 0.0);
    var k = 0u;
    for (var vector = lane.index; 4u * vector < columns; vector += LANES) {
        for (var column = 4u * vector; column < min(4u * vector + 4u, columns); column += 1u) {
            while column >= segment_at(k).end {
                k += 1u;
            }
            let segment = segment_at(k);
            let u = gather(row, index, segment, column, shift);
            along = pair_sum(along, two_product(u, own_element(index, segment.packed + column - segment.first)));
        }
    }
    along = reduce_sum(along, lane);
    along = pair_times(pair_product(along, pair_product(inverse, inverse)), UNIT);

    // [2] tangent and store
    let factor = params.factor * float_at(params.results + UPSTREAM);
    let scale = params.factor_exponent + bitcast<i32>(state[params.results + UPSTREAM + 1u]) + shift;
    k = 0u;
    for (var vector = lane.index; 4u * vector < params.dim; vector += LANES) {
        var x = vec4<f32>();
        for (var j = 0u; j < 4u; j += 1u) {
            let column = 4u * vector + j;
            if column < columns {
                while column >= segment_at(k).end {
                    k += 1u;
                }
                let segment = segment_at(k);
                let own_power = bitcast<i32>(state[segment.words + params.norms + NORM_WORDS * index + NORM_POWER]);
                let step = power_of_two(power - own_power);
                let part = Pair(along.high * step * step, along.low * step * step);
                let u = gather(row, index, segment, column, shift);
                let tangent = minus_along(u, own_element(index, segment.packed + column - segment.first), part);
                let exponent = scale + own_power;
                let half = exponent / 2;
                x[j] = tangent * factor * power_of_two(half) * power_of_two(exponent - half);
            }
        }
        store_vector(params.out_base + local * params.out_stride, vector, select(bitcast<vec4<u32>>(x), vec4<u32>(NOT_A_NUMBER), refused));
    }
}
