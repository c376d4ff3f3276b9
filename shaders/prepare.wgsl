// prepare.wgsl: makes what the heavy passes read: packed embeddings, norms, cosines of the positives, keys of the anchors.
// Math     reset      status ← NONE, sums ← 0
//          pack       n = ‖x‖; packed = x·2^t with norm in [2^12, 2^13); norms: 2^12/‖packed‖ and t
//          positives  s⁺ᵢ = q̂ᵢ·p̂_{π(i)}; thresholds of margin and rank
//          With prefixes all of it for each. Segments lie behind each other in a packed row, each padded with zeros to whole stages of a
//          tile. The power t of a segment is that of its prefix, t^k, so every prefix keeps as many digits as an embedding alone, however
//          small it is beside the rest. Running products are multiplied by 2^(t^k − t^(k−1)) ≤ 1 of both rows where segment k begins
// In/out   raw: embeddings of f32, f16 or bf16 with any row stride, as words; side: order, positives, keys · packed, state, status
// Groups   reset: 64 words each; pack: an index each; positives: a row each
// Numerics Embeddings are decoded by whole numbers, so that subnormal ones count on every device, and NaN is seen under any
//          optimiser. Norms and s⁺ have about 44 bits. A row that is not finite or has norm zero packs as zeros

struct Params {
    zero: u32,
    count: u32,           // reset: words; pack: indices of this part; positives: rows
    first: u32,           // the index of the first one
    dim: u32,             // of the longest prefix
    dtype: u32,
    row_stride: u32,      // elements
    raw_base: u32,        // elements from the start of the binding to the row of index `raw_first`
    raw_first: u32,
    limit: u32,           // indices of the tower. Those beyond are packed as zeros
    order: u32,           // the row behind each index; NONE for the identity
    packed_base: u32,     // vectors from the start of the binding to the first index of this part
    row_vectors: u32,
    norms: u32,
    passage: u32,         // 1 for passages
    other_base: u32,      // positives: vectors from the start of `other` to index `other_first`
    other_first: u32,
    other_norms: u32,
    positives: u32,       // the index in the space of the passages of each row's positive; NONE for the identity
    row_keys: u32,
    positive: u32,
    anchors: u32,
    margin: f32,          // with the slack of ties
    prefixes: u32,
    segments: u32,        // SEGMENT_WORDS of each prefix: its packed vectors and its entries
    prefix_words: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> raw: array<u32>;
@group(0) @binding(2) var<storage, read> side: array<u32>;
@group(0) @binding(3) var<storage, read_write> state: array<u32>;
@group(0) @binding(4) var<storage, read_write> status: array<atomic<u32>>;
@group(0) @binding(5) var<storage, read_write> packed: array<Packed>;
@group(0) @binding(6) var<storage, read> query: array<Packed>;
@group(0) @binding(7) var<storage, read> passage: array<Packed>;

const TYPE_F32 = 0u;
const TYPE_F16 = 1u;
const TYPE_BF16 = 2u;
const COSINE_TIE = 9.5367431640625e-7; // 2^-20, src/mask.rs

@compute @workgroup_size(64)
fn reset(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let word = id.y * groups.x * 64u + id.x;
    if word < STATUS_WORDS {
        atomicStore(&status[word], NONE);
    }
    if word == 0u {
        state[ACCEPTED] = 0u;
    }
    if word < params.count {
        state[params.first + word] = 0u;
    }
}

// The bits of the f32 number that has the value of an f16 number.
fn widen_f16(half: u32) -> u32 {
    let sign = (half & 0x8000u) << 16u;
    let magnitude = half & 0x7fffu;
    if magnitude >= 0x7c00u {
        return sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13u);
    }
    if magnitude >= 0x400u {
        return sign | ((magnitude << 13u) + 0x38000000u);
    }
    return sign | bitcast<u32>(f32(magnitude) * 5.9604644775390625e-8);
}

// The bits, as f32, of element `column` of a row that starts `start` elements from the start of the binding. They are 0 from `end` on.
fn element_bits(start: u32, column: u32, end: u32) -> u32 {
    let dtype = params.dtype;
    if column >= end {
        return 0u;
    }
    let at = start + column;
    if dtype == TYPE_F32 {
        return raw[at];
    }
    let half = (raw[at >> 1u] >> (16u * (at & 1u))) & 0xffffu;
    return select(widen_f16(half), half << 16u, dtype == TYPE_BF16);
}

