//! The epilogue of a tile: all that follows the matrix product. It scales, masks, takes exponentials and sums, sixteen columns at a time.
//!
//! A tile element pairs index r of one space with index c of another. Seen along the row it is a candidate c of anchor r;
//! seen down the column a candidate r of anchor c. The two have their own masks, sums and coefficients, and share the cosine.
//!
//! They also share the exponential, if one offset serves the whole tile: exp2(β s·log₂e − k) for one integer k. In f32 that is so if the
//! numbers that matter in the tile's rows and columns lie within some hundred powers of two. Otherwise every row and every column gets an
//! offset of its own, and an exponential of its own. Which of the two happens depends on the tile's numbers alone. Neither loses a digit,
//! because offsets are whole numbers.

mod gradient;
mod sums;

pub(super) use gradient::{Coefficients, Edges, TileGradient, gradient_tile};
pub(super) use sums::{TileSums, sum_tile};

use super::side::{Candidates, Numbers, Side};
use super::simd::{Beta, F, LANES, U, bits, lanes, load, load_keys};

/// Where a tile lies, and what is known of its indices for one prefix. It has `rows` × `cols` elements in a buffer of row stride `stride`
/// (a multiple of [`LANES`], at least `cols`).
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
    pub row_start: usize,
    pub col_start: usize,
    pub row_side: &'a Side,
    pub col_side: &'a Side,
    pub row: &'a Numbers,
    pub col: &'a Numbers,
    pub beta: Beta,
}

impl Tile<'_> {
    /// Chunks of a row, of which the last may reach beyond the tile.
    fn chunks(&self) -> usize {
        self.cols.div_ceil(LANES)
    }

    /// The entries of a vector of the column space that belong to the tile's columns, in chunks.
    #[inline(always)]
    fn of_cols<'v>(&self, x: &'v [f32]) -> &'v [F] {
        x[self.col_start..][..self.chunks() * LANES].as_chunks().0
    }

    /// The products in row `r` of the buffer.
    #[inline(always)]
    fn line<'x>(&self, x: &'x [f32], r: usize) -> &'x [F] {
        x[r * self.stride..][..self.chunks() * LANES].as_chunks().0
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
        let (aq, ap, row, threshold) = (query[self.r], passage[self.r], a.row[self.r], self.tile.row.threshold[self.r]);
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
        let (row, threshold) = (load_keys(&a.row, self.c), load(&self.tile.col.threshold, self.c));
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

/// The cosines of a chunk of products, and zeros beyond the tile's last column. There the buffer holds what an earlier tile left. Masks
/// keep these lanes out of every sum, but 0 times an infinity would be NaN.
#[inline(always)]
fn cosines(raw: &F, scale: f32, inverse: &F, live: usize, checked: bool) -> F {
    let raw: F = if checked { lanes!(l => if l < live { raw[l] } else { 0.0 }) } else { *raw };
    lanes!(l => raw[l] * scale * inverse[l])
}

/// Runs the block for every chunk of a tile's row, `$j`. `checked` is true only for a last chunk of fewer columns, `live` of them. The
/// compiler knows its value in either case. This is a macro for the same reason as [`lanes`].
macro_rules! for_each_chunk {
    ($tile:expr, |$j:ident, $live:ident, $checked:ident| $body:block) => {
        let whole = $tile.cols / LANES;
        for $j in 0..whole {
            let ($live, $checked) = (LANES, false);
            $body
        }
        if $tile.cols % LANES > 0 {
            let ($j, $live, $checked) = (whole, $tile.cols % LANES, true);
            $body
        }
    };
}
use for_each_chunk;

#[cfg(test)]
mod tests;
