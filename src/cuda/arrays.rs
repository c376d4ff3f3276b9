//! Arrays of a call: their names, slots and sizes, and the content of the side data.

use super::abi::{self, COMBINED_ROWS, FOUND, MAX_CUTS, RESULTS, ROWS_PER_BLOCK, STATUS_WORDS, Shared, number};
use super::launches::{Launches, at};
use super::plan::Layouts;
use super::problem::{Arithmetic, Packing};
use super::schedule::{Address, Slot};
use crate::call::{NoNegative, ZeroNorm};
use crate::candidates::candidates;
use crate::dtype::DType;
use crate::loss::Block;
use crate::mask::Keys;
use crate::order::Space;
use crate::problem::GradientOutput;
use bytemuck::{NoUninit, Pod};

/// One tower on the device.
pub(super) struct TowerArrays {
    pub(super) packing: abi::Packing,
    pub(super) candidates: Address,
}

impl TowerArrays {
    /// Where in the packed embeddings the row of an index is.
    pub(super) fn packed_row(&self, index: u32) -> u32 {
        let abi::Packing { index: starts, row: rows, parts, .. } = &self.packing;
        let mut parts = starts.iter().zip(rows).take(*parts as usize).rev();
        parts.find(|(start, _)| **start <= index).map_or(index, |(start, row)| row + index - start)
    }
}

/// Arrays of the state and the side data.
pub(super) struct Common {
    pub(super) positives: abi::Positives,
    /// Parameters of `combine`. Those that depend on the towers are not set yet.
    pub(super) combine: abi::Combine,
    pub(super) anchor_row: Address,
    // These three are null where the order of the passages is the identity.
    pub(super) anchor_index: Address,
    pub(super) occurrence_start: Address,
    pub(super) occurrences: Address,
    pub(super) upstream: Address,
    pub(super) skipping: Option<Skipping>,
}

/// What decides which squares of cosines are left out of the gradient.
#[derive(Clone, Copy)]
pub(super) struct Skipping {
    pub(super) masses: Address,
    pub(super) skipped: Address,
    /// log₂ of the share of a row's softmax that may be skipped for each candidate that the row meets: η over their number.
    pub(super) log2_share: f64,
}

/// Where the sums of a tower's gradients are collected. That is the output itself if its type, stride and order allow it.
pub(super) struct Sums {
    pub(super) address: Address,
    pub(super) stride: usize,
    pub(super) output: Address,
}

