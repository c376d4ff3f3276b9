//! Super-blocks: pieces of regions whose gradients of logits fit a bounded workspace.

use crate::loss::{Block, Loss};
use crate::order::{Order, Space};
use crate::problem::Problem;
use crate::regions::{Region, cuts, regions};
use std::ops::Range;

/// A piece of a region. `SuperBlock` in kernels/common/problem.cuh is what a CUDA kernel sees of it. Pairs are of the rows and of the
/// columns.
#[derive(Debug, Clone)]
pub(crate) struct SuperBlock {
    /// Its place among the super-blocks of the call.
    pub number: usize,
    /// Spaces of the row and column indices.
    pub spaces: [Space; 2],
    /// Blocks of the softmaxes of the row anchors and of the column anchors.
    pub blocks: [Block; 2],
    /// Row and column indices.
    pub ranges: [Range<usize>; 2],
    /// Whether it is a square on the diagonal of a triangle. Tiles below the diagonal are mirror images then, and are not visited.
    pub triangle: bool,
    /// Whether its indices are anchors here.
    pub anchors: [bool; 2],
    /// Whether the sums of its anchors are taken here.
    pub sums: [bool; 2],
    /// Whether gradients of its embeddings are added here.
    pub gradients: [bool; 2],
    /// Whether the column anchors' part of ∂L/∂β is added here.
    pub counted: bool,
}

/// Tiles of `edge` x `edge` cosines. A backend visits squares of `together` x `together` tiles, so the number of tiles along either axis
/// is a multiple of `together`.
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
    /// Tiles along an axis.
    pub(crate) fn tiles_along(&self, axis: usize, tile: impl Into<Tiling>) -> usize {
        let tile = tile.into();
        self.ranges[axis].len().div_ceil(tile.edge * tile.together) * tile.together
    }

    /// Tiles that are visited: all of a rectangle, those on and above the diagonal of a triangle.
    pub(crate) fn tiles(&self, tile: impl Into<Tiling>) -> usize {
        let tile = tile.into();
        let [rows, cols] = [0, 1].map(|axis| self.tiles_along(axis, tile));
        if self.triangle { rows * (rows + 1) / 2 } else { rows * cols }
    }

    /// Squares of tiles that are visited together. Those below the diagonal of a triangle, which are mirror images, count too.
    pub(crate) fn squares(&self, tile: Tiling) -> usize {
        self.tiles_along(0, tile) * self.tiles_along(1, tile) / (tile.together * tile.together)
    }

    /// Elements of the matrix of gradients, padded to whole tiles.
    pub(crate) fn elements(&self, tile: impl Into<Tiling>) -> usize {
        let tile = tile.into();
        self.tiles_along(0, tile) * self.tiles_along(1, tile) * tile.edge * tile.edge
    }

    /// Number of partial sums of the row anchors and of the column anchors: one for each anchor and each tile that it meets.
    pub(crate) fn partials(&self, tile: impl Into<Tiling>) -> [usize; 2] {
        let tile = tile.into();
        let [rows, cols] = [0, 1].map(|axis| self.tiles_along(axis, tile));
        [cols * rows * tile.edge, rows * cols * tile.edge]
    }

    /// Whether the loss uses a block of an anchor here. If not, the loss has no gradient with respect to these cosines.
    pub(crate) fn has_coefficients(&self, loss: &Loss) -> bool {
        (0..2).any(|axis| self.anchors[axis] && loss.uses(self.blocks[axis]))
    }

    /// Whether the sums of all anchors here are taken here, too. Tile skipping needs them: they are the shares of a tile in the softmaxes
    /// of its anchors.
    pub(crate) fn knows_shares(&self) -> bool {
        (0..2).all(|axis| self.sums[axis] || !self.anchors[axis])
    }

    /// Floating-point operations of the cosines of embeddings of dimension `dim`.
    pub(crate) fn forward_flops(&self, dim: usize) -> f64 {
        let whole = self.ranges[0].len() as f64 * self.ranges[1].len() as f64;
        2.0 * dim as f64 * if self.triangle { whole / 2.0 } else { whole }
    }

    /// Floating-point operations of computing the cosines again, and of the products of their gradients with the embeddings.
    pub(crate) fn backward_flops(&self, dim: usize) -> f64 {
        let products = self.gradients.iter().map(|g| f64::from(u8::from(*g))).sum::<f64>();
        // The products of a triangle read the whole square, which is twice the cosines of the triangle.
        self.forward_flops(dim) * (1.0 + products * if self.triangle { 2.0 } else { 1.0 })
    }

    /// Whether negatives above the positive are counted here. Only the cosines of S give ranks.
    fn ranks(&self) -> bool {
        matches!(self.blocks[0], Block::QP)
    }

    /// What kernels and shaders are told besides: `triangle`, `ranks` and `counted`.
    pub(crate) fn flags(&self) -> [bool; 3] {
        [self.triangle, self.ranks(), self.counted]
    }
}

