// one_prefix.wgsl: a tile of a call that has one prefix, usually the whole embedding. There is no loop over prefixes, because not every
// compiler sees that a loop ends after its first turn. The alternative is several_prefixes.wgsl.

fn visit_prefixes(totals: ptr<function, Totals>, place: Place, thread: Thread, invocation: Invocation) {
    visit_prefix(totals, place, thread, invocation, 0u);
}

fn multiply_to(totals: ptr<function, Totals>, place: Place, thread: Thread, invocation: Invocation, k: u32) {
    multiply(totals, place, thread, invocation, 0u, params.row_vectors);
}

fn has_radials(k: u32) -> bool {
    return false;
}

fn join_gradients(totals: ptr<function, Totals>, place: Place, thread: Thread, mirrored: bool) {
}
