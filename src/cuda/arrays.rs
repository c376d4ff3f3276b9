//! Arrays of a call: their names, slots and sizes, and the content of the side data.

use super::launches::{Launches, at};
use super::per_row::{COMBINED_ROWS, FOUND, ROWS_PER_BLOCK};
use super::plan::Layouts;
use super::problem::Tile;
use super::schedule::{Address, ArrayId, Slot};
use crate::candidates::candidates;
use crate::dtype::DType;
use crate::loss::Block;
use crate::mask::Keys;
use crate::order::Space;
use crate::problem::GradientOutput;
use bytemuck::{NoUninit, Pod};

/// One tower on the device.
pub(super) struct TowerArrays {
    pub(super) raw: ArrayId,
    pub(super) row_bytes: u64,
    pub(super) order: Address,
    pub(super) indices: usize,
    pub(super) padded: usize,
    pub(super) packed: ArrayId,
    pub(super) plane: u64,
    pub(super) row_pitch: u64,
    pub(super) panel: u64,
    pub(super) parts: Vec<Part>,
    pub(super) inverse: ArrayId,
    pub(super) inverse_norm: ArrayId,
    /// For each index, what is wrong with its embedding.
    pub(super) faults: ArrayId,
    pub(super) candidates: ArrayId,
}

/// Indices of a space from a cut (src/regions.rs) to the next, and where they begin among the packed rows.
pub(super) struct Part {
    pub(super) index: usize,
    pub(super) row: usize,
}

impl TowerArrays {
    /// The packed row of an index.
    pub(super) fn packed_row(&self, index: usize) -> usize {
        self.parts.iter().rev().find(|p| p.index <= index).map_or(index, |p| p.row + index - p.index)
    }
}

/// Arrays of the state and the side data.
pub(super) struct Common {
    pub(super) row_keys: ArrayId,
    pub(super) weights: ArrayId,
    pub(super) groups: ArrayId,
    pub(super) anchor_row: ArrayId,
    // Null where the order of the passages is the identity.
    pub(super) positives: Address,
    pub(super) anchor_index: Address,
    pub(super) occurrence_start: Address,
    pub(super) occurrences: Address,
    pub(super) results: ArrayId,
    pub(super) status: ArrayId,
    /// Blocks of `combine` that are done, 0 between launches.
    pub(super) ticket: ArrayId,
    pub(super) row_losses: ArrayId,
    pub(super) sums: ArrayId,
    pub(super) above: ArrayId,
    pub(super) positive: ArrayId,
    pub(super) anchors: ArrayId,
    pub(super) diagonal: ArrayId,
    pub(super) log_coefficients: ArrayId,
    pub(super) block_results: ArrayId,
    pub(super) upstream: Address,
    pub(super) skipping: Option<Skipping>,
}

/// What decides which squares of cosines are left out of the gradient.
#[derive(Clone, Copy)]
pub(super) struct Skipping {
    pub(super) masses: ArrayId,
    pub(super) skipped: ArrayId,
    /// log₂ of η for each of the candidates that a row meets.
    pub(super) log2_share: f64,
}

/// Where sums of gradients are collected: in the output itself where its type and order allow.
pub(super) struct Sums {
    pub(super) address: Address,
    pub(super) stride: usize,
    pub(super) output: ArrayId,
}

