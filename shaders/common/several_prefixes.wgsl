// several_prefixes.wgsl: what a tile does for each of several prefixes, shortest first. Its products go on from segment to segment, so that those
// of the longest prefix are those of all. The alternative is one_prefix.wgsl.

fn prefix_count() -> u32 {
    return params.prefixes;
}

// Whether the radial sums of a prefix are taken. That of the longest is what is left along the embedding (project_prefixes.wgsl).
fn has_radials(k: u32) -> bool {
    return k + 1u < params.prefixes;
}

// Where the packed vectors of a prefix end.
fn end_vector(k: u32) -> u32 {
    return side[params.segments + k].x;
}

// 2^(t of prefix k − t of the shorter one) of an entry (prepare.wgsl).
fn step_of(place: Place, entry: u32, k: u32) -> f32 {
    let index = index_of(place, entry);
    if index == NONE {
        return 1.0;
    }
    let norms = select(params.col_norms, params.row_norms, is_row(entry));
    return bitcast<f32>(state[k * params.prefix_words + norms + NORM_WORDS * index + NORM_STEP]);
}

// Multiplies each element by the steps of its row and its column from the shorter prefix to prefix k.
fn rescale(totals: ptr<function, Totals>, place: Place, thread: Thread, k: u32) {
    for (var b = 0u; b < select(0u, BLOCKS, k > 0u); b += 1u) {
        var of_cols = vec4<f32>();
        for (var j = 0u; j < 4u; j += 1u) {
            of_cols[j] = step_of(place, TILE + col_of(thread, b, j), k);
        }
        for (var i = 0u; i < 4u; i += 1u) {
            (*totals).block[b][i] = (*totals).block[b][i] * step_of(place, row_of(thread, b, i), k) * of_cols;
        }
    }
}
