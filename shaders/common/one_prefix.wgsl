// one_prefix.wgsl: what a tile of a call without prefixes does for its only one: the whole embedding. The alternative is several_prefixes.wgsl.

fn prefix_count() -> u32 {
    return 1u;
}

fn has_radials(k: u32) -> bool {
    return false;
}

fn end_vector(k: u32) -> u32 {
    return params.row_vectors;
}

fn rescale(totals: ptr<function, Totals>, place: Place, thread: Thread, k: u32) {
}
