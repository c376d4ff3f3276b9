//! Turns super-blocks into dispatches: windows of buffers, parameters, workgroups.

use super::bindings::Recorder;
use super::layout::{LANES, Layout, Sums, Tower};
use super::parts::Parts;
use super::schedule::{Binding, Dispatch, Slot};
use super::shaders::{Module, Products};
use super::uniforms::{Combine, Product, Tiles, scaled, split};
use crate::call::{NoNegative, ZeroNorm};
use crate::candidates::NONE;
use crate::error::Result;
use crate::order::Space;
use crate::super_blocks::SuperBlock;
use std::ops::Range;

/// Words of a partial sum: sum, exponent, count.
pub(super) const PARTIAL_WORDS: usize = 3;

pub(super) struct Dispatches<'a> {
    pub parts: &'a Parts<'a>,
    pub recorder: Recorder,
    pub layout: Layout,
    pub side: Vec<u8>,
    pub towers: [Tower; 2],
    pub sums: [Option<Sums>; 2],
    pub partials: Vec<Dispatch>,
    pub combine: Vec<Dispatch>,
    pub backward: Vec<Dispatch>,
}

impl<'a> Dispatches<'a> {
    pub(super) fn new(parts: &'a Parts<'a>) -> Result<Self> {
        let (layout, side) = Layout::new(parts);
        let mut this = Self {
            parts,
            recorder: Recorder::new(parts),
            layout,
            side,
            towers: [Space::Query, Space::Passage].map(|space| Tower::new(parts, space)),
            sums: [0, 1].map(|k| Sums::new(parts, k)),
            partials: Vec::new(),
            combine: Vec::new(),
            backward: Vec::new(),
        };
        this.reserve()?;
        this.prepare()?;
        this.sum_pass()?;
        this.combine_step()?;
        this.gradient_pass()?;
        this.projection()?;
        Ok(this)
    }

    /// Makes slots as large as their whole content, because dispatches may bind only parts of it.
    fn reserve(&mut self) -> Result<()> {
        for tower in self.towers {
            let elements = (tower.rows - 1) * tower.row_stride + self.parts.problem.dim;
            self.recorder.reserve(tower.raw, (elements * tower.element_bytes) as u64)?;
            self.recorder.reserve(tower.packed, (tower.padded * tower.packed_row_bytes()) as u64)?;
        }
        for sums in self.sums.into_iter().flatten() {
            let elements = (sums.output_rows - 1) * sums.output_stride + self.parts.problem.dim;
            self.recorder.reserve(sums.output, (elements * sums.dtype.bytes()) as u64)?;
        }
        Ok(())
    }

    pub(super) fn side(&mut self, index: u32) -> Result<Binding> {
        let bytes = self.side.len() as u64;
        self.recorder.whole(index, Slot::Side, bytes)
    }

    pub(super) fn state(&mut self, index: u32) -> Result<Binding> {
        self.recorder.state(index, self.layout.state_words)
    }

    /// Binds the packed rows of these indices. Returns where the first one begins in the binding, too.
    pub(super) fn packed(&mut self, index: u32, tower: &Tower, range: &Range<usize>) -> Result<(Binding, u32)> {
        let row = tower.packed_row_bytes() as u64;
        let bytes = range.start as u64 * row..range.end as u64 * row;
        let window = self.recorder.window(index, tower.packed, bytes, tower.vector_bytes as u64)?;
        Ok((window.binding, window.base))
    }

    /// The same. Cooperative matrices read whole tiles, so it binds as many more rows as whole tiles have.
    fn packed_tiles(&mut self, index: u32, tower: &Tower, range: &Range<usize>) -> Result<(Binding, u32)> {
        let whole = range.start..range.start + range.len().next_multiple_of(self.parts.variant.tile());
        self.packed(index, tower, if self.cooperative() { &whole } else { range })
    }

    /// Whether cooperative matrices multiply.
    fn cooperative(&self) -> bool {
        self.parts.variant.products != Products::Fma
    }

