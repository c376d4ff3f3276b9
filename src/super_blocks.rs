//! Super-blocks: pieces of regions whose gradients of logits fit a bounded workspace.

use crate::loss::{Block, Loss};
use crate::order::Space;
use crate::problem::Problem;
use crate::regions::Region;
use std::ops::Range;

/// A piece of a region; in kernels/common/problem.cuh, `SuperBlock`.
#[derive(Debug, Clone)]
pub(crate) struct SuperBlock {
    /// Among those of the call.
    pub number: usize,
    pub spaces: [Space; 2],
    pub blocks: [Block; 2],
    pub ranges: [Range<usize>; 2],
    pub triangle: bool,
    pub anchors: [bool; 2],
    pub sums: [bool; 2],
    pub gradients: [bool; 2],
    pub counted: bool,
}

/// Tiles of `edge` indices, visited so many at once along either edge: every edge has a multiple of that.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiling {
    pub edge: usize,
    pub together: usize,
}

impl From<usize> for Tiling {
    fn from(edge: usize) -> Self {
        Self { edge, together: 1 }
    }
}

impl SuperBlock {
    pub(crate) fn tiles_along(&self, edge: usize, tile: impl Into<Tiling>) -> usize {
        let tile = tile.into();
        self.ranges[edge].len().div_ceil(tile.edge * tile.together) * tile.together
    }

    pub(crate) fn tiles(&self, tile: impl Into<Tiling>) -> usize {
        let tile = tile.into();
        let [rows, cols] = [0, 1].map(|edge| self.tiles_along(edge, tile));
        if self.triangle { rows * (rows + 1) / 2 } else { rows * cols }
    }

    /// Squares of tiles that are visited together, mirror images of a triangle's included.
    pub(crate) fn squares(&self, tile: Tiling) -> usize {
        self.tiles_along(0, tile) * self.tiles_along(1, tile) / (tile.together * tile.together)
    }

    /// Elements of the matrix of gradients, padded to whole tiles.
    pub(crate) fn elements(&self, tile: impl Into<Tiling>) -> usize {
        let tile = tile.into();
        self.tiles_along(0, tile) * self.tiles_along(1, tile) * tile.edge * tile.edge
    }

    /// Partial sums along rows and down columns.
    pub(crate) fn partials(&self, tile: impl Into<Tiling>) -> [usize; 2] {
        let tile = tile.into();
        let [rows, cols] = [0, 1].map(|edge| self.tiles_along(edge, tile));
        [cols * rows * tile.edge, rows * cols * tile.edge]
    }

    /// Whether an anchor here has a coefficient in the loss, and so the cosines gradients.
    pub(crate) fn has_coefficients(&self, loss: &Loss) -> bool {
        (0..2).any(|edge| self.anchors[edge] && loss.uses(self.blocks[edge]))
    }

    /// Whether every anchor that has gradients here has its sums taken here, too, so that its share in each tile is known.
    pub(crate) fn knows_shares(&self) -> bool {
        (0..2).all(|edge| self.sums[edge] || !self.anchors[edge])
    }

    /// Floating-point operations of the cosines of dimension `dim`.
    pub(crate) fn forward_flops(&self, dim: usize) -> f64 {
        let whole = self.ranges[0].len() as f64 * self.ranges[1].len() as f64;
        2.0 * dim as f64 * if self.triangle { whole / 2.0 } else { whole }
    }

    /// Floating-point operations of the cosines again, and of the products of their gradients with the embeddings.
    pub(crate) fn backward_flops(&self, dim: usize) -> f64 {
        let products = self.gradients.iter().map(|g| f64::from(u8::from(*g))).sum::<f64>();
        // A square on the diagonal of a triangle is one product over the whole square, twice its tiles.
        self.forward_flops(dim) * (1.0 + products * if self.triangle { 2.0 } else { 1.0 })
    }

    fn ranks(&self) -> bool {
        matches!(self.blocks[0], Block::QP)
    }

    pub(crate) fn flags(&self) -> [bool; 3] {
        [self.triangle, self.ranks(), self.counted]
    }
}

/// Super-blocks of every region: edges of at most `longest` indices, a multiple of the tile's edge `step`.
pub(crate) fn super_blocks(
    problem: &Problem<'_>,
    regions: &[Region],
    cuts: &[Vec<usize>; 2],
    step: usize,
    longest: usize,
) -> Vec<SuperBlock> {
    // No super-block straddles a cut, so that the blocks of rows of the products, which begin at cuts, meet whole tiles.
    let parts = |range: &Range<usize>, cuts: &[usize]| -> Vec<Range<usize>> {
        let inside = cuts.iter().copied().filter(|c| range.start < *c && *c < range.end);
        let points: Vec<_> = [range.start].into_iter().chain(inside).chain([range.end]).collect();
        let split = |ends: &[usize]| {
            let (start, end) = (ends[0], ends[1]);
            let count = (end - start).div_ceil(longest);
            let size = (end - start).div_ceil(count).next_multiple_of(step);
            (start..end).step_by(size).map(move |start| start..end.min(start + size))
        };
        points.windows(2).flat_map(split).collect()
    };
    let wanted = |space: Space| problem.gradients[space as usize].is_some();
    let mut blocks = Vec::new();
    for region in regions {
        let [row_parts, col_parts] =
            [(&region.rows, 0), (&region.cols, 1)].map(|(range, k)| parts(range, &cuts[region.spaces[k] as usize]));
        for (r, rows) in row_parts.iter().enumerate() {
            for (c, cols) in col_parts.iter().enumerate() {
                if region.triangle && c < r {
                    continue;
                }
                let triangle = region.triangle && c == r;
                let gradient = |edge: usize| region.gradients[edge] && wanted(region.spaces[edge]);
                blocks.push(SuperBlock {
                    number: blocks.len(),
                    spaces: region.spaces,
                    blocks: region.blocks,
                    ranges: [rows.clone(), cols.clone()],
                    triangle,
                    anchors: region.anchors,
                    sums: [region.anchors[0], region.anchors[1] && region.sum_cols],
                    gradients: [gradient(0), gradient(1) && !triangle],
                    counted: region.sum_cols,
                });
            }
        }
    }
    blocks
}
