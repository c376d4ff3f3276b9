//! Turns the waves of a plan into launches.

use super::abi::{self, MAX_CUTS, MAX_SUPER_BLOCKS, REDUCE_BYTES, REDUCE_THREADS, Shared, kernels, number};
use super::arrays::{Common, Skipping, Sums, TowerArrays};
use super::plan::{Layout, Layouts};
use super::problem::{Arithmetic, Pass};
use super::schedule::{Address, ArrayId, Launch, Slot};
use super::waves::{PARTIAL_BYTES, Wave};
use crate::error::Result;
use crate::order::Space;
use crate::super_blocks::{SuperBlock, Tiling};
use std::collections::HashMap;

pub(super) struct Launches<'a> {
    pub layouts: &'a Layouts<'a>,
    pub layout: Layout,
    pub side: Vec<u8>,
    pub partials: Vec<Launch>,
    pub combine: Vec<Launch>,
    /// `partials` and then `combine`, but one launch merges the last wave and combines the sums.
    pub forward: Vec<Launch>,
    pub repack: Vec<Launch>,
    pub backward: Vec<Launch>,
    /// For each launch of `backward` that reads stored cosines, its index, and a launch that recomputes them instead.
    pub recomputing: Vec<(usize, Launch)>,
    pub bounded_bytes: usize,
    pub gradient_alignment: [u64; 2],
    /// For each super-block whose squares may be skipped, by its number: the place of its first square.
    pub first_squares: HashMap<usize, usize>,
    /// For each super-block whose cosines are stored, by its number: the place of its first cosine.
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
                    l.add(Slot::Workspace, "partials", abi::Partial::BYTES * partial_count),
                    l.add(Slot::Workspace, "counts", u32::BYTES * partial_count),
                )
            },
            |l| {
                (
                    l.add(Slot::Workspace, "gradients", elements * bytes * planes),
                    l.add(Slot::Workspace, "dots", 8 * dot_count),
                )
            },
        );
        this.bounded_bytes =
            (PARTIAL_BYTES * partial_count).max(elements * bytes * planes + 8 * dot_count) + this.keep_cosines();

        let plane = (elements * bytes) as u64;
        this.prepare(&towers, &common);
        this.sum_pass(&towers, &common, partials, counts);
        this.choose_step(&towers, &common);
        let last_dots = this.gradient_pass(&towers, &common, &sums, gradients, plane, dots);
        this.projection(&towers, &common, &sums, last_dots);
        Ok(this)
    }

    /// A wave as kernels see it. The gradients of its logits begin at `element`.
    fn wave(&self, wave: &[SuperBlock], towers: &[TowerArrays; 2], mut element: usize) -> abi::Wave {
        let tile = self.layouts.tile.tiling();
        let (mut first_tile, mut partial, mut blocks) = (0, 0, [abi::SuperBlock::default(); MAX_SUPER_BLOCKS]);
        for (s, block) in wave.iter().zip(&mut blocks) {
            let [row, col] = [0, 1].map(|axis| abi::Edge {
                begin: number(s.ranges[axis].start),
                end: number(s.ranges[axis].end),
                space: s.spaces[axis] as u32,
                block: number(s.blocks[axis].index()),
                anchors: s.anchors[axis],
                sums: s.sums[axis],
                gradients: s.gradients[axis],
                tiles: number(s.tiles_along(axis, tile)),
                packed: towers[s.spaces[axis] as usize].packed_row(number(s.ranges[axis].start)),
            });
            let [triangle, ranks, counted] = s.flags();
            let [row_partials, col_partials] = s.partials(tile);
            *block = abi::SuperBlock {
                row,
                col,
                first_tile: number(first_tile),
                tiles: number(s.tiles(tile)),
                triangle,
                ranks,
                counted,
                first_square: self.first_squares.get(&s.number).map_or(abi::NONE, |first| number(*first)),
                row_partials: partial as u64,
                col_partials: (partial + row_partials) as u64,
                gradient: element as u64,
            };
            first_tile += s.tiles(tile);
            partial += row_partials + col_partials;
            element += s.elements(tile);
        }
        abi::Wave { count: number(wave.len()), tiles: number(first_tile), blocks }
    }

    fn towers(&self, towers: &[TowerArrays; 2]) -> abi::Towers {
        let Layouts { problem, order, .. } = &self.layouts;
        let masked = crate::mask::may_mask(&problem.pairs, order);
        let of = towers.each_ref().map(|TowerArrays { packing, candidates }| {
            let abi::Packing { packed, plane, panel, inverse, .. } = *packing;
            abi::Tower { packed, plane, panel, inverse, candidates: *candidates }
        });
        abi::Towers { of, row_bytes: number(self.packed_row_bytes()), masked }
    }

    /// β·log₂e as two floats whose sum is exact to 2⁻⁴⁸.
    fn beta(&self) -> abi::Beta {
        let exact = self.layouts.problem.call().beta() * std::f64::consts::LOG2_E;
        let high = exact as f32;
        abi::Beta { high, low: (exact - f64::from(high)) as f32 }
    }

    /// A launch of a kernel that is compiled for every arithmetic and tile. There is a thread block for each of `tiles`; or as many
    /// clusters as the device holds, which take the `squares` in turn.
    fn tiled(&self, pass: Pass, arithmetic: Arithmetic, tiles: u32, squares: usize) -> Launch {
        let tile = self.layouts.tile;
        let (kernel, module) = pass.kernel(arithmetic, tile);
        let blocks = match tile.kernels().persistent {
            false => tiles,
            true => 2 * number(squares.min(self.layouts.problem.clusters())),
        };
        Launch::new(module, kernel, [blocks, 1], tile.threads()).shared(tile.shared_bytes(pass, arithmetic))
    }

    /// Squares of a wave that clusters visit.
    fn squares(&self, wave: &[SuperBlock]) -> usize {
        wave.iter().map(|s| s.tiles(self.layouts.tile.step())).sum()
    }

    fn sum_pass(&mut self, towers: &[TowerArrays; 2], common: &Common, partials: ArrayId, counts: ArrayId) {
        let (towers_of_kernels, partials, counts) = (self.towers(towers), at(partials), at(counts));
        for (k, super_blocks) in self.layouts.division.forward.iter().enumerate() {
            let wave = self.wave(super_blocks, towers, 0);
            let arithmetic = self.layouts.problem.arithmetic().of_cosines();
            let launch = self.tiled(Pass::LogSumExp, arithmetic, wave.tiles, self.squares(super_blocks));
            self.partials.push(launch.parameters(&kernels::logsumexp {
                wave,
                towers: towers_of_kernels,
                rows: common.positives.anchors,
                beta: self.beta(),
                partials,
                counts,
                cosines: self.cosines(super_blocks),
            }));
            if let Some((skipping, grid)) = common.skipping.zip(self.squares_to_judge(super_blocks)) {
                let Tiling { edge, together } = self.layouts.tile.tiling();
                let (masses, tile, together) = (skipping.masses, number(edge), number(together));
                let parameters = kernels::square_masses { wave, partials, masses, tile, together };
                self.partials.push(self.judge("square_masses", grid).parameters(&parameters));
            }
            let (anchor_index, tile) = (common.anchor_index, number(self.layouts.tile.edge()));
            let m = abi::Merge { partials, counts, anchor_index, tile, first: k == 0 };
            if k + 1 == self.layouts.division.forward.len() {
                self.forward = self.partials.clone();
                self.forward.push(self.combine_launch(towers, common, wave, m, true));
            }
            self.partials.push(self.combine_launch(towers, common, wave, m, false));
        }
        // For sums that are complete already. This launch merges no wave.
        let nothing = abi::Merge { partials, counts, anchor_index: Address::Null, tile: 1, first: false };
        let no_wave = self.wave(&[], towers, 0);
        self.combine.push(self.combine_launch(towers, common, no_wave, nothing, true));
    }

    /// Number of squares of a wave that may be skipped, mirror images included; `None` if there are none.
    fn squares_to_judge(&self, wave: &Wave) -> Option<u32> {
        let judged = wave.iter().filter(|s| self.first_squares.contains_key(&s.number));
        let squares: usize = judged.map(|s| s.squares(self.layouts.tile.tiling())).sum();
        (squares > 0).then_some(squares as u32)
    }

    /// A launch of a kernel that decides about squares, or counts them.
    fn judge(&self, kernel: &str, blocks: u32) -> Launch {
        Launch::new("skip_squares", kernel, [blocks, 1], REDUCE_THREADS).shared(REDUCE_BYTES)
    }

    /// Decides which squares the gradient leaves out. It needs the coefficients, so it comes after `combine`.
    fn choose_step(&mut self, towers: &[TowerArrays; 2], common: &Common) {
        let Some(Skipping { masses, skipped, log2_share }) = common.skipping else { return };
        let (towers_of_kernels, results) = (self.towers(towers), common.combine.results);
        let together = number(self.layouts.tile.tiling().together);
        let c = abi::Choice {
            log_coefficients: common.combine.log_coefficients,
            diagonal: common.combine.diagonal,
            masses,
            skipped,
            log2_share,
            rows: number(self.layouts.problem.pairs.rows()),
            step: number(self.layouts.tile.step()),
            together,
            padding: 0,
        };
        let mut chosen = Vec::new();
        for (k, super_blocks) in self.layouts.division.backward.iter().enumerate() {
            let wave = self.wave(super_blocks, towers, 0);
            if let Some(grid) = self.squares_to_judge(super_blocks) {
                let choice = kernels::choose_skipped { wave, towers: towers_of_kernels, c };
                chosen.push(self.judge("choose_skipped", grid).parameters(&choice));
            }
            let count = kernels::count_skipped { wave, skipped, results, together, first: k == 0 };
            chosen.push(self.judge("count_skipped", 1).parameters(&count));
        }
        self.combine.extend(chosen.clone());
        self.forward.extend(chosen);
    }

    /// For each wave, adds the launches of its gradients of logits and of their products. Returns the dots of the last wave, which the
    /// projection adds up. A dot is a tile's part of ∂L/∂β.
    fn gradient_pass(
        &mut self,
        towers: &[TowerArrays; 2],
        common: &Common,
        sums: &[Option<Sums>; 2],
        gradients: ArrayId,
        plane: u64,
        dots: ArrayId,
    ) -> abi::Dots {
        let Layouts { problem, tile, division, .. } = self.layouts;
        let (towers_of_kernels, results) = (self.towers(towers), common.combine.results);
        let (gradients, skipped) = (at(gradients), common.skipping.map_or(Address::Null, |s| s.skipped));
        let mut last_dots = abi::Dots { dots: at(dots), results, count: 0, first: true };
        for (k, super_blocks) in division.backward.iter().enumerate() {
            // Super-blocks whose cosines are stored come first and have a launch of their own. The others have another launch, whose
            // gradients and dots lie behind those of the first.
            let kept = super_blocks.iter().take_while(|s| self.first_cosines.contains_key(&s.number)).count();
            let (mut element, mut dot_count) = (0, 0);
            for part in [&super_blocks[..kept], &super_blocks[kept..]].into_iter().filter(|part| !part.is_empty()) {
                let (wave, squares) = (self.wave(part, towers, element), self.squares(part));
                let parameters = kernels::gradient_tile {
                    wave,
                    towers: towers_of_kernels,
                    rows: common.positives.anchors,
                    beta: self.beta(),
                    log_coefficients: common.combine.log_coefficients,
                    positive: common.combine.positive,
                    results,
                    row_count: number(problem.pairs.rows()),
                    gradients,
                    plane,
                    dots: Address::In(dots, (f64::BYTES * dot_count) as i64),
                    skipped,
                };
                let launch = |pass| self.tiled(pass, problem.arithmetic(), wave.tiles, squares).parameters(&parameters);
                let recomputing = launch(Pass::GradientTile);
                if self.first_cosines.contains_key(&part[0].number) {
                    let cosines = self.cosines(part);
                    let reading = launch(Pass::KeptGradientTile).parameters(&kernels::gradient_tile_kept { cosines });
                    self.recomputing.push((self.backward.len(), recomputing));
                    self.backward.push(reading);
                } else {
                    self.backward.push(recomputing);
                }
                element += part.iter().map(|s| s.elements(tile.tiling())).sum::<usize>();
                dot_count += if tile.kernels().persistent { 2 * squares } else { wave.tiles as usize };
            }
            last_dots = abi::Dots { count: number(dot_count), first: k == 0, ..last_dots };
            // `project` adds up the dots of the last wave itself.
            if k + 1 < division.backward.len() {
                let launch = Launch::new("project", "sum_dots", [1, 1], REDUCE_THREADS).shared(REDUCE_BYTES);
                self.backward.push(launch.parameters(&kernels::sum_dots { dots: last_dots }));
            }
            let (product, blocks) = self.product(sums, k > 0);
            if blocks > 0 {
                let launch = self.tiled(Pass::GradientProduct, problem.arithmetic(), blocks, blocks as usize);
                let (wave, towers) = (self.wave(super_blocks, towers, 0), towers_of_kernels);
                let product = kernels::gradient_product { wave, towers, gradients, plane, product, skipped };
                self.backward.push(launch.parameters(&product));
            }
        }
        last_dots
    }

    /// Outputs of the products, and their number of tiles: thread blocks, or squares that clusters take in turn.
    fn product(&self, sums: &[Option<Sums>; 2], accumulate: bool) -> (abi::Product, u32) {
        let Layouts { problem, order, tile, .. } = self.layouts;
        let tile = tile.step();
        let all_cuts = crate::regions::cuts(&problem.rows, order, problem.pairs.rows());
        let of = [0, 1].map(|k| {
            let range = self.gradient_range(k);
            let inside = |cut: &usize| range.start <= *cut && *cut <= range.end;
            let points: Vec<usize> = all_cuts[k].iter().copied().filter(inside).collect();
            let (mut cuts, mut first_block, mut blocks) = ([number(range.end); MAX_CUTS], [0; MAX_CUTS], 0);
            points.iter().zip(&mut cuts).for_each(|(point, cut)| *cut = number(*point));
            for (ends, first) in points.windows(2).zip(&mut first_block) {
                *first = blocks;
                blocks += number((ends[1] - ends[0]).div_ceil(tile));
            }
            let (count, blocks) = (number(points.len()), if sums[k].is_some() { blocks } else { 0 });
            let (sums, stride) = sums[k].as_ref().map_or((Address::Null, 0), |s| (s.address, s.stride as u64));
            abi::Outputs { count, blocks, cuts, first_block, sums, stride }
        });
        let (dim, tiles_along_dim) = (number(problem.dim), number(problem.dim.div_ceil(tile)));
        let blocks = (of[0].blocks + of[1].blocks).saturating_mul(tiles_along_dim);
        (abi::Product { of, dim, tiles_along_dim, accumulate, padding: 0 }, blocks)
    }
}
