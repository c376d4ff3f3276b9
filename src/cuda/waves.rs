//! Super-blocks and waves of a plan, and which super-blocks have their cosines stored for the gradient.
//!
//! Waves and stored cosines share one bound. The more cosines are stored, the smaller are the waves, and the more often are sums of
//! gradients read and written. So a plan tries a few sizes of waves and takes the one of the lowest cost. A stored cosine has the bits of
//! a recomputed one. But the size of the waves decides in which order gradients are added up, and so their last bits.

use super::abi::{self, MAX_SUPER_BLOCKS, Shared};
use super::problem::{Arithmetic, Cosines, Problem, Tile};
use super::schedule::ARRAY_ALIGNMENT;
use crate::order::Order;
use crate::regions;
use crate::super_blocks::{SuperBlock, super_blocks};
use std::ops::Range;

/// Plans store cosines of at least this many terms (the dimension, times what a product costs: see [`terms`]), because cosines of fewer
/// terms are recomputed faster than they are read. The first number is for gradients of one plane, the second for two planes.
///
/// The numbers follow from counts for a thread block's half of a square. They have not been measured yet.
///
/// - Stored: an H200 reads 128 KiB of cosines and writes 64 KiB of gradients, or 128 KiB in two planes. At 4.3 TB/s, shared by 132
///   multiprocessors, that takes 6.0 or 8.0 µs.
/// - Recomputed: it multiplies for 9.1 ns per term, and needs 2.2 µs for the rest (docs/hopper.md). Both are equal at 420 or 640 terms,
///   and on an H100, which has 3.35 TB/s, at 610 or 890.
/// - The first pass writes the 128 KiB in 4.0 µs (H200) or 5.2 µs (H100). From 430 terms on, its own products take longer than that.
///
/// So 640 is right for one plane on both devices. For two planes, 768 is the multiple of 128 in the middle between them: at 768 terms,
/// storing saves 1.2 µs of 9.2 on an H200, and costs 1.1 µs on an H100.
const LEAST_TERMS: [usize; 2] = [640, 768];
/// Terms of a cosine that take as long to multiply (at 790 TFLOP/s) as a wave takes to read and write one sum of a gradient: 8 bytes at
/// 4.3 TB/s.
const TERMS_OF_A_SUM: usize = 740;

/// Super-blocks that a launch visits together.
pub(super) type Wave = Vec<SuperBlock>;

/// Which super-blocks are computed together, and which have their cosines stored.
pub(super) struct Division {
    pub forward: Vec<Wave>,
    pub backward: Vec<Wave>,
    /// Number of super-blocks whose cosines are stored. They are the first of the backward waves.
    pub kept: usize,
}

/// Number of cosines that are stored for a super-block, in whole squares (kernels/common/cosines.cuh).
pub(super) fn kept_elements(block: &SuperBlock, tile: Tile) -> usize {
    block.tiles(tile.step()) * tile.step() * tile.step()
}

fn kept_bytes(block: &SuperBlock, tile: Tile, contents: Contents) -> usize {
    size_of::<f32>() * kept_elements(block, tile) * contents.planes()
}

/// What a cosine costs, in terms of one product of f16 on the tensor cores. `F16x3` has three products for each term. Fused multiply-adds
/// of f32 take about twelve times as long.
fn terms(problem: &Problem<'_>) -> usize {
    let times = match problem.arithmetic() {
        Arithmetic::F16 | Arithmetic::F16x2 => 1,
        Arithmetic::F16x3 => 3,
        Arithmetic::Exact => 12,
    };
    problem.entries() * times
}

fn least_terms(problem: &Problem<'_>) -> usize {
    LEAST_TERMS[problem.arithmetic().gradient_planes() - 1]
}

impl Division {
    /// The division of least cost within `bound`. Its waves may have at least `least` bytes, which hold the smallest super-block.
    pub(super) fn best(problem: &Problem<'_>, order: &Order, tile: Tile, bound: usize, least: usize) -> Self {
        let chosen = problem.cosines();
        // With prefixes the gradient reads cosines from memory in any case: those that are not kept are made and stored for each wave.
        let pays = problem.several().is_some() || terms(problem) >= least_terms(problem);
        let keeps = chosen.unwrap_or(if pays { Cosines::Kept } else { Cosines::Recomputed });
        let whole = Self::new(problem, order, tile, bound, bound, keeps);
        if keeps == Cosines::Recomputed {
            return whole;
        }
        let smaller = [2, 4].map(|parts| bound / parts).into_iter().filter(|bytes| *bytes >= least);
        let smaller = smaller.map(|bytes| Self::new(problem, order, tile, bound, bytes, keeps));
        let rank = |division: &Self| match chosen {
            Some(_) => division.cost(problem, tile)[0],
            None => division.cost(problem, tile).iter().sum(),
        };
        smaller.fold(whole, |best, next| if rank(&next) < rank(&best) { next } else { best })
    }

