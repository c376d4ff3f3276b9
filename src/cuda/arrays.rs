//! Arrays of a call: their names, slots and sizes, and the content of the side data.

use super::abi::{
    self, COMBINED_ROWS, FOUND, MAX_CUTS, MAX_SUPER_BLOCKS, NOT_KEPT, RESULTS, ROWS_PER_BLOCK, STATUS_WORDS, Shared,
    number,
};
use super::prefixes::{self, PrefixArrays};
use super::problem::{Arithmetic, Packing, Problem, Tile};
use super::schedule::{ARRAY_ALIGNMENT, Address, Array, ArrayId, Slot};
use super::waves::{Division, Elements, Wave, kept_elements};
use crate::call::{NoNegative, ZeroNorm};
use crate::candidates::candidates;
use crate::dtype::DType;
use crate::loss::Block;
use crate::mask::Keys;
use crate::order::{Occurrences, Order, Space};
use crate::problem::GradientOutput;
use crate::super_blocks::{SuperBlock, Tiling};
use bytemuck::{NoUninit, Pod};
use std::collections::HashMap;

/// Places of arrays in slots.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) arrays: Vec<Array>,
    /// Bytes of each slot.
    pub(super) ends: [u64; Slot::ALL.len()],
    /// What the slot `Side` holds.
    pub(super) side: Vec<u8>,
}

impl Layout {
    pub(super) fn add(&mut self, slot: Slot, name: &'static str, bytes: usize) -> Address {
        let end = &mut self.ends[slot as usize];
        let offset = end.next_multiple_of(ARRAY_ALIGNMENT);
        *end = offset + bytes as u64;
        self.arrays.push(Array { name, slot, offset, bytes: bytes as u64 });
        Address::In(ArrayId(self.arrays.len() - 1), 0)
    }

    /// Lays out two groups of arrays of the workspace over each other, because they are never in use at the same time.
    fn overlay<A, B>(&mut self, a: impl FnOnce(&mut Self) -> A, b: impl FnOnce(&mut Self) -> B) -> (A, B) {
        let start = self.ends[Slot::Workspace as usize];
        let first = a(self);
        let end = std::mem::replace(&mut self.ends[Slot::Workspace as usize], start);
        let second = b(self);
        let last = &mut self.ends[Slot::Workspace as usize];
        *last = end.max(*last);
        (first, second)
    }

    /// Adds an array of the side data with its content.
    pub(super) fn add_side<T: NoUninit + Pod>(&mut self, name: &'static str, content: &[T]) -> Address {
        let bytes: &[u8] = bytemuck::cast_slice(content);
        let address = self.add(Slot::Side, name, bytes.len());
        self.side.resize(self.ends[Slot::Side as usize] as usize - bytes.len(), 0);
        self.side.extend(bytes);
        address
    }
}

/// What the arrays and the launches of a plan follow from.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) order: &'a Order,
    pub(super) tile: Tile,
    pub(super) division: &'a Division,
}

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
    /// `None` for a call that has only the whole embedding.
    pub(super) prefixes: Option<PrefixArrays>,
}

/// What decides which squares of cosines are left out of the gradient.
pub(super) struct Skipping {
    /// For each super-block whose squares may be skipped, by its number: the place of its first square.
    pub(super) first_squares: HashMap<usize, usize>,
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
    /// What the address of the output must be a multiple of.
    alignment: u64,
}

/// The arrays of a call.
pub(super) struct Arrays<'a> {
    pub(super) parts: Parts<'a>,
    pub(super) layout: Layout,
    pub(super) common: Common,
    pub(super) towers: [TowerArrays; 2],
    pub(super) sums: [Option<Sums>; 2],
    pub(super) partials: Address,
    pub(super) counts: Address,
    pub(super) gradients: Address,
    /// Bytes from the first plane of `gradients` to the second.
    pub(super) plane: u64,
    /// A dot is a tile's part of ∂L/∂β.
    pub(super) dots: Address,
    kept_cosines: Address,
    /// For each super-block whose cosines are stored, by its number: the place of its first cosine.
    first_cosines: HashMap<usize, u64>,
    /// With prefixes: the cosines that are stored for one wave, and the radial sums of its tiles.
    wave_cosines: Address,
    pub(super) radials: Address,
    /// Numbers of elements of all waves, the largest of each. With prefixes, those of one prefix.
    pub(super) elements: Elements,
    /// Number of cosines that are stored, of one prefix.
    pub(super) kept: usize,
    pub(super) bounded_bytes: usize,
}