/// Most super-blocks of a plan. The launches of each take 2 to 4 KiB on the host, so a plan stays below 64 MiB. Plans refuse a bound on
/// the workspace that would cut the work into more.
const MAX_SUPER_BLOCKS: usize = 1 << 14;

/// Ranges of the super-blocks of a region, along its rows and along its columns. Each has at most `longest` indices. Each but the last
/// before a cut has a multiple of `step`.
fn edges(region: &Region, cuts: &[Vec<usize>; 2], step: usize, longest: usize) -> [Vec<Range<usize>>; 2] {
    // No super-block straddles a cut. The products that add up gradients take blocks of rows that begin at cuts, and these must meet
    // whole tiles.
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
    [(&region.rows, 0), (&region.cols, 1)].map(|(range, axis)| parts(range, &cuts[region.spaces[axis] as usize]))
}

/// The least length, a multiple of `step`, for which super-blocks of that many indices are at most [`MAX_SUPER_BLOCKS`].
pub(crate) fn least_edge<C>(problem: &Problem<'_, C>, order: &Order, step: usize) -> usize {
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
    let (mut low, mut high) = (0, 1); // in steps; super-blocks of length `low` are too many
    while many(high) {
        (low, high) = (high, 2 * high);
    }
    while high - low > 1 {
        let middle = (low + high) / 2;
        if many(middle) { low = middle } else { high = middle }
    }
    high * step
}

/// Super-blocks of every region, of at most `longest` indices along either axis. `longest` is a multiple of `step`, the indices that are
/// visited together.
pub(crate) fn super_blocks<C>(
    problem: &Problem<'_, C>,
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
                let gradient = |axis: usize| region.gradients[axis] && wanted(region.spaces[axis]);
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
                let problem = crate::Problem::new(pairs, DType::F32, 1).unwrap().with_rows(rows.clone()).unwrap();
                let (order, m) = (Order::new(&pairs), pairs.rows());
                let (regions, cuts) = (regions(plain.loss(), &rows, &order, m), cuts(&rows, &order, m));
                let count = |edge: usize| super_blocks(&problem, &regions, &cuts, 64, edge).len();
                let edge = least_edge(&problem, &order, 64);
                assert!(
                    count(edge) <= MAX_SUPER_BLOCKS && (edge == 64 || count(edge - 64) > MAX_SUPER_BLOCKS),
                    "{edge}"
                );
                // Longer super-blocks are fewer.
                assert!([2, 3, 10].iter().all(|times| count(edge * times) <= MAX_SUPER_BLOCKS));
            }
        }
        let call = Call::new(Loss::gte(), 0.1);
        let small = call.pairs(5000, 6000).unwrap();
        let problem = crate::Problem::new(small, DType::F32, 1).unwrap();
        assert_eq!(least_edge(&problem, &Order::new(&small), 128), 128, "what small bounds are for");
    }
}
