// logsumexp.wgsl: sums of exponentials of the rows and columns of tiles of cosines, and ranks.
// Math     for every index i of a tile's rows that anchors a row of the batch: Σ exp(β s_ij) over the negatives j of the tile that it
//          keeps, and the number of those whose s_ij is above s⁺. The same for the indices of its columns. reference.rs: `Negatives::kept`
// In/out   left, right: packed embeddings; side, state: keys, norms, anchors · scratch: for each index and tile the sum, its
//          exponent and the count, PARTIAL_WORDS words at (tile of the other axis · indices of the axis, padded + index)
//          With prefixes, for each of them: steps 2 to 7 take the products as they stand where the prefix ends
// Groups   one tile each
// Numerics Cosines and exponentials are f32, exponents are whole numbers. If the cosines of a tile that any anchor keeps span less than
//          2^110, one exponential under one exponent serves rows and columns. Else each row and column has the exponent of its own largest
//          term, so that nothing that counts is lost at any temperature. Every run gives the same bits, because the order is fixed

const PARTIAL_WORDS = 3u;

var<workgroup> bars: array<f32, 2u * TILE>; // s⁺ with slack, of every entry
// The cosine that gives an entry its exponent: the largest one that any anchor of the tile keeps, or that the entry's own anchor keeps.
var<workgroup> tops: array<atomic<i32>, 2u * TILE>;
// Numbers of negatives above the bar. A word has four entries 16 apart, with 8 bits each, because an entry counts at most 128.
var<workgroup> counts: array<atomic<u32>, 32u * PARTS>;
var<workgroup> smallest: atomic<i32>;

// The exponent of an entry: β·log2 e times that cosine, rounded. It is 0 where no candidate is kept.
fn exponent_at(entry: u32) -> f32 {
    let top = from_ordered(atomicLoad(&tops[entry]));
    return select(0.0, whole_logit(top), top > NO_COSINE);
}

