// several_prefixes.wgsl: what a tile does for each of several prefixes, shortest first. Its products go on from segment to segment, so all
// prefixes together have those of the longest. The alternative is one_prefix.wgsl.

// Every prefix leaves its products in `totals`. What a pass does for it is `visit_prefix` of that pass.
fn visit_prefixes(totals: ptr<function, Totals>, place: Place, thread: Thread, invocation: Invocation) {
    for (var k = 0u; k < params.prefixes; k += 1u) {
        visit_prefix(totals, place, thread, invocation, k);
        workgroupBarrier();
    }
}

// Makes products of the shorter prefix those of prefix k.
fn multiply_to(totals: ptr<function, Totals>, place: Place, thread: Thread, invocation: Invocation, k: u32) {
    var begin = 0u;
    if k > 0u {
        begin = side[params.segments + k - 1u].x;
        rescale(totals, place, thread, k);
    }
    multiply(totals, place, thread, invocation, begin, side[params.segments + k].x);
}

// Whether the radial sums of a prefix are taken. That of the longest is what is left along the embedding (project_prefixes.wgsl).
fn has_radials(k: u32) -> bool {
    return k + 1u < params.prefixes;
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
    for (var b = 0u; b < BLOCKS; b += 1u) {
        var of_cols = vec4<f32>();
        for (var j = 0u; j < 4u; j += 1u) {
            of_cols[j] = step_of(place, TILE + col_of(thread, b, j), k);
        }
        for (var i = 0u; i < 4u; i += 1u) {
            (*totals).block[b][i] = (*totals).block[b][i] * step_of(place, row_of(thread, b, i), k) * of_cols;
        }
    }
}

// Makes the gradients of each prefix the sum of those of all prefixes that have its columns. `totals` has those of the longest. A thread
// reads what it wrote itself.
fn join_gradients(totals: ptr<function, Totals>, place: Place, thread: Thread, mirrored: bool) {
    let columns = params.col_tiles * TILE;
    for (var k = params.prefixes - 1u; k > 0u; k -= 1u) {
        rescale(totals, place, thread, k);
        for (var b = 0u; b < BLOCKS; b += 1u) {
            for (var i = 0u; i < 4u; i += 1u) {
                for (var j = 0u; j < 4u; j += 1u) {
                    let row = place.row * TILE + row_of(thread, b, i);
                    let col = place.col * TILE + col_of(thread, b, j);
                    let g = (*totals).block[b][i][j] + load_gradient(k - 1u, row * columns + col);
                    (*totals).block[b][i][j] = g;
                    store_gradient(k - 1u, row * columns + col, g);
                    if mirrored {
                        store_gradient(k - 1u, col * columns + row, g);
                    }
                }
            }
        }
    }
}
