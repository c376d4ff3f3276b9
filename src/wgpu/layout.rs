//! Where things lie in the slots of a plan, and what the side data have in them.

use super::parts::{Parts, Segment};
use super::schedule::{ALIGNMENT, Slot};
use super::shaders::Products;
use super::uniforms::scaled;
use crate::candidates::{NONE, candidates};
use crate::dtype::DType;
use crate::mask::Keys;
use crate::order::Space;
use bytemuck::Pod;

/// Words of the results, with which `state` begins: see shaders/common/state.wgsl.
pub(super) const RESULT_WORDS: usize = 16;
/// Bytes at the beginning of the slot `State`, which the shaders call `status`. What they call `state` follows.
pub(super) const STATUS_BYTES: u64 = ALIGNMENT;
/// Invocations of a workgroup of every shader but those of tiles and products. In `combine` each has a row.
pub(super) const LANES: usize = 64;
/// Elements of each row that a stage of a tile multiplies. The length of packed rows is a multiple of it.
pub(super) const STAGE: usize = 16;
/// Words of the ends of a segment in the side data.
pub(super) const SEGMENT_WORDS: usize = 4;

/// Where arrays begin, in words of `state` and of `side`. In the state, what a prefix has beside its sums is a block of `prefix_words`, and
/// these are the places in the first block.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Layout {
    // state
    pub sums: usize,
    pub norms: [usize; 2],
    pub anchors: usize,
    pub positive: usize,
    pub coefficients: usize,
    pub diagonal: usize,
    pub row_losses: usize,
    pub group_results: usize,
    /// None of the last two without several prefixes.
    pub radials: [usize; 2],
    pub radial: usize,
    pub prefix_words: usize,
    pub state_words: usize,
    // side; the last four are NONE if the order of the passages is the identity
    pub segments: u32,
    pub row_keys: u32,
    pub weights: u32,
    pub groups: u32,
    pub candidates: [u32; 2],
    pub order: u32,
    pub positives: u32,
    pub occurrence_start: u32,
    pub occurrences: u32,
}

impl Layout {
    pub(super) fn new(parts: &Parts<'_>) -> (Self, Vec<u8>) {
        let Parts { problem, order, occurrences, .. } = parts;
        let (m, pairs) = (problem.pairs.rows(), &problem.pairs);
        let mut words = RESULT_WORDS;
        let mut state = |count: usize| {
            let at = words;
            words += count;
            at
        };
        let (prefixes, several) = (parts.segments.len(), usize::from(parts.has_several()));
        let mut layout = Self {
            sums: state(4 * 4 * m * prefixes),
            norms: [state(4 * m), state(4 * order.len())],
            anchors: state(4 * m),
            positive: state(2 * m),
            coefficients: state(4 * 2 * m),
            diagonal: state(2 * m),
            row_losses: state(2 * m),
            group_results: state(12 * m.div_ceil(LANES)),
            radials: [state(several * 2 * m), state(several * 2 * order.len())],
            radial: state(several * 4 * m),
            ..Self::default()
        };
        layout.prefix_words = words - layout.norms[0];
        layout.state_words = layout.norms[0] + prefixes * layout.prefix_words;

        let mut side = Vec::new();
        let ends = |s: &Segment| -> [u32; SEGMENT_WORDS] { [s.vectors.end as u32, s.columns.end as u32, 0, 0] };
        layout.segments = append(&mut side, &parts.segments.iter().map(ends).collect::<Vec<_>>());
        let keys = Keys::new(pairs);
        for space in [Space::Query, Space::Passage] {
            layout.candidates[space as usize] = append(&mut side, &candidates(problem, order, &keys, space));
        }
        layout.row_keys = append(&mut side, &keys.rows.iter().map(|k| [k.query, k.passage]).collect::<Vec<_>>());
        let weights = pairs.normalized_weights().into_iter().map(scaled);
        layout.weights = append(&mut side, &weights.map(|(w, e)| [w.to_bits(), e as u32]).collect::<Vec<_>>());
        let groups = problem.call().loss().groups().iter().map(|g| {
            let blocks = g.blocks().iter().fold(0_u32, |bits, b| bits | 1 << b.index());
            [(g.coefficient() as f32).to_bits(), blocks, u32::from(g.positive_copies())]
        });
        layout.groups = append(&mut side, &groups.collect::<Vec<_>>());
        [layout.order, layout.positives, layout.occurrence_start, layout.occurrences] = [NONE; 4];
        if let Some(passages) = &order.passage {
            layout.order = append(&mut side, passages);
            layout.positives = append(&mut side, &order.anchor_index(m));
            layout.occurrence_start = append(&mut side, &occurrences.start);
            layout.occurrences = append(&mut side, &occurrences.index);
        }
        (layout, side)
    }
}