// The sums of prefix k, whose shorter ones have left their products in `totals`.
fn visit_prefix(totals: ptr<function, Totals>, place: Place, thread: Thread, invocation: Invocation, k: u32) {
    let index = thread.index;
    // [1] load
    let words = k * params.prefix_words;
    if index < 2u * TILE {
        let edge = load_edge(place, index, words);
        candidates[index] = edge.candidate;
        anchors[index] = edge.anchor;
        bars[index] = rank_bar(edge, words);
        atomicStore(&tops[index], ordered(NO_COSINE));
    }
    if index < 32u * PARTS {
        atomicStore(&counts[index], 0u);
    }
    if index == 0u {
        atomicStore(&largest, ordered(NO_COSINE));
        atomicStore(&smallest, ordered(-NO_COSINE));
    }
    multiply_to(totals, place, thread, invocation, k);

    // [2] scale, [3] mask, [4] ranks and range
    var s: array<Cosines, BLOCKS>;
    let checked = is_checked(place);
    var top = vec4<f32>(NO_COSINE);
    var bottom = vec4<f32>(-NO_COSINE);
    var row_count = array<u32, PARTS>(); // not without a value: Chromium would keep that of the last pass of the loop
    var col_count = array<u32, PARTS>();
    for (var b = 0u; b < BLOCKS; b += 1u) {
        let block = scale_and_mask((*totals).block[b], thread, b, checked);
        var col_bars = vec4<f32>();
        for (var j = 0u; j < 4u; j += 1u) {
            col_bars[j] = bars[TILE + col_of(thread, b, j)];
        }
        var of_rows = 0u;
        var of_cols = vec4<u32>();
        for (var i = 0u; i < 4u; i += 1u) {
            let x = block.s[i];
            let kept = kept_in_row(block.kept.row | block.kept.col, i);
            top = select(top, max(top, x), kept);
            bottom = select(bottom, min(bottom, x), kept);
            let above_row = select(vec4<u32>(), vec4<u32>(1u), x > vec4<f32>(bars[row_of(thread, b, i)]));
            let above_col = select(vec4<u32>(), vec4<u32>(1u), x > col_bars);
            of_rows += dot(select(vec4<u32>(), above_row, kept_in_row(block.kept.row, i)), vec4<u32>(1u)) << (8u * i);
            of_cols += select(vec4<u32>(), above_col, kept_in_row(block.kept.col, i));
        }
        row_count[b / PARTS] += of_rows;
        col_count[b % PARTS] += dot(of_cols, vec4<u32>(1u, 1u << 8u, 1u << 16u, 1u << 24u));
        s[b] = block;
    }
    for (var p = 0u; p < PARTS; p += 1u) {
        atomicAdd(&counts[16u * p + thread.y], row_count[p]);
        atomicAdd(&counts[16u * (PARTS + p) + thread.x], col_count[p]);
    }
    atomicMax(&largest, ordered(max(max(top.x, top.y), max(top.z, top.w))));
    atomicMin(&smallest, ordered(min(min(bottom.x, bottom.y), min(bottom.z, bottom.w))));
    workgroupBarrier();

    // [5] exponents
    let highest = from_ordered(atomicLoad(&largest));
    let together = params.beta_head * (highest - from_ordered(atomicLoad(&smallest))) < 110.0; // also when none is kept
    if !together {
        for (var b = 0u; b < BLOCKS; b += 1u) {
            let block = s[b];
            var col_top = vec4<f32>(NO_COSINE);
            for (var i = 0u; i < 4u; i += 1u) {
                let x = block.s[i];
                let row_top = select(vec4<f32>(NO_COSINE), x, kept_in_row(block.kept.row, i));
                col_top = select(col_top, max(col_top, x), kept_in_row(block.kept.col, i));
                atomicMax(&tops[row_of(thread, b, i)], ordered(max(max(row_top.x, row_top.y), max(row_top.z, row_top.w))));
            }
            for (var j = 0u; j < 4u; j += 1u) {
                atomicMax(&tops[TILE + col_of(thread, b, j)], ordered(col_top[j]));
            }
        }
    } else if index < 2u * TILE {
        atomicStore(&tops[index], ordered(highest));
    }
    workgroupBarrier();

    // [6] sums of rows and columns at once, or of rows and then of columns. It is one loop, because what is written twice is compiled
    // twice.
    var row_sum = array<vec4<f32>, PARTS>();
    var col_sum = array<vec4<f32>, PARTS>();
    for (var edge = 0u; edge < select(2u, 1u, together); edge += 1u) {
        for (var b = 0u; b < BLOCKS; b += 1u) {
            let block = s[b];
            let row_bits = select(0u, block.kept.row, edge == 0u);
            let col_bits = select(0u, block.kept.col, edge == 1u || together);
            var of_entries = vec4<f32>();
            for (var n = 0u; n < 4u; n += 1u) {
                of_entries[n] = exponent_at(select(TILE + col_of(thread, b, n), row_of(thread, b, n), edge == 0u));
            }
            var of_rows = vec4<f32>();
            var of_cols = vec4<f32>(); // not without a value: Chromium would keep that of the last pass of the loop
            for (var i = 0u; i < 4u; i += 1u) {
                let terms = exp2_of_four(logits_minus(block.s[i], select(of_entries, vec4<f32>(of_entries[i]), edge == 0u)));
                of_rows[i] = dot(select(vec4<f32>(), terms, kept_in_row(row_bits, i)), vec4<f32>(1.0));
                of_cols += select(vec4<f32>(), terms, kept_in_row(col_bits, i));
            }
            row_sum[b / PARTS] += of_rows;
            col_sum[b % PARTS] += of_cols;
        }
    }
    for (var p = 0u; p < PARTS; p += 1u) {
        pool[256u * p + 16u * thread.y + thread.x] = row_sum[p];
        pool[256u * (PARTS + p) + 16u * thread.x + thread.y] = col_sum[p];
    }
    workgroupBarrier();

    // [7] store: each thread stores an entry. On the diagonal of a triangle the sums of the rows stand for both.
    let by_row = is_row(index);
    let diagonal = params.triangle != 0u && place.row == place.col;
    if index < 2u * TILE && select(params.col_sums, params.row_sums, by_row) != 0u && (by_row || !diagonal) {
        let partials = k * params.prefix_partials + select(params.col_partials, params.row_partials, by_row);
        let to = partials + PARTIAL_WORDS * place_among(place, index);
        scratch[to] = bitcast<u32>(sum_of_threads(index));
        scratch[to + 1u] = bitcast<u32>(i32(exponent_at(index)));
        scratch[to + 2u] = (atomicLoad(&counts[lane_of(index)]) >> (8u * component_of(index))) & 255u;
    }
}

@compute @workgroup_size(256)
fn logsumexp(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    invocation: Invocation,
) {
    let index = invocation.index;
    let tile = group.y * groups.x + group.x;
    if tile >= params.tiles {
        return;
    }
    let thread = Thread(index, index % 16u, index / 16u);
    let place = place_of(tile);
    var totals = Totals();
    visit_prefixes(&totals, place, thread, invocation);
}
