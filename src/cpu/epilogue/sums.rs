//! The first pass's part of the epilogue: from products to sums of exponentials, and to ranks.

use super::{Lookup, Tile, cosines, for_each_chunk};
use crate::cpu::simd::{F, LANES, dispatch, exp2_scaled, lanes, select, sum};
use crate::partials::ExpSum;

/// The sums of one tile, along its rows and down its columns. Without ranks, `rows_above` and `cols_above` are empty.
#[derive(Debug, Default)]
pub(in crate::cpu) struct TileSums {
    pub rows: Vec<ExpSum>,
    pub rows_above: Vec<u32>,
    pub cols: Vec<ExpSum>,
    pub cols_above: Vec<u32>,
}

/// Rows after which column sums move from f32 to f64.
pub(super) const FLUSH: usize = 64;

/// One row in so many is looked at to choose the offset of a tile.
const SAMPLE: usize = 8;

/// The offset of a tile is this much below the largest logit of the sample, in powers of two. So a row or a column may have its largest
/// logit 130 below that of the sample, or 60 above it.
const BELOW: f32 = 40.0;

/// What the sum of a row or a column that keeps anything must be for the offset to serve it. Every term above 2⁻¹²⁶ counts, so a sum of
/// 2⁻⁹⁰ over a tile lacks less than 2⁻²⁶ of itself. A sum of 2¹⁰⁰ is far from what f32 can hold.
const SERVES: std::ops::RangeInclusive<f64> = 1.0 / (1_u128 << 90) as f64..=(1_u128 << 100) as f64;

/// Sums over a tile of products. `masked`: pairs may be masked. `cols`: the sums of the column anchors are taken, too. `ranks`: negatives
/// above the positives are counted.
pub(in crate::cpu) fn sum_tile(x: &[f32], tile: &Tile<'_>, masked: bool, cols: bool, ranks: bool) -> TileSums {
    fn of<const MASKED: bool, const COLS: bool, const RANKS: bool>(x: &[f32], tile: &Tile<'_>) -> TileSums {
        sum_shared::<MASKED, COLS, RANKS>(x, tile).unwrap_or_else(|| sum_apart::<MASKED, COLS, RANKS>(x, tile))
    }
    match (masked, cols, ranks) {
        (true, true, true) => of::<true, true, true>(x, tile),
        (true, true, false) => of::<true, true, false>(x, tile),
        (true, false, true) => of::<true, false, true>(x, tile),
        (true, false, false) => of::<true, false, false>(x, tile),
        (false, true, true) => of::<false, true, true>(x, tile),
        (false, true, false) => of::<false, true, false>(x, tile),
        (false, false, true) => of::<false, false, true>(x, tile),
        (false, false, false) => of::<false, false, false>(x, tile),
    }
}

