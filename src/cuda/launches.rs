//! From a plan's waves to launches: arguments in the order of the kernels' parameters.

use super::arrays::{Common, Part, Skipping, Sums, TowerArrays};
use super::plan::{Layout, Layouts, MAX_SUPER_BLOCKS};
use super::problem::{Arithmetic, Pass, Tile};
use super::schedule::{Address, Argument, ArrayId, Launch, Slot};
use super::waves::Wave;
use crate::error::Result;
use crate::loss::Block;
use crate::options::ZeroNorm;
use crate::order::Space;
use crate::super_blocks::{SuperBlock, Tiling};
use std::collections::HashMap;

/// As in kernels/common/problem.cuh.
const MAX_CUTS: usize = 8;
/// Warps, and so rows, of a block of `pack`, `positives` and `project`.
pub(super) const ROWS_PER_BLOCK: usize = 8;
pub(super) const REDUCE_THREADS: usize = 256;
const REDUCE_BYTES: u32 = 64;

pub(super) struct Launches<'a> {
    pub layouts: &'a Layouts<'a>,
    pub layout: Layout,
    pub side: Vec<u8>,
    pub partials: Vec<Launch>,
    pub combine: Vec<Launch>,
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
        this.combine_step(&common);
        this.choose_step(&towers, &common);
        this.gradient_pass(&towers, &common, &sums, gradients, plane, dots);
        this.projection(&towers, &common, &sums);
        Ok(this)
    }

    fn raw(&self, tower: &TowerArrays) -> Argument {
        let problem = self.layouts.problem;
        Argument::new().pointer(at(tower.raw)).u64(tower.row_bytes).u32(problem.dim).u32(problem.dtype.code())
    }

    fn prepare(&mut self, towers: &[TowerArrays; 2], common: &Common) {
        let problem = self.layouts.problem;
        let m = problem.pairs.rows();
        let format = match problem.arithmetic() {
            Arithmetic::F16 | Arithmetic::F16x2 => 0_u32,
            Arithmetic::F16x3 => 1,
            Arithmetic::Exact => 2,
        };
        for (k, tower) in towers.iter().enumerate() {
            let packing = Argument::new()
                .nested(&self.raw(tower))
                .pointer(tower.order)
                .pointer(at(tower.packed))
                .u64(tower.plane)
                .pointer(at(tower.inverse))
                .pointer(at(tower.inverse_norm))
                .pointer(Address::In(common.status, 4 * k as i64))
                .u64(tower.row_pitch)
                .u64(tower.panel)
                .u32(tower.indices)
                .u32(tower.padded)
                .u32(self.packed_row_bytes())
                .u32(format)
                .flag(self.layouts.tile == Tile::Cluster)
                .u32(tower.parts.len());
            let parts = |a: Argument, of: fn(&Part) -> usize| {
                (0..MAX_CUTS).fold(a, |a, p| a.u32(tower.parts.get(p).map_or(0, of)))
            };
            let packing = parts(parts(packing, |p| p.index), |p| p.row);
            let grid = [tower.padded.div_ceil(ROWS_PER_BLOCK) as u32, 1];
            self.repack.push(Launch::new("prepare", "pack", grid, 256).argument(packing));
        }
        self.partials.push(Launch::new("prepare", "reset", [1, 1], 32).pointer(at(common.status)));
        self.partials.extend(self.repack.clone());
        let positives = Argument::new()
            .nested(&self.raw(&towers[0]))
            .nested(&self.raw(&towers[1]))
            .pointer(common.positives)
            .pointer(common.anchor_index)
            .pointer(at(towers[0].inverse_norm))
            .pointer(at(towers[1].inverse_norm))
            .pointer(at(common.row_keys))
            .pointer(at(common.positive))
            .pointer(at(common.anchors))
            .f64(problem.options.margin().unwrap_or(f64::INFINITY))
            .u32(m)
            .u32(0_u32);
        let grid = [m.div_ceil(ROWS_PER_BLOCK) as u32, 1];
        self.partials.push(Launch::new("prepare", "positives", grid, 256).argument(positives));
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
        let masked = crate::candidates::may_mask(self.layouts.problem, &self.layouts.order);
        let tower = |argument: Argument, t: &TowerArrays| {
            argument.pointer(at(t.packed)).u64(t.plane).u64(t.panel).pointer(at(t.inverse)).pointer(at(t.candidates))
        };
        towers.iter().fold(Argument::new(), tower).u32(self.packed_row_bytes()).flag(masked)
    }

    /// β·log₂e as two floats whose sum is exact to 2⁻⁴⁸.
    fn beta(&self) -> Argument {
        let exact = self.layouts.problem.options.beta() * std::f64::consts::LOG2_E;
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
        let m = self.layouts.problem.pairs.rows();
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
            let grid = [m.div_ceil(REDUCE_THREADS) as u32, Block::ALL.len() as u32];
            self.partials.push(
                Launch::new("combine", "merge", grid, REDUCE_THREADS as u32)
                    .argument(argument)
                    .pointer(at(partials))
                    .pointer(at(counts))
                    .pointer(common.anchor_index)
                    .pointer(at(common.sums))
                    .pointer(at(common.above))
                    .u32(m)
                    .u32(self.layouts.tile.edge())
                    .flag(k == 0),
            );
        }
    }

    fn zero_is_error(&self) -> bool {
        self.layouts.problem.options.zero_norm() == ZeroNorm::Error
    }

    fn combine_step(&mut self, common: &Common) {
        let problem = self.layouts.problem;
        let m = problem.pairs.rows();
        let blocks = m.div_ceil(REDUCE_THREADS) as u32;
        let combine = Argument::new()
            .pointer(at(common.sums))
            .pointer(at(common.above))
            .pointer(at(common.positive))
            .pointer(at(common.weights))
            .pointer(at(common.groups))
            .pointer(at(common.row_losses))
            .pointer(at(common.diagonal))
            .pointer(at(common.log_coefficients))
            .pointer(at(common.block_results))
            .pointer(at(common.status))
            .f64(problem.options.beta())
            .u32(m)
            .u32(problem.loss.groups().len());
        let launch = |kernel, blocks| {
            Launch::new("combine", kernel, [blocks, 1], REDUCE_THREADS as u32)
                .shared(REDUCE_BYTES)
                .argument(combine.clone())
        };
        self.combine.push(launch("combine", blocks));
        self.combine
            .push(launch("finish_forward", 1).pointer(at(common.results)).u32(blocks).flag(self.zero_is_error()));
    }

    /// Squares of a wave that may be skipped, mirror images included; `None` if there are none.
    fn squares_to_judge(&self, wave: &Wave) -> Option<u32> {
        let judged = wave.iter().filter(|s| self.first_squares.contains_key(&s.number));
        let squares: usize = judged.map(|s| s.squares(self.layouts.tile.tiling())).sum();
        (squares > 0).then_some(squares as u32)
    }

    fn judge(&self, kernel: &str, blocks: u32) -> Launch {
        Launch::new("skip_squares", kernel, [blocks, 1], REDUCE_THREADS as u32).shared(REDUCE_BYTES)
    }

    /// Which squares the gradient leaves out, once the coefficients are known.
    fn choose_step(&mut self, towers: &[TowerArrays; 2], common: &Common) {
        let Some(Skipping { masses, skipped, log2_share }) = common.skipping else { return };
        let together = self.layouts.tile.tiling().together;
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
                self.combine.push(launch.argument(self.towers(towers)).argument(choice));
            }
            let count = self.judge("count_skipped", 1).argument(argument).pointer(at(skipped));
            self.combine.push(count.pointer(at(common.results)).u32(together).flag(k == 0));
        }
    }

    fn gradient_pass(
        &mut self,
        towers: &[TowerArrays; 2],
        common: &Common,
        sums: &[Option<Sums>; 2],
        gradients: ArrayId,
        plane: u64,
        dots: ArrayId,
    ) {
        let Layouts { problem, tile, division, .. } = self.layouts;
        let tower_argument = self.towers(towers);
        let skipped = common.skipping.map_or(Address::Null, |s| at(s.skipped));
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
            let dot_launch = Launch::new("combine", "sum_dots", [1, 1], REDUCE_THREADS as u32).shared(REDUCE_BYTES);
            self.backward.push(dot_launch.pointer(at(dots)).pointer(at(common.results)).u32(dot_count).flag(k == 0));
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

    fn projection(&mut self, towers: &[TowerArrays; 2], common: &Common, sums: &[Option<Sums>; 2]) {
        let problem = self.layouts.problem;
        let (beta, rows) = (problem.options.beta(), &problem.rows);
        for (k, sums) in sums.iter().enumerate() {
            let (Some(sums), Some(output)) = (sums, problem.gradients[k]) else { continue };
            let (own, other) = (&towers[k], &towers[1 - k]);
            let out_rows = if k == 0 { rows.len() } else { problem.pairs.passages() };
            let projection = Argument::new()
                .nested(&self.raw(own))
                .nested(&self.raw(other))
                .pointer(sums.address)
                .u64(sums.stride as u64)
                .pointer(at(own.inverse))
                .pointer(at(own.inverse_norm))
                .pointer(at(other.inverse_norm))
                .pointer(at(common.diagonal))
                .pointer(at(common.results))
                .pointer(common.positives)
                .pointer(common.anchor_index)
                .pointer(common.occurrence_start)
                .pointer(common.occurrences)
                .pointer(at(common.anchor_row))
                .pointer(common.upstream)
                .pointer(at(common.status))
                .pointer(at(sums.output))
                .u64((output.row_stride * output.dtype.bytes()) as u64)
                .f64(problem.upstream * beta)
                .u32(output.dtype.code())
                .u32(out_rows)
                .u32(if k == 0 { rows.start } else { 0 })
                .u32(rows.start)
                .u32(rows.end)
                .u32(k)
                .flag(self.zero_is_error())
                .u32(0_u32);
            let grid = [out_rows.div_ceil(ROWS_PER_BLOCK) as u32, 1];
            self.backward.push(Launch::new("project", "project", grid, 256).argument(projection));
        }
        self.backward.push(
            Launch::new("combine", "finish_backward", [1, 1], 32)
                .pointer(at(common.results))
                .pointer(common.upstream)
                .f64(problem.upstream)
                .f64(beta)
                .pointer(at(common.status))
                .flag(self.zero_is_error()),
        );
    }
}