impl<'a> Arrays<'a> {
    pub(super) fn new(parts: Parts<'a>) -> Self {
        let mut layout = Layout::default();
        let common = parts.common(&mut layout);
        let towers = [Space::Query, Space::Passage].map(|space| parts.tower(&mut layout, space));
        let sums = [0, 1].map(|k| parts.sums(&mut layout, k));
        let Parts { problem, tile, division, .. } = parts;
        let (tiling, arithmetic) = (tile.tiling(), problem.arithmetic());
        let most = |waves: &[Wave], f: fn(&SuperBlock, Tiling) -> usize| {
            waves.iter().map(|w| w.iter().map(|s| f(s, tiling)).sum::<usize>()).max().unwrap_or(0).max(1)
        };
        let contents = problem.contents();
        let partials = |waves: &[Wave]| most(waves, |s, tile| s.partials(tile).iter().sum());
        let cosines = |wave: &Wave| wave.iter().map(|s| kept_elements(s, tile)).sum::<usize>();
        let elements = Elements {
            partials: partials(&division.forward),
            gradients: most(&division.backward, SuperBlock::elements),
            dots: most(&division.backward, SuperBlock::tiles),
            radials: partials(&division.backward),
            cosines: division.backward.iter().map(cosines).max().unwrap_or(0).max(1),
        };
        let (planes, plane) = (contents.planes(), elements.gradients * arithmetic.bytes());
        let ((partials, counts), (gradients, dots, radials, wave_cosines)) = layout.overlay(
            |l| {
                let partials = l.add(Slot::Workspace, "partials", abi::Partial::BYTES * elements.partials * planes);
                (partials, l.add(Slot::Workspace, "counts", u32::BYTES * elements.partials * planes))
            },
            |l| {
                let bytes = plane * arithmetic.gradient_planes() * planes;
                let gradients = l.add(Slot::Workspace, "gradients", bytes);
                let dots = l.add(Slot::Workspace, "dots", f64::BYTES * elements.dots);
                let Some(prefixes) = contents.prefixes else { return (gradients, dots, Address::Null, Address::Null) };
                let radials = match prefixes {
                    1 => Address::Null,
                    _ => l.add(Slot::Workspace, "radials", f32::BYTES * elements.radials * (prefixes - 1)),
                };
                (
                    gradients,
                    dots,
                    radials,
                    l.add(Slot::Workspace, "wave_cosines", f32::BYTES * elements.cosines * prefixes),
                )
            },
        );
        let (mut kept, mut first_cosines) = (0, HashMap::new());
        for block in division.kept_blocks() {
            first_cosines.insert(block.number, kept as u64);
            kept += kept_elements(block, tile);
        }
        let cosine_bytes = f32::BYTES * kept * planes;
        let kept_cosines = match kept {
            0 => Address::Null,
            _ => layout.add(Slot::Workspace, "cosines", cosine_bytes),
        };
        let bounded_bytes = contents.bytes(elements) + cosine_bytes;
        let plane = plane as u64;
        Self {
            parts,
            layout,
            common,
            towers,
            sums,
            partials,
            counts,
            gradients,
            plane,
            dots,
            kept_cosines,
            first_cosines,
            wave_cosines,
            radials,
            elements,
            kept,
            bounded_bytes,
        }
    }

    /// Whether the cosines of a super-block are stored.
    pub(super) fn keeps(&self, block: &SuperBlock) -> bool {
        self.first_cosines.contains_key(&block.number)
    }

    /// Where the super-blocks of a launch have their cosines.
    pub(super) fn cosines(&self, wave: &[SuperBlock]) -> abi::Cosines {
        let mut first = [NOT_KEPT; MAX_SUPER_BLOCKS];
        for (first, block) in first.iter_mut().zip(wave) {
            *first = self.first_cosines.get(&block.number).copied().unwrap_or(NOT_KEPT);
        }
        abi::Cosines { kept: self.kept_cosines, first }
    }

