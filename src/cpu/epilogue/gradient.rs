//! The third pass's part of the epilogue: from products to gradients of logits.

use super::sums::{FLUSH, flush};
use super::{Lookup, Tile, cosines, for_each_chunk};
use crate::cpu::side::padded;
use crate::cpu::simd::{F, LANES, dispatch, exp2_scaled, lanes, load, select, sum};

/// Coefficients of the anchors of a space. The coefficient of an anchor is `factor`·2^−`exponent`. Times exp(β s) it is
/// exp2(β s·log₂e − exponent)·factor, in which no number leaves the range of f32. The vectors are padded like those of a side.
#[derive(Debug, Clone)]
pub(in crate::cpu) struct Coefficients {
    exponent: Vec<f32>,
    factor: Vec<f32>,
}

/// The exponent of a coefficient of 0. It flushes any exponential to 0.
const NEVER: f32 = 1e9;

impl Coefficients {
    /// Coefficients of these natural logarithms, divided by 2^shift. That of −∞ contributes nothing.
    pub(in crate::cpu) fn new(logs: impl Iterator<Item = f64>, shift: f64) -> Self {
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

    /// Smallest and largest exponent of `count` coefficients that are not 0; (∞, −∞) if all are.
    fn range(&self, start: usize, count: usize) -> (f32, f32) {
        let exponents = self.exponent[start..][..count].iter().filter(|&&e| e != NEVER);
        exponents.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &e| (low.min(e), high.max(e)))
    }

    /// The coefficients from `start` on, times 2^k, in whole chunks.
    fn times_power_of_two(&self, start: usize, chunks: usize, k: f32) -> Vec<F> {
        let all = self.exponent[start..].iter().zip(&self.factor[start..]).take(chunks * LANES);
        let scaled: Vec<f32> = all.map(|(e, factor)| factor * power_of_two(k - e)).collect();
        scaled.as_chunks().0.to_vec()
    }
}

/// 2^n for an integer n, or the nearest power of two that is a normal f32. A factor of 0 may have any exponent.
fn power_of_two(n: f32) -> f32 {
    f32::from_bits(((n.clamp(-126.0, 127.0) as i32 + 127) as u32) << 23)
}

/// Coefficients of the row anchors and of the column anchors; `None` if the loss does not use their block.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Edges<'a> {
    pub rows: Option<&'a Coefficients>,
    pub cols: Option<&'a Coefficients>,
    /// Whether the column anchors' part of ∂L/∂β is added here. Otherwise it is added where the anchors are rows.
    pub count_cols: bool,
}

/// What the gradient of a tile adds to other sums. With G_r the part of G of the row's anchor and G_c that of the column's, `radial` has
/// Σ_c G_r (s − s⁺_r) + G_c s for each row of the tile, and Σ_r G_c (s − s⁺_c) + G_r s for each column: x̂·Σ G ŷ of the two embeddings, but
/// for the cosines of positives that are subtracted. It is empty where nobody asked for it.
#[derive(Debug, Default, PartialEq)]
pub(in crate::cpu) struct TileGradient {
    /// Σ G·(s − s⁺), where each of the two parts of G has the s⁺ of its own anchor.
    pub beta: f64,
    pub radial: [Vec<f64>; 2],
}

/// One offset serves a tile if the exponents of its coefficients span no more. Then a coefficient is within 2^±60, and no exponential of a
/// negative exceeds 2^60. What exponentials below 2⁻¹²⁶ would add is less than 2⁻⁶⁵ of the largest share of a row.
const SPAN: f32 = 120.0;

