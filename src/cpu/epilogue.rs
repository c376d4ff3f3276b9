//! The epilogue of a tile: all that follows the matrix product. It scales, masks, takes exponentials and sums, sixteen columns at a time.
//! Its steps and their order are those of every other backend's epilogue.
//!
//! A tile element pairs index r of one space with index c of another. Seen along the row it is a candidate c of anchor r;
//! seen down the column a candidate r of anchor c. The two have their own masks, sums and coefficients, and share the cosine.

use super::simd::{Beta, F, LANES, U, bits, dispatch, exp2_scaled, lanes, load, load_keys, select, sum};
use super::state::padded;
use crate::mask::Key;
use crate::partials::ExpSum;

/// What a tile needs to know of indices as anchors, whose rows ask which candidates are their negatives.
#[derive(Debug, Clone)]
pub(super) struct Anchors {
    pub query_key: Vec<u32>,
    pub passage_key: Vec<u32>,
    pub row: Vec<u32>,
    /// Highest cosine that the row keeps; +∞ without a margin.
    pub threshold: Vec<f32>,
    /// s⁺.
    pub positive: Vec<f32>,
    /// A negative whose cosine is above this ranks above the positive.
    pub above: Vec<f32>,
}

impl Anchors {
    /// Query keys and passage keys. They are exchanged if those of the candidates are.
    #[inline(always)]
    fn keys(&self, candidates: &Candidates) -> (&[u32], &[u32]) {
        match candidates.swapped {
            false => (&self.query_key, &self.passage_key),
            true => (&self.passage_key, &self.query_key),
        }
    }
}

/// What a tile needs to know of indices as candidates.
#[derive(Debug, Clone)]
pub(super) struct Candidates {
    pub query_key: Vec<u32>,
    pub passage_key: Vec<u32>,
    /// Whether they are queries, whose keys are exchanged: see [`Key::swapped`].
    pub swapped: bool,
    /// The only row that may keep the candidate, or [`Candidates::EVERYONE`].
    pub owner: Vec<u32>,
}

impl Candidates {
    pub(super) const EVERYONE: u32 = u32::MAX;

    /// Queries as candidates. `keys` are those of their rows.
    pub(super) fn queries(keys: &[Key]) -> Self {
        Self { swapped: true, ..Self::passages(keys.iter().map(|k| k.swapped()), None) }
    }

    /// Passages as candidates.
    pub(super) fn passages(keys: impl Iterator<Item = Key> + Clone, owners: Option<Vec<i32>>) -> Self {
        let owner = match owners {
            Some(owners) => {
                padded(owners.into_iter().map(|o| u32::try_from(o).unwrap_or(Self::EVERYONE)), Self::EVERYONE)
            }
            None => padded(keys.clone().map(|_| Self::EVERYONE), Self::EVERYONE),
        };
        Self {
            query_key: padded(keys.clone().map(|k| k.query), 0),
            passage_key: padded(keys.map(|k| k.passage), 0),
            swapped: false,
            owner,
        }
    }
}

/// All that tiles need to know of the indices of a space. Every vector has [`LANES`] entries of padding.
#[derive(Debug, Clone)]
pub(super) struct Side {
    /// 1/‖x‖ of the panel's row.
    pub inverse: Vec<f32>,
    pub anchors: Anchors,
    pub candidates: Candidates,
}

/// Where a tile lies: `rows` × `cols` elements in a buffer of row stride `stride` (a multiple of [`LANES`], at least `cols`).
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
    pub row_start: usize,
    pub col_start: usize,
    pub row_side: &'a Side,
    pub col_side: &'a Side,
    pub beta: Beta,
}

/// The sums of one tile, along its rows and down its columns.
#[derive(Debug, Default)]
pub(super) struct TileSums {
    pub rows: Vec<ExpSum>,
    pub rows_above: Vec<u32>,
    pub cols: Vec<ExpSum>,
    pub cols_above: Vec<u32>,
}

/// Coefficients of the anchors of a space. The coefficient of an anchor is `factor`·2^−`exponent`. Times exp(β s) it is
/// exp2(β s·log₂e − exponent)·factor, in which no number leaves the range of f32. The vectors are padded like those of [`Side`].
#[derive(Debug, Clone)]
pub(super) struct Coefficients {
    exponent: Vec<f32>,
    factor: Vec<f32>,
}