    /// Waves of at most `wave_bytes`. The cosines of as many super-blocks as fit beside the largest wave are stored.
    fn new(problem: &Problem<'_>, order: &Order, tile: Tile, bound: usize, wave_bytes: usize, keeps: Cosines) -> Self {
        let (m, contents) = (problem.pairs.rows(), problem.contents());
        let regions = regions::regions(problem.call().loss(), &problem.rows, order, m);
        let longest = longest_edge(contents, tile, wave_bytes);
        let blocks = super_blocks(problem, &regions, &regions::cuts(&problem.rows, order, m), tile.step(), longest);
        let with_coefficients = |s: &&SuperBlock| s.has_coefficients(problem.call().loss());
        let forward = waves(blocks.iter().cloned(), tile, contents, wave_bytes);
        let backward = waves(blocks.iter().filter(with_coefficients).cloned(), tile, contents, wave_bytes);
        let wave = |wave: &Wave| wave.iter().map(|s| bytes_of(s, tile, contents)).sum::<usize>();
        let largest = forward.iter().chain(&backward).map(wave).max().unwrap_or(0);
        let mut room = match keeps {
            Cosines::Kept => bound.saturating_sub(largest + ARRAY_ALIGNMENT as usize),
            Cosines::Recomputed => 0,
        };
        let mut fits = |block: &&SuperBlock| {
            let left = room.checked_sub(kept_bytes(block, tile, contents));
            left.inspect(|left| room = *left).is_some()
        };
        let kept = backward.iter().flatten().take_while(&mut fits).count();
        Self { forward, backward, kept }
    }

    /// The super-blocks whose cosines are stored, and the others that have gradients.
    fn backward_blocks(&self) -> [impl Iterator<Item = &SuperBlock>; 2] {
        [0..self.kept, self.kept..usize::MAX]
            .map(|range: Range<usize>| self.backward.iter().flatten().skip(range.start).take(range.end - range.start))
    }

    /// The super-blocks whose cosines are stored.
    pub(super) fn kept_blocks(&self) -> impl Iterator<Item = &SuperBlock> {
        let [kept, _] = self.backward_blocks();
        kept
    }

    /// Number of squares whose cosines are stored, and of all squares that have gradients.
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

    /// Those costs that depend on the division, in terms of cosines: what the backward pass spends on reading or recomputing cosines, and
    /// what the waves spend on sums of gradients.
    fn cost(&self, problem: &Problem<'_>, tile: Tile) -> [f64; 2] {
        let [kept, others] = self.backward_blocks().map(|blocks| blocks.map(|s| kept_elements(s, tile)).sum::<usize>());
        // If the caller wants cosines stored, a plan stores as many as it can, whatever that costs. With prefixes it costs nothing more.
        let free = problem.cosines().is_some() || problem.several().is_some();
        let of_kept = if free { 0 } else { least_terms(problem) };
        let sums: usize = self.backward.iter().map(sums_of).sum();
        let cosines = kept as f64 * of_kept as f64 + others as f64 * terms(problem) as f64;
        [cosines, sums as f64 * (problem.entries() * TERMS_OF_A_SUM) as f64]
    }
}

/// Number of rows of sums of gradients that a wave adds to.
fn sums_of(wave: &Wave) -> usize {
    let mut ranges: Vec<(usize, usize, usize)> = Vec::new();
    for block in wave {
        for axis in 0..2 {
            let range = (block.spaces[axis] as usize, block.ranges[axis].start, block.ranges[axis].end);
            if block.gradients[axis] && !ranges.contains(&range) {
                ranges.push(range);
            }
        }
    }
    ranges.iter().map(|(_, start, end)| end - start).sum()
}

/// What the workspace holds for each cosine of a wave: that of one prefix, or of several.
#[derive(Debug, Clone, Copy)]
pub(super) struct Contents {
    pub(super) arithmetic: Arithmetic,
    /// Number of prefixes of a call that needs the kernels of prefixes.
    pub(super) prefixes: Option<usize>,
}

/// Numbers of elements that a wave needs. Those of a call with prefixes are the numbers of one prefix.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Elements {
    /// Partial sums of the first pass.
    pub(super) partials: usize,
    /// Gradients of logits, with dots and, if there are prefixes, with radial sums and with cosines for one wave.
    pub(super) gradients: usize,
    pub(super) dots: usize,
    pub(super) radials: usize,
    pub(super) cosines: usize,
}

