// gradient_tile.wgsl: gradient of the loss with respect to tiles of cosines.
// Math     g_ij = exp(β s_ij)·([row i keeps j] a_i + [column j keeps i] b_j), with a, b from combine.wgsl, in units of 2^SHIFT.
//          ĝ_ij = g_ij·n_i·n_j with n = 2^12/‖packed row‖, so that products with packed rows need no other scale.
//          dots: Σ g (s − s⁺), where each part of g has the positive of its own anchor
//          With prefixes g^k is that of prefix k, and plane s has Σ ĝ^k over the prefixes k ≥ s, because all of these have the columns of
//          segment s. ĝ^k is in units of the packed rows of segment k, so it is multiplied by steps (several_prefixes.wgsl) on its way to
//          shorter prefixes. A thread makes these sums of what it stored itself, from the longest prefix down: 3 K − 2 numbers are moved
//          for each cosine, K of them without these sums, too. To add each ĝ^k to all shorter planes at once would move about K²
//          radials: by row Σ_j g_r (s − s⁺_r) + g_c s, by column Σ_i g_c (s − s⁺_c) + g_r s, where g_r is the part of g of the row's
//          anchor, and g_c that of the column's, for each prefix but the longest
// In/out   as logsumexp.wgsl; state: coefficients, positives, SHIFT · scratch: ĝ, row-major [row_tiles·TILE][col_tiles·TILE];
//          dots: an f32 for each tile; radials: an f32 for each index and tile, as the sums of logsumexp.wgsl
// Groups   one tile each. Off the diagonal of a triangle, also the mirror image of the tile
// Numerics As logsumexp.wgsl. A coefficient is factor·2^exponent. If no coefficient of a tile exceeds 2^60 times the inverse of its largest
//          exponential, one exponential serves both rows and columns. Else each is taken with its own

const NEVER = -1e9; // an exponent that makes everything 0

var<workgroup> coefficients: array<vec2<f32>, 2u * TILE>; // exponent and factor of every entry
var<workgroup> positives: array<f32, 2u * TILE>;
var<workgroup> strongest: atomic<i32>;

var<private> dot_sum: f32; // of a thread's elements, over all prefixes

fn is_diagonal(place: Place) -> bool {
    return params.triangle != 0u && place.row == place.col;
}