impl Coefficients {
    /// Coefficients of these natural logarithms, divided by 2^shift. That of −∞ contributes nothing.
    pub(super) fn new(logs: impl Iterator<Item = f64>, shift: f64) -> Self {
        const NEVER: f32 = 1e9; // flushes any exponential to 0
        let (exponent, factor) = logs
            .map(|log| {
                let log2 = log * std::f64::consts::LOG2_E - shift;
                if log2 == f64::NEG_INFINITY {
                    (NEVER, 0.0)
                } else {
                    (-log2.round() as f32, (log2 - log2.round()).exp2() as f32)
                }
            })
            .unzip::<f32, f32, Vec<_>, Vec<_>>();
        Self { exponent: padded(exponent.into_iter(), NEVER), factor: padded(factor.into_iter(), 0.0) }
    }
}

/// Tells which elements of a row of a tile are kept: sixteen columns from `c` on, of which the first `live` are in the tile.
#[derive(Clone, Copy)]
struct Lookup<'a, 't> {
    tile: &'t Tile<'a>,
    r: usize,
    c: usize,
    live: usize,
}

impl Lookup<'_, '_> {
    /// Which candidates from c on the row of anchor r keeps.
    #[inline(always)]
    fn along_row<const MASKED: bool>(self, s: &F) -> U {
        if !MASKED {
            return [u32::MAX; LANES];
        }
        let (a, candidates) = (&self.tile.row_side.anchors, &self.tile.col_side.candidates);
        let (q, p) = (load_keys(&candidates.query_key, self.c), load_keys(&candidates.passage_key, self.c));
        let owner = load_keys(&candidates.owner, self.c);
        let (query, passage) = a.keys(candidates);
        let (aq, ap, row, threshold) = (query[self.r], passage[self.r], a.row[self.r], a.threshold[self.r]);
        lanes!(l => bits(
            (q[l] != aq)
                & (p[l] != ap)
                & (p[l] != aq)
                & ((owner[l] == Candidates::EVERYONE) | (owner[l] == row))
                & (s[l] <= threshold)
                & (l < self.live)
        ))
    }

    /// Which rows of the anchors from c on keep candidate r.
    #[inline(always)]
    fn down_column<const MASKED: bool>(self, s: &F) -> U {
        if !MASKED {
            return [u32::MAX; LANES];
        }
        let (a, candidate) = (&self.tile.col_side.anchors, &self.tile.row_side.candidates);
        let (query, passage) = a.keys(candidate);
        let (q, p) = (load_keys(query, self.c), load_keys(passage, self.c));
        let (row, threshold) = (load_keys(&a.row, self.c), load(&a.threshold, self.c));
        let (cq, cp, owner) = (candidate.query_key[self.r], candidate.passage_key[self.r], candidate.owner[self.r]);
        lanes!(l => bits(
            (q[l] != cq)
                & (p[l] != cp)
                & (q[l] != cp)
                & ((owner == Candidates::EVERYONE) | (row[l] == owner))
                & (s[l] <= threshold[l])
                & (l < self.live)
        ))
    }
}

/// The chunk, with zeros beyond the tile's last column. There the buffer holds what an earlier tile left. Masks keep these lanes out of
/// every sum, but 0 times an infinity would be NaN.
#[inline(always)]
fn live_lanes(x: F, live: usize, checked: bool) -> F {
    if checked { lanes!(l => if l < live { x[l] } else { 0.0 }) } else { x }
}

/// Runs the block for every sixteen columns of a tile. `checked` is true only for a last chunk of fewer columns, `live` of them. The
/// compiler knows its value in either case. This is a macro for the same reason as [`lanes`].
macro_rules! for_each_chunk {
    ($tile:expr, |$c:ident, $live:ident, $checked:ident| $body:block) => {
        let whole = $tile.cols - $tile.cols % LANES;
        let mut column = 0;
        while column < whole {
            let ($c, $live, $checked) = (column, LANES, false);
            $body
            column += LANES;
        }
        if whole < $tile.cols {
            let ($c, $live, $checked) = (whole, $tile.cols - whole, true);
            $body
        }
    };
}

/// Rows after which column sums move from f32 to f64.
const FLUSH: usize = 64;

