// logsumexp.wgsl: sums of exponentials of the rows and columns of tiles of cosines, and ranks.
// Math     for every index i of a tile's row edge that anchors a row: Σ exp(β s_ij) over its kept negatives j of the tile, and the
//          number of them with s_ij above s⁺; likewise down its columns. reference.rs: `Negatives::kept`
// In/out   left, right: packed embeddings; side, state: keys, norms, anchors · scratch: for each index and tile the sum, its
//          exponent, the count, PARTIAL_WORDS words at (tile across · indices of the edge, padded + index)
// Groups   one tile each
// Numerics Cosines and exponentials f32, exponents whole numbers. Where the kept cosines of a tile span less than 2^110, one
//          exponential under one exponent serves rows and columns; elsewhere each row and column has the exponent of its own
//          largest term, so nothing that counts is lost at any temperature. Same bits on every run: fixed order

const PARTIAL_WORDS = 3u;

var<workgroup> bars: array<f32, 2u * TILE>; // s⁺ with slack, by entry of the edges
// The cosine that an entry has its exponent from: the largest kept one, its own or that of the tile.
var<workgroup> tops: array<atomic<i32>, 2u * TILE>;
// Of kept negatives above the bar: four entries 16 apart, 8 bits each, because an entry has at most 128.
var<workgroup> counts: array<atomic<u32>, 32u * PARTS>;
var<workgroup> smallest: atomic<i32>;

// β·log2 e times it, rounded; 0 where nothing is kept.
fn exponent_at(entry: u32) -> f32 {
    let top = from_ordered(atomicLoad(&tops[entry]));
    return select(0.0, whole_logit(top), top > NO_COSINE);
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
    // [1] load
    let thread = Thread(index, index % 16u, index / 16u);
    let place = place_of(tile);
    if index < 2u * TILE {
        let edge = load_edge(place, index);
        candidates[index] = edge.candidate;
        anchors[index] = edge.anchor;
        bars[index] = rank_bar(edge);
        atomicStore(&tops[index], ordered(NO_COSINE));
    }
    if index < 32u * PARTS {
        atomicStore(&counts[index], 0u);
    }
    if index == 0u {
        atomicStore(&largest, ordered(NO_COSINE));
        atomicStore(&smallest, ordered(-NO_COSINE));
    }
    let products = multiply(place, thread, invocation);

    // [2] scale, [3] mask, [4] ranks and range
    var s: array<Cosines, BLOCKS>;
    let checked = is_checked(place);
    var top = vec4<f32>(NO_COSINE);
    var bottom = vec4<f32>(-NO_COSINE);
    var row_count: array<u32, PARTS>;
    var col_count: array<u32, PARTS>;
    for (var b = 0u; b < BLOCKS; b += 1u) {
        let block = scale_and_mask(products.block[b], thread, b, checked);
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
    let together = params.beta_head * (highest - from_ordered(atomicLoad(&smallest))) < 110.0; // also when nothing is kept
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

    // [6] sums: of rows and columns at once, or of rows, then of columns. One loop for both: what is there twice is compiled twice.
    var row_sum: array<vec4<f32>, PARTS>;
    var col_sum: array<vec4<f32>, PARTS>;
    for (var edge = 0u; edge < select(2u, 1u, together); edge += 1u) {
        for (var b = 0u; b < BLOCKS; b += 1u) {
            let block = s[b];
            let row_bits = select(0u, block.kept.row, edge == 0u);
            let col_bits = select(0u, block.kept.col, edge == 1u || together);
            var of_entries = vec4<f32>();
            for (var k = 0u; k < 4u; k += 1u) {
                of_entries[k] = exponent_at(select(TILE + col_of(thread, b, k), row_of(thread, b, k), edge == 0u));
            }
            var of_rows = vec4<f32>();
            var of_cols = vec4<f32>(); // not without a value: Chromium left what the last pass of the loop had
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

    // [7] store, an entry each. On the diagonal of a triangle the rows stand for both.
    let by_row = is_row(index);
    let diagonal = params.triangle != 0u && place.row == place.col;
    if index >= 2u * TILE || select(params.col_sums, params.row_sums, by_row) == 0u || (diagonal && !by_row) {
        return;
    }
    // Entry 64 p + 16 i + y is component i of what the 16 threads of row (or column) y have of part p.
    let lane = 16u * (index / 64u) + index % 16u;
    let component = index / 16u % 4u;
    var sum = 0.0;
    for (var k = 0u; k < 16u; k += 1u) {
        sum += pool[16u * lane + k][component];
    }
    let across = select(place.row, place.col, by_row);
    let along = select(params.col_tiles, params.row_tiles, by_row) * TILE;
    let start = select(place.col, place.row, by_row) * TILE;
    let to = select(params.col_partials, params.row_partials, by_row) + PARTIAL_WORDS * (across * along + start + index % TILE);
    scratch[to] = bitcast<u32>(sum);
    scratch[to + 1u] = bitcast<u32>(i32(exponent_at(index)));
    scratch[to + 2u] = (atomicLoad(&counts[lane]) >> (8u * component)) & 255u;
}