impl Launches<'_> {
    /// Adds an array of the side data with its content.
    fn side_array<T: NoUninit + Pod>(&mut self, name: &'static str, content: &[T]) -> Address {
        let bytes: &[u8] = bytemuck::cast_slice(content);
        let id = self.layout.add(Slot::Side, name, bytes.len());
        self.side.resize(self.layout.arrays[id.0].offset as usize, 0);
        self.side.extend(bytes);
        at(id)
    }

    pub(super) fn common(&mut self) -> Common {
        let Layouts { problem, order, occurrences, .. } = self.layouts;
        let (m, pairs) = (problem.pairs.rows(), &problem.pairs);
        let keys = Keys::new(pairs);
        let row_keys: Vec<[u32; 2]> = keys.rows.iter().map(|k| [k.query, k.passage]).collect();
        let row_keys = self.side_array("row_keys", &row_keys);
        let weight = self.side_array("weights", &pairs.normalized_weights());
        let groups: Vec<abi::Group> = (problem.call().loss().groups().iter())
            .map(|g| abi::Group {
                coefficient: g.coefficient(),
                blocks: g.blocks().iter().fold(0, |bits, b| bits | 1 << b.index()),
                copies: g.positive_copies().into(),
            })
            .collect();
        let groups = self.side_array("groups", &groups);
        let anchor_row = self.side_array("anchor_row", &order.anchor_row);
        let [mut positives, mut anchor_index, mut occurrence_start, mut indices] = [Address::Null; 4];
        if order.passage.is_some() {
            let positive: Vec<u32> = (0..m).map(|i| pairs.positive(i) as u32).collect();
            positives = self.side_array("positives", &positive);
            anchor_index = self.side_array("anchor_index", &order.anchor_index(m));
            occurrence_start = self.side_array("occurrence_start", &occurrences.start);
            indices = self.side_array("occurrences", &occurrences.index);
        }
        let upstream = match problem.device_upstream {
            true => at(self.layout.add(Slot::Upstream, "upstream", 4)),
            false => Address::Null,
        };
        let mut state = |name, bytes| at(self.layout.add(Slot::State, name, bytes));
        let results = state("results", RESULTS * f64::BYTES);
        let (status, ticket) = (state("status", STATUS_WORDS * u32::BYTES), state("ticket", u32::BYTES));
        let row_losses = state("row_losses", f64::BYTES * m);
        let (sums, above) = (state("sums", 4 * abi::ExpSum::BYTES * m), state("above", 2 * u32::BYTES * m));
        let (positive, anchors) = (state("positive", f64::BYTES * m), state("anchors", <[u32; 4]>::BYTES * m));
        let diagonal = state("diagonal", f64::BYTES * m);
        let log_coefficients = state("log_coefficients", 4 * f64::BYTES * m);
        let skipping = self.skipping();
        let blocks = m.div_ceil(COMBINED_ROWS);
        let positives = abi::Positives {
            positives,
            row_keys,
            positive,
            anchors,
            ticket,
            status,
            margin: problem.call().margin().unwrap_or(f64::INFINITY),
            wanted: true,
            padding: 0,
        };
        let combine = abi::Combine {
            sums,
            above,
            positive,
            weight,
            groups,
            row_losses,
            diagonal,
            log_coefficients,
            results,
            faults: [Address::Null; 2],
            found: at(self.layout.add(Slot::Workspace, "block_results", f64::BYTES * FOUND * blocks)),
            status,
            ticket,
            beta: problem.call().beta(),
            rows: number(m),
            group_count: number(problem.call().loss().groups().len()),
            indices: [0; 2],
            zero_is_error: problem.call().zero_norm() == ZeroNorm::Error,
            empty_is_error: problem.call().no_negative() == NoNegative::Error,
            merges_only: false,
            padding: 0,
        };
        Common {
            positives,
            combine,
            anchor_row,
            anchor_index,
            occurrence_start,
            occurrences: indices,
            upstream,
            skipping,
        }
    }

    /// Gives every square that may be skipped its place. `None` if the call asks for no skipping, or if no square may be skipped.
    fn skipping(&mut self) -> Option<Skipping> {
        let Layouts { problem, tile, division, .. } = self.layouts;
        let share = problem.call().tile_skipping()?;
        let mut squares = 0;
        for block in division.backward.iter().flatten().filter(|s| s.knows_shares()) {
            self.first_squares.insert(block.number, squares);
            squares += block.squares(tile.tiling());
        }
        // The candidates that a row meets in all its blocks. They include the row itself and its positive, so the shares of all squares
        // add up to η at most.
        let (m, n, _) = problem.shape();
        let candidates = |block: &Block| if matches!(block, Block::QP | Block::PP) { n } else { m };
        let met: usize = Block::ALL.iter().filter(|b| problem.call().loss().uses(**b)).map(candidates).sum();
        (squares > 0).then(|| Skipping {
            masses: at(self.layout.add(Slot::State, "square_masses", abi::Masses::BYTES * squares)),
            skipped: at(self.layout.add(Slot::State, "skipped", u32::BYTES * squares)),
            log2_share: share.log2() - (met as f64).log2(),
        })
    }

    pub(super) fn tower(&mut self, space: Space) -> TowerArrays {
        let Layouts { problem, order, tile, .. } = self.layouts;
        let (m, n, d) = problem.shape();
        let keys = Keys::new(&problem.pairs);
        let (slot, rows, indices) = match space {
            Space::Query => (Slot::Query, m, m),
            Space::Passage => (Slot::Passage, n, order.len()),
        };
        // Names of the arrays.
        let [raw, own_candidates, packed, inverse, inverse_norm, faults] = [
            ["query", "passage"],
            ["query_candidates", "passage_candidates"],
            ["query_packed", "passage_packed"],
            ["query_inverse", "passage_inverse"],
            ["query_inverse_norm", "passage_inverse_norm"],
            ["query_faults", "passage_faults"],
        ]
        .map(|names| names[space as usize]);
        let candidates = candidates(problem, order, &keys, space);
        let row_bytes = (problem.row_strides[space as usize] * problem.dtype.bytes()) as u64;
        let raw_bytes = (rows - 1) * row_bytes as usize + d * problem.dtype.bytes();
        let raw = at(self.layout.add(slot, raw, raw_bytes));
        let candidates = self.side_array(own_candidates, &candidates);
        let passage_order = order.passage.as_ref().filter(|_| space == Space::Passage);
        let visited = passage_order.map_or(Address::Null, |o| self.side_array("order", o));
        let (mut index, mut row) = ([0; MAX_CUTS], [0; MAX_CUTS]);
        let (parts, padded) = match tile.kernels().packing {
            // A tile may begin at the last index. It reads as many rows from there on as a tile has, so the rows are padded by a tile.
            Packing::Rows => (1, (indices + tile.edge()).next_multiple_of(ROWS_PER_BLOCK)),
            // Every part begins at a multiple of a square's length. So every tile begins at a multiple of eight rows, as wgmma demands.
            Packing::Panels => {
                let cuts = &crate::regions::cuts(&problem.rows, order, m)[space as usize];
                let mut padded = 0;
                for (ends, (index, row)) in cuts.windows(2).zip(index.iter_mut().zip(&mut row)) {
                    (*index, *row) = (number(ends[0]), number(padded));
                    padded += (ends[1] - ends[0]).next_multiple_of(tile.step());
                }
                (cuts.len() - 1, padded)
            }
        };
        let packed_row_bytes = self.packed_row_bytes();
        let plane = padded * packed_row_bytes;
        let (row_pitch, panel) = match tile.kernels().packing {
            Packing::Rows => (packed_row_bytes, 128),
            Packing::Panels => (128, 128 * padded),
        };
        let mut workspace = |name, bytes| at(self.layout.add(Slot::Workspace, name, bytes));
        let packing = abi::Packing {
            raw: abi::Raw { data: raw, row_bytes, dim: number(d), dtype: problem.dtype.code() },
            order: visited,
            packed: workspace(packed, plane * problem.arithmetic().planes()),
            plane: plane as u64,
            inverse: workspace(inverse, f32::BYTES * indices),
            // A backward call compares norms with these, to know whether it was given the embeddings of the forward call.
            inverse_norm: at(self.layout.add(Slot::State, inverse_norm, f64::BYTES * indices)),
            // These are part of the state. Shards exchange sums before `combine` reads the faults, and meanwhile another call may use the
            // workspace.
            faults: at(self.layout.add(Slot::State, faults, <[u32; 2]>::BYTES * indices)),
            row_pitch: row_pitch as u64,
            panel: panel as u64,
            indices: number(indices),
            padded: number(padded),
            row_bytes: number(packed_row_bytes),
            format: match problem.arithmetic() {
                Arithmetic::F16 | Arithmetic::F16x2 => abi::PACK_F16,
                Arithmetic::F16x3 => abi::PACK_F16X3,
                Arithmetic::Exact => abi::PACK_F32,
            },
            swizzled: tile.kernels().packing == Packing::Panels,
            parts: number(parts),
            index,
            row,
        };
        TowerArrays { packing, candidates }
    }

    pub(super) fn packed_row_bytes(&self) -> usize {
        (self.layouts.problem.dim * self.layouts.problem.arithmetic().bytes()).next_multiple_of(128)
    }

    /// Indices of a space that have gradients in this shard.
    pub(super) fn gradient_range(&self, k: usize) -> std::ops::Range<usize> {
        if k == 0 { self.layouts.problem.rows.clone() } else { 0..self.layouts.order.len() }
    }

    pub(super) fn sums(&mut self, k: usize) -> Option<Sums> {
        let Layouts { problem, order, .. } = self.layouts;
        let GradientOutput { dtype, row_stride } = problem.gradients[k]?;
        let (slot, name) = [(Slot::QueryGradient, "query_gradient"), (Slot::PassageGradient, "passage_gradient")][k];
        let rows = if k == 0 { problem.rows.len() } else { problem.pairs.passages() };
        let bytes = ((rows - 1) * row_stride + problem.dim) * dtype.bytes();
        let output = self.layout.add(slot, name, bytes);
        let range = self.gradient_range(k);
        // Kernels store two sums at once, so rows of sums must begin at multiples of 8 bytes.
        let in_place = dtype == DType::F32 && row_stride % 2 == 0 && (k == 0 || order.passage.is_none());
        self.gradient_alignment[k] = if in_place { 8 } else { dtype.bytes() as u64 };
        let (id, stride) = if in_place {
            (output, row_stride)
        } else {
            let stride = problem.dim.next_multiple_of(2);
            (self.layout.add(Slot::Workspace, ["query_sums", "passage_sums"][k], 4 * range.len() * stride), stride)
        };
        // Kernels address sums by index. The first index of a shard may be above 0, so the address is as far before the array.
        Some(Sums { address: Address::In(id, -((4 * range.start * stride) as i64)), stride, output: at(output) })
    }
}