impl Launches<'_> {
    /// Adds an array of the side data with its content.
    fn side_array<T: NoUninit + Pod>(&mut self, name: &'static str, content: &[T]) -> ArrayId {
        let bytes: &[u8] = bytemuck::cast_slice(content);
        let id = self.layout.add(Slot::Side, name, bytes.len());
        self.side.resize(self.layout.arrays[id.0].offset as usize, 0);
        self.side.extend(bytes);
        id
    }

    pub(super) fn common(&mut self) -> Common {
        let Layouts { problem, order, occurrences, .. } = self.layouts;
        let (m, pairs) = (problem.pairs.rows(), &problem.pairs);
        let keys = Keys::new(pairs);
        let row_keys: Vec<[u32; 2]> = keys.rows.iter().map(|k| [k.query, k.passage]).collect();
        let row_keys = self.side_array("row_keys", &row_keys);
        let weights = self.side_array("weights", &pairs.normalized_weights());
        let groups: Vec<[u64; 2]> = (problem.call().loss().groups().iter())
            .map(|g| {
                let blocks = g.blocks().iter().fold(0_u64, |bits, b| bits | 1 << b.index());
                [g.coefficient().to_bits(), blocks | u64::from(g.positive_copies()) << 32]
            })
            .collect();
        let groups = self.side_array("groups", &groups);
        let anchor_row = self.side_array("anchor_row", &order.anchor_row);
        let [mut positives, mut anchor_index, mut occurrence_start, mut indices] = [Address::Null; 4];
        if order.passage.is_some() {
            let positive: Vec<u32> = (0..m).map(|i| pairs.positive(i) as u32).collect();
            positives = at(self.side_array("positives", &positive));
            anchor_index = at(self.side_array("anchor_index", &order.anchor_index(m)));
            occurrence_start = at(self.side_array("occurrence_start", &occurrences.start));
            indices = at(self.side_array("occurrences", &occurrences.index));
        }
        let upstream = match problem.device_upstream {
            true => at(self.layout.add(Slot::Upstream, "upstream", 4)),
            false => Address::Null,
        };
        let mut state = |name, bytes| self.layout.add(Slot::State, name, bytes);
        let (results, status, ticket) = (state("results", 16 * 8), state("status", 10 * 4), state("ticket", 4));
        let row_losses = state("row_losses", 8 * m);
        let (sums, above) = (state("sums", 4 * 16 * m), state("above", 2 * 4 * m));
        let (positive, anchors) = (state("positive", 8 * m), state("anchors", 16 * m));
        let (diagonal, log_coefficients) = (state("diagonal", 8 * m), state("log_coefficients", 4 * 8 * m));
        let skipping = self.skipping();
        let blocks = m.div_ceil(COMBINED_ROWS);
        let block_results = self.layout.add(Slot::Workspace, "block_results", 8 * FOUND * blocks);
        Common {
            row_keys,
            weights,
            groups,
            anchor_row,
            positives,
            anchor_index,
            occurrence_start,
            occurrences: indices,
            results,
            status,
            ticket,
            row_losses,
            sums,
            above,
            positive,
            anchors,
            diagonal,
            log_coefficients,
            block_results,
            upstream,
            skipping,
        }
    }

    /// Gives every square that may be skipped its place; none if the options ask for no skipping, or there is no such square.
    fn skipping(&mut self) -> Option<Skipping> {
        let Layouts { problem, tile, division, .. } = self.layouts;
        let share = problem.call().tile_skipping()?;
        let mut squares = 0;
        for block in division.backward.iter().flatten().filter(|s| s.knows_shares()) {
            self.first_squares.insert(block.number, squares);
            squares += block.squares(tile.tiling());
        }
        // Of a row in all its blocks, itself and its positive among them, so that shares of tiles add up to η at the most.
        let (m, n, _) = problem.shape();
        let candidates = |block: &Block| if matches!(block, Block::QP | Block::PP) { n } else { m };
        let met: usize = Block::ALL.iter().filter(|b| problem.call().loss().uses(**b)).map(candidates).sum();
        (squares > 0).then(|| Skipping {
            masses: self.layout.add(Slot::State, "square_masses", 16 * squares),
            skipped: self.layout.add(Slot::State, "skipped", 4 * squares),
            log2_share: share.log2() - (met as f64).log2(),
        })
    }

    pub(super) fn tower(&mut self, space: Space) -> TowerArrays {
        let Layouts { problem, order, tile, .. } = self.layouts;
        let (m, n, d) = problem.shape();
        let keys = Keys::new(&problem.pairs);
        let (rows, indices) = match space {
            Space::Query => (m, m),
            Space::Passage => (n, order.len()),
        };
        let candidates = candidates(problem, order, &keys, space);
        let (slot, names) = match space {
            Space::Query => (
                Slot::Query,
                ["query", "query_candidates", "query_packed", "query_inverse", "query_inverse_norm", "query_faults"],
            ),
            Space::Passage => (
                Slot::Passage,
                [
                    "passage",
                    "passage_candidates",
                    "passage_packed",
                    "passage_inverse",
                    "passage_inverse_norm",
                    "passage_faults",
                ],
            ),
        };
        let row_bytes = (problem.row_strides[space as usize] * problem.dtype.bytes()) as u64;
        let raw_bytes = (rows - 1) * row_bytes as usize + d * problem.dtype.bytes();
        let raw = self.layout.add(slot, names[0], raw_bytes);
        let candidates = self.side_array(names[1], &candidates);
        let passage_order = order.passage.as_ref().filter(|_| space == Space::Passage);
        let visited = passage_order.map_or(Address::Null, |o| at(self.side_array("order", o)));
        let planes = problem.arithmetic().planes();
        let (parts, padded) = match tile {
            // A tile that begins at the last index reads a tile's rows from there on.
            Tile::Small | Tile::Large => {
                (vec![Part { index: 0, row: 0 }], (indices + tile.edge()).next_multiple_of(ROWS_PER_BLOCK))
            }
            // Every part begins at a whole square, so that tiles are whole eights of rows.
            Tile::Cluster => {
                let cuts = &crate::regions::cuts(&problem.rows, order, m)[space as usize];
                let mut row = 0;
                let mut part = |ends: &[usize]| {
                    let part = Part { index: ends[0], row };
                    row += (ends[1] - ends[0]).next_multiple_of(tile.step());
                    part
                };
                (cuts.windows(2).map(&mut part).collect(), row)
            }
        };
        let row_bytes_packed = self.packed_row_bytes();
        let plane = padded * row_bytes_packed;
        let (row_pitch, panel) = match tile {
            Tile::Small | Tile::Large => (row_bytes_packed, 128),
            Tile::Cluster => (128, 128 * padded),
        };
        TowerArrays {
            raw,
            row_bytes,
            order: visited,
            indices,
            padded,
            packed: self.layout.add(Slot::Workspace, names[2], plane * planes),
            plane: plane as u64,
            row_pitch: row_pitch as u64,
            panel: panel as u64,
            parts,
            inverse: self.layout.add(Slot::Workspace, names[3], 4 * indices),
            // By which a backward call knows the embeddings of the forward call.
            inverse_norm: self.layout.add(Slot::State, names[4], 8 * indices),
            // A shard's sums are exchanged before `combine` reads them, and the workspace may serve others meanwhile.
            faults: self.layout.add(Slot::State, names[5], 8 * indices),
            candidates,
        }
    }

    pub(super) fn packed_row_bytes(&self) -> usize {
        (self.layouts.problem.dim * self.layouts.problem.arithmetic().bytes()).next_multiple_of(128)
    }

    /// Range of a space that has gradients in this shard.
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
        // Pairs of sums are stored at once, so rows of f32 must begin at multiples of 8 bytes.
        let in_place = dtype == DType::F32 && row_stride % 2 == 0 && (k == 0 || order.passage.is_none());
        self.gradient_alignment[k] = if in_place { 8 } else { dtype.bytes() as u64 };
        let (id, stride) = if in_place {
            (output, row_stride)
        } else {
            let stride = problem.dim.next_multiple_of(2);
            (self.layout.add(Slot::Workspace, ["query_sums", "passage_sums"][k], 4 * range.len() * stride), stride)
        };
        // Kernels address by index; the first one of a shard is not 0.
        Some(Sums { address: Address::In(id, -((4 * range.start * stride) as i64)), stride, output })
    }
}
