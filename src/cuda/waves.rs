//! Super-blocks and waves of a plan, and whose cosines the first pass keeps for the gradient instead of having them computed again.
//!
//! Waves and kept cosines share one bound: the more is kept, the smaller the waves, and the more often sums of gradients are read and
//! written. So a few sizes of waves are tried, and the one with the lowest cost taken. Which cosines are kept decides no bit of the
//! results, only what multiplies; the size of the waves decides the order of sums.

use super::plan::{ARRAY_ALIGNMENT, MAX_SUPER_BLOCKS};
use super::problem::{Arithmetic, Cosines, Tile};
use crate::order::Order;
use crate::problem::Problem;
use crate::regions;
use crate::super_blocks::{SuperBlock, super_blocks};
use std::ops::Range;

/// Bytes of a partial sum and of a count.
const PARTIAL_BYTES: [usize; 2] = [8, 4];

/// Terms of a cosine that cost as much as keeping it: the smallest dimension at which plans keep. Multiplying d terms at 790 TFLOP/s (an
/// H200's bare products) takes d/512 times as long as moving 5.6 bytes at 4.3 TB/s: the 4 that are read again, and what is left of the
/// 4 written once they are hidden behind the products of the first pass. From the counts alone; not measured yet.
const LEAST_TERMS: usize = 512;
/// Terms that cost as much as a wave's reading and writing one sum of a gradient, 8 bytes.
const TERMS_OF_A_SUM: usize = 740;

/// Super-blocks that a launch visits together.
pub(super) type Wave = Vec<SuperBlock>;

/// What is computed together, and what is kept.
pub(super) struct Division {
    pub forward: Vec<Wave>,
    pub backward: Vec<Wave>,
    /// So many super-blocks of the backward waves, in order, keep their cosines.
    pub kept: usize,
}

/// Elements of a super-block's kept cosines (kernels/common/cosines.cuh): whole squares.
pub(super) fn kept_elements(block: &SuperBlock, tile: Tile) -> usize {
    block.tiles(tile.step()) * tile.step() * tile.step()
}

fn kept_bytes(block: &SuperBlock, tile: Tile) -> usize {
    size_of::<f32>() * kept_elements(block, tile)
}

/// Terms of a cosine on the tensor cores; fused multiply-adds of f32 take about twelve times as long.
fn terms(problem: &Problem<'_>) -> usize {
    let times = match problem.arithmetic() {
        Arithmetic::F16 | Arithmetic::F16x2 => 1,
        Arithmetic::F16x3 => 3,
        Arithmetic::Exact => 12,
    };
    problem.dim * times
}

impl Division {
    /// The one of least cost, within the bound.
    pub(super) fn best(problem: &Problem<'_>, order: &Order, tile: Tile, bound: usize) -> Self {
        let chosen = problem.cosines();
        let keeps = chosen.unwrap_or(if terms(problem) >= LEAST_TERMS { Cosines::Kept } else { Cosines::Recomputed });
        let whole = Self::new(problem, order, tile, bound, bound, keeps);
        if keeps == Cosines::Recomputed {
            return whole;
        }
        let least = bounded_bytes(tile.step(), tile.step(), problem.arithmetic());
        let smaller = [2, 4].map(|parts| bound / parts).into_iter().filter(|bytes| *bytes >= least);
        let smaller = smaller.map(|bytes| Self::new(problem, order, tile, bound, bytes, keeps));
        let rank = |division: &Self| match chosen {
            Some(_) => division.cost(problem, tile)[0],
            None => division.cost(problem, tile).iter().sum(),
        };
        smaller.fold(whole, |best, next| if rank(&next) < rank(&best) { next } else { best })
    }

    /// Waves of at most `wave_bytes`, and what fits beside them kept.
    fn new(problem: &Problem<'_>, order: &Order, tile: Tile, bound: usize, wave_bytes: usize, keeps: Cosines) -> Self {
        let (m, arithmetic) = (problem.pairs.rows(), problem.arithmetic());
        let regions = regions::regions(problem.loss, &problem.rows, order, m);
        let longest = longest_edge(arithmetic, tile, wave_bytes);
        let blocks = super_blocks(problem, &regions, &regions::cuts(&problem.rows, order, m), tile.step(), longest);
        let with_coefficients = |s: &&SuperBlock| s.has_coefficients(problem.loss);
        let forward = waves(blocks.iter().cloned(), tile, arithmetic, wave_bytes);
        let backward = waves(blocks.iter().filter(with_coefficients).cloned(), tile, arithmetic, wave_bytes);
        let wave = |wave: &Wave| wave.iter().map(|s| bytes_of(s, tile, arithmetic)).sum::<usize>();
        let largest = forward.iter().chain(&backward).map(wave).max().unwrap_or(0);
        let mut room = match keeps {
            Cosines::Kept => bound.saturating_sub(largest + ARRAY_ALIGNMENT as usize),
            Cosines::Recomputed => 0,
        };
        let mut fits = |block: &&SuperBlock| {
            let left = room.checked_sub(kept_bytes(block, tile));
            left.inspect(|left| room = *left).is_some()
        };
        let kept = backward.iter().flatten().take_while(&mut fits).count();
        Self { forward, backward, kept }
    }