dispatch! {
    /// Scales the products in `x` to cosines, in place; masks; finds maxima and ranks; sums exponentials.
    ///
    /// `MASKED`: pairs may be masked. `COLS`: the sums of the column anchors are taken, too.
    pub(super) fn sum_tile<const MASKED, const COLS>(x: &mut [f32], tile: &Tile<'_>) -> TileSums = sum_tile_body
}

#[inline(always)]
fn sum_tile_body<const FMA: bool, const MASKED: bool, const COLS: bool>(x: &mut [f32], tile: &Tile<'_>) -> TileSums {
    let mut out = TileSums {
        rows: Vec::with_capacity(tile.rows),
        rows_above: Vec::with_capacity(tile.rows),
        ..Default::default()
    };
    let width = tile.cols.next_multiple_of(LANES);
    let width_if_cols = if COLS { width } else { 0 };
    let mut col_max = vec![f32::NEG_INFINITY; width_if_cols];
    let mut col_above = vec![0_u32; width_if_cols];
    let mut row_max = Vec::with_capacity(tile.rows);
    for (r, line) in x.chunks_mut(tile.stride).take(tile.rows).enumerate() {
        let index = tile.row_start + r;
        let scale = tile.row_side.inverse[index];
        let bar = tile.row_side.anchors.above[index];
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut above = [0_u32; LANES];
        for_each_chunk!(tile, |c, live, checked| {
            let at = Lookup { tile, r: index, c: tile.col_start + c, live };
            let inverse = load(&tile.col_side.inverse, at.c);
            let raw = live_lanes(load(line, c), live, checked);
            let s: F = lanes!(l => raw[l] * scale * inverse[l]);
            line[c..c + LANES].copy_from_slice(&s);
            let keep = if checked { at.along_row::<true>(&s) } else { at.along_row::<MASKED>(&s) };
            let kept = select(&keep, &s, f32::NEG_INFINITY);
            max = lanes!(l => if kept[l] > max[l] { kept[l] } else { max[l] });
            above = lanes!(l => above[l] + u32::from(kept[l] > bar));
            if COLS {
                let bars = load(&tile.col_side.anchors.above, at.c);
                let keep = if checked { at.down_column::<true>(&s) } else { at.down_column::<MASKED>(&s) };
                let kept = select(&keep, &s, f32::NEG_INFINITY);
                let (m, a) = (&mut col_max[c..c + LANES], &mut col_above[c..c + LANES]);
                for l in 0..LANES {
                    m[l] = if kept[l] > m[l] { kept[l] } else { m[l] };
                }
                for l in 0..LANES {
                    a[l] += u32::from(kept[l] > bars[l]);
                }
            }
        });
        row_max.push(max.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v)));
        out.rows_above.push(above.iter().sum());
    }

    let exponent = |max: &f32| if *max == f32::NEG_INFINITY { 0.0 } else { tile.beta.exponent(*max) };
    let col_exponent: Vec<f32> = col_max.iter().map(exponent).collect();
    let mut col_sum = vec![0.0_f32; width_if_cols];
    let mut col_total = vec![0.0_f64; width_if_cols];
    for (r, line) in x.chunks(tile.stride).take(tile.rows).enumerate() {
        let index = tile.row_start + r;
        let k = exponent(&row_max[r]);
        let mut total = [0.0_f32; LANES];
        for_each_chunk!(tile, |c, live, checked| {
            let at = Lookup { tile, r: index, c: tile.col_start + c, live };
            let s = live_lanes(load(line, c), live, checked);
            let keep = if checked { at.along_row::<true>(&s) } else { at.along_row::<MASKED>(&s) };
            let e = select(&keep, &exp2_scaled::<FMA>(&s, tile.beta, &[k; LANES]), 0.0);
            total = lanes!(l => total[l] + e[l]);
            if COLS {
                let keep = if checked { at.down_column::<true>(&s) } else { at.down_column::<MASKED>(&s) };
                let e = select(&keep, &exp2_scaled::<FMA>(&s, tile.beta, &load(&col_exponent, c)), 0.0);
                let sums = &mut col_sum[c..c + LANES];
                for l in 0..LANES {
                    sums[l] += e[l];
                }
            }
        });
        out.rows.push(ExpSum::new(sum(&total), k as i32));
        if COLS && (r % FLUSH == FLUSH - 1 || r + 1 == tile.rows) {
            for (total, sum) in col_total.iter_mut().zip(&mut col_sum) {
                *total += f64::from(std::mem::take(sum));
            }
        }
    }
    if COLS {
        out.cols =
            col_total.iter().zip(&col_exponent).take(tile.cols).map(|(s, k)| ExpSum::new(*s, *k as i32)).collect();
        out.cols_above = col_above[..tile.cols].to_vec();
    }
    out
}

