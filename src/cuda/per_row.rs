//! Launches of the kernels that work a row or an embedding at a time, around the matrix products: `prepare`, `combine`, `project`.

use super::abi::{
    self, COMBINED_ROWS, REDUCE_BYTES, REDUCE_THREADS, RESULTS, ROWS_PER_BLOCK, STATUS_WORDS, Shared, kernels, number,
};
use super::arrays::{Arrays, Parts};
use super::prefixes::of_prefixes;
use super::schedule::{Address, Launch};

/// Shared memory of a thread block of `combine`.
const COMBINE_BYTES: u32 = 2816;

impl Arrays<'_> {
    /// Packs both towers. The forward call also wants norms and cosines of the positives. A backward call that packs again does not.
    pub(super) fn prepare(&self, wanted: bool) -> Launch {
        let of = self.towers.each_ref().map(|tower| tower.packing);
        let blocks = of.iter().map(|packing| packing.padded / number(ROWS_PER_BLOCK)).sum();
        let all = abi::Prepare { of, positives: abi::Positives { wanted, ..self.common.positives } };
        let prepare = |name| Launch::new(name, name, [blocks, 1], REDUCE_THREADS).parameters(&kernels::prepare { all });
        let Some(of) = &self.common.prefixes else { return prepare("prepare") };
        let prefixes = self.prefixes(of, 0, 0);
        prepare("prepare_prefixes").parameters(&kernels::prepare_prefixes { prefixes })
    }

    /// Merges the partial sums of a wave. If they are `complete` with it, combines them.
    pub(super) fn combine(&self, wave: abi::Wave, m: abi::Merge, complete: bool) -> Launch {
        let m_bytes = f64::BYTES * self.parts.problem.pairs.rows();
        let (mut own, mut planes) = (self.common.combine, 1);
        if let Some(prefixes) = self.parts.problem.several() {
            own.results = of_prefixes(own.results, RESULTS * f64::BYTES);
            own.status = of_prefixes(own.status, STATUS_WORDS * u32::BYTES);
            own.row_losses = of_prefixes(own.row_losses, m_bytes);
            planes = prefixes.len();
        }
        let c = abi::Combine {
            faults: self.towers.each_ref().map(|tower| tower.packing.faults),
            indices: self.towers.each_ref().map(|tower| tower.packing.indices),
            merges_only: !complete,
            ..own
        };
        let blocks = self.parts.problem.pairs.rows().div_ceil(COMBINED_ROWS);
        Launch::new("combine", "combine", [number(blocks), number(planes)], REDUCE_THREADS)
            .shared(COMBINE_BYTES)
            .parameters(&kernels::combine { wave, m, c })
    }

    /// Turns sums of gradients into the gradients of the raw embeddings. `dots` are those of the last wave.
    pub(super) fn project(&self, dots: abi::Dots) -> Launch {
        let Self { parts: Parts { problem, .. }, common, towers, sums, .. } = self;
        let rows = &problem.rows;
        let of = [0, 1].map(|k| {
            let (own, other) = (&towers[k].packing, &towers[1 - k].packing);
            let (all_rows, first_row) = [(rows.len(), rows.start), (problem.pairs.passages(), 0)][k];
            let wanted = sums[k].as_ref().zip(problem.gradients[k]);
            let (out, out_row_bytes, out_type, out_rows) = wanted.map_or((Address::Null, 0, 0, 0), |(sums, output)| {
                let row_bytes = output.row_stride * output.dtype.bytes();
                (sums.output, row_bytes as u64, output.dtype.code(), all_rows)
            });
            let (sums, sums_stride) = sums[k].as_ref().map_or((Address::Null, 0), |s| (s.address, s.stride as u64));
            abi::Projection {
                own: own.raw,
                other: other.raw,
                sums,
                sums_stride,
                inverse: own.inverse,
                inverse_norm: own.inverse_norm,
                other_inverse_norm: other.inverse_norm,
                out,
                out_row_bytes,
                out_type,
                rows: number(out_rows),
                first_row: number(first_row),
                is_passage: k == 1,
            }
        });
        let blocks = 1 + of.iter().map(|projection| projection.rows.div_ceil(number(ROWS_PER_BLOCK))).sum::<u32>();
        let b = abi::Backward {
            of,
            dots,
            diagonal: common.combine.diagonal,
            positives: common.positives.positives,
            anchor_index: common.anchor_index,
            occurrence_start: common.occurrence_start,
            occurrences: common.occurrences,
            anchor_row: common.anchor_row,
            upstream: common.upstream,
            status: common.combine.status,
            beta: problem.call().beta(),
            factor: problem.upstream,
            row_begin: number(rows.start),
            row_end: number(rows.end),
            zero_is_error: common.combine.zero_is_error,
            padding: 0,
        };
        let project = |name| Launch::new(name, name, [blocks, 1], REDUCE_THREADS).shared(REDUCE_BYTES);
        let project = |name| project(name).parameters(&kernels::project { b });
        let Some(of) = &common.prefixes else { return project("project") };
        project("project_prefixes").parameters(&self.joined(of))
    }
}
