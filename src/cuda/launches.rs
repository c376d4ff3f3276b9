//! From a plan's waves to launches: arguments in the order of the kernels' parameters.

use super::arrays::{Common, Skipping, Sums, TowerArrays};
use super::plan::{Layout, Layouts, MAX_SUPER_BLOCKS};
use super::problem::{Arithmetic, Pass, Tile};
use super::schedule::{Address, Argument, ArrayId, Launch, Slot};
use super::waves::Wave;
use crate::error::Result;
use crate::order::Space;
use crate::super_blocks::{SuperBlock, Tiling};
use std::collections::HashMap;

/// As in kernels/common/problem.cuh.
pub(super) const MAX_CUTS: usize = 8;
/// As in kernels/common/reduce.cuh.
pub(super) const REDUCE_THREADS: u32 = 256;
pub(super) const REDUCE_BYTES: u32 = 64;

pub(super) struct Launches<'a> {
    pub layouts: &'a Layouts<'a>,
    pub layout: Layout,
    pub side: Vec<u8>,
    pub partials: Vec<Launch>,
    pub combine: Vec<Launch>,
    /// Both, with the last wave merged and the sums combined in one launch.
    pub forward: Vec<Launch>,
    pub repack: Vec<Launch>,
    pub backward: Vec<Launch>,
    /// Launches of `backward` that read what is kept, by their index, and what computes the same without.
    pub recomputing: Vec<(usize, Launch)>,
    pub bounded_bytes: usize,
    pub gradient_alignment: [u64; 2],
    /// Of super-blocks, by number, whose squares may be skipped: the first.
    pub first_squares: HashMap<usize, usize>,
    /// Of super-blocks, by number, that keep their cosines: the first element.
    pub first_cosines: HashMap<usize, u64>,
    pub cosines: Option<ArrayId>,
}

pub(super) fn at(id: ArrayId) -> Address {
    Address::In(id, 0)
}

impl<'a> Launches<'a> {
    pub(super) fn new(layouts: &'a Layouts<'a>) -> Result<Self> {
        let mut this = Self {
            layouts,
            layout: Layout::default(),
            side: Vec::new(),
            partials: Vec::new(),
            combine: Vec::new(),
            forward: Vec::new(),
            repack: Vec::new(),
            backward: Vec::new(),
            recomputing: Vec::new(),
            bounded_bytes: 0,
            gradient_alignment: [1; 2],
            first_squares: HashMap::new(),
            first_cosines: HashMap::new(),
            cosines: None,
        };
        let common = this.common();
        let towers = [Space::Query, Space::Passage].map(|space| this.tower(space));
        let sums = [0, 1].map(|k| this.sums(k));
        let tile = layouts.tile.tiling();
        let most = |waves: &[Wave], f: fn(&SuperBlock, Tiling) -> usize| {
            waves.iter().map(|w| w.iter().map(|s| f(s, tile)).sum::<usize>()).max().unwrap_or(0).max(1)
        };
        let partial_count = most(&layouts.division.forward, |s, tile| s.partials(tile).iter().sum());
        let elements = most(&layouts.division.backward, SuperBlock::elements);
        let dot_count = most(&layouts.division.backward, SuperBlock::tiles);
        let arithmetic = layouts.problem.arithmetic();
        let (bytes, planes) = (arithmetic.bytes(), arithmetic.gradient_planes());
        let ((partials, counts), (gradients, dots)) = this.layout.overlay(
            |l| {
                (
                    l.add(Slot::Workspace, "partials", 8 * partial_count),
                    l.add(Slot::Workspace, "counts", 4 * partial_count),
                )
            },
            |l| {
                (
                    l.add(Slot::Workspace, "gradients", elements * bytes * planes),
                    l.add(Slot::Workspace, "dots", 8 * dot_count),
                )
            },
        );
        this.bounded_bytes = (12 * partial_count).max(elements * bytes * planes + 8 * dot_count) + this.keep_cosines();

        let plane = (elements * bytes) as u64;
        this.prepare(&towers, &common);
        this.sum_pass(&towers, &common, partials, counts);
        this.choose_step(&towers, &common);
        let last_dots = this.gradient_pass(&towers, &common, &sums, gradients, plane, dots);
        this.projection(&towers, &common, &sums, &last_dots);
        Ok(this)
    }

