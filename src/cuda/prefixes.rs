//! What a plan has for prefixes alone: where segments lie, the arrays of all prefixes, and the launches of prefixes.cu.

use super::abi::{self, REDUCE_THREADS, Shared, kernels, number};
use super::arrays::{Arrays, Layout, Parts};
use super::problem::Problem;
use super::schedule::{Address, Launch, Slot};

/// A segment of an embedding: the columns of a prefix that no shorter prefix has.
pub(super) struct Segment {
    /// Where it ends in a raw row, in elements: d_k.
    pub(super) end: usize,
    /// Where it ends in a packed row, in bytes.
    pub(super) packed_end: usize,
}

/// The segments of the prefixes of a call. Each begins at a multiple of 128 bytes of a packed row, so any prefix may end anywhere.
pub(super) fn segments(problem: &Problem<'_>) -> Vec<Segment> {
    let (mut begin, mut packed_end) = (0, 0);
    let segment = |&crate::prefix::Prefix { dim, .. }: &_| {
        packed_end += ((dim - begin) * problem.arithmetic().bytes()).next_multiple_of(128);
        begin = dim;
        Segment { end: dim, packed_end }
    };
    problem.prefixes.iter().map(segment).collect()
}

/// Arrays of a call with prefixes. Those with a part for each prefix have one part after the other.
pub(super) struct PrefixArrays {
    count: usize,
    /// v_k.
    pub(super) weights: Address,
    segments: Address,
    dims: Address,
    scales: [Address; 2],
    factors: Address,
    positive_radials: [Address; 2],
    radial_sums: [Address; 2],
    radials: [Address; 2],
    columns: Address,
    /// Tiles along the packed columns. None has columns of two segments.
    pub(super) tiles_along_dim: usize,
}

impl PrefixArrays {
    /// `None` for a call that has only the whole embedding.
    pub(super) fn new(parts: &Parts<'_>, layout: &mut Layout) -> Option<Self> {
        let Parts { problem, tile, .. } = parts;
        let prefixes = problem.several()?;
        let (count, m, indices) = (prefixes.len(), problem.pairs.rows(), parts.indices());
        let segments = segments(problem);
        let (mut columns, mut begin) = (Vec::new(), 0);
        for (k, segment) in segments.iter().enumerate() {
            let end = segment.packed_end / problem.arithmetic().bytes();
            columns.extend((begin..end).step_by(tile.step()).map(|at| [number(at), number(end), number(k), 0]));
            begin = end;
        }
        let weights: Vec<f64> = prefixes.iter().map(|prefix| prefix.weight).collect();
        let ends: Vec<u32> = segments.iter().map(|segment| number(segment.packed_end)).collect();
        let dims: Vec<u32> = segments.iter().map(|segment| number(segment.end)).collect();
        let weights = layout.add_side("prefix_weights", &weights);
        let (segments, dims) = (layout.add_side("segments", &ends), layout.add_side("prefix_dims", &dims));
        let tiles_along_dim = columns.len();
        let columns = layout.add_side("columns", &columns);
        let wanted = problem.gradients.map(|gradient| gradient.is_some());
        let mut of_spaces = |slot, names: [&'static str; 2], bytes: [usize; 2], wanted: [bool; 2]| {
            [0, 1].map(|k| if wanted[k] && bytes[k] > 0 { layout.add(slot, names[k], bytes[k]) } else { Address::Null })
        };
        let outputs = [problem.rows.len(), problem.pairs.passages()];
        let radial = |of: [usize; 2]| of.map(|of| f64::BYTES * of * (count - 1));
        let scales = of_spaces(
            Slot::Workspace,
            ["query_scales", "passage_scales"],
            indices.map(|of| <[u32; 4]>::BYTES * of * count),
            [true; 2],
        );
        let names = ["query_positive_radials", "passage_positive_radials"];
        let positive_radials = of_spaces(Slot::State, names, radial([m; 2]), [true; 2]);
        let radial_sums =
            of_spaces(Slot::Workspace, ["query_radial_sums", "passage_radial_sums"], radial(indices), wanted);
        let radials = of_spaces(Slot::Workspace, ["query_radials", "passage_radials"], radial(outputs), wanted);
        let factors = layout.add(Slot::State, "factors", f64::BYTES * m * count);
        Some(Self {
            count,
            weights,
            segments,
            dims,
            scales,
            factors,
            positive_radials,
            radial_sums,
            radials,
            columns,
            tiles_along_dim,
        })
    }
}

