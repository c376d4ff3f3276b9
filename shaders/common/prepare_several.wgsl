// prepare_several.wgsl: prepare.wgsl for calls with several prefixes, shortest first. The alternative is prepare_one.wgsl.

const SEGMENT_WORDS = 4u;

fn pack_segments(local: u32, index: u32, row: u32, start: u32, lane: Lane) {
    var packing = Packing();
    for (var k = 0u; k < params.prefixes; k += 1u) {
        packing = pack_segment(packing, k, local, index, row, start, lane);
    }
}

fn positives_of_prefixes(row: u32, index: u32, left: u32, right: u32, lane: Lane) {
    var product = Product();
    for (var k = 0u; k < params.prefixes; k += 1u) {
        product = positive_of_prefix(product, k, row, index, left, right, lane);
    }
}

// Where the packed vectors of a prefix end.
fn vectors_of(k: u32) -> u32 {
    return side[params.segments + SEGMENT_WORDS * k];
}

// Where the entries of a prefix end.
fn columns_of(k: u32) -> u32 {
    return side[params.segments + SEGMENT_WORDS * k + 1u];
}