impl Contents {
    /// Arrays of each kind.
    pub(super) fn planes(self) -> usize {
        self.prefixes.unwrap_or(1)
    }

    /// Bytes of the workspace for a wave of the first pass, or for one of the third, whichever takes more.
    pub(super) fn bytes(self, of: Elements) -> usize {
        let partials = of.partials * (abi::Partial::BYTES + u32::BYTES); // with the number of negatives above the positive
        let gradients = of.gradients * self.arithmetic.bytes() * self.arithmetic.gradient_planes();
        let only_with_prefixes = match self.prefixes {
            Some(prefixes) => f32::BYTES * ((prefixes - 1) * of.radials + prefixes * of.cosines),
            None => 0,
        };
        (self.planes() * partials).max(self.planes() * gradients + of.dots * f64::BYTES + only_with_prefixes)
    }
}

/// An upper bound on the bytes of the workspace for a super-block of `rows` x `cols` indices in tiles of any kind.
pub(super) fn bounded_bytes(rows: usize, cols: usize, contents: Contents) -> usize {
    // The smallest tile has most partial sums and dots. Its edge is 64, and along both axes it has a partial sum for every 64 cosines.
    let (cosines, partials) = (rows * cols, rows * cols / 64 * 2);
    let dots = cosines / (64 * 64);
    let elements = Elements { partials, gradients: cosines, dots, radials: partials, cosines };
    let arrays = if contents.prefixes.is_some() { 5 } else { 3 };
    contents.bytes(elements) + arrays * ARRAY_ALIGNMENT as usize
}

fn bytes_of(block: &SuperBlock, tile: Tile, contents: Contents) -> usize {
    let [rows, cols] = [0, 1].map(|axis| block.tiles_along(axis, tile.tiling()) * tile.edge());
    bounded_bytes(rows, cols, contents)
}

/// The length, in indices, of the largest square super-block that the bound holds.
fn longest_edge(contents: Contents, tile: Tile, bound: usize) -> usize {
    let step = tile.step();
    let fits = |length: usize| bounded_bytes(length, length, contents) <= bound;
    let (mut low, mut high) = (1, (1 << 26) / step); // in steps; a super-block of length `low` fits, one of `high` does not
    while high - low > 1 {
        let middle = (low + high) / 2;
        if fits(middle * step) { low = middle } else { high = middle }
    }
    low * step
}

