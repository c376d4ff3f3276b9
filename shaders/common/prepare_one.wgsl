// prepare_one.wgsl: prepare.wgsl for calls whose only prefix is the longest. There is no loop over prefixes, as in one_prefix.wgsl. The
// alternative is prepare_several.wgsl.

fn pack_segments(local: u32, index: u32, row: u32, start: u32, lane: Lane) {
    let all = pack_segment(Packing(), 0u, local, index, row, start, lane);
}

fn positives_of_prefixes(row: u32, index: u32, left: u32, right: u32, lane: Lane) {
    let product = positive_of_prefix(Product(), 0u, row, index, left, right, lane);
}

fn vectors_of(k: u32) -> u32 {
    return params.row_vectors;
}

fn columns_of(k: u32) -> u32 {
    return params.dim;
}