/// Coefficients of the row anchors and of the column anchors; `None` if the loss does not use their block.
pub(super) struct Edges<'a> {
    pub rows: Option<&'a Coefficients>,
    pub cols: Option<&'a Coefficients>,
    /// Whether the column anchors' part of ∂L/∂β is added here. Otherwise it is added where the anchors are rows.
    pub count_cols: bool,
}

/// Replaces a tile by Ĝ = G/(‖x_r‖‖y_c‖), where G = exp(β s)·([kept for r] a_r + [kept for c] b_c). Returns Σ G·(s − s⁺), where each of
/// the two parts of G has the s⁺ of its own anchor. `raw` says that the tile still holds products, not cosines.
pub(super) fn gradient_tile(x: &mut [f32], tile: &Tile<'_>, edges: &Edges<'_>, masked: bool, raw: bool) -> f64 {
    if raw {
        scale_tile(x, tile);
    }
    match (edges.rows, edges.cols, masked) {
        (Some(a), Some(b), true) => gradient::<true, true, true>(x, tile, a, b, edges.count_cols),
        (Some(a), Some(b), false) => gradient::<false, true, true>(x, tile, a, b, edges.count_cols),
        (Some(a), None, true) => gradient::<true, true, false>(x, tile, a, a, false),
        (Some(a), None, false) => gradient::<false, true, false>(x, tile, a, a, false),
        (None, Some(b), true) => gradient::<true, false, true>(x, tile, b, b, edges.count_cols),
        (None, Some(b), false) => gradient::<false, false, true>(x, tile, b, b, edges.count_cols),
        (None, None, _) => {
            x.fill(0.0);
            0.0
        }
    }
}

fn scale_tile(x: &mut [f32], tile: &Tile<'_>) {
    for (r, line) in x.chunks_mut(tile.stride).take(tile.rows).enumerate() {
        let scale = tile.row_side.inverse[tile.row_start + r];
        let inverse = &tile.col_side.inverse[tile.col_start..tile.col_start + tile.cols];
        line.iter_mut().zip(inverse).for_each(|(v, i)| *v = *v * scale * i);
    }
}

dispatch! {
    fn gradient<const MASKED, const ROWS, const COLS>(
        x: &mut [f32],
        tile: &Tile<'_>,
        a: &Coefficients,
        b: &Coefficients,
        count_cols: bool,
    ) -> f64 = gradient_body
}