dispatch! {
    /// The sums, in one sweep with one offset for the tile. `None` if that offset does not serve every row and column.
    fn sum_shared<const MASKED, const COLS, const RANKS>(x: &[f32], tile: &Tile<'_>) -> Option<TileSums> = sum_shared_body
}

#[inline(always)]
pub(super) fn sum_shared_body<const FMA: bool, const MASKED: bool, const COLS: bool, const RANKS: bool>(
    x: &[f32],
    tile: &Tile<'_>,
) -> Option<TileSums> {
    let offset = offset::<MASKED>(x, tile);
    let k = [offset; LANES];
    let exponent = offset as i32;
    let mut out = TileSums::with_rows(tile.rows, RANKS);
    let chunks = if COLS { tile.chunks() } else { 0 };
    let (inverse, bars) = (tile.of_cols(&tile.col.inverse), tile.of_cols(&tile.col.above));
    let mut col_sum = vec![[0.0_f32; LANES]; chunks];
    let mut col_total = vec![[0.0_f64; LANES]; chunks];
    let mut col_above = vec![[0_u32; LANES]; if RANKS { chunks } else { 0 }];
    let mut col_kept = vec![[0_u32; LANES]; if MASKED || !tile.cols.is_multiple_of(LANES) { chunks } else { 0 }];
    for r in 0..tile.rows {
        let index = tile.row_start + r;
        let (scale, bar) = (tile.row.inverse[index], tile.row.above[index]);
        let line = tile.line(x, r);
        let mut total = [0.0_f32; LANES];
        let mut above = [0_u32; LANES];
        let mut kept = [0_u32; LANES];
        for_each_chunk!(tile, |j, live, checked| {
            let at = Lookup { tile, r: index, c: tile.col_start + j * LANES, live };
            let s = cosines(&line[j], scale, &inverse[j], live, checked);
            let e = exp2_scaled::<FMA>(&s, tile.beta, &k);
            let (keep, e_row) = if MASKED || checked {
                let keep = if checked { at.along_row::<true>(&s) } else { at.along_row::<MASKED>(&s) };
                kept = lanes!(l => kept[l] | keep[l]);
                (keep, select(&keep, &e, 0.0))
            } else {
                ([u32::MAX; LANES], e)
            };
            total = lanes!(l => total[l] + e_row[l]);
            if RANKS {
                above = lanes!(l => above[l] + (u32::from(s[l] > bar) & keep[l]));
            }
            if COLS {
                let (keep, e_col) = if MASKED || checked {
                    let keep = if checked { at.down_column::<true>(&s) } else { at.down_column::<MASKED>(&s) };
                    let all = &mut col_kept[j];
                    *all = lanes!(l => all[l] | keep[l]);
                    (keep, select(&keep, &e, 0.0))
                } else {
                    ([u32::MAX; LANES], e)
                };
                let sums = &mut col_sum[j];
                *sums = lanes!(l => sums[l] + e_col[l]);
                if RANKS {
                    let (bars, counts) = (&bars[j], &mut col_above[j]);
                    *counts = lanes!(l => counts[l] + (u32::from(s[l] > bars[l]) & keep[l]));
                }
            }
        });
        let total = sum(&total);
        let empty = MASKED && kept.iter().all(|k| *k == 0);
        if !empty && !SERVES.contains(&total) {
            return None;
        }
        out.rows.push(ExpSum::new(total, exponent));
        if RANKS {
            out.rows_above.push(above.iter().sum());
        }
        if COLS && (r % FLUSH == FLUSH - 1 || r + 1 == tile.rows) {
            flush(&mut col_total, &mut col_sum);
        }
    }
    if COLS {
        let totals = &col_total.as_flattened()[..tile.cols];
        let kept = col_kept.as_flattened();
        let empty = |c: usize| kept.get(c).is_some_and(|k| *k == 0) && MASKED;
        if (0..tile.cols).any(|c| !empty(c) && !SERVES.contains(&totals[c])) {
            return None;
        }
        out.cols = totals.iter().map(|s| ExpSum::new(*s, exponent)).collect();
        out.cols_above = if RANKS { col_above.as_flattened()[..tile.cols].to_vec() } else { Vec::new() };
    }
    Some(out)
}

/// Moves column sums from f32 to f64.
pub(super) fn flush(totals: &mut [[f64; LANES]], sums: &mut [F]) {
    for (total, sum) in totals.as_flattened_mut().iter_mut().zip(sums.as_flattened_mut()) {
        *total += f64::from(std::mem::take(sum));
    }
}

impl TileSums {
    fn with_rows(rows: usize, ranks: bool) -> Self {
        let rows_above = Vec::with_capacity(if ranks { rows } else { 0 });
        Self { rows: Vec::with_capacity(rows), rows_above, ..Self::default() }
    }
}

/// The offset for a tile, from the largest cosine that some of its rows keep.
#[inline(always)]
fn offset<const MASKED: bool>(x: &[f32], tile: &Tile<'_>) -> f32 {
    let inverse = tile.of_cols(&tile.col.inverse);
    let mut max = [f32::NEG_INFINITY; LANES];
    for r in (0..tile.rows).step_by(SAMPLE) {
        let index = tile.row_start + r;
        let (scale, line) = (tile.row.inverse[index], tile.line(x, r));
        for_each_chunk!(tile, |j, live, checked| {
            let at = Lookup { tile, r: index, c: tile.col_start + j * LANES, live };
            let s = cosines(&line[j], scale, &inverse[j], live, checked);
            let keep = if checked { at.along_row::<true>(&s) } else { at.along_row::<MASKED>(&s) };
            let kept = select(&keep, &s, f32::NEG_INFINITY);
            max = lanes!(l => if kept[l] > max[l] { kept[l] } else { max[l] });
        });
    }
    let max = largest(&max);
    if max == f32::NEG_INFINITY { 0.0 } else { tile.beta.exponent(max) - BELOW }
}

fn largest(x: &F) -> f32 {
    x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v))
}

