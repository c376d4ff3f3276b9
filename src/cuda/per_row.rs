//! Launches around the heavy passes, a row or an embedding at a time: `prepare`, `combine`, `project`.

use super::arrays::{Common, Part, Sums, TowerArrays};
use super::launches::{Launches, MAX_CUTS, REDUCE_BYTES, REDUCE_THREADS, at};
use super::problem::{Arithmetic, Tile};
use super::schedule::{Address, Argument, Launch};
use crate::call::{NoNegative, ZeroNorm};

/// Warps, and so rows, of a block of `prepare` and `project`.
pub(super) const ROWS_PER_BLOCK: usize = 8;
/// Rows of a block of `combine`, numbers that it leaves for the last one, and its shared memory.
pub(super) const COMBINED_ROWS: usize = 64;
pub(super) const FOUND: usize = 11;
const COMBINE_BYTES: u32 = 2816;

impl Launches<'_> {
    fn raw(&self, tower: &TowerArrays) -> Argument {
        let problem = self.layouts.problem;
        Argument::new().pointer(at(tower.raw)).u64(tower.row_bytes).u32(problem.dim).u32(problem.dtype.code())
    }

    pub(super) fn prepare(&mut self, towers: &[TowerArrays; 2], common: &Common) {
        let problem = self.layouts.problem;
        let format = match problem.arithmetic() {
            Arithmetic::F16 | Arithmetic::F16x2 => 0_u32,
            Arithmetic::F16x3 => 1,
            Arithmetic::Exact => 2,
        };
        let mut packing = Argument::new();
        for tower in towers {
            let one = Argument::new()
                .nested(&self.raw(tower))
                .pointer(tower.order)
                .pointer(at(tower.packed))
                .u64(tower.plane)
                .pointer(at(tower.inverse))
                .pointer(at(tower.inverse_norm))
                .pointer(at(tower.faults))
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
            packing = packing.nested(&parts(parts(one, |p| p.index), |p| p.row).end());
        }
        let blocks: usize = towers.iter().map(|tower| tower.padded / ROWS_PER_BLOCK).sum();
        let launch = |with_positives| {
            let positives = Argument::new()
                .pointer(common.positives)
                .pointer(at(common.row_keys))
                .pointer(at(common.positive))
                .pointer(at(common.anchors))
                .pointer(at(common.ticket))
                .pointer(at(common.status))
                .f64(problem.call().margin().unwrap_or(f64::INFINITY))
                .flag(with_positives)
                .u32(0_u32);
            Launch::new("prepare", "prepare", [blocks as u32, 1], REDUCE_THREADS)
                .argument(packing.clone().nested(&positives))
        };
        self.partials.push(launch(true));
        self.repack.push(launch(false));
    }

    fn zero_is_error(&self) -> bool {
        self.layouts.problem.call().zero_norm() == ZeroNorm::Error
    }

    /// Merges the partials of a wave, and combines the sums if `complete`.
    pub(super) fn combine_launch(
        &self,
        towers: &[TowerArrays; 2],
        common: &Common,
        wave: Argument,
        merge: Argument,
        complete: bool,
    ) -> Launch {
        let problem = self.layouts.problem;
        let m = problem.pairs.rows();
        let combine = Argument::new()
            .pointer(at(common.sums))
            .pointer(at(common.above))
            .pointer(at(common.positive))
            .pointer(at(common.weights))
            .pointer(at(common.groups))
            .pointer(at(common.row_losses))
            .pointer(at(common.diagonal))
            .pointer(at(common.log_coefficients))
            .pointer(at(common.results))
            .pointer(at(towers[0].faults))
            .pointer(at(towers[1].faults))
            .pointer(at(common.block_results))
            .pointer(at(common.status))
            .pointer(at(common.ticket))
            .f64(problem.call().beta())
            .u32(m)
            .u32(problem.call().loss().groups().len())
            .u32(towers[0].indices)
            .u32(towers[1].indices)
            .flag(self.zero_is_error())
            .flag(problem.call().no_negative() == NoNegative::Error)
            .flag(!complete)
            .u32(0_u32);
        Launch::new("combine", "combine", [m.div_ceil(COMBINED_ROWS) as u32, 1], REDUCE_THREADS)
            .shared(COMBINE_BYTES)
            .argument(wave)
            .argument(merge)
            .argument(combine)
    }

    /// The last launch.
    pub(super) fn projection(
        &mut self,
        towers: &[TowerArrays; 2],
        common: &Common,
        sums: &[Option<Sums>; 2],
        last_dots: &Argument,
    ) {
        let problem = self.layouts.problem;
        let rows = &problem.rows;
        let (mut projections, mut blocks) = (Argument::new(), 1);
        for (k, sums) in sums.iter().enumerate() {
            let (own, other) = (&towers[k], &towers[1 - k]);
            let (out_rows, first_row) = [(rows.len(), rows.start), (problem.pairs.passages(), 0)][k];
            let wanted = sums.as_ref().zip(problem.gradients[k]);
            let (out, out_row_bytes, out_type, out_rows) = wanted.map_or((Address::Null, 0, 0, 0), |(sums, output)| {
                let row_bytes = output.row_stride * output.dtype.bytes();
                (at(sums.output), row_bytes as u64, output.dtype.code(), out_rows)
            });
            let (address, stride) = sums.as_ref().map_or((Address::Null, 0), |s| (s.address, s.stride));
            let projection = Argument::new()
                .nested(&self.raw(own))
                .nested(&self.raw(other))
                .pointer(address)
                .u64(stride as u64)
                .pointer(at(own.inverse))
                .pointer(at(own.inverse_norm))
                .pointer(at(other.inverse_norm))
                .pointer(out)
                .u64(out_row_bytes)
                .u32(out_type)
                .u32(out_rows)
                .u32(first_row)
                .u32(k);
            projections = projections.nested(&projection.end());
            blocks += out_rows.div_ceil(ROWS_PER_BLOCK);
        }
        let backward = projections
            .nested(&last_dots.clone().end())
            .pointer(at(common.diagonal))
            .pointer(common.positives)
            .pointer(common.anchor_index)
            .pointer(common.occurrence_start)
            .pointer(common.occurrences)
            .pointer(at(common.anchor_row))
            .pointer(common.upstream)
            .pointer(at(common.status))
            .f64(problem.call().beta())
            .f64(problem.upstream)
            .u32(rows.start)
            .u32(rows.end)
            .flag(self.zero_is_error())
            .u32(0_u32);
        let launch = Launch::new("project", "project", [blocks as u32, 1], REDUCE_THREADS).shared(REDUCE_BYTES);
        self.backward.push(launch.argument(backward));
    }
}