    /// The argument, and the number of tiles. Gradients of logits begin at `element`.
    fn wave(&self, wave: &[SuperBlock], towers: &[TowerArrays; 2], mut element: usize) -> (Argument, usize) {
        let tile = self.layouts.tile.tiling();
        let (mut first_tile, mut partial) = (0, 0);
        let mut blocks = Argument::new();
        for s in wave {
            let mut block = Argument::new();
            for edge in 0..2 {
                block = block
                    .u32(s.ranges[edge].start)
                    .u32(s.ranges[edge].end)
                    .u32(s.spaces[edge] as u32)
                    .u32(s.blocks[edge].index())
                    .flag(s.anchors[edge])
                    .flag(s.sums[edge])
                    .flag(s.gradients[edge])
                    .u32(s.tiles_along(edge, tile))
                    .u32(towers[s.spaces[edge] as usize].packed_row(s.ranges[edge].start));
            }
            let [triangle, ranks, counted] = s.flags();
            let [row_partials, col_partials] = s.partials(tile);
            let first_square = self.first_squares.get(&s.number).map_or(u32::MAX, |first| *first as u32);
            block = block.u32(first_tile).u32(s.tiles(tile)).flag(triangle).flag(ranks).flag(counted).u32(first_square);
            block = block.u64(partial as u64).u64((partial + row_partials) as u64).u64(element as u64).end();
            blocks = blocks.nested(&block);
            first_tile += s.tiles(tile);
            partial += row_partials + col_partials;
            element += s.elements(tile);
        }
        const SUPER_BLOCK_BYTES: usize = 120;
        let blocks = blocks.padded_to(MAX_SUPER_BLOCKS * SUPER_BLOCK_BYTES);
        (Argument::new().u32(wave.len()).u32(first_tile).nested(&blocks), first_tile)
    }

    fn towers(&self, towers: &[TowerArrays; 2]) -> Argument {
        let Layouts { problem, order, .. } = &self.layouts;
        let masked = crate::mask::may_mask(&problem.pairs, order);
        let tower = |argument: Argument, t: &TowerArrays| {
            argument.pointer(at(t.packed)).u64(t.plane).u64(t.panel).pointer(at(t.inverse)).pointer(at(t.candidates))
        };
        towers.iter().fold(Argument::new(), tower).u32(self.packed_row_bytes()).flag(masked)
    }

    /// β·log₂e as two floats whose sum is exact to 2⁻⁴⁸.
    fn beta(&self) -> Argument {
        let exact = self.layouts.problem.call().beta() * std::f64::consts::LOG2_E;
        let high = exact as f32;
        Argument::new().f32(high).f32((exact - f64::from(high)) as f32)
    }

    /// A launch of a kernel that is compiled for every arithmetic and tile; clusters take `squares` in turn.
    fn tiled(&self, pass: Pass, arithmetic: Arithmetic, tiles: usize, squares: usize) -> Launch {
        let tile = self.layouts.tile;
        let (kernel, module) = pass.kernel(arithmetic, tile);
        let blocks = match tile {
            Tile::Small | Tile::Large => tiles,
            Tile::Cluster => 2 * squares.min(self.layouts.problem.clusters()),
        };
        Launch::new(module, kernel, [blocks as u32, 1], tile.threads()).shared(tile.shared_bytes(pass, arithmetic))
    }

    /// Squares of 256 x 256 in a wave.
    fn squares(&self, wave: &[SuperBlock]) -> usize {
        wave.iter().map(|s| s.tiles(self.layouts.tile.step())).sum()
    }