/// Replaces a tile of products by Ĝ = G/(‖x_r‖‖y_c‖) + `add`, where G = exp(β s)·([kept for r] a_r + [kept for c] b_c). `add` is a tile of
/// the same shape and stride.
pub(in crate::cpu) fn gradient_tile(
    x: &mut [f32],
    add: Option<&[f32]>,
    tile: &Tile<'_>,
    edges: &Edges<'_>,
    masked: bool,
    radial: bool,
) -> TileGradient {
    let (Some(a), Some(b)) = (edges.rows.or(edges.cols), edges.cols.or(edges.rows)) else {
        match add {
            Some(add) => x.copy_from_slice(add),
            None => x.fill(0.0),
        }
        return TileGradient::default();
    };
    // One kind of anchors has its own offset in any case.
    let both = edges.rows.is_some() && edges.cols.is_some();
    let offset = if both { offset(tile, a, b) } else { None };
    let call = Call { add, tile, a, b, count_cols: edges.count_cols, offset };
    match (edges.rows.is_some(), edges.cols.is_some()) {
        (true, true) if offset.is_some() => call.run::<true, true, true>(x, masked, radial),
        (true, true) => call.run::<true, true, false>(x, masked, radial),
        (true, false) => call.run::<true, false, false>(x, masked, radial),
        (false, _) => call.run::<false, true, false>(x, masked, radial),
    }
}

/// The offset that serves all rows and columns of the tile, if there is one.
fn offset(tile: &Tile<'_>, a: &Coefficients, b: &Coefficients) -> Option<f32> {
    let (rows, cols) = (a.range(tile.row_start, tile.rows), b.range(tile.col_start, tile.cols));
    let (low, high) = (rows.0.min(cols.0), rows.1.max(cols.1));
    match high - low {
        span if span < 0.0 => Some(0.0), // every coefficient is 0
        span => (span <= SPAN).then(|| ((low + high) / 2.0).round()),
    }
}

struct Call<'a> {
    add: Option<&'a [f32]>,
    tile: &'a Tile<'a>,
    a: &'a Coefficients,
    b: &'a Coefficients,
    count_cols: bool,
    offset: Option<f32>,
}

impl Call<'_> {
    fn run<const ROWS: bool, const COLS: bool, const SHARED: bool>(
        &self,
        x: &mut [f32],
        masked: bool,
        radial: bool,
    ) -> TileGradient {
        match (masked, radial) {
            (true, true) => gradient::<true, true, ROWS, COLS, SHARED>(x, self),
            (true, false) => gradient::<true, false, ROWS, COLS, SHARED>(x, self),
            (false, true) => gradient::<false, true, ROWS, COLS, SHARED>(x, self),
            (false, false) => gradient::<false, false, ROWS, COLS, SHARED>(x, self),
        }
    }
}