// x·2^-exponent, where `exponent` is that of the largest element of the row.
fn scaled_element(bits: u32, exponent: i32) -> f32 {
    let field = (bits >> 23u) & 255u;
    let fraction = bits & 0x7fffffu;
    var part = bitcast<f32>(0x3f800000u | fraction);
    var power = i32(field) - 127;
    if field == 0u {
        part = f32(fraction);
        power = -149;
    }
    let x = part * power_of_two(power - exponent);
    return select(x, -x, (bits >> 31u) != 0u);
}

// What is known of a row after some of its prefixes.
struct Packing {
    largest: u32,    // bits of the largest element
    exponent: i32,   // of that
    squares: Pair,   // of the elements times 2^-exponent
    t: i32,
    column: u32,     // the first of the next segment
    vector: u32,     // packed
}

// Packs segment k of index `index`, whose raw row begins at `start`. `before` is what is known after the shorter prefixes.
fn pack_segment(before: Packing, k: u32, local: u32, index: u32, row: u32, start: u32, lane: Lane) -> Packing {
    var largest = before.largest;
    var exponent = before.exponent;
    var squares = before.squares;
    let first_column = before.column;
    let first_vector = before.vector;
    let end_vector = vectors_of(k);
    let end_column = columns_of(k);

    // [1] the largest element
    var largest_here = 0u;
    for (var column = first_column + lane.index; column < end_column; column += LANES) {
        largest_here = max(largest_here, element_bits(start, column, end_column) & 0x7fffffffu);
    }
    largest_here = u32(reduce_max(i32(largest_here), lane));
    let begins = largest == 0u && largest_here > 0u;
    if largest_here > largest {
        largest = largest_here;
        var larger = i32(largest >> 23u) - 127;
        if largest < 0x800000u {
            larger = -118 - i32(countLeadingZeros(largest)); // 31 − zeros − 149
        }
        let unit = power_of_two(2 * (exponent - larger));
        squares = Pair(squares.high * unit, squares.low * unit);
        exponent = larger;
    }
    let finite = largest < 0x7f800000u;
    let usable = finite && largest > 0u;

    // [2] norm
    var more = Pair(0.0, 0.0);
    if usable {
        for (var column = first_column + lane.index; column < end_column; column += LANES) {
            let x = scaled_element(element_bits(start, column, end_column), exponent);
            more = pair_sum(more, two_product(x, x));
        }
    }
    more = reduce_sum(more, lane);
    if begins {
        squares = more;
    } else {
        squares = pair_sum(squares, more);
    }
    var power = 0;
    var inverse = Pair(0.0, 0.0);
    if usable {
        let root = sqrt(squares.high);
        let square = two_product(root, root);
        let norm = quick_two_sum(root, ((squares.high - square.high) - square.low + squares.low) / (2.0 * root));
        let size = exponent_of(norm.high);
        let unit = power_of_two(-size);
        let part = Pair(norm.high * unit, norm.low * unit); // 1 … 2
        let first = 1.0 / part.high;
        let product = two_product(part.high, first);
        inverse = quick_two_sum(first, first * (((1.0 - product.high) - product.low) - part.low * first));
        power = 12 - size;
    }
    let t = power - exponent;
    if lane.index == 0u {
        if !finite {
            atomicMin(&status[NON_FINITE + params.passage], row);
        } else if largest == 0u && k == 0u { // if any prefix has norm zero, the shortest has
            atomicMin(&status[ZERO_NORM + params.passage], row);
        }
        let to = params.norms + k * params.prefix_words + NORM_WORDS * index;
        state[to] = bitcast<u32>(inverse.high);
        state[to + 1u] = bitcast<u32>(inverse.low);
        state[to + NORM_POWER] = bitcast<u32>(t);
        state[to + NORM_STEP] = bitcast<u32>(select(power_of_two(t - before.t), 1.0, begins || k == 0u));
        // Shorter prefixes without direction have the power of the first that has one, so that no step is above 1.
        for (var empty = 0u; empty < select(0u, k, begins); empty += 1u) {
            state[params.norms + empty * params.prefix_words + NORM_WORDS * index + NORM_POWER] = bitcast<u32>(t);
        }
    }

    // [3] pack
    let unit = power_of_two(power);
    for (var vector = first_vector + lane.index; vector < end_vector; vector += LANES) {
        var x = vec4<f32>();
        if usable {
            let column = first_column + 4u * (vector - first_vector);
            x = unit * vec4<f32>(
                scaled_element(element_bits(start, column, end_column), exponent),
                scaled_element(element_bits(start, column + 1u, end_column), exponent),
                scaled_element(element_bits(start, column + 2u, end_column), exponent),
                scaled_element(element_bits(start, column + 3u, end_column), exponent),
            );
        }
        packed[params.packed_base + local * params.row_vectors + vector] = narrow(x);
    }
    return Packing(largest, exponent, squares, t, end_column, end_vector);
}