    fn sum_pass(&mut self, towers: &[TowerArrays; 2], common: &Common, partials: ArrayId, counts: ArrayId) {
        let tower_argument = self.towers(towers);
        for (k, wave) in self.layouts.division.forward.iter().enumerate() {
            let (argument, tiles) = self.wave(wave, towers, 0);
            let arithmetic = self.layouts.problem.arithmetic().of_cosines();
            let launch = self.tiled(Pass::LogSumExp, arithmetic, tiles, self.squares(wave));
            self.partials.push(
                launch
                    .argument(argument.clone())
                    .argument(tower_argument.clone())
                    .pointer(at(common.anchors))
                    .argument(self.beta())
                    .pointer(at(partials))
                    .pointer(at(counts))
                    .argument(self.cosines(wave)),
            );
            if let Some((skipping, grid)) = common.skipping.zip(self.squares_to_judge(wave)) {
                self.partials.push(
                    self.judge("square_masses", grid)
                        .argument(argument.clone())
                        .pointer(at(partials))
                        .pointer(at(skipping.masses))
                        .u32(self.layouts.tile.edge())
                        .u32(self.layouts.tile.tiling().together),
                );
            }
            let merge = Argument::new()
                .pointer(at(partials))
                .pointer(at(counts))
                .pointer(common.anchor_index)
                .u32(self.layouts.tile.edge())
                .flag(k == 0);
            if k + 1 == self.layouts.division.forward.len() {
                self.forward = self.partials.clone();
                self.forward.push(self.combine_launch(towers, common, argument.clone(), merge.clone(), true));
            }
            self.partials.push(self.combine_launch(towers, common, argument, merge, false));
        }
        // Of sums that are complete: adds no wave to what is there.
        let nothing = Argument::new().pointer(at(partials)).pointer(at(counts)).pointer(Address::Null).u32(1_u32);
        let no_wave = self.wave(&[], towers, 0).0;
        self.combine.push(self.combine_launch(towers, common, no_wave, nothing.flag(false), true));
    }

    /// Squares of a wave that may be skipped, mirror images included; `None` if there are none.
    fn squares_to_judge(&self, wave: &Wave) -> Option<u32> {
        let judged = wave.iter().filter(|s| self.first_squares.contains_key(&s.number));
        let squares: usize = judged.map(|s| s.squares(self.layouts.tile.tiling())).sum();
        (squares > 0).then_some(squares as u32)
    }

    fn judge(&self, kernel: &str, blocks: u32) -> Launch {
        Launch::new("skip_squares", kernel, [blocks, 1], REDUCE_THREADS).shared(REDUCE_BYTES)
    }

    /// Which squares the gradient leaves out, once the coefficients are known.
    fn choose_step(&mut self, towers: &[TowerArrays; 2], common: &Common) {
        let Some(Skipping { masses, skipped, log2_share }) = common.skipping else { return };
        let together = self.layouts.tile.tiling().together;
        let mut chosen = Vec::new();
        for (k, wave) in self.layouts.division.backward.iter().enumerate() {
            let (argument, _) = self.wave(wave, towers, 0);
            if let Some(grid) = self.squares_to_judge(wave) {
                let choice = Argument::new()
                    .pointer(at(common.log_coefficients))
                    .pointer(at(common.diagonal))
                    .pointer(at(masses))
                    .pointer(at(skipped))
                    .f64(log2_share)
                    .u32(self.layouts.problem.pairs.rows())
                    .u32(self.layouts.tile.step())
                    .u32(together)
                    .u32(0_u32);
                let launch = self.judge("choose_skipped", grid).argument(argument.clone());
                chosen.push(launch.argument(self.towers(towers)).argument(choice));
            }
            let count = self.judge("count_skipped", 1).argument(argument).pointer(at(skipped));
            chosen.push(count.pointer(at(common.results)).u32(together).flag(k == 0));
        }
        self.combine.extend(chosen.clone());
        self.forward.extend(chosen);
    }

