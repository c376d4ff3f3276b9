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

var<workgroup> bars: array<f32, 2u * TILE>;      // s⁺ with slack, by entry of the edges
var<workgroup> exponents: array<f32, 2u * TILE>; // β·log2 e times the largest cosine, rounded
var<workgroup> smallest: atomic<i32>;

// One number for each row of the tile, and one for each column, from what the threads across have of them.
fn share(thread: Thread, rows: array<vec4<f32>, PARTS>, cols: array<vec4<f32>, PARTS>) {
    for (var p = 0u; p < PARTS; p += 1u) {
        pool[256u * p + 16u * thread.y + thread.x] = rows[p];
        pool[256u * (PARTS + p) + 16u * thread.x + thread.y] = cols[p];
    }
}

// Threads that reduce: 16 for each part of the rows, then as many for the columns. Their four entries are 16 apart.
fn reduces(thread: u32) -> bool {
    return thread < 32u * PARTS;
}

fn first_entry(thread: u32) -> u32 {
    return select(TILE, 0u, thread < 16u * PARTS) + thread % 16u + 64u * (thread / 16u % PARTS);
}

fn sum_shared(thread: u32) -> vec4<f32> {
    var sum = pool[16u * thread];
    for (var k = 1u; k < 16u; k += 1u) {
        sum += pool[16u * thread + k];
    }
    return sum;
}

fn largest_shared(thread: u32) -> vec4<f32> {
    var top = pool[16u * thread];
    for (var k = 1u; k < 16u; k += 1u) {
        top = max(top, pool[16u * thread + k]);
    }
    return top;
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
    for (var k = index; k < 2u * TILE; k += THREADS) {
        let edge = load_edge(place, k);
        candidates[k] = edge.candidate;
        anchors[k] = edge.anchor;
        bars[k] = rank_bar(edge);
    }
    if index == 0u {
        atomicStore(&largest, ordered(NO_COSINE));
        atomicStore(&smallest, ordered(-NO_COSINE));
    }
    let products = multiply(place, thread, invocation);

    // [2] scale, [3] mask
    var s: array<Cosines, BLOCKS>;
    let checked = is_checked(place);
    for (var b = 0u; b < BLOCKS; b += 1u) {
        s[b] = scale_and_mask(products.block[b], thread, b, checked);
    }

    // [4] exponents and ranks
    var top = NO_COSINE;
    var bottom = -NO_COSINE;
    var row_top: array<vec4<f32>, PARTS>;
    var col_top: array<vec4<f32>, PARTS>;
    var row_count: array<vec4<f32>, PARTS>;
    var col_count: array<vec4<f32>, PARTS>;
    for (var p = 0u; p < PARTS; p += 1u) {
        row_top[p] = vec4<f32>(NO_COSINE);
        col_top[p] = vec4<f32>(NO_COSINE);
    }
    for (var b = 0u; b < BLOCKS; b += 1u) {
        let r = b / PARTS;
        let c = b % PARTS;
        for (var i = 0u; i < 4u; i += 1u) {
            let row_bar = bars[row_of(thread, b, i)];
            for (var j = 0u; j < 4u; j += 1u) {
                let x = s[b].s[i][j];
                if is_kept(s[b].kept.row | s[b].kept.col, i, j) {
                    top = max(top, x);
                    bottom = min(bottom, x);
                }
                if is_kept(s[b].kept.row, i, j) {
                    row_top[r][i] = max(row_top[r][i], x);
                    row_count[r][i] += select(0.0, 1.0, x > row_bar);
                }
                if is_kept(s[b].kept.col, i, j) {
                    col_top[c][j] = max(col_top[c][j], x);
                    col_count[c][j] += select(0.0, 1.0, x > bars[TILE + col_of(thread, b, j)]);
                }
            }
        }
    }
    share(thread, row_top, col_top);
    atomicMax(&largest, ordered(top));
    atomicMin(&smallest, ordered(bottom));
    workgroupBarrier();
    let highest = from_ordered(atomicLoad(&largest));
    let together = params.beta_head * (highest - from_ordered(atomicLoad(&smallest))) < 110.0; // also when nothing is kept
    if reduces(index) {
        var tops = largest_shared(index);
        if together {
            tops = vec4<f32>(highest);
        }
        let first = first_entry(index);
        for (var i = 0u; i < 4u; i += 1u) {
            exponents[first + 16u * i] = select(0.0, round(params.beta_head * tops[i]), tops[i] > NO_COSINE);
        }
    }
    workgroupBarrier();

    // [5] sums
    var row_sum: array<vec4<f32>, PARTS>;
    var col_sum: array<vec4<f32>, PARTS>;
    for (var b = 0u; b < BLOCKS; b += 1u) {
        for (var i = 0u; i < 4u; i += 1u) {
            let row_exponent = exponents[row_of(thread, b, i)];
            for (var j = 0u; j < 4u; j += 1u) {
                let x = s[b].s[i][j];
                let by_row = exp2_of(logit_minus(x, row_exponent));
                var by_col = by_row;
                if !together {
                    by_col = exp2_of(logit_minus(x, exponents[TILE + col_of(thread, b, j)]));
                }
                row_sum[b / PARTS][i] += select(0.0, by_row, is_kept(s[b].kept.row, i, j));
                col_sum[b % PARTS][j] += select(0.0, by_col, is_kept(s[b].kept.col, i, j));
            }
        }
    }

    // [6] store
    share(thread, row_sum, col_sum);
    workgroupBarrier();
    var sums = vec4<f32>();
    if reduces(index) {
        sums = sum_shared(index);
    }
    workgroupBarrier();
    share(thread, row_count, col_count);
    workgroupBarrier();
    // On the diagonal of a triangle the rows stand for both.
    let of_rows = index < 16u * PARTS;
    let diagonal = params.triangle != 0u && place.row == place.col;
    if !reduces(index) || select(params.col_sums, params.row_sums, of_rows) == 0u || (diagonal && !of_rows) {
        return;
    }
    let counts = sum_shared(index);
    let first = first_entry(index);
    let across = select(place.row, place.col, of_rows);
    let along = select(params.col_tiles, params.row_tiles, of_rows) * TILE;
    let start = select(place.col, place.row, of_rows) * TILE;
    for (var i = 0u; i < 4u; i += 1u) {
        let entry = first + 16u * i;
        let to = select(params.col_partials, params.row_partials, of_rows) + PARTIAL_WORDS * (across * along + start + entry % TILE);
        scratch[to] = bitcast<u32>(sums[i]);
        scratch[to + 1u] = bitcast<u32>(i32(exponents[entry]));
        scratch[to + 2u] = u32(counts[i]);
    }
}