    /// The super-blocks that keep their cosines, and the others with gradients.
    fn backward_blocks(&self) -> [impl Iterator<Item = &SuperBlock>; 2] {
        [0..self.kept, self.kept..usize::MAX]
            .map(|range: Range<usize>| self.backward.iter().flatten().skip(range.start).take(range.end - range.start))
    }

    /// The super-blocks that keep their cosines.
    pub(super) fn kept_blocks(&self) -> impl Iterator<Item = &SuperBlock> {
        let [kept, _] = self.backward_blocks();
        kept
    }

    /// Squares whose cosines are kept, and all that have gradients.
    pub(super) fn squares(&self, tile: Tile) -> [usize; 2] {
        let [kept, others] = self.backward_blocks().map(|blocks| blocks.map(|s| s.tiles(tile.step())).sum::<usize>());
        [kept, kept + others]
    }

    /// Floating-point operations of forward and backward.
    pub(super) fn flops(&self, dim: usize) -> f64 {
        let spared: f64 = self.kept_blocks().map(|s| s.forward_flops(dim)).sum();
        self.forward.iter().flatten().map(|s| s.forward_flops(dim)).sum::<f64>()
            + self.backward.iter().flatten().map(|s| s.backward_flops(dim)).sum::<f64>()
            - spared
    }

    /// What the division has an influence on, in terms of cosines: of the cosines in the backward pass, and of the waves' sums.
    fn cost(&self, problem: &Problem<'_>, tile: Tile) -> [f64; 2] {
        let [kept, others] = self.backward_blocks().map(|blocks| blocks.map(|s| kept_elements(s, tile)).sum::<usize>());
        // Forced to keep, a plan keeps as much as it can, whatever that costs.
        let of_kept = if problem.cosines().is_some() { 0 } else { LEAST_TERMS };
        let sums: usize = self.backward.iter().map(sums_of).sum();
        let cosines = kept as f64 * of_kept as f64 + others as f64 * terms(problem) as f64;
        [cosines, sums as f64 * (problem.dim * TERMS_OF_A_SUM) as f64]
    }
}

/// Rows of sums that a wave adds to.
fn sums_of(wave: &Wave) -> usize {
    let mut ranges: Vec<(usize, usize, usize)> = Vec::new();
    for block in wave {
        for edge in 0..2 {
            let range = (block.spaces[edge] as usize, block.ranges[edge].start, block.ranges[edge].end);
            if block.gradients[edge] && !ranges.contains(&range) {
                ranges.push(range);
            }
        }
    }
    ranges.iter().map(|(_, start, end)| end - start).sum()
}

/// Bytes of a wave that is one super-block of rows x cols indices, in the pass that takes more.
pub(super) fn bounded_bytes(rows: usize, cols: usize, arithmetic: Arithmetic) -> usize {
    let (bytes, planes) = (arithmetic.bytes(), arithmetic.gradient_planes());
    // Partials of the smallest tile, 64: two edges, each a number for every 64 elements.
    let partials = rows * cols / 64 * 2 * PARTIAL_BYTES.iter().sum::<usize>();
    let dots = rows * cols / (64 * 64) * size_of::<f64>();
    partials.max(rows * cols * bytes * planes + dots) + 3 * ARRAY_ALIGNMENT as usize
}

fn bytes_of(block: &SuperBlock, tile: Tile, arithmetic: Arithmetic) -> usize {
    let [rows, cols] = [0, 1].map(|edge| block.tiles_along(edge, tile.tiling()) * tile.edge());
    bounded_bytes(rows, cols, arithmetic)
}

/// The longest edge, in indices, of a square super-block that the bound holds.
fn longest_edge(arithmetic: Arithmetic, tile: Tile, bound: usize) -> usize {
    let step = tile.step();
    let fits = |edge: usize| bounded_bytes(edge, edge, arithmetic) <= bound;
    let (mut low, mut high) = (1, (1 << 26) / step); // in tiles: a super-block of `low` fits, one of `high` is out of reach
    while high - low > 1 {
        let middle = (low + high) / 2;
        if fits(middle * step) { low = middle } else { high = middle }
    }
    low * step
}

/// Super-blocks in order, as many in each wave as the bound and a launch allow; at least one wave, which may be empty.
fn waves(blocks: impl Iterator<Item = SuperBlock>, tile: Tile, arithmetic: Arithmetic, bound: usize) -> Vec<Wave> {
    let mut waves = vec![Wave::new()];
    let mut used = 0;
    for block in blocks {
        let more = bytes_of(&block, tile, arithmetic);
        let full = waves.last().is_none_or(|w| w.len() == MAX_SUPER_BLOCKS || (!w.is_empty() && used + more > bound));
        if full {
            waves.push(Wave::new());
            used = 0;
        }
        used += more;
        if let Some(wave) = waves.last_mut() {
            wave.push(block);
        }
    }
    waves
}