dispatch! {
    fn gradient<const MASKED, const RADIAL, const ROWS, const COLS, const SHARED>(x: &mut [f32], call: &Call<'_>) -> TileGradient
        = gradient_body
}

#[inline(always)]
fn gradient_body<
    const FMA: bool,
    const MASKED: bool,
    const RADIAL: bool,
    const ROWS: bool,
    const COLS: bool,
    const SHARED: bool,
>(
    x: &mut [f32],
    call: &Call<'_>,
) -> TileGradient {
    let &Call { add, tile, a, b, count_cols, offset } = call;
    let counted = if count_cols { 1.0_f32 } else { 0.0 };
    let mut out = TileGradient::default();
    let (inverse, positives) = (tile.of_cols(&tile.col.inverse), tile.of_cols(&tile.col.positive));
    let shared = [offset.unwrap_or_default(); LANES];
    let scaled = if SHARED { b.times_power_of_two(tile.col_start, tile.chunks(), shared[0]) } else { Vec::new() };
    let chunks = if RADIAL { tile.chunks() } else { 0 };
    let mut radial_cols = vec![[0.0_f32; LANES]; chunks];
    let mut radial_totals = vec![[0.0_f64; LANES]; chunks];
    for r in 0..tile.rows {
        let index = tile.row_start + r;
        let scale = tile.row.inverse[index];
        let row_exponent = [a.exponent[index]; LANES];
        let row_factor = a.factor[index] * if SHARED { power_of_two(shared[0] - a.exponent[index]) } else { 1.0 };
        let row_positive = tile.row.positive[index];
        let lines = r * tile.stride..r * tile.stride + tile.chunks() * LANES;
        let add: Option<&[F]> = add.map(|add| add[lines.clone()].as_chunks().0);
        let line: &mut [F] = x[lines].as_chunks_mut().0;
        let mut product = [0.0_f32; LANES];
        let mut radial = [0.0_f32; LANES];
        for_each_chunk!(tile, |j, live, checked| {
            let at = Lookup { tile, r: index, c: tile.col_start + j * LANES, live };
            let s = cosines(&line[j], scale, &inverse[j], live, checked);
            let e_shared: F = if SHARED { exp2_scaled::<FMA>(&s, tile.beta, &shared) } else { [0.0; LANES] };
            let mut g_row = [0.0_f32; LANES];
            let mut g_col = [0.0_f32; LANES];
            let mut above_row = [0.0_f32; LANES];
            let mut above_col = [0.0_f32; LANES];
            if ROWS {
                let e = if SHARED { e_shared } else { exp2_scaled::<FMA>(&s, tile.beta, &row_exponent) };
                g_row = lanes!(l => e[l] * row_factor);
                if MASKED || checked {
                    let keep = if checked { at.along_row::<true>(&s) } else { at.along_row::<MASKED>(&s) };
                    g_row = select(&keep, &g_row, 0.0);
                }
                above_row = lanes!(l => s[l] - row_positive);
                product = lanes!(l => product[l] + g_row[l] * above_row[l]);
            }
            if COLS {
                let (e, factor) = match SHARED {
                    true => (e_shared, scaled[j]),
                    false => (exp2_scaled::<FMA>(&s, tile.beta, &load(&b.exponent, at.c)), load(&b.factor, at.c)),
                };
                g_col = lanes!(l => e[l] * factor[l]);
                if MASKED || checked {
                    let keep = if checked { at.down_column::<true>(&s) } else { at.down_column::<MASKED>(&s) };
                    g_col = select(&keep, &g_col, 0.0);
                }
                let positive = &positives[j];
                above_col = lanes!(l => s[l] - positive[l]);
                product = lanes!(l => product[l] + counted * g_col[l] * above_col[l]);
            }
            if RADIAL {
                radial = lanes!(l => radial[l] + (g_row[l] * above_row[l] + g_col[l] * s[l]));
                let cols = &mut radial_cols[j];
                *cols = lanes!(l => cols[l] + (g_col[l] * above_col[l] + g_row[l] * s[l]));
            }
            let g: F = lanes!(l => (g_row[l] + g_col[l]) * scale * inverse[j][l]);
            line[j] = match add {
                Some(add) => lanes!(l => g[l] + add[j][l]),
                None => g,
            };
        });
        out.beta += sum(&product);
        if RADIAL {
            out.radial[0].push(sum(&radial));
            if r % FLUSH == FLUSH - 1 || r + 1 == tile.rows {
                flush(&mut radial_totals, &mut radial_cols);
            }
        }
    }
    if RADIAL {
        out.radial[1] = radial_totals.as_flattened()[..tile.cols].to_vec();
    }
    out
}

/// The portable body, with one offset for the tile.
#[cfg(test)]
pub(super) fn gradient_portable(
    x: &mut [f32],
    add: Option<&[f32]>,
    tile: &Tile<'_>,
    edges: &Edges<'_>,
) -> TileGradient {
    let (a, b) = (edges.rows.unwrap(), edges.cols.unwrap());
    let offset = Some(offset(tile, a, b).unwrap());
    let call = Call { add, tile, a, b, count_cols: edges.count_cols, offset };
    gradient_body::<true, true, true, true, true, true>(x, &call)
}

/// The same with an offset for each row and each column.
#[cfg(test)]
pub(super) fn gradient_apart(x: &mut [f32], add: Option<&[f32]>, tile: &Tile<'_>, edges: &Edges<'_>) -> TileGradient {
    let (a, b) = (edges.rows.unwrap(), edges.cols.unwrap());
    let call = Call { add, tile, a, b, count_cols: edges.count_cols, offset: None };
    gradient_body::<true, true, true, true, true, false>(x, &call)
}