    /// Cuts a range into parts of at most `most`, because no more can be bound at once.
    pub(super) fn split(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
        let end = range.end;
        range.step_by(most).map(move |start| start..end.min(start + most))
    }

    /// Parameters and bindings 1 … 4 of a super-block. The sum pass and the gradient pass share them.
    fn tiles(&mut self, s: &SuperBlock) -> Result<(Tiles, [Binding; 4])> {
        let problem = self.parts.problem;
        let (layout, tile) = (self.layout, self.parts.variant.tile());
        let m = problem.pairs.rows();
        let [row_tower, col_tower] = s.spaces.map(|space| self.towers[space as usize]);
        let (left, row_base) = self.packed_tiles(1, &row_tower, &s.ranges[0])?;
        let (right, col_base) = self.packed_tiles(2, &col_tower, &s.ranges[1])?;
        let [triangle, ranks, counted] = s.flags().map(u32::from);
        let masked = crate::mask::may_mask(&problem.pairs, &self.parts.order);
        let [row_partials, col_partials] = s.partials(tile);
        let prefixes = self.parts.segments.len();
        let candidates = s.spaces.map(|space| layout.candidates[space as usize] / 4);
        let norms = s.spaces.map(|space| layout.norms[space as usize] as u32);
        let meets = |axis: usize| match (s.anchors[axis], s.blocks[axis].candidates_are_passages()) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => 2,
        };
        let coefficients = s.blocks.map(|b| layout.coefficients as u32 + 2 * (b.index() * m) as u32);
        let [beta_head, beta_middle, beta_tail] = self.beta();
        let params = Tiles {
            zero: 0,
            tiles: s.tiles(tile) as u32,
            triangle,
            row_begin: s.ranges[0].start as u32,
            row_end: s.ranges[0].end as u32,
            col_begin: s.ranges[1].start as u32,
            col_end: s.ranges[1].end as u32,
            row_tiles: s.tiles_along(0, tile) as u32,
            col_tiles: s.tiles_along(1, tile) as u32,
            row_base,
            col_base,
            row_vectors: row_tower.row_vectors as u32,
            row_candidates: candidates[0],
            col_candidates: candidates[1],
            row_norms: norms[0],
            col_norms: norms[1],
            anchors: layout.anchors as u32,
            row_anchors: meets(0),
            col_anchors: meets(1),
            row_sums: s.sums[0].into(),
            col_sums: s.sums[1].into(),
            ranks,
            counted,
            masked: masked.into(),
            row_partials: 0,
            col_partials: (PARTIAL_WORDS * row_partials) as u32,
            row_coefficients: coefficients[0],
            col_coefficients: coefficients[1],
            positive: layout.positive as u32,
            results: 0,
            gradient: self.first_gradient(s) as u32,
            dots: 0,
            plane: if self.cooperative() { s.elements(tile) as u32 } else { 0 },
            prefixes: prefixes as u32,
            segments: layout.segments / 4,
            prefix_words: layout.prefix_words as u32,
            prefix_partials: (PARTIAL_WORDS * (row_partials + col_partials)) as u32,
            prefix_plane: (s.elements(tile) * if self.cooperative() { 2 } else { 1 }) as u32,
            row_radials: s.tiles(tile) as u32,
            col_radials: (s.tiles(tile) + row_partials) as u32,
            prefix_radials: (row_partials + col_partials) as u32,
            beta_head,
            beta_middle,
            beta_tail,
        };
        Ok((params, [left, right, self.side(3)?, self.state(4)?]))
    }

    /// Number of f32 in front of the gradients of a super-block: the dots of its tiles and the radial sums of each prefix but the longest,
    /// padded so that a binding may begin behind them. A dot is a tile's part of ∂L/∂β.
    fn first_gradient(&self, s: &SuperBlock) -> usize {
        let (tile, shorter) = (self.parts.variant.tile(), self.parts.segments.len() - 1);
        (s.tiles(tile) + shorter * s.partials(tile).iter().sum::<usize>()).next_multiple_of(64)
    }

    /// β·log₂e as the sum of three f32.
    fn beta(&self) -> [f32; 3] {
        split(self.parts.problem.call().beta() * std::f64::consts::LOG2_E)
    }

    /// Parameters of the steps for prefix `k`.
    pub(super) fn combine_params(&self, k: usize) -> Combine {
        let problem = self.parts.problem;
        let (layout, m) = (self.layout, problem.pairs.rows());
        let place = |first: usize| (first + k * layout.prefix_words) as u32;
        let prefixes = self.parts.segments.len();
        let (prefix_weight, prefix_exponent) = scaled(problem.prefixes[k].weight);
        let [beta_head, beta_middle, beta_tail] = self.beta();
        let (factor, factor_exponent) = scaled(problem.upstream);
        Combine {
            count: m as u32,
            sums: (layout.sums + k * self.prefix_sums()) as u32,
            positive: place(layout.positive),
            weights: layout.weights,
            groups: layout.groups,
            group_count: problem.call().loss().groups().len() as u32,
            coefficients: place(layout.coefficients),
            diagonal: place(layout.diagonal),
            row_losses: place(layout.row_losses),
            group_results: place(layout.group_results),
            workgroups: m.div_ceil(LANES) as u32,
            zero_is_error: (problem.call().zero_norm() == ZeroNorm::Error).into(),
            empty_is_error: (problem.call().no_negative() == NoNegative::Error).into(),
            factor,
            factor_exponent,
            beta: problem.call().beta() as f32,
            beta_head,
            beta_middle,
            beta_tail,
            prefix: k as u32,
            prefixes: prefixes as u32,
            room: prefixes.next_power_of_two().trailing_zeros() as i32,
            radial: if self.parts.has_several() { place(layout.radial) } else { NONE },
            prefix_weight,
            prefix_exponent,
            ..Combine::default()
        }
    }

    /// Words of the sums of a prefix.
    fn prefix_sums(&self) -> usize {
        16 * self.parts.problem.pairs.rows()
    }

    fn sum_pass(&mut self) -> Result<()> {
        let (tile, m) = (self.parts.variant.tile(), self.parts.problem.pairs.rows());
        let blocks = &self.parts.blocks;
        for s in blocks {
            let (params, bindings) = self.tiles(s)?;
            let partials: usize = s.partials(tile).iter().sum();
            let bytes = (4 * PARTIAL_WORDS * partials * self.parts.segments.len()) as u64;
            let scratch = self.recorder.whole(5, Slot::Scratch, bytes)?;
            let grid = self.recorder.grid(s.tiles(tile));
            let bindings = bindings.into_iter().chain([scratch]);
            let module = if self.parts.has_several() { Module::LogSumExpPrefixes } else { Module::LogSumExp };
            self.partials.push(self.recorder.dispatch(module, "logsumexp", params, bindings, grid));
            for axis in (0..2).filter(|&axis| s.sums[axis]) {
                let merge = Combine {
                    count: s.ranges[axis].len() as u32,
                    begin: s.ranges[axis].start as u32,
                    across: s.tiles_along(1 - axis, tile) as u32,
                    along: (s.tiles_along(axis, tile) * tile) as u32,
                    tile: tile as u32,
                    triangle: Self::triangle(s, axis),
                    partials: if axis == 0 { params.row_partials } else { params.col_partials },
                    prefixes: params.prefixes,
                    prefix_partials: params.prefix_partials,
                    prefix_sums: self.prefix_sums() as u32,
                    candidates: self.layout.candidates[s.spaces[axis] as usize],
                    block_sums: (self.layout.sums + 4 * s.blocks[axis].index() * m) as u32,
                    ranks: params.ranks,
                    ..Combine::default()
                };
                let bindings = [self.side(1)?, self.state(2)?, self.recorder.whole(4, Slot::Scratch, bytes)?];
                let grid = self.recorder.grid(s.ranges[axis].len().div_ceil(LANES));
                self.partials.push(self.recorder.dispatch(Module::Combine, "merge", merge, bindings, grid));
            }
        }
        Ok(())
    }

    fn combine_step(&mut self) -> Result<()> {
        for k in 0..self.parts.segments.len() {
            let params = self.combine_params(k);
            for (entry, grid) in
                [("combine", self.recorder.grid(params.workgroups as usize)), ("finish_forward", [1, 1])]
            {
                let bindings = [self.side(1)?, self.state(2)?, self.recorder.status(3)?];
                self.combine.push(self.recorder.dispatch(Module::Combine, entry, params, bindings, grid));
            }
        }
        if !self.parts.is_whole() {
            self.join()?;
        }
        Ok(())
    }

    /// Which part of a triangle sums along an axis are of, as the shaders number them.
    pub(super) fn triangle(s: &SuperBlock, axis: usize) -> u32 {
        if s.triangle { 1 + axis as u32 } else { 0 }
    }

    fn gradient_pass(&mut self) -> Result<()> {
        let problem = self.parts.problem;
        let tile = self.parts.variant.tile();
        if problem.device_upstream {
            let bindings = [self.state(2)?, self.recorder.whole(5, Slot::Upstream, 4)?];
            let params = self.combine_params(0);
            self.backward.push(self.recorder.dispatch(Module::Combine, "load_upstream", params, bindings, [1, 1]));
        }
        if self.parts.has_several() {
            self.clear_radials()?;
        }
        let mut written: [Vec<Range<usize>>; 2] = [Vec::new(), Vec::new()];
        let mut first = true;
        let (blocks, graded) = (&self.parts.blocks, &self.parts.graded);
        for s in blocks.iter().zip(graded).filter(|(_, graded)| **graded).map(|(s, _)| s) {
            let (params, bindings) = self.tiles(s)?;
            let start = 4 * u64::from(params.gradient);
            let plane = 4 * s.elements(tile) as u64; // f32, or two planes of f16
            let bytes = start + plane * self.parts.segments.len() as u64;
            // Dots and gradients are one array, or with cooperative matrices two arrays of different types.
            let scratch = match self.cooperative() {
                false => vec![self.recorder.whole(5, Slot::Scratch, bytes)?],
                true => vec![
                    self.recorder.whole(5, Slot::Scratch, start)?,
                    self.recorder.window(6, Slot::Scratch, start..bytes, 2)?.binding,
                ],
            };
            let grid = self.recorder.grid(s.tiles(tile));
            let bindings = bindings.into_iter().chain(scratch);
            let module = if self.parts.has_several() { Module::GradientTilePrefixes } else { Module::GradientTile };
            self.backward.push(self.recorder.dispatch(module, "gradient_tile", params, bindings, grid));

            let sum = Combine { tiles: params.tiles, first: first.into(), ..self.combine_params(0) };
            let bindings = [self.state(2)?, self.recorder.whole(4, Slot::Scratch, bytes)?];
            self.backward.push(self.recorder.dispatch(Module::Combine, "sum_dots", sum, bindings, [1, 1]));
            first = false;
            if self.parts.has_several() {
                self.merge_radials(s, &params, bytes)?;
            }

            for axis in (0..2).filter(|&axis| s.gradients[axis]) {
                self.product(s, axis, start..start + plane, &mut written)?;
            }
        }
        self.clear(&written)?;
        if first {
            // No super-block has coefficients, so none has started the sum of dots. This makes it 0.
            let sum = Combine { first: 1, ..self.combine_params(0) };
            let bindings = [self.state(2)?, self.recorder.whole(4, Slot::Scratch, 16)?];
            self.backward.push(self.recorder.dispatch(Module::Combine, "sum_dots", sum, bindings, [1, 1]));
        }
        Ok(())
    }

    /// Binds the sums of these indices. Returns where the first one begins in the binding, too.
    pub(super) fn sums_window(&mut self, index: u32, sums: &Sums, range: &Range<usize>) -> Result<(Binding, u32)> {
        let row = 4 * sums.stride as u64;
        let (start, end) = ((range.start - sums.first) as u64, (range.end - sums.first) as u64);
        let bytes = start * row..(end - 1) * row + 4 * self.parts.problem.dim as u64;
        let window = self.recorder.window(index, sums.slot, bytes, 4)?;
        Ok((window.binding, window.base))
    }

    /// Adds the products of a super-block's gradients with embeddings, for the indices along one axis, segment by segment. `gradient` is
    /// the plane of the first prefix. The first super-block that has a range of indices writes their sums, and later ones add to them.
    fn product(
        &mut self,
        s: &SuperBlock,
        axis: usize,
        gradient: Range<u64>,
        written: &mut [Vec<Range<usize>>; 2],
    ) -> Result<()> {
        let (space, other) = (s.spaces[axis] as usize, s.spaces[1 - axis] as usize);
        let Some(sums) = self.sums[space] else { return Ok(()) };
        let (segments, tile) = (&self.parts.segments, self.parts.variant.tile());
        let range = &s.ranges[axis];
        let (vector_bytes, plane) = if self.cooperative() { (8, s.elements(tile) as u32) } else { (16, 0) };
        let other = self.towers[other];
        let (packed, packed_base) = self.packed_tiles(2, &other, &s.ranges[1 - axis])?;
        let (output, sums_base) = self.sums_window(3, &sums, range)?;
        let params = Product {
            zero: 0,
            indices: range.len() as u32,
            depth: s.ranges[1 - axis].len() as u32,
            gradient_vectors: (s.tiles_along(1, tile) * tile / 4) as u32,
            row_vectors: other.row_vectors as u32,
            sums_stride: sums.stride as u32,
            accumulate: written[space].contains(range).into(),
            plane,
            ..Product::default()
        };
        if params.accumulate == 0 {
            written[space].push(range.clone());
        }
        let entry = ["product_rows", "product_columns"][axis];
        let bytes = gradient.end - gradient.start;
        for (k, segment) in segments.iter().enumerate() {
            let plane = gradient.start + k as u64 * bytes..gradient.end + k as u64 * bytes;
            let gradients = self.recorder.window(1, Slot::Scratch, plane, vector_bytes)?;
            let dim = segment.columns.len();
            let params = Product {
                gradient_base: gradients.base,
                packed_base: packed_base + segment.vectors.start as u32,
                vectors: segment.vectors.len() as u32,
                sums_base: sums_base + segment.columns.start as u32,
                dim: dim as u32,
                ..params
            };
            // A tile of sums is as large as one of cosines.
            let grid = [dim.div_ceil(tile) as u32, range.len().div_ceil(tile) as u32];
            let bindings = [gradients.binding, packed, output];
            self.backward.push(self.recorder.dispatch(Module::GradientProduct, entry, params, bindings, grid));
        }
        Ok(())
    }

    /// Writes zeros to all sums that no super-block writes.
    fn clear(&mut self, written: &[Vec<Range<usize>>; 2]) -> Result<()> {
        for (written, sums) in written.iter().zip(self.sums) {
            let Some(sums) = sums else { continue };
            let mut written = written.clone();
            written.sort_unstable_by_key(|range| range.start);
            let end = sums.first + sums.rows;
            let starts = [sums.first].into_iter().chain(written.iter().map(|range| range.end));
            let ends = written.iter().map(|range| range.start).chain([end]);
            let most = self.recorder.rows_of(4 * sums.stride as u64);
            let gaps: Vec<_> = starts.zip(ends).flat_map(|(start, end)| Self::split(start..end, most)).collect();
            for range in gaps {
                let (output, sums_base) = self.sums_window(3, &sums, &range)?;
                let params = Product {
                    indices: range.len() as u32,
                    sums_base,
                    sums_stride: sums.stride as u32,
                    dim: self.parts.dim() as u32,
                    ..Product::default()
                };
                let grid = self.recorder.grid(range.len());
                self.backward.push(self.recorder.dispatch(Module::GradientProduct, "clear", params, [output], grid));
            }
        }
        Ok(())
    }
}