    /// Gives the argument of the sum of the last wave's dots.
    fn gradient_pass(
        &mut self,
        towers: &[TowerArrays; 2],
        common: &Common,
        sums: &[Option<Sums>; 2],
        gradients: ArrayId,
        plane: u64,
        dots: ArrayId,
    ) -> Argument {
        let Layouts { problem, tile, division, .. } = self.layouts;
        let tower_argument = self.towers(towers);
        let skipped = common.skipping.map_or(Address::Null, |s| at(s.skipped));
        let mut last_dots = Argument::new();
        for (k, wave) in division.backward.iter().enumerate() {
            // What is kept comes first. Either part has its own launch, and its places behind those of the other.
            let kept = wave.iter().take_while(|s| self.first_cosines.contains_key(&s.number)).count();
            let (mut element, mut dot_count) = (0, 0);
            for part in [&wave[..kept], &wave[kept..]].into_iter().filter(|part| !part.is_empty()) {
                let (argument, tiles) = self.wave(part, towers, element);
                let squares = self.squares(part);
                let launch = |pass| {
                    self.tiled(pass, problem.arithmetic(), tiles, squares)
                        .argument(argument.clone())
                        .argument(tower_argument.clone())
                        .pointer(at(common.anchors))
                        .argument(self.beta())
                        .pointer(at(common.log_coefficients))
                        .pointer(at(common.positive))
                        .pointer(at(common.results))
                        .u32(problem.pairs.rows())
                        .pointer(at(gradients))
                        .u64(plane)
                        .pointer(Address::In(dots, 8 * dot_count as i64))
                        .pointer(skipped)
                };
                let recomputing = launch(Pass::GradientTile);
                if self.first_cosines.contains_key(&part[0].number) {
                    let reading = launch(Pass::KeptGradientTile).argument(self.cosines(part));
                    self.recomputing.push((self.backward.len(), recomputing));
                    self.backward.push(reading);
                } else {
                    self.backward.push(recomputing);
                }
                element += part.iter().map(|s| s.elements(tile.tiling())).sum::<usize>();
                dot_count += if *tile == Tile::Cluster { 2 * squares } else { tiles };
            }
            let (argument, _) = self.wave(wave, towers, 0);
            let sum = Argument::new().pointer(at(dots)).pointer(at(common.results)).u32(dot_count).flag(k == 0);
            if k + 1 < division.backward.len() {
                let launch = Launch::new("project", "sum_dots", [1, 1], REDUCE_THREADS).shared(REDUCE_BYTES);
                self.backward.push(launch.argument(sum));
            } else {
                last_dots = sum; // the projection adds them
            }
            let (product, blocks) = self.product(sums, k > 0);
            if blocks > 0 {
                let launch = self.tiled(Pass::GradientProduct, problem.arithmetic(), blocks, blocks);
                self.backward.push(
                    launch
                        .argument(argument)
                        .argument(tower_argument.clone())
                        .pointer(at(gradients))
                        .u64(plane)
                        .argument(product)
                        .pointer(skipped),
                );
            }
        }
        last_dots
    }

    /// Outputs of the products, and the number of blocks of threads, or of squares of clusters.
    fn product(&self, sums: &[Option<Sums>; 2], accumulate: bool) -> (Argument, usize) {
        let Layouts { problem, order, tile, .. } = self.layouts;
        let tile = tile.step();
        let cuts = crate::regions::cuts(&problem.rows, order, problem.pairs.rows());
        let mut argument = Argument::new();
        let mut row_blocks = 0;
        for (k, sums) in sums.iter().enumerate() {
            let range = self.gradient_range(k);
            let mut points: Vec<usize> =
                cuts[k].iter().copied().filter(|c| range.start <= *c && *c <= range.end).collect();
            let mut blocks = 0;
            let mut first_block = [0; MAX_CUTS];
            for (part, ends) in points.windows(2).enumerate() {
                first_block[part] = blocks;
                blocks += (ends[1] - ends[0]).div_ceil(tile);
            }
            let count = points.len();
            points.resize(MAX_CUTS, range.end);
            let (address, stride) = sums.as_ref().map_or((Address::Null, 0), |s| (s.address, s.stride));
            let mut outputs = Argument::new().u32(count).u32(if sums.is_some() { blocks } else { 0 });
            outputs = points.iter().chain(&first_block).fold(outputs, |a, v| a.u32(*v));
            argument = argument.nested(&outputs.pointer(address).u64(stride as u64).end());
            row_blocks += if sums.is_some() { blocks } else { 0 };
        }
        let along_dim = problem.dim.div_ceil(tile);
        (argument.u32(problem.dim).u32(along_dim).flag(accumulate).u32(0_u32), row_blocks * along_dim)
    }
}
