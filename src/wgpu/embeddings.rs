//! Dispatches that read or write embeddings: packing before the passes over tiles, projection after them. Each takes a part of the rows
//! that can be bound at once.

use super::dispatches::Dispatches;
use super::layout::{LANES, Tower};
use super::shaders::Module;
use super::uniforms::{Prepare, Project, scaled};
use crate::candidates::NONE;
use crate::error::Result;
use crate::mask::COSINE_TIE;

impl Dispatches<'_> {
    /// Resets the state, packs both towers, and computes the cosines of the positives.
    pub(super) fn prepare(&mut self) -> Result<()> {
        let problem = self.parts.problem;
        let (m, layout) = (problem.pairs.rows(), self.layout);
        let sums = 16 * m * self.parts.segments.len();
        let module = if self.parts.has_several() { Module::PreparePrefixes } else { Module::Prepare };
        let reset = Prepare { count: sums as u32, first: layout.sums as u32, ..Prepare::default() };
        let prefixes = Prepare {
            prefixes: self.parts.segments.len() as u32,
            segments: layout.segments,
            prefix_words: layout.prefix_words as u32,
            ..Prepare::default()
        };
        let bindings = [self.state(3)?, self.recorder.status(4)?];
        let grid = self.recorder.grid(sums.div_ceil(LANES));
        self.partials.push(self.recorder.dispatch(module, "reset", reset, bindings, grid));

        for (k, tower) in self.towers.into_iter().enumerate() {
            let row_bytes = (tower.row_stride * tower.element_bytes) as u64;
            let of_packed = self.recorder.rows_of(tower.packed_row_bytes() as u64);
            // If rows are in another order than indices, any index may read any row. So all raw rows are bound at once.
            let most = if tower.in_order { of_packed.min(self.recorder.rows_of(row_bytes)) } else { of_packed };
            for range in Self::split(0..tower.padded, most) {
                // Padding reads no raw row, but the binding must not be empty.
                let first = range.start.min(tower.rows - 1);
                let rows = if tower.in_order { first..range.end.clamp(first + 1, tower.rows) } else { 0..tower.rows };
                let end = (rows.end - 1) as u64 * row_bytes + (problem.dim * tower.element_bytes) as u64;
                let raw = self.recorder.window(
                    1,
                    tower.raw,
                    rows.start as u64 * row_bytes..end,
                    tower.element_bytes as u64,
                )?;
                let (packed, packed_base) = self.packed(5, &tower, &range)?;
                let params = Prepare {
                    count: range.len() as u32,
                    first: range.start as u32,
                    dim: self.parts.dim() as u32,
                    dtype: problem.dtype.code(),
                    row_stride: tower.row_stride as u32,
                    raw_base: raw.base,
                    raw_first: rows.start as u32,
                    limit: tower.indices as u32,
                    order: if tower.in_order { NONE } else { layout.order },
                    packed_base,
                    row_vectors: tower.row_vectors as u32,
                    norms: layout.norms[k] as u32,
                    passage: k as u32,
                    ..prefixes
                };
                let bindings = [raw.binding, self.side(2)?, self.state(3)?, self.recorder.status(4)?, packed];
                let grid = self.recorder.grid(range.len());
                self.partials.push(self.recorder.dispatch(module, "pack", params, bindings, grid));
            }
        }

        let [query, passage] = self.towers;
        let most = self.recorder.rows_of(query.packed_row_bytes() as u64);
        for range in Self::split(0..m, most) {
            let others = if passage.in_order { range.clone() } else { 0..passage.indices };
            let (left, packed_base) = self.packed(6, &query, &range)?;
            let (right, other_base) = self.packed(7, &passage, &others)?;
            let params = Prepare {
                count: range.len() as u32,
                first: range.start as u32,
                packed_base,
                row_vectors: query.row_vectors as u32,
                norms: layout.norms[0] as u32,
                other_base,
                other_first: others.start as u32,
                other_norms: layout.norms[1] as u32,
                positives: layout.positives,
                row_keys: layout.row_keys,
                positive: layout.positive as u32,
                anchors: layout.anchors as u32,
                // Without a margin it is 4, because no cosine exceeds s⁺ by that much.
                margin: problem.call().margin().map_or(4.0, |m| (m + COSINE_TIE).clamp(-8.0, 8.0) as f32),
                ..prefixes
            };
            let bindings = [self.side(2)?, self.state(3)?, left, right];
            let grid = self.recorder.grid(range.len());
            self.partials.push(self.recorder.dispatch(module, "positives", params, bindings, grid));
        }
        Ok(())
    }

    /// Turns sums of gradients into the gradients of the raw embeddings, and finishes the temperature's.
    pub(super) fn projection(&mut self) -> Result<()> {
        let problem = self.parts.problem;
        let (layout, rows) = (self.layout, problem.rows.clone());
        let (factor, factor_exponent) = scaled(problem.upstream * problem.call().beta());
        self.radials()?;
        for k in 0..2 {
            let Some(sums) = self.sums[k] else { continue };
            let (own, other) = (self.towers[k], self.towers[1 - k]);
            let passages_in_order = self.towers[1].in_order;
            let out_row = (sums.output_stride * sums.dtype.bytes()) as u64;
            let row_bytes = out_row.max(own.packed_row_bytes() as u64).max(4 * sums.stride as u64);
            let first = if k == 0 { rows.start } else { 0 };
            let most = self.recorder.rows_of(row_bytes);
            for part in Self::split(first..first + sums.output_rows, most) {
                // Indices that these rows meet. In order, row k and passage k are a pair, so passages from M on meet no query.
                let all = |tower: &Tower| 0..tower.indices;
                let own_range = if own.in_order { part.clone() } else { all(&own) };
                let sums_range = if own.in_order { part.clone() } else { sums.first..sums.first + sums.rows };
                let m = problem.pairs.rows();
                let other_range = match (passages_in_order, part.start.min(m - 1)..part.end.min(m)) {
                    (true, range) if !range.is_empty() => range,
                    (true, _) => 0..1,
                    (false, _) => all(&other),
                };
                let (own_binding, own_base) = self.packed(3, &own, &own_range)?;
                let (other_binding, other_base) = self.packed(4, &other, &other_range)?;
                let start = (part.start - first) as u64 * out_row;
                let end = (part.end - 1 - first) as u64 * out_row + (problem.dim * sums.dtype.bytes()) as u64;
                let out = self.recorder.window(5, sums.output, start..end, sums.dtype.bytes() as u64)?;
                let (sums_binding, sums_base) = if sums.in_place() {
                    (None, out.base)
                } else {
                    let (binding, base) = self.sums_window(6, &sums, &sums_range)?;
                    (Some(binding), base)
                };
                let module = match (self.parts.is_whole(), sums.in_place()) {
                    (true, true) => Module::ProjectInPlace,
                    (true, false) => Module::Project,
                    (false, true) => Module::ProjectPrefixesInPlace,
                    (false, false) => Module::ProjectPrefixes,
                };
                let params = Project {
                    zero: 0,
                    count: part.len() as u32,
                    first: part.start as u32,
                    dim: problem.dim as u32,
                    row_vectors: own.row_vectors as u32,
                    own_base,
                    own_first: own_range.start as u32,
                    other_base,
                    other_first: other_range.start as u32,
                    sums_base,
                    sums_first: sums_range.start as u32,
                    sums_stride: sums.stride as u32,
                    out_base: out.base,
                    out_stride: sums.output_stride as u32,
                    out_type: sums.dtype.code(),
                    norms: layout.norms[k] as u32,
                    other_norms: layout.norms[1 - k] as u32,
                    diagonal: layout.diagonal as u32,
                    results: 0,
                    passage: k as u32,
                    positives: layout.positives,
                    candidates: layout.candidates[1],
                    occurrence_start: layout.occurrence_start,
                    occurrences: layout.occurrences,
                    row_begin: rows.start as u32,
                    row_end: rows.end as u32,
                    factor,
                    factor_exponent,
                    prefixes: self.parts.segments.len() as u32,
                    segments: layout.segments,
                    prefix_words: layout.prefix_words as u32,
                    radials: layout.radials[k] as u32,
                };
                let bindings = [self.side(1)?, self.state(2)?, own_binding, other_binding, out.binding];
                let bindings = bindings.into_iter().chain(sums_binding);
                let grid = self.recorder.grid(part.len());
                self.backward.push(self.recorder.dispatch(module, "project", params, bindings, grid));
            }
        }
        let params = self.combine_params(0);
        let bindings = [self.state(2)?];
        self.backward.push(self.recorder.dispatch(Module::Combine, "finish_backward", params, bindings, [1, 1]));
        Ok(())
    }
}