dispatch! {
    /// The sums, with an offset for each row and each column, whose largest cosines a sweep of its own finds.
    fn sum_apart<const MASKED, const COLS, const RANKS>(x: &[f32], tile: &Tile<'_>) -> TileSums = sum_apart_body
}

#[inline(always)]
pub(super) fn sum_apart_body<const FMA: bool, const MASKED: bool, const COLS: bool, const RANKS: bool>(
    x: &[f32],
    tile: &Tile<'_>,
) -> TileSums {
    let mut out = TileSums::with_rows(tile.rows, RANKS);
    let chunks = if COLS { tile.chunks() } else { 0 };
    let (inverse, bars) = (tile.of_cols(&tile.col.inverse), tile.of_cols(&tile.col.above));
    let mut col_max = vec![[f32::NEG_INFINITY; LANES]; chunks];
    let mut col_above = vec![[0_u32; LANES]; chunks];
    let mut row_max = Vec::with_capacity(tile.rows);
    for r in 0..tile.rows {
        let index = tile.row_start + r;
        let (scale, bar) = (tile.row.inverse[index], tile.row.above[index]);
        let line = tile.line(x, r);
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut above = [0_u32; LANES];
        for_each_chunk!(tile, |j, live, checked| {
            let at = Lookup { tile, r: index, c: tile.col_start + j * LANES, live };
            let s = cosines(&line[j], scale, &inverse[j], live, checked);
            let keep = if checked { at.along_row::<true>(&s) } else { at.along_row::<MASKED>(&s) };
            let kept = select(&keep, &s, f32::NEG_INFINITY);
            max = lanes!(l => if kept[l] > max[l] { kept[l] } else { max[l] });
            above = lanes!(l => above[l] + u32::from(kept[l] > bar));
            if COLS {
                let keep = if checked { at.down_column::<true>(&s) } else { at.down_column::<MASKED>(&s) };
                let kept = select(&keep, &s, f32::NEG_INFINITY);
                let (bars, m, a) = (&bars[j], &mut col_max[j], &mut col_above[j]);
                *m = lanes!(l => if kept[l] > m[l] { kept[l] } else { m[l] });
                *a = lanes!(l => a[l] + u32::from(kept[l] > bars[l]));
            }
        });
        row_max.push(largest(&max));
        if RANKS {
            out.rows_above.push(above.iter().sum());
        }
    }

    let exponent = |max: f32| if max == f32::NEG_INFINITY { 0.0 } else { tile.beta.exponent(max) };
    let col_exponent: Vec<F> = col_max.iter().map(|max| max.map(exponent)).collect();
    let mut col_sum = vec![[0.0_f32; LANES]; chunks];
    let mut col_total = vec![[0.0_f64; LANES]; chunks];
    for (r, max) in row_max.into_iter().enumerate() {
        let index = tile.row_start + r;
        let (scale, k) = (tile.row.inverse[index], exponent(max));
        let line = tile.line(x, r);
        let mut total = [0.0_f32; LANES];
        for_each_chunk!(tile, |j, live, checked| {
            let at = Lookup { tile, r: index, c: tile.col_start + j * LANES, live };
            let s = cosines(&line[j], scale, &inverse[j], live, checked);
            let keep = if checked { at.along_row::<true>(&s) } else { at.along_row::<MASKED>(&s) };
            let e = select(&keep, &exp2_scaled::<FMA>(&s, tile.beta, &[k; LANES]), 0.0);
            total = lanes!(l => total[l] + e[l]);
            if COLS {
                let keep = if checked { at.down_column::<true>(&s) } else { at.down_column::<MASKED>(&s) };
                let e = select(&keep, &exp2_scaled::<FMA>(&s, tile.beta, &col_exponent[j]), 0.0);
                let sums = &mut col_sum[j];
                *sums = lanes!(l => sums[l] + e[l]);
            }
        });
        out.rows.push(ExpSum::new(sum(&total), k as i32));
        if COLS && (r % FLUSH == FLUSH - 1 || r + 1 == tile.rows) {
            flush(&mut col_total, &mut col_sum);
        }
    }
    if COLS {
        let sums = col_total.as_flattened().iter().zip(col_exponent.as_flattened());
        out.cols = sums.take(tile.cols).map(|(s, k)| ExpSum::new(*s, *k as i32)).collect();
        out.cols_above = if RANKS { col_above.as_flattened()[..tile.cols].to_vec() } else { Vec::new() };
    }
    out
}
