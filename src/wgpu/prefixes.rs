//! Dispatches that only calls with prefixes have: those of prefixes.wgsl.

use super::dispatches::Dispatches;
use super::layout::LANES;
use super::schedule::Slot;
use super::shaders::Module;
use super::uniforms::{Prefixes, Tiles};
use crate::error::Result;
use crate::order::Space;
use crate::super_blocks::SuperBlock;

impl Dispatches<'_> {
    /// What the dispatches of prefixes.wgsl share that are for the embeddings of a space.
    fn prefixes(&self, space: Space) -> Prefixes {
        let (layout, rows, k) = (self.layout, &self.parts.problem.rows, space as usize);
        Prefixes {
            prefixes: self.parts.segments.len() as u32,
            prefix_words: layout.prefix_words as u32,
            norms: layout.norms[k] as u32,
            other_norms: layout.norms[1 - k] as u32,
            diagonal: layout.diagonal as u32,
            positives: layout.positives,
            radials: layout.radials[k] as u32,
            radial: layout.radial as u32,
            passage: k as u32,
            candidates: layout.candidates[1],
            occurrence_start: layout.occurrence_start,
            occurrences: layout.occurrences,
            row_begin: rows.start as u32,
            row_end: rows.end as u32,
            ..Prefixes::default()
        }
    }

    /// Makes D of each prefix what its columns get from all prefixes that have them.
    pub(super) fn join(&mut self) -> Result<()> {
        let m = self.parts.problem.pairs.rows();
        let join = Prefixes { count: m as u32, ..self.prefixes(Space::Query) };
        let bindings = [self.side(1)?, self.state(2)?];
        let grid = self.recorder.grid(m.div_ceil(LANES));
        self.combine.push(self.recorder.dispatch(Module::Prefixes, "join", join, bindings, grid));
        Ok(())
    }

    /// Makes the radial sums of all prefixes but the longest 0.
    pub(super) fn clear_radials(&mut self) -> Result<()> {
        let words = 2 * self.towers.iter().map(|tower| tower.indices).sum::<usize>();
        let clear = Prefixes { count: words as u32, ..self.prefixes(Space::Query) };
        let (binding, grid) = (self.state(2)?, self.recorder.grid(words.div_ceil(LANES)));
        self.backward.push(self.recorder.dispatch(Module::Prefixes, "clear_radials", clear, [binding], grid));
        Ok(())
    }

    /// Adds what the tiles of a super-block found along its axes, where gradients are added, too.
    pub(super) fn merge_radials(&mut self, s: &SuperBlock, params: &Tiles, bytes: u64) -> Result<()> {
        let tile = self.parts.variant.tile();
        // Products along the rows of a triangle read all of its square. Radial sums of mirror images are those of the columns.
        for axis in (0..2).filter(|&axis| s.gradients[if s.triangle { 0 } else { axis }]) {
            let merge = Prefixes {
                count: s.ranges[axis].len() as u32,
                begin: s.ranges[axis].start as u32,
                across: s.tiles_along(1 - axis, tile) as u32,
                along: (s.tiles_along(axis, tile) * tile) as u32,
                tile: tile as u32,
                triangle: Self::triangle(s, axis),
                partials: if axis == 0 { params.row_radials } else { params.col_radials },
                prefix_partials: params.prefix_radials,
                ..self.prefixes(s.spaces[axis])
            };
            let bindings = [self.state(2)?, self.recorder.whole(3, Slot::Scratch, bytes)?];
            let grid = self.recorder.grid(s.ranges[axis].len().div_ceil(LANES));
            self.backward.push(self.recorder.dispatch(Module::Prefixes, "merge_radials", merge, bindings, grid));
        }
        Ok(())
    }

    /// Makes the radial parts of embeddings from the radial sums of their indices.
    pub(super) fn radials(&mut self) -> Result<()> {
        for space in [Space::Query, Space::Passage] {
            if !self.parts.has_several() || self.sums[space as usize].is_none() {
                continue;
            }
            let rows = self.towers[space as usize].rows;
            let params = Prefixes { count: rows as u32, ..self.prefixes(space) };
            let (bindings, grid) = ([self.side(1)?, self.state(2)?], self.recorder.grid(rows.div_ceil(LANES)));
            self.backward.push(self.recorder.dispatch(Module::Prefixes, "radials", params, bindings, grid));
        }
        Ok(())
    }
}
