//! Turns the waves of a plan into launches.

use super::abi::{self, MAX_CUTS, MAX_SUPER_BLOCKS, REDUCE_BYTES, REDUCE_THREADS, Shared, kernels, number};
use super::arrays::{Arrays, Parts, Skipping};
use super::prefixes::PrefixArrays;
use super::problem::{Arithmetic, Pass};
use super::schedule::{Address, Launch};
use super::waves::{Elements, Wave, kept_elements};
use crate::super_blocks::{SuperBlock, Tiling};

pub(super) struct Launches<'a> {
    arrays: &'a Arrays<'a>,
    pub(super) partials: Vec<Launch>,
    pub(super) combine: Vec<Launch>,
    /// `partials` and then `combine`, but one launch merges the last wave and combines the sums.
    pub(super) forward: Vec<Launch>,
    pub(super) backward: Vec<Launch>,
}

impl<'a> Launches<'a> {
    pub(super) fn new(arrays: &'a Arrays<'a>) -> Self {
        let (partials, combine, forward, backward) = Default::default();
        let mut this = Self { arrays, partials, combine, forward, backward };
        this.partials.push(arrays.prepare(true));
        this.sum_pass();
        this.choose_step();
        this.backward = this.gradient_pass(true);
        this
    }

    /// [`Plan::backward_alone`](super::Plan::backward_alone).
    pub(super) fn backward_alone(&self) -> Vec<Launch> {
        let mut launches = vec![self.arrays.prepare(false)];
        launches.extend(self.gradient_pass(false));
        launches
    }