/// Waves of super-blocks in their order, with as many in each wave as the bound and a launch allow. There is at least one wave, which may
/// be empty.
fn waves(blocks: impl Iterator<Item = SuperBlock>, tile: Tile, contents: Contents, bound: usize) -> Vec<Wave> {
    let mut waves = vec![Wave::new()];
    let mut used = 0;
    for block in blocks {
        let more = bytes_of(&block, tile, contents);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;
    use crate::cuda::{Architecture, DEFAULT_WORKSPACE_BYTES, Launch, Plan};
    use crate::dtype::DType;
    use crate::loss::Loss;

    type Change = fn(Problem<'_>) -> Problem<'_>;

    fn plan(rows: usize, dim: usize, workspace: usize, change: Change) -> Plan {
        let call = Call::new(Loss::samtone_query(), 0.01).with_workspace_bytes(workspace);
        Plan::new(&change(Problem::new(call.pairs(rows, rows).unwrap(), DType::BF16, dim).unwrap())).unwrap()
    }

    const KINDS: [Change; 5] = [
        |p| p,
        |p| p.with_tile(Tile::Small),
        |p| p.with_architecture(Architecture::Sm90a { multiprocessors: 132 }),
        |p| p.with_arithmetic(Arithmetic::F16),
        |p| p.with_arithmetic(Arithmetic::F16x3),
    ];

    #[test]
    fn kept_cosines_are_three_operations_of_twelve() {
        for change in KINDS {
            let kept = plan(16_384, 1024, 8 << 30, change);
            let recomputed = plan(16_384, 1024, 8 << 30, |p| p.with_cosines(Cosines::Recomputed));
            let [squares, all] = kept.kept_squares();
            assert!(squares == all && all > 0, "{kept}");
            approx::assert_relative_eq!(kept.flops(), 0.75 * recomputed.flops(), max_relative = 1e-12);
            assert_eq!((recomputed.kept_squares()[0], recomputed.array("cosines")), (0, None));
            let kernels = |launches: &[Launch]| {
                let tiles = launches.iter().filter(|l| l.module.starts_with("gradient_tile"));
                tiles.map(|l| l.kernel.contains("kept")).collect::<Vec<_>>()
            };
            assert!(kernels(kept.backward()).iter().all(|kept| *kept), "{kept}");
            assert_eq!(kernels(kept.backward_alone()), vec![false; kernels(kept.backward()).len()]);
        }
    }

    #[test]
    fn as_much_is_kept_as_fits_and_pays() {
        let default = |rows, dim| plan(rows, dim, DEFAULT_WORKSPACE_BYTES, |p| p);
        let share = |plan: &Plan| plan.kept_squares()[0] as f64 / plan.kept_squares()[1] as f64;
        for rows in [512, 2048, 4096] {
            assert_eq!(share(&default(rows, 768)), 1.0, "{}", default(rows, 768));
            assert_eq!(share(&default(rows, 256)), 0.0, "{}", default(rows, 256));
        }
        // 1.5 · 8192² cosines take 403 MB of 537. A plan may store them all and give the waves the rest, or store two thirds and have
        // larger waves. If gradients take two planes of f16, a wave of all of them takes another 403 MB, and smaller waves cost more than
        // stored cosines save.
        let one_plane = |rows, dim, workspace| plan(rows, dim, workspace, |p| p.with_arithmetic(Arithmetic::F16));
        let most = one_plane(8192, 768, DEFAULT_WORKSPACE_BYTES);
        assert!(share(&most) > 0.6, "{most}");
        assert_eq!(share(&plan(8192, 768, 1 << 30, |p| p)), 1.0);
        // All cosines take 6.4 GB. What half a gigabyte holds of them is not worth smaller waves.
        assert_eq!(share(&default(32_768, 1024)), 0.0, "{}", default(32_768, 1024));
        assert_eq!(share(&plan(32_768, 1024, 8 << 30, |p| p)), 1.0);
        let most = one_plane(32_768, 1024, 4 << 30);
        assert!((0.4..0.8).contains(&share(&most)), "{most}");
    }

    /// Arrays that share the bound.
    const BOUNDED: [&str; 7] = ["partials", "counts", "gradients", "dots", "radials", "wave_cosines", "cosines"];

    #[test]
    fn waves_and_kept_cosines_stay_within_the_bound() {
        for (change, prefixes) in KINDS.into_iter().flat_map(|change| [(change, &[64][..]), (change, &[16, 33, 64])]) {
            for rows in [1, 65, 2048, 3000, 5000] {
                for workspace in [(3 << 20) - 1, 4 << 20, 20 << 20, 50_000_001, 100 << 20, 400 << 20] {
                    for cosines in [Cosines::Kept, Cosines::Recomputed] {
                        let call = Call::new(Loss::samtone_both(), 0.01).with_workspace_bytes(workspace);
                        let call = call.with_prefixes(prefixes);
                        let pairs = call.pairs(rows, rows + 7).unwrap();
                        let problem = Problem::new(pairs, DType::BF16, 64).unwrap();
                        let plan = Plan::new(&change(problem).with_cosines(cosines)).unwrap();
                        let bounded: u64 = (plan.arrays().iter())
                            .filter(|a| BOUNDED.contains(&a.name))
                            .map(|a| a.offset + a.bytes)
                            .max()
                            .unwrap();
                        let start = plan.array("partials").unwrap().offset.min(plan.array("gradients").unwrap().offset);
                        let used = bounded - start;
                        assert!(plan.bounded_bytes() <= workspace && used <= workspace as u64, "{used} bytes: {plan}");
                        let kept = plan.array("cosines").map_or(0, |a| a.bytes);
                        let squares = plan.kept_squares()[0] * plan.tile().step() * plan.tile().step();
                        assert_eq!(kept, 4 * (prefixes.len() * squares) as u64, "{plan}");
                    }
                }
            }
        }
    }

    /// Stored cosines use all that the waves leave of the workspace.
    #[test]
    fn the_next_super_block_would_not_fit() {
        let call = Call::new(Loss::samtone_query(), 0.01);
        let pairs = call.pairs(4096, 4096).unwrap();
        for workspace in [30 << 20, 60 << 20, 90 << 20] {
            let problem = Problem::new(pairs, DType::BF16, 768).unwrap();
            let problem = problem.with_cosines(Cosines::Kept);
            let (order, tile) = (Order::new(&pairs), Tile::Large);
            let division = Division::best(&problem, &order, tile, workspace, 1 << 20);
            let [kept, mut others] = division.backward_blocks();
            let contents = problem.contents();
            let used: usize = kept.map(|s| kept_bytes(s, tile, contents)).sum();
            let wave = |wave: &Wave| wave.iter().map(|s| bytes_of(s, tile, contents)).sum::<usize>();
            let largest = division.forward.iter().chain(&division.backward).map(wave).max().unwrap();
            let more = kept_bytes(others.next().unwrap(), tile, contents);
            assert!(used > 0 && used + largest <= workspace && used + largest + more + 256 > workspace, "{used} kept");
        }
    }
}