    /// Where the super-blocks of a launch have cosines that are stored for their wave alone, from cosine `element` of the wave on.
    pub(super) fn wave_cosines(&self, wave: &[SuperBlock], mut element: usize) -> abi::Cosines {
        let mut first = [NOT_KEPT; MAX_SUPER_BLOCKS];
        for (first, block) in first.iter_mut().zip(wave) {
            *first = element as u64;
            element += kept_elements(block, self.parts.tile);
        }
        abi::Cosines { kept: self.wave_cosines, first }
    }

    /// What the address of a gradient must be a multiple of.
    pub(super) fn gradient_alignment(&self, k: usize) -> u64 {
        self.sums[k].as_ref().map_or(1, |sums| sums.alignment)
    }
}

impl Parts<'_> {
    fn common(&self, layout: &mut Layout) -> Common {
        let Parts { problem, order, .. } = self;
        let (m, pairs) = (problem.pairs.rows(), &problem.pairs);
        let keys = Keys::new(pairs);
        let row_keys: Vec<[u32; 2]> = keys.rows.iter().map(|k| [k.query, k.passage]).collect();
        let row_keys = layout.add_side("row_keys", &row_keys);
        let weight = layout.add_side("weights", &pairs.normalized_weights());
        let groups: Vec<abi::Group> = (problem.call().loss().groups().iter())
            .map(|g| abi::Group {
                coefficient: g.coefficient(),
                blocks: g.blocks().iter().fold(0, |bits, b| bits | 1 << b.index()),
                copies: g.positive_copies().into(),
            })
            .collect();
        let groups = layout.add_side("groups", &groups);
        let anchor_row = layout.add_side("anchor_row", &order.anchor_row);
        let [mut positives, mut anchor_index, mut occurrence_start, mut indices] = [Address::Null; 4];
        if order.passage.is_some() {
            let positive: Vec<u32> = (0..m).map(|i| pairs.positive(i) as u32).collect();
            positives = layout.add_side("positives", &positive);
            anchor_index = layout.add_side("anchor_index", &order.anchor_index(m));
            let occurrences = Occurrences::new(order);
            occurrence_start = layout.add_side("occurrence_start", &occurrences.start);
            indices = layout.add_side("occurrences", &occurrences.index);
        }
        let upstream = match problem.device_upstream {
            true => layout.add(Slot::Upstream, "upstream", 4),
            false => Address::Null,
        };
        // With prefixes, arrays by row have a part for each. Results, status and row losses of the call come before those of the prefixes.
        let planes = problem.contents().planes();
        let joint = usize::from(problem.several().is_some());
        let mut state = |name, bytes: usize, parts: usize| layout.add(Slot::State, name, bytes * parts);
        let results = state("results", RESULTS * f64::BYTES, joint + planes);
        let status = state("status", STATUS_WORDS * u32::BYTES, joint + planes);
        let ticket = state("ticket", u32::BYTES, planes);
        let row_losses = state("row_losses", f64::BYTES * m, joint + planes);
        let sums = state("sums", 4 * abi::ExpSum::BYTES * m, planes);
        let above = state("above", 2 * u32::BYTES * m, planes);
        let positive = state("positive", f64::BYTES * m, planes);
        let anchors = state("anchors", <[u32; 4]>::BYTES * m, planes);
        let diagonal = state("diagonal", f64::BYTES * m, planes);
        let log_coefficients = state("log_coefficients", 4 * f64::BYTES * m, planes);
        let prefixes = PrefixArrays::new(self, layout);
        let skipping = self.skipping(layout);
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
            prefix_weights: prefixes.as_ref().map_or(Address::Null, |p| p.weights),
            row_losses,
            diagonal,
            log_coefficients,
            results,
            faults: [Address::Null; 2],
            found: layout.add(Slot::Workspace, "block_results", f64::BYTES * FOUND * blocks * planes),
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
            prefixes,
        }
    }

    /// Gives every square that may be skipped its place. `None` if the call asks for no skipping, or if no square may be skipped.
    fn skipping(&self, layout: &mut Layout) -> Option<Skipping> {
        let Parts { problem, tile, division, .. } = self;
        let share = problem.call().tile_skipping()?;
        let (mut squares, mut first_squares) = (0, HashMap::new());
        for block in division.backward.iter().flatten().filter(|s| s.knows_shares()) {
            first_squares.insert(block.number, squares);
            squares += block.squares(tile.tiling());
        }
        // The candidates that a row meets in all its blocks. They include the row itself and its positive, so the shares of all squares
        // add up to η at most.
        let (m, n, _) = problem.shape();
        let candidates = |block: &Block| if matches!(block, Block::QP | Block::PP) { n } else { m };
        let met: usize = Block::ALL.iter().filter(|b| problem.call().loss().uses(**b)).map(candidates).sum();
        (squares > 0).then(|| Skipping {
            first_squares,
            masses: layout.add(Slot::State, "square_masses", abi::Masses::BYTES * squares),
            skipped: layout.add(Slot::State, "skipped", u32::BYTES * squares),
            log2_share: share.log2() - (met as f64).log2(),
        })
    }

    fn tower(&self, layout: &mut Layout, space: Space) -> TowerArrays {
        let Parts { problem, order, tile, .. } = self;
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
        let raw = layout.add(slot, raw, raw_bytes);
        let candidates = layout.add_side(own_candidates, &candidates);
        let passage_order = order.passage.as_ref().filter(|_| space == Space::Passage);
        let visited = passage_order.map_or(Address::Null, |o| layout.add_side("order", o));
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
        let planes = problem.contents().planes();
        let plane = padded * packed_row_bytes;
        let (row_pitch, panel) = match tile.kernels().packing {
            Packing::Rows => (packed_row_bytes, 128),
            Packing::Panels => (128, 128 * padded),
        };
        let mut workspace = |name, bytes| layout.add(Slot::Workspace, name, bytes);
        let packing = abi::Packing {
            raw: abi::Raw { data: raw, row_bytes, dim: number(d), dtype: problem.dtype.code() },
            order: visited,
            packed: workspace(packed, plane * problem.arithmetic().planes()),
            plane: plane as u64,
            inverse: workspace(inverse, f32::BYTES * indices * planes),
            // A backward call compares norms with these, to know whether it was given the embeddings of the forward call.
            inverse_norm: layout.add(Slot::State, inverse_norm, f64::BYTES * indices * planes),
            // These are part of the state. Shards exchange sums before `combine` reads the faults, and meanwhile another call may use the
            // workspace.
            faults: layout.add(Slot::State, faults, <[u32; 2]>::BYTES * indices),
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
        let segments = self.problem.several().map(|_| prefixes::segments(self.problem));
        let end = segments.and_then(|segments| Some(segments.last()?.packed_end));
        end.unwrap_or((self.problem.dim * self.problem.arithmetic().bytes()).next_multiple_of(128))
    }

    /// Number of indices of each space.
    pub(super) fn indices(&self) -> [usize; 2] {
        [self.problem.pairs.rows(), self.order.len()]
    }

    /// Indices of a space that have gradients in this shard.
    pub(super) fn gradient_range(&self, k: usize) -> std::ops::Range<usize> {
        if k == 0 { self.problem.rows.clone() } else { 0..self.order.len() }
    }

    fn sums(&self, layout: &mut Layout, k: usize) -> Option<Sums> {
        let Parts { problem, order, .. } = self;
        let GradientOutput { dtype, row_stride } = problem.gradients[k]?;
        let (slot, name) = [(Slot::QueryGradient, "query_gradient"), (Slot::PassageGradient, "passage_gradient")][k];
        let rows = if k == 0 { problem.rows.len() } else { problem.pairs.passages() };
        let bytes = ((rows - 1) * row_stride + problem.dim) * dtype.bytes();
        let output = layout.add(slot, name, bytes);
        let range = self.gradient_range(k);
        // Kernels store two sums at once, so rows of sums must begin at multiples of 8 bytes. With prefixes sums are in packed columns.
        let several = problem.several().is_some();
        let in_place = !several && dtype == DType::F32 && row_stride % 2 == 0 && (k == 0 || order.passage.is_none());
        let alignment = if in_place { 8 } else { dtype.bytes() as u64 };
        let (sums, stride) = if in_place {
            (output, row_stride)
        } else {
            let packed = self.packed_row_bytes() / problem.arithmetic().bytes();
            let stride = if several { packed } else { problem.dim.next_multiple_of(2) };
            (layout.add(Slot::Workspace, ["query_sums", "passage_sums"][k], 4 * range.len() * stride), stride)
        };
        // Kernels address sums by index. The first index of a shard may be above 0, so the address is as far before the array.
        let address = sums.after(-((4 * range.start * stride) as i64));
        Some(Sums { address, stride, output, alignment })
    }
}