/// Adds `content` to the side data at a multiple of 16 bytes. Returns its first word.
fn append<T: Pod>(side: &mut Vec<u8>, content: &[T]) -> u32 {
    side.resize(side.len().next_multiple_of(16), 0);
    let at = side.len() / 4;
    side.extend(bytemuck::cast_slice::<T, u8>(content));
    at as u32
}

/// One tower: its embeddings as given, and packed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tower {
    pub raw: Slot,
    pub packed: Slot,
    pub indices: usize,
    pub rows: usize,
    /// Elements from row to row.
    pub row_stride: usize,
    pub element_bytes: usize,
    /// Vectors of four numbers in a packed row.
    pub row_vectors: usize,
    pub vector_bytes: usize,
    /// Number of packed rows: indices, and rows of zeros behind them that whole tiles may read.
    pub padded: usize,
    /// Whether index k is row k.
    pub in_order: bool,
}

impl Tower {
    pub(super) fn new(parts: &Parts<'_>, space: Space) -> Self {
        let Parts { problem, order, variant, .. } = parts;
        let (m, n, _) = problem.shape();
        let (raw, packed, indices, rows) = match space {
            Space::Query => (Slot::Query, Slot::PackedQuery, m, m),
            Space::Passage => (Slot::Passage, Slot::PackedPassage, order.len(), n),
        };
        Self {
            raw,
            packed,
            indices,
            rows,
            row_stride: problem.row_strides[space as usize],
            element_bytes: problem.dtype.bytes(),
            // Cooperative matrices read whole tiles. A tile may begin at any index, also at the last one.
            padded: if variant.products == Products::Fma { indices } else { indices + variant.tile() - 1 },
            row_vectors: parts.row_vectors(),
            vector_bytes: if variant.f16 { 8 } else { 16 },
            in_order: space == Space::Query || order.passage.is_none(),
        }
    }

    pub(super) fn packed_row_bytes(&self) -> usize {
        self.row_vectors * self.vector_bytes
    }
}

/// Where the sums of a tower's gradients are collected. That is the output itself if its type and order allow it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sums {
    pub slot: Slot,
    /// Elements from row to row.
    pub stride: usize,
    /// The index whose sums come first.
    pub first: usize,
    /// Number of indices that have sums.
    pub rows: usize,
    pub output: Slot,
    pub output_stride: usize,
    pub output_rows: usize,
    pub dtype: DType,
}

impl Sums {
    pub(super) fn new(parts: &Parts<'_>, k: usize) -> Option<Self> {
        let Parts { problem, order, .. } = parts;
        let output = problem.gradients[k]?;
        let in_place = output.dtype == DType::F32 && (k == 0 || order.passage.is_none());
        let (first, rows, output_rows) = match k {
            0 => (problem.rows.start, problem.rows.len(), problem.rows.len()),
            _ => (0, order.len(), problem.pairs.passages()),
        };
        let slot = [Slot::QueryGradient, Slot::PassageGradient][k];
        Some(Self {
            slot: if in_place { slot } else { [Slot::QuerySums, Slot::PassageSums][k] },
            stride: if in_place { output.row_stride } else { problem.dim },
            first,
            rows,
            output: slot,
            output_stride: output.row_stride,
            output_rows,
            dtype: output.dtype,
        })
    }

    pub(super) fn in_place(&self) -> bool {
        self.slot == self.output
    }
}
