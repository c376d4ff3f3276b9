//! Super-blocks: pieces of regions whose gradients of logits fit a bounded workspace.

use crate::loss::{Block, Loss};
use crate::order::{Order, Space};
use crate::problem::Problem;
use crate::regions::{Region, cuts, regions};
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

/// Most super-blocks of a plan. Each is 2 to 4 KiB of launches on the host, so that plans stay below 64 MiB. A bound on the
/// workspace that cuts the work into more is refused.
const MAX_SUPER_BLOCKS: usize = 1 << 14;

/// Edges of a super-block along the rows and along the columns of a region: at most `longest` indices, a multiple of `step`.
fn edges(region: &Region, cuts: &[Vec<usize>; 2], step: usize, longest: usize) -> [Vec<Range<usize>>; 2] {
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
    [(&region.rows, 0), (&region.cols, 1)].map(|(range, k)| parts(range, &cuts[region.spaces[k] as usize]))
}

/// The shortest edge, a multiple of `step`, of which a plan has at most [`MAX_SUPER_BLOCKS`].
pub(crate) fn least_edge(problem: &Problem<'_>, order: &Order, step: usize) -> usize {
    let m = problem.pairs.rows();
    let (regions, cuts) = (regions(problem.call().loss(), &problem.rows, order, m), cuts(&problem.rows, order, m));
    let count = |longest: usize| -> usize {
        let of = |region: &Region| {
            let [rows, cols] = edges(region, &cuts, step, longest).map(|parts| parts.len());
            if region.triangle { rows * (rows + 1) / 2 } else { rows * cols }
        };
        regions.iter().map(of).sum()
    };
    let many = |steps: usize| count(steps * step) > MAX_SUPER_BLOCKS;
    let (mut low, mut high) = (0, 1); // in steps: super-blocks of `low` are too many
    while many(high) {
        (low, high) = (high, 2 * high);
    }
    while high - low > 1 {
        let middle = (low + high) / 2;
        if many(middle) { low = middle } else { high = middle }
    }
    high * step
}

/// Super-blocks of every region: edges of at most `longest` indices, a multiple of the tile's edge `step`.
pub(crate) fn super_blocks(
    problem: &Problem<'_>,
    regions: &[Region],
    cuts: &[Vec<usize>; 2],
    step: usize,
    longest: usize,
) -> Vec<SuperBlock> {
    let wanted = |space: Space| problem.gradients[space as usize].is_some();
    let mut blocks = Vec::new();
    for region in regions {
        let [row_parts, col_parts] = edges(region, cuts, step, longest);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;
    use crate::dtype::DType;

    #[test]
    fn the_least_edge_is_that_of_not_too_many_super_blocks() {
        let shared: Vec<u32> = (0..20_000).map(|i| i / 3).collect();
        for loss in [Loss::info_nce(), Loss::gte()] {
            let plain = Call::new(loss, 0.1);
            let shared = plain.clone().with_positives(&*shared);
            let (large, wide) = (plain.pairs(65_536, 65_536).unwrap(), plain.pairs(4, 1 << 22).unwrap());
            let shared = shared.pairs(20_000, 30_000).unwrap();
            for (pairs, rows) in [(large, 0..65_536), (wide, 0..4), (shared, 5..19_000)] {
                let problem = Problem::new(pairs, DType::F32, 1).unwrap().with_rows(rows.clone()).unwrap();
                let (order, m) = (Order::new(&pairs), pairs.rows());
                let (regions, cuts) = (regions(plain.loss(), &rows, &order, m), cuts(&rows, &order, m));
                let count = |edge: usize| super_blocks(&problem, &regions, &cuts, 64, edge).len();
                let edge = least_edge(&problem, &order, 64);
                assert!(
                    count(edge) <= MAX_SUPER_BLOCKS && (edge == 64 || count(edge - 64) > MAX_SUPER_BLOCKS),
                    "{edge}"
                );
                // More room means fewer.
                assert!([2, 3, 10].iter().all(|times| count(edge * times) <= MAX_SUPER_BLOCKS));
            }
        }
        let call = Call::new(Loss::gte(), 0.1);
        let small = call.pairs(5000, 6000).unwrap();
        let problem = Problem::new(small, DType::F32, 1).unwrap();
        assert_eq!(least_edge(&problem, &Order::new(&small), 128), 128, "what small bounds are for");
    }
}
