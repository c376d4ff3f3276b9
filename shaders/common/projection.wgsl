// projection.wgsl: what project.wgsl and project_prefixes.wgsl share: parameters, buffers, and how numbers are stored.

struct Params {
    zero: u32,
    count: u32,           // output rows of this part
    first: u32,           // the query or passage of the first one
    dim: u32,
    row_vectors: u32,     // of a packed row
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
    prefixes: u32,        // the rest is for project_prefixes.wgsl
    segments: u32,        // SEGMENT_WORDS of each prefix: the ends of its packed vectors and of its entries
    prefix_words: u32,
    radials: u32,         // R of prefixes.wgsl
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

// Whether the indices behind a row are listed.
fn lists_occurrences() -> bool {
    return (params.passage != 0u) & (params.occurrence_start != NONE);
}

// An embedding in its pair: the row of the pair, NONE if the index anchors none, and the index of the other embedding.
struct Paired {
    anchor: u32,
    other: u32,
}

// `index` is one of those behind `row`, which is a query or a passage.
fn pair_of(row: u32, index: u32) -> Paired {
    if params.passage != 0u {
        let anchor = side[params.candidates + CANDIDATE_WORDS * index + 3u];
        return Paired(anchor, anchor);
    }
    if params.positives != NONE {
        return Paired(row, side[params.positives + row]);
    }
    return Paired(row, row);
}

// Whether the shard adds the positive of a pair. That of a query it always adds, because queries are those of the shard.
fn is_of_shard(anchor: u32) -> bool {
    return params.passage == 0u || (anchor >= params.row_begin && anchor < params.row_end); // not if it is NONE
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