#[inline(always)]
fn gradient_body<const FMA: bool, const MASKED: bool, const ROWS: bool, const COLS: bool>(
    x: &mut [f32],
    tile: &Tile<'_>,
    a: &Coefficients,
    b: &Coefficients,
    count_cols: bool,
) -> f64 {
    let counted = if count_cols { 1.0_f32 } else { 0.0 };
    let mut total = 0.0;
    for (r, line) in x.chunks_mut(tile.stride).take(tile.rows).enumerate() {
        let index = tile.row_start + r;
        let scale = tile.row_side.inverse[index];
        let (row_exponent, row_factor) = ([a.exponent[index]; LANES], a.factor[index]);
        let row_positive = tile.row_side.anchors.positive[index];
        let mut product = [0.0_f32; LANES];
        for_each_chunk!(tile, |c, live, checked| {
            let at = Lookup { tile, r: index, c: tile.col_start + c, live };
            let s = live_lanes(load(line, c), live, checked);
            let inverse = load(&tile.col_side.inverse, at.c);
            let mut g = [0.0_f32; LANES];
            if ROWS {
                let keep = if checked { at.along_row::<true>(&s) } else { at.along_row::<MASKED>(&s) };
                let e = select(&keep, &exp2_scaled::<FMA>(&s, tile.beta, &row_exponent), 0.0);
                g = lanes!(l => e[l] * row_factor);
                product = lanes!(l => product[l] + g[l] * (s[l] - row_positive));
            }
            if COLS {
                let keep = if checked { at.down_column::<true>(&s) } else { at.down_column::<MASKED>(&s) };
                let e = select(&keep, &exp2_scaled::<FMA>(&s, tile.beta, &load(&b.exponent, at.c)), 0.0);
                let factor = load(&b.factor, at.c);
                let e: F = lanes!(l => e[l] * factor[l]);
                g = lanes!(l => g[l] + e[l]);
                let positive = load(&tile.col_side.anchors.positive, at.c);
                product = lanes!(l => product[l] + counted * e[l] * (s[l] - positive[l]));
            }
            let out: F = lanes!(l => g[l] * scale * inverse[l]);
            line[c..c + LANES].copy_from_slice(&out);
        });
        total += sum(&product);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A space of `n` indices with colliding keys, owners and thresholds.
    fn side(n: usize, seed: u32) -> Side {
        let draw = |k: usize, salt: u32, below: u32| (k as u32 * 2_654_435_761 + salt * seed).rotate_left(11) % below;
        let real = |k, salt| draw(k, salt, 1000) as f32 / 1000.0;
        let keys = |salt, below| padded((0..n).map(|k| draw(k, salt, below)), 0);
        let owner = (0..n).map(|k| if draw(k, 5, 3) == 0 { k as u32 } else { Candidates::EVERYONE });
        Side {
            inverse: padded((0..n).map(|k| 0.1 + real(k, 1)), 0.0),
            anchors: Anchors {
                query_key: keys(2, 9),
                passage_key: keys(3, 9),
                row: padded(0..n as u32, 0),
                threshold: padded((0..n).map(|k| real(k, 4)), 0.0),
                positive: padded((0..n).map(|k| real(k, 6)), 0.0),
                above: padded((0..n).map(|k| real(k, 6)), 0.0),
            },
            candidates: Candidates {
                query_key: keys(7, 9),
                passage_key: keys(8, 9),
                swapped: seed.is_multiple_of(2),
                owner: padded(owner, 0),
            },
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (rows, cols, stride) = (37, 45, 48);
        let (row_side, col_side) = (side(rows + 3, 77), side(cols + 5, 1234));
        let (row_start, col_start, beta) = (3, 5, Beta::new(20.0));
        let tile = Tile { rows, cols, stride, row_start, col_start, row_side: &row_side, col_side: &col_side, beta };
        let raw: Vec<f32> = (0..rows * stride).map(|k| ((k * 37 % 211) as f32 - 100.0) / 90.0).collect();

        let (mut dispatched, mut portable) = (raw.clone(), raw.clone());
        let got = sum_tile::<true, true>(&mut dispatched, &tile);
        let want = sum_tile_body::<true, true, true>(&mut portable, &tile);
        assert_eq!(dispatched, portable);
        assert_eq!((&got.rows, &got.cols), (&want.rows, &want.cols));
        assert_eq!((&got.rows_above, &got.cols_above), (&want.rows_above, &want.cols_above));
        assert!(got.rows.iter().any(|s| s.ln() > 0.0) && got.cols_above.iter().any(|&a| a > 0));

        // Without fused multiply-add only the last digits may differ.
        let mut unfused = raw;
        let near = sum_tile_body::<false, true, true>(&mut unfused, &tile);
        for (a, b) in near.rows.iter().zip(&got.rows) {
            approx::assert_abs_diff_eq!(a.ln().max(-1e9), b.ln().max(-1e9), epsilon = 1e-5);
        }

        let coefficients = Coefficients::new((0..60).map(|k| f64::from(k % 7) - 3.0), 0.0);
        let a = gradient::<true, true, true>(&mut dispatched, &tile, &coefficients, &coefficients, true);
        let b = gradient_body::<true, true, true, true>(&mut portable, &tile, &coefficients, &coefficients, true);
        assert_eq!(dispatched, portable);
        assert_eq!(a, b);
        assert!(a != 0.0);
    }

    #[test]
    fn what_an_earlier_tile_left_beyond_the_edge_is_harmless() {
        let (row_side, col_side) = (side(4, 5), side(20, 6));
        let beta = Beta::new(10.0);
        let tile = Tile {
            rows: 4,
            cols: 5,
            stride: 16,
            row_start: 0,
            col_start: 0,
            row_side: &row_side,
            col_side: &col_side,
            beta,
        };
        let coefficients = Coefficients::new((0..20).map(|_| 0.0), 0.0);
        let run = |rest: f32| {
            let mut x: Vec<f32> = (0..64).map(|k| if k % 16 < 5 { 0.5 } else { rest }).collect();
            let sums = sum_tile::<false, true>(&mut x, &tile);
            let edges = Edges { rows: Some(&coefficients), cols: Some(&coefficients), count_cols: true };
            (sums.rows, sums.cols, gradient_tile(&mut x, &tile, &edges, false, false))
        };
        let clean = run(0.0);
        for rest in [f32::INFINITY, f32::NAN, 1e30] {
            assert_eq!(run(rest), clean);
        }
    }
}