impl Arrays<'_> {
    /// What every kernel of prefixes gets. Partial sums of one prefix are `partials` elements before those of the next, and its cosines
    /// are `cosines` elements before.
    pub(super) fn prefixes(&self, of: &PrefixArrays, partials: usize, cosines: usize) -> abi::Prefixes {
        let problem = self.parts.problem;
        abi::Prefixes {
            segments: of.segments,
            dims: of.dims,
            scales: of.scales,
            count: number(of.count),
            rows: number(problem.pairs.rows()),
            indices: self.parts.indices().map(number),
            partials: partials as u64,
            cosines: cosines as u64,
            gradients: self.plane * problem.arithmetic().gradient_planes() as u64,
        }
    }

    /// The columns of each tile of the gradient products, and the bytes from the gradients of one prefix to those of the next.
    pub(super) fn columns(&self) -> (Address, u64) {
        let prefixes = self.common.prefixes.as_ref();
        prefixes.map_or((Address::Null, 0), |of| (of.columns, self.prefixes(of, 0, 0).gradients))
    }

    /// Makes results of the call from those of its prefixes.
    pub(super) fn join(&self, of: &PrefixArrays) -> Launch {
        let (combine, m) = (&self.common.combine, self.parts.problem.pairs.rows());
        let j = abi::Join {
            sums: combine.sums,
            log_coefficients: combine.log_coefficients,
            diagonal: combine.diagonal,
            positive: combine.positive,
            prefix_row_losses: of_prefixes(combine.row_losses, f64::BYTES * m),
            prefix_weights: of.weights,
            inverse_norm: self.towers.each_ref().map(|tower| tower.packing.inverse_norm),
            anchor_index: self.common.anchor_index,
            row_losses: combine.row_losses,
            factors: of.factors,
            positive_radials: of.positive_radials,
            results: combine.results,
            status: combine.status,
        };
        let grid = [number(m.div_ceil(REDUCE_THREADS as usize)), 1];
        let prefixes = self.prefixes(of, 0, 0);
        Launch::new("prefixes", "join_prefixes", grid, REDUCE_THREADS)
            .parameters(&kernels::join_prefixes { j, prefixes })
    }

    /// Adds up the radial sums of a wave. `None` if there is one prefix, whose radial part is what is left along the embedding.
    pub(super) fn merge_radials(&self, of: &PrefixArrays, wave: abi::Wave, first: bool) -> Option<Launch> {
        let tile = number(self.parts.tile.edge());
        let r = abi::Radials { partials: self.radials, sums: of.radial_sums, tile, first };
        let prefixes = self.prefixes(of, self.elements.radials, 0);
        let blocks = self.parts.indices().iter().sum::<usize>().div_ceil(REDUCE_THREADS as usize);
        let launch = Launch::new("prefixes", "merge_radials", [number(blocks), number(of.count - 1)], REDUCE_THREADS);
        (of.count > 1).then(|| launch.parameters(&kernels::merge_radials { wave, r, prefixes }))
    }

    /// Makes the radial parts of the output rows, after all waves. `None` as for [`Arrays::merge_radials`].
    pub(super) fn join_radials(&self, of: &PrefixArrays) -> Option<Launch> {
        let (problem, common) = (self.parts.problem, &self.common);
        let outputs = [problem.rows.len(), problem.pairs.passages()];
        let rows = [0, 1].map(|k| if problem.gradients[k].is_some() { outputs[k] } else { 0 });
        let j = abi::JoinRadials {
            sums: of.radial_sums,
            positive_radials: of.positive_radials,
            inverse_norm: self.towers.each_ref().map(|tower| tower.packing.inverse_norm),
            radials: of.radials,
            results: common.combine.results,
            occurrence_start: common.occurrence_start,
            occurrences: common.occurrences,
            anchor_row: common.anchor_row,
            rows: rows.map(number),
            row_begin: number(problem.rows.start),
            row_end: number(problem.rows.end),
        };
        let blocks = rows.iter().sum::<usize>().div_ceil(REDUCE_THREADS as usize);
        let launch = Launch::new("prefixes", "join_radials", [number(blocks), 1], REDUCE_THREADS);
        let prefixes = self.prefixes(of, 0, 0);
        (of.count > 1 && blocks > 0).then(|| launch.parameters(&kernels::join_radials { j, prefixes }))
    }

    /// What the projection reads besides.
    pub(super) fn joined(&self, of: &PrefixArrays) -> kernels::project_prefixes {
        let element_bytes = number(self.parts.problem.arithmetic().bytes());
        let joined = abi::Joined { factors: of.factors, radials: of.radials, element_bytes, padding: 0 };
        kernels::project_prefixes { prefixes: self.prefixes(of, 0, 0), joined }
    }
}

/// Where the parts of the prefixes begin in an array that has a part of so many bytes for the whole call first.
pub(super) fn of_prefixes(array: Address, bytes: usize) -> Address {
    array.after(bytes as i64)
}