    fn parts(&self) -> &Parts<'a> {
        &self.arrays.parts
    }

    /// A wave as kernels see it. The gradients of its logits begin at `element`.
    fn wave(&self, wave: &[SuperBlock], mut element: usize) -> abi::Wave {
        let tile = self.parts().tile.tiling();
        let first_squares = self.arrays.common.skipping.as_ref().map(|s| &s.first_squares);
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
                packed: self.arrays.towers[s.spaces[axis] as usize].packed_row(number(s.ranges[axis].start)),
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
                first_square: first_squares
                    .and_then(|all| all.get(&s.number))
                    .map_or(abi::NONE, |first| number(*first)),
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

    fn towers(&self) -> abi::Towers {
        let Parts { problem, order, .. } = self.parts();
        let masked = crate::mask::may_mask(&problem.pairs, order);
        let of = self.arrays.towers.each_ref().map(|tower| {
            let abi::Packing { packed, plane, panel, inverse, .. } = tower.packing;
            abi::Tower { packed, plane, panel, inverse, candidates: tower.candidates }
        });
        abi::Towers { of, row_bytes: number(self.parts().packed_row_bytes()), masked }
    }

    /// β·log₂e as two floats whose sum is exact to 2⁻⁴⁸.
    fn beta(&self) -> abi::Beta {
        let exact = self.parts().problem.call().beta() * std::f64::consts::LOG2_E;
        let high = exact as f32;
        abi::Beta { high, low: (exact - f64::from(high)) as f32 }
    }

    /// A launch of a kernel that is compiled for every arithmetic and tile. There is a thread block for each of `tiles`; or as many
    /// clusters as the device holds, which take the `squares` in turn.
    fn tiled(&self, pass: Pass, arithmetic: Arithmetic, tiles: u32, squares: usize) -> Launch {
        let Parts { problem, tile, .. } = self.parts();
        let (kernel, module) = pass.kernel(arithmetic, *tile);
        let blocks = match tile.kernels().persistent {
            false => tiles,
            true => 2 * number(squares.min(problem.clusters())),
        };
        Launch::new(module, kernel, [blocks, 1], tile.threads()).shared(tile.shared_bytes(pass, arithmetic))
    }

    /// Squares of a wave that clusters visit.
    fn squares(&self, wave: &[SuperBlock]) -> usize {
        wave.iter().map(|s| s.tiles(self.parts().tile.step())).sum()
    }

    fn sum_pass(&mut self) {
        let Arrays { parts: Parts { tile, division, .. }, common, partials, counts, .. } = self.arrays;
        let (partials, counts) = (*partials, *counts);
        let Tiling { edge, together } = tile.tiling();
        for (k, super_blocks) in division.forward.iter().enumerate() {
            let wave = self.wave(super_blocks, 0);
            let cosines = self.arrays.cosines(super_blocks);
            self.partials.push(self.logsumexp(super_blocks, wave, partials, counts, cosines, self.arrays.kept));
            if let Some((skipping, grid)) = common.skipping.as_ref().zip(self.squares_to_judge(super_blocks)) {
                let (masses, tile, together) = (skipping.masses, number(edge), number(together));
                let parameters = kernels::square_masses { wave, partials, masses, tile, together };
                self.partials.push(self.judge("square_masses", grid).parameters(&parameters));
            }
            let (anchor_index, tile) = (common.anchor_index, number(edge));
            let prefix_partials = self.arrays.elements.partials as u64;
            let m = abi::Merge { partials, counts, anchor_index, tile, first: k == 0, prefix_partials };
            // The sums of a shard are not complete after the last wave either. They are combined all the same, because this makes the status.
            self.partials.push(self.arrays.combine(wave, m, k + 1 == division.forward.len()));
        }
        self.forward = self.partials.clone();
        // For sums that are complete already. This launch merges no wave.
        let anchor_index = Address::Null;
        let nothing = abi::Merge { partials, counts, anchor_index, tile: 1, first: false, prefix_partials: 0 };
        self.combine.push(self.arrays.combine(self.wave(&[], 0), nothing, true));
        if let Some(of) = &common.prefixes {
            self.forward.push(self.arrays.join(of));
            self.combine.push(self.arrays.join(of));
        }
    }

    /// A launch of the first pass. With prefixes, cosines of one prefix are `plane` elements before those of the next. If `partials` is
    /// null, it stores cosines alone.
    fn logsumexp(
        &self,
        super_blocks: &[SuperBlock],
        wave: abi::Wave,
        partials: Address,
        counts: Address,
        cosines: abi::Cosines,
        plane: usize,
    ) -> Launch {
        let Arrays { parts: Parts { problem, .. }, common, elements, .. } = self.arrays;
        let pass = if common.prefixes.is_some() { Pass::LogSumExpPrefixes } else { Pass::LogSumExp };
        let launch = self.tiled(pass, problem.arithmetic().of_cosines(), wave.tiles, self.squares(super_blocks));
        let launch = launch.parameters(&kernels::logsumexp {
            wave,
            towers: self.towers(),
            rows: common.positives.anchors,
            beta: self.beta(),
            partials,
            counts,
            cosines,
        });
        let Some(of) = &common.prefixes else { return launch };
        let prefixes = self.arrays.prefixes(of, elements.partials, plane);
        launch.parameters(&kernels::logsumexp_prefixes { prefixes })
    }

    /// Number of squares of a wave that may be skipped, mirror images included; `None` if there are none.
    fn squares_to_judge(&self, wave: &Wave) -> Option<u32> {
        let first_squares = &self.arrays.common.skipping.as_ref()?.first_squares;
        let judged = wave.iter().filter(|s| first_squares.contains_key(&s.number));
        let squares: usize = judged.map(|s| s.squares(self.parts().tile.tiling())).sum();
        (squares > 0).then_some(number(squares))
    }

    /// A launch of a kernel that decides about squares, or counts them.
    fn judge(&self, kernel: &str, blocks: u32) -> Launch {
        Launch::new("skip_squares", kernel, [blocks, 1], REDUCE_THREADS).shared(REDUCE_BYTES)
    }

    /// Decides which squares the gradient leaves out. It needs the coefficients, so it comes after `combine`.
    fn choose_step(&mut self) {
        let Arrays { parts: Parts { problem, tile, division, .. }, common, .. } = self.arrays;
        let Some(&Skipping { masses, skipped, log2_share, .. }) = common.skipping.as_ref() else { return };
        let (towers, results) = (self.towers(), common.combine.results);
        let together = number(tile.tiling().together);
        let c = abi::Choice {
            log_coefficients: common.combine.log_coefficients,
            diagonal: common.combine.diagonal,
            masses,
            skipped,
            log2_share,
            rows: number(problem.pairs.rows()),
            step: number(tile.step()),
            together,
            padding: 0,
        };
        let mut chosen = Vec::new();
        for (k, super_blocks) in division.backward.iter().enumerate() {
            let wave = self.wave(super_blocks, 0);
            if let Some(grid) = self.squares_to_judge(super_blocks) {
                let choice = kernels::choose_skipped { wave, towers, c };
                chosen.push(self.judge("choose_skipped", grid).parameters(&choice));
            }
            let count = kernels::count_skipped { wave, skipped, results, together, first: k == 0 };
            chosen.push(self.judge("count_skipped", 1).parameters(&count));
        }
        self.combine.extend(chosen.clone());
        self.forward.extend(chosen);
    }

    /// For each wave, the launches of its gradients of logits and of their products, and at the end the projection. If it `keeps`
    /// cosines, those that the forward call stored are read, else all are computed again.
    fn gradient_pass(&self, keeps: bool) -> Vec<Launch> {
        let Arrays { parts: Parts { problem, tile, division, .. }, common, gradients, plane, dots, .. } = self.arrays;
        let (towers, results) = (self.towers(), common.combine.results);
        let skipped = common.skipping.as_ref().map_or(Address::Null, |s| s.skipped);
        let (gradients, plane) = (*gradients, *plane);
        let mut launches = Vec::new();
        let mut last_dots = abi::Dots { dots: *dots, results, count: 0, first: true };
        for (k, super_blocks) in division.backward.iter().enumerate() {
            // Super-blocks whose cosines are stored come first and have a launch of their own. The others have another launch, whose
            // gradients and dots lie behind those of the first.
            let kept = super_blocks.iter().take_while(|s| self.arrays.keeps(s)).count();
            let mut before = Elements::default();
            for part in [&super_blocks[..kept], &super_blocks[kept..]].into_iter().filter(|part| !part.is_empty()) {
                let (wave, squares) = (self.wave(part, before.gradients), self.squares(part));
                let parameters = kernels::gradient_tile {
                    wave,
                    towers,
                    rows: common.positives.anchors,
                    beta: self.beta(),
                    log_coefficients: common.combine.log_coefficients,
                    positive: common.combine.positive,
                    results,
                    row_count: number(problem.pairs.rows()),
                    gradients,
                    plane,
                    dots: dots.after((f64::BYTES * before.dots) as i64),
                    skipped,
                };
                let launch = |pass| self.tiled(pass, problem.arithmetic(), wave.tiles, squares).parameters(&parameters);
                let reads = keeps && self.arrays.keeps(&part[0]);
                match &common.prefixes {
                    Some(of) => launches.extend(self.joint_gradients(of, part, wave, reads, before, launch)),
                    None if reads => {
                        let cosines = self.arrays.cosines(part);
                        let launch = launch(Pass::KeptGradientTile);
                        launches.push(launch.parameters(&kernels::gradient_tile_kept { cosines }));
                    }
                    None => launches.push(launch(Pass::GradientTile)),
                }
                let sum = |f: &dyn Fn(&SuperBlock) -> usize| part.iter().map(f).sum::<usize>();
                before.gradients += sum(&|s| s.elements(tile.tiling()));
                before.dots += if tile.kernels().persistent { 2 * squares } else { wave.tiles as usize };
                before.radials += sum(&|s| s.partials(tile.tiling()).iter().sum());
                before.cosines += sum(&|s| kept_elements(s, *tile));
            }
            last_dots = abi::Dots { count: number(before.dots), first: k == 0, ..last_dots };
            // `project` adds up the dots of the last wave itself.
            if k + 1 < division.backward.len() {
                let launch = Launch::new("project", "sum_dots", [1, 1], REDUCE_THREADS).shared(REDUCE_BYTES);
                launches.push(launch.parameters(&kernels::sum_dots { dots: last_dots }));
            }
            let wave = self.wave(super_blocks, 0);
            launches.extend(common.prefixes.as_ref().and_then(|of| self.arrays.merge_radials(of, wave, k == 0)));
            let (product, blocks) = self.product(k > 0);
            if blocks > 0 {
                let launch = self.tiled(Pass::GradientProduct, problem.arithmetic(), blocks, blocks as usize);
                let product = kernels::gradient_product { wave, towers, gradients, plane, product, skipped };
                launches.push(launch.parameters(&product));
            }
        }
        launches.extend(common.prefixes.as_ref().and_then(|of| self.arrays.join_radials(of)));
        launches.push(self.arrays.project(last_dots));
        launches
    }

    /// The launches that make the gradients of all prefixes, for a part of a wave. Cosines that are not stored are stored first, for this
    /// wave. `before` says what the parts of the wave before this one take, and `launch` starts a launch of a pass.
    fn joint_gradients(
        &self,
        of: &PrefixArrays,
        part: &[SuperBlock],
        wave: abi::Wave,
        reads: bool,
        before: Elements,
        launch: impl Fn(Pass) -> Launch,
    ) -> Vec<Launch> {
        let Arrays { elements, kept, radials, .. } = self.arrays;
        let (cosines, plane) = match reads {
            true => (self.arrays.cosines(part), *kept),
            false => (self.arrays.wave_cosines(part, before.cosines), elements.cosines),
        };
        let mut launches = Vec::new();
        if !reads {
            launches.push(self.logsumexp(part, wave, Address::Null, Address::Null, cosines, plane));
        }
        let radials = radials.after((f32::BYTES * before.radials) as i64);
        let prefixes = self.arrays.prefixes(of, elements.radials, plane);
        let parameters = kernels::gradient_tile_prefixes { cosines, prefixes, radials };
        launches.push(launch(Pass::GradientTilePrefixes).parameters(&parameters));
        launches
    }

    /// Outputs of the products, and their number of tiles: thread blocks, or squares that clusters take in turn.
    fn product(&self, accumulate: bool) -> (abi::Product, u32) {
        let Arrays { parts: Parts { problem, order, tile, .. }, sums, .. } = self.arrays;
        let tile = tile.step();
        let all_cuts = crate::regions::cuts(&problem.rows, order, problem.pairs.rows());
        let of = [0, 1].map(|k| {
            let range = self.parts().gradient_range(k);
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
        let several = self.arrays.common.prefixes.as_ref();
        let tiles_along_dim = number(several.map_or(problem.dim.div_ceil(tile), |of| of.tiles_along_dim));
        let (dim, (columns, prefix_gradients)) = (number(problem.dim), self.arrays.columns());
        let blocks = (of[0].blocks + of[1].blocks).saturating_mul(tiles_along_dim);
        (abi::Product { of, dim, tiles_along_dim, accumulate, padding: 0, columns, prefix_gradients }, blocks)
    }
}