@compute @workgroup_size(64)
fn pack(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let local = group.y * groups.x + group.x;
    if local >= params.count {
        return;
    }
    let index = params.first + local;
    if index >= params.limit {
        for (var vector = lane.index; vector < params.row_vectors; vector += LANES) {
            packed[params.packed_base + local * params.row_vectors + vector] = narrow(vec4<f32>());
        }
        return;
    }
    var row = index;
    if params.order != NONE {
        row = side[params.order + index];
    }
    let start = params.raw_base + (row - params.raw_first) * params.row_stride;

    pack_segments(local, index, row, start, lane);
}

fn norm_at(at: u32) -> Pair {
    return Pair(bitcast<f32>(state[at]), bitcast<f32>(state[at + 1u]));
}

// A lane's part of the product of two packed rows up to where a segment ends.
struct Product {
    dot: Pair,
    vector: u32,
}

// The cosine of a row with its positive for prefix k. Packed rows begin at `left` and `right`. `before` is that of the shorter prefix.
fn positive_of_prefix(before: Product, k: u32, row: u32, index: u32, left: u32, right: u32, lane: Lane) -> Product {
    let end = vectors_of(k);
    let norm = params.norms + k * params.prefix_words + NORM_WORDS * row;
    let other_norm = params.other_norms + k * params.prefix_words + NORM_WORDS * index;
    var of_lane = before.dot;
    if k > 0u {
        let steps = vec2<f32>(bitcast<f32>(state[norm + NORM_STEP]), bitcast<f32>(state[other_norm + NORM_STEP]));
        of_lane = Pair(of_lane.high * steps.x * steps.y, of_lane.low * steps.x * steps.y);
    }
    for (var vector = before.vector + lane.index; vector < end; vector += LANES) {
        let a = widen(query[left + vector]);
        let b = widen(passage[right + vector]);
        of_lane = pair_sum(of_lane, two_product(a.x, b.x));
        of_lane = pair_sum(of_lane, two_product(a.y, b.y));
        of_lane = pair_sum(of_lane, two_product(a.z, b.z));
        of_lane = pair_sum(of_lane, two_product(a.w, b.w));
    }
    let dot = reduce_sum(of_lane, lane);
    if lane.index == 0u {
        let norms = pair_product(norm_at(norm), norm_at(other_norm));
        let cosine = pair_product(pair_times(dot, 5.9604644775390625e-8), norms); // 2^-24
        let to = params.positive + k * params.prefix_words + POSITIVE_WORDS * row;
        state[to] = bitcast<u32>(cosine.high);
        state[to + 1u] = bitcast<u32>(cosine.low);
        let anchor = params.anchors + k * params.prefix_words + ANCHOR_WORDS * row;
        state[anchor] = side[params.row_keys + 2u * row];
        state[anchor + 1u] = side[params.row_keys + 2u * row + 1u];
        state[anchor + 2u] = bitcast<u32>(pair_sum(cosine, Pair(params.margin, 0.0)).high);
        state[anchor + 3u] = bitcast<u32>(pair_sum(cosine, Pair(COSINE_TIE, 0.0)).high);
    }
    return Product(of_lane, end);
}

@compute @workgroup_size(64)
fn positives(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let local = group.y * groups.x + group.x;
    if local >= params.count {
        return;
    }
    let row = params.first + local;
    var index = row;
    if params.positives != NONE {
        index = side[params.positives + row];
    }
    let left = params.packed_base + local * params.row_vectors;
    let right = params.other_base + (index - params.other_first) * params.row_vectors;
    positives_of_prefixes(row, index, left, right, lane);
}
