// tile.wgsl: what both passes over tiles of cosines share: which tile, the entries of its two axes, its product, its mask.
//
// Threads  256 as 16 x 16. Thread (y, x) has the rows y, y + 16, … and the columns x, x + 16, … of the tile. It has blocks of 4 x 4
//          elements, PARTS in each direction: one with blocks_1.wgsl, four with blocks_4.wgsl
// Shared   pool: memory of the product (multiply_f32.wgsl, multiply_cooperative.wgsl), afterwards scratch of 512·PARTS vectors
//          candidates, anchors: the indices of the tile's axes, rows first

struct Params {
    zero: u32,
    tiles: u32,
    triangle: u32,        // both axes are the same. Tiles below the diagonal are mirror images, which are not visited
    row_begin: u32,       // index of the space, as the next three
    row_end: u32,
    col_begin: u32,
    col_end: u32,
    row_tiles: u32,
    col_tiles: u32,
    row_base: u32,        // vectors from the start of `left` to index row_begin
    col_base: u32,
    row_vectors: u32,     // of a packed row
    row_candidates: u32,  // vectors from the start of `side` to index 0 of the space
    col_candidates: u32,
    row_norms: u32,       // words from the start of `state`
    col_norms: u32,
    anchors: u32,
    row_anchors: u32,     // what the rows, and the columns, anchor: 0 nothing here, 1 candidates are passages, 2 they are queries
    col_anchors: u32,
    row_sums: u32,        // whether their sums are taken here
    col_sums: u32,
    ranks: u32,           // whether negatives above the positive are counted
    counted: u32,         // whether the columns' part of ∂L/∂β is added here
    masked: u32,          // whether any pair of different indices can be masked
    row_partials: u32,    // words from the start of `scratch`
    col_partials: u32,
    row_coefficients: u32, // words from the start of `state`
    col_coefficients: u32,
    positive: u32,
    results: u32,
    gradient: u32,        // numbers of f32 from the start of `scratch`
    dots: u32,
    plane: u32,           // cooperative: numbers from the first to the second plane of the gradients
    prefixes: u32,        // the rest as shaders for prefixes read it
    segments: u32,        // vectors of `side`, one for each prefix: first the end of its packed vectors
    prefix_words: u32,
    prefix_partials: u32, // words from the partial sums of a prefix to those of the next
    prefix_plane: u32,    // numbers from the gradients of a prefix to those of the next
    row_radials: u32,     // words from the start of `scratch`
    col_radials: u32,
    prefix_radials: u32,
    beta_head: f32,
    beta_middle: f32,
    beta_tail: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> side: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> state: array<u32>;
@group(0) @binding(5) var<storage, read_write> scratch: array<u32>;

const TILE = 64u * PARTS;
const THREADS = 256u;

// Keys are exchanged where the candidates are queries. The rule for such candidates then reads like the rule for passages.
var<workgroup> candidates: array<vec4<u32>, 2u * TILE>; // query key, passage key, owner, 2^12/‖packed‖
var<workgroup> anchors: array<vec4<u32>, 2u * TILE>;    // query key, passage key, row, highest cosine that it keeps
var<workgroup> largest: atomic<i32>;                     // the largest cosine of the tile that any anchor keeps, as a whole number

struct Thread {
    index: u32,
    x: u32,
    y: u32,
}

struct Place {
    row: u32,
    col: u32,
}

// The tiles of a rectangle are visited in bands of eight rows of tiles, and a band column by column. So workgroups that run together share
// both operands in the cache. Those of a triangle are visited row by row.
fn place_of(tile: u32) -> Place {
    let cols = params.col_tiles;
    if params.triangle == 0u {
        let band = tile / (8u * cols);
        let in_band = tile % (8u * cols);
        let height = min(8u, params.row_tiles - 8u * band);
        return Place(8u * band + in_band % height, in_band / height);
    }
    // Row r begins at r·cols − r (r − 1) / 2. This solves for r, and then corrects what f32 got wrong.
    let side_length = 2.0 * f32(cols) + 1.0;
    var r = u32(max(0.0, (side_length - sqrt(max(0.0, side_length * side_length - 8.0 * f32(tile)))) * 0.5));
    r = min(r, cols - 1u);
    while r > 0u && triangle_start(r) > tile {
        r -= 1u;
    }
    while triangle_start(r + 1u) <= tile {
        r += 1u;
    }
    return Place(r, r + tile - triangle_start(r));
}

fn triangle_start(row: u32) -> u32 {
    return row * params.col_tiles - (row * row - row) / 2u;
}

// One index of an axis of the tile. It anchors `row`, which is NONE if it anchors none.
struct Edge {
    candidate: vec4<u32>,
    anchor: vec4<u32>,
    row: u32,
}

fn is_row(k: u32) -> bool {
    return k < TILE;
}

// Entry k < TILE is row k of the tile, and entry TILE + k is its column k. This is its index, or NONE if there is none.
fn index_of(place: Place, k: u32) -> u32 {
    let local = select(place.col, place.row, is_row(k)) * TILE + k % TILE;
    let index = select(params.col_begin, params.row_begin, is_row(k)) + local;
    return select(index, NONE, index >= select(params.col_end, params.row_end, is_row(k)));
}

// An entry that does not exist is nobody's candidate and no anchor. `words` leads to the numbers of the prefix.
fn load_edge(place: Place, k: u32, words: u32) -> Edge {
    let index = index_of(place, k);
    let nothing = vec4<u32>(NONE, NONE, NONE, bitcast<u32>(NO_COSINE));
    if index == NONE {
        return Edge(vec4<u32>(NONE, NONE, NONE - 1u, 0u), nothing, NONE);
    }
    var candidate = side[select(params.col_candidates, params.row_candidates, is_row(k)) + index];
    let row = candidate.w;
    candidate.w = state[words + select(params.col_norms, params.row_norms, is_row(k)) + NORM_WORDS * index];
    let meets = select(params.col_anchors, params.row_anchors, is_row(k));
    if row == NONE || meets == 0u {
        return Edge(candidate, nothing, NONE);
    }
    let at = words + params.anchors + ANCHOR_WORDS * row;
    let exchanged = u32(meets == 2u);
    return Edge(candidate, vec4<u32>(state[at + exchanged], state[at + 1u - exchanged], row, state[at + 2u]), row);
}

fn rank_bar(edge: Edge, words: u32) -> f32 {
    if edge.row == NONE {
        return -NO_COSINE;
    }
    return bitcast<f32>(state[words + params.anchors + ANCHOR_WORDS * edge.row + 3u]);
}

// Bit 4 i + j of `row` says that the anchor of its row keeps element (i, j). In `col` it says that of the anchor of its column.
struct Kept {
    row: u32,
    col: u32,
}

struct Cosines {
    s: mat4x4<f32>, // s[i][j]
    kept: Kept,
}

fn row_of(thread: Thread, block: u32, i: u32) -> u32 {
    return thread.y + 16u * (4u * (block / PARTS) + i);
}

fn col_of(thread: Thread, block: u32, j: u32) -> u32 {
    return thread.x + 16u * (4u * (block % PARTS) + j);
}

fn is_kept(bits: u32, i: u32, j: u32) -> bool {
    return ((bits >> (4u * i + j)) & 1u) != 0u;
}

// The same for the four elements of row i.
fn kept_in_row(bits: u32, i: u32) -> vec4<bool> {
    return (vec4<u32>(bits >> (4u * i)) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>();
}

// Whether any two indices of the tile may be masked. Default keys mask a pair only where both indices are the same.
fn is_checked(place: Place) -> bool {
    let row = params.row_begin + place.row * TILE;
    let col = params.col_begin + place.col * TILE;
    let ragged = (row + TILE > params.row_end) | (col + TILE > params.col_end);
    return (params.masked != 0u) | ragged | ((row < col + TILE) & (col < row + TILE));
}

// [2] scale: makes cosines of products. [3] mask: the rule of src/mask.rs. What belongs to a column is read once, not once for each row,
// because not every compiler sees that it stays the same.
fn scale_and_mask(products: mat4x4<f32>, thread: Thread, block: u32, checked: bool) -> Cosines {
    var out = Cosines(products, Kept(select(0u, 0xffffu, params.row_anchors != 0u), select(0u, 0xffffu, params.col_anchors != 0u)));
    var col_scales = vec4<f32>();
    for (var j = 0u; j < 4u; j += 1u) {
        col_scales[j] = bitcast<f32>(candidates[TILE + col_of(thread, block, j)].w) * 5.9604644775390625e-8; // 2^-24
    }
    for (var i = 0u; i < 4u; i += 1u) {
        out.s[i] *= bitcast<f32>(candidates[row_of(thread, block, i)].w) * col_scales;
    }
    if !checked {
        return out;
    }
    var of_cols: array<vec4<u32>, 4>;
    var col_anchors: array<vec4<u32>, 4>;
    for (var j = 0u; j < 4u; j += 1u) {
        of_cols[j] = candidates[TILE + col_of(thread, block, j)];
        col_anchors[j] = anchors[TILE + col_of(thread, block, j)];
    }
    var kept = Kept(0u, 0u);
    for (var i = 0u; i < 4u; i += 1u) {
        let r = candidates[row_of(thread, block, i)];
        let of_row = anchors[row_of(thread, block, i)];
        for (var j = 0u; j < 4u; j += 1u) {
            let s = out.s[i][j];
            let c = of_cols[j];
            let of_col = col_anchors[j];
            let by_row = (c.x != of_row.x) & (c.y != of_row.y) & (c.y != of_row.x) & ((c.z == NONE) | (c.z == of_row.z)) & (s <= bitcast<f32>(of_row.w));
            let by_col = (r.x != of_col.x) & (r.y != of_col.y) & (r.y != of_col.x) & ((r.z == NONE) | (r.z == of_col.z)) & (s <= bitcast<f32>(of_col.w));
            kept.row |= select(0u, 1u << (4u * i + j), by_row);
            kept.col |= select(0u, 1u << (4u * i + j), by_col);
        }
    }
    out.kept.row &= kept.row;
    out.kept.col &= kept.col;
    return out;
}

// Entry 64 p + 16 i + y of an axis is component i of what the 16 threads of row (or column) y have of part p. These are its 16 threads in
// `pool`, and its component.
fn lane_of(entry: u32) -> u32 {
    return 16u * (entry / 64u) + entry % 16u;
}

fn component_of(entry: u32) -> u32 {
    return entry / 16u % 4u;
}

// What the threads of an entry have, together.
fn sum_of_threads(entry: u32) -> f32 {
    let lane = lane_of(entry);
    var sum = 0.0;
    for (var k = 0u; k < 16u; k += 1u) {
        sum += pool[16u * lane + k][component_of(entry)];
    }
    return sum;
}

// Where a number of an entry lies among those of its axis: those of one tile of the other axis after those of another.
fn place_among(place: Place, entry: u32) -> u32 {
    let by_row = is_row(entry);
    let across = select(place.row, place.col, by_row);
    let along = select(params.col_tiles, params.row_tiles, by_row) * TILE;
    let start = select(place.col, place.row, by_row) * TILE;
    return across * along + start + entry % TILE;
}

// Cosines as whole numbers in the same order, for an atomic maximum.
fn ordered(x: f32) -> i32 {
    let bits = bitcast<i32>(x);
    return select(bits, bits ^ 0x7fffffff, bits < 0);
}

fn from_ordered(bits: i32) -> f32 {
    return bitcast<f32>(select(bits, bits ^ 0x7fffffff, bits < 0));
}