// The gradients of prefix k, whose shorter ones have left their products in `totals`. The longest leaves its gradients there.
fn visit_prefix(totals: ptr<function, Totals>, place: Place, thread: Thread, invocation: Invocation, k: u32) {
    let index = thread.index;
    let diagonal = is_diagonal(place);
    let counted = select(0.0, 1.0, params.counted != 0u && !diagonal);
    let mirrored = params.triangle != 0u && !diagonal;
    let columns = params.col_tiles * TILE;
    // [1] load
    let words = k * params.prefix_words;
    if index == 0u {
        atomicStore(&largest, ordered(NO_COSINE));
        atomicStore(&strongest, ordered(NEVER));
    }
    workgroupBarrier();
    if index < 2u * TILE {
        let edge = load_edge(place, index, words);
        candidates[index] = edge.candidate;
        anchors[index] = edge.anchor;
        coefficients[index] = vec2<f32>(NEVER, 0.0);
        positives[index] = 0.0;
        if edge.row != NONE {
            positives[index] = bitcast<f32>(state[words + params.positive + POSITIVE_WORDS * edge.row]);
            let at = words + select(params.col_coefficients, params.row_coefficients, is_row(index)) + SCALED_WORDS * edge.row;
            let factor = bitcast<f32>(state[at]);
            if factor != 0.0 {
                let whole = f32(bitcast<i32>(state[at + 1u]) - bitcast<i32>(state[params.results + SHIFT]));
                coefficients[index] = vec2<f32>(whole, factor);
                atomicMax(&strongest, ordered(whole));
            }
        }
    }
    multiply_to(totals, place, thread, invocation, k);

    // [2] scale, [3] mask
    var s: array<Cosines, BLOCKS>;
    let checked = is_checked(place);
    var top = NO_COSINE;
    for (var b = 0u; b < BLOCKS; b += 1u) {
        let block = scale_and_mask((*totals).block[b], thread, b, checked);
        for (var i = 0u; i < 4u; i += 1u) {
            for (var j = 0u; j < 4u; j += 1u) {
                top = select(top, max(top, block.s[i][j]), is_kept(block.kept.row | block.kept.col, i, j));
            }
        }
        s[b] = block;
    }

    // [4] one exponential or two
    atomicMax(&largest, ordered(top));
    workgroupBarrier();
    let highest = from_ordered(atomicLoad(&largest));
    let exponent = select(0.0, whole_logit(highest), highest > NO_COSINE);
    let together = exponent + from_ordered(atomicLoad(&strongest)) < 60.0;

    // [5] gradients
    // With values, as in logsumexp.wgsl.
    var row_radial = array<vec4<f32>, PARTS>();
    var col_radial = array<vec4<f32>, PARTS>();
    for (var b = 0u; b < BLOCKS; b += 1u) {
        for (var i = 0u; i < 4u; i += 1u) {
            let row = row_of(thread, b, i);
            let of_row = coefficients[row];
            let row_scale = bitcast<f32>(candidates[row].w);
            let row_factor = of_row.y * select(1.0, exp2_of(exponent + of_row.x), together);
            for (var j = 0u; j < 4u; j += 1u) {
                let col = col_of(thread, b, j);
                let of_col = coefficients[TILE + col];
                let x = s[b].s[i][j];
                var by_row = exp2_of(logit_minus(x, select(-of_row.x, exponent, together)));
                var by_col = by_row * of_col.y;
                if together {
                    by_col *= exp2_of(exponent + of_col.x);
                } else {
                    by_col = of_col.y * exp2_of(logit_minus(x, -of_col.x));
                }
                by_row = select(0.0, by_row * row_factor, is_kept(s[b].kept.row, i, j));
                by_col = select(0.0, by_col, is_kept(s[b].kept.col, i, j));
                dot_sum += by_row * (x - positives[row]) + counted * by_col * (x - positives[TILE + col]);
                if has_radials(k) {
                    row_radial[b / PARTS][i] += by_row * (x - positives[row]) + by_col * x;
                    col_radial[b % PARTS][j] += by_col * (x - positives[TILE + col]) + by_row * x;
                }
                let g = (by_row + by_col) * row_scale * bitcast<f32>(candidates[TILE + col].w);
                store_gradient(k, (place.row * TILE + row) * columns + place.col * TILE + col, g);
                if mirrored {
                    store_gradient(k, (place.col * TILE + col) * columns + place.row * TILE + row, g);
                }
                if k > 0u && !has_radials(k) {
                    (*totals).block[b][i][j] = g; // of the longest prefix, whose products are not needed any more
                }
            }
        }
    }
    if has_radials(k) {
        for (var p = 0u; p < PARTS; p += 1u) {
            pool[256u * p + 16u * thread.y + thread.x] = row_radial[p];
            pool[256u * (PARTS + p) + 16u * thread.x + thread.y] = col_radial[p];
        }
        workgroupBarrier();
        if index < 2u * TILE && (is_row(index) || !diagonal) {
            let radials = k * params.prefix_radials + select(params.col_radials, params.row_radials, is_row(index));
            scratch[radials + place_among(place, index)] = bitcast<u32>(sum_of_threads(index));
        }
    }
}

@compute @workgroup_size(256)
fn gradient_tile(
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
    dot_sum = 0.0;
    var totals = Totals();
    visit_prefixes(&totals, place, thread, invocation);
    join_gradients(&totals, place, thread, params.triangle != 0u && !is_diagonal(place));

    // [6] store
    pool[index] = vec4<f32>(dot_sum, 0.0, 0.0, 0.0);
    workgroupBarrier();
    for (var step = THREADS / 2u; step > 0u; step >>= 1u) {
        if index < step {
            pool[index].x += pool[index + step].x;
        }
        workgroupBarrier();
    }
    if index == 0u {
        scratch[params.dots + tile] = bitcast<u32>(pool[0].x);
    }
}
