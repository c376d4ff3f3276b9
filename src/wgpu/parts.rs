//! What layout, bindings and dispatches of a plan are made from.

use super::capabilities::Capabilities;
use super::layout::STAGE;
use super::shaders::Variant;
use crate::Problem;
use crate::order::{Occurrences, Order};
use crate::prefix::Prefix;
use crate::super_blocks::SuperBlock;
use std::ops::Range;

/// What a plan is made from.
pub(super) struct Parts<'a> {
    pub problem: &'a Problem<'a>,
    pub order: Order,
    pub occurrences: Occurrences,
    pub capabilities: Capabilities,
    pub variant: Variant,
    pub blocks: Vec<SuperBlock>,
    /// For each super-block, whether it has coefficients, and so gradients.
    pub graded: Vec<bool>,
    /// By prefix.
    pub segments: Vec<Segment>,
}

/// What a prefix has beyond the one before.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    /// Its entries.
    pub columns: Range<usize>,
    /// Its vectors of four numbers in a packed row. They are whole stages, so the last ones may have zeros.
    pub vectors: Range<usize>,
}

impl Segment {
    pub(super) fn of(prefixes: &[Prefix]) -> Vec<Self> {
        let (mut column, mut vector) = (0, 0);
        let of = |prefix: &Prefix| {
            let columns = column..prefix.dim;
            let vectors = vector..vector + columns.len().next_multiple_of(STAGE) / 4;
            (column, vector) = (columns.end, vectors.end);
            Self { columns, vectors }
        };
        prefixes.iter().map(of).collect()
    }
}

impl Parts<'_> {
    /// Vectors of a packed row.
    pub(super) fn row_vectors(&self) -> usize {
        self.segments.last().map_or(0, |s| s.vectors.end)
    }

    /// Entries of the longest prefix. No pass reads further ones.
    pub(super) fn dim(&self) -> usize {
        self.segments.last().map_or(0, |s| s.columns.end)
    }

    /// Whether a tile has sums and gradients for each of several prefixes.
    pub(super) fn has_several(&self) -> bool {
        self.segments.len() > 1
    }

    /// Whether the only prefix is the whole embedding.
    pub(super) fn is_whole(&self) -> bool {
        !self.has_several() && self.dim() == self.problem.dim
    }
}
