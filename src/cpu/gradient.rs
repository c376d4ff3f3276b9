//! Third pass: tiles of gradients of logits, and their products with the raw embeddings.
//!
//! It works in waves of as many tiles as the workspace holds. First every tile of the wave becomes Ĝ; one worker does all of a tile. Then
//! every block of the outputs adds up the products of its tiles in the order of the list; one worker does all of a block. No two workers
//! ever add to the same number, and the list decides the order of every addition. So results have the same bits for any number of threads
//! and any workspace.

use super::Task;
use super::epilogue::{Coefficients, Edges, gradient_tile};
use super::matmul::{MatRef, multiply};
use super::plan::{Plan, TileId};
use super::state::State;
use super::sums::{products, view};
use super::workspace::Workspace;
use crate::combine::Combined;
use crate::error::Result;
use crate::loss::Block;
use crate::memory::reserve;
use crate::order::Space;
use rayon::prelude::*;
use std::ops::Range;

/// Σ Ĝ·x for a range of indices of one space. It is cut into panels of columns, and each panel is row-major, so a block of rows of a panel
/// is one slice.
pub(super) struct Accumulator {
    data: Vec<f32>,
    /// Indices it covers.
    pub range: Range<usize>,
    dim: usize,
    width: usize,
}

impl Accumulator {
    /// Zeros in this memory. [`Accumulator::into_memory`] gives the memory back.
    fn new(mut data: Vec<f32>, range: Range<usize>, dim: usize, width: usize) -> Result<Self> {
        reserve(&mut data, range.len() * dim, "the sums of the gradients")?;
        data.fill(0.0);
        Ok(Self { data, range, dim, width })
    }

    pub(super) fn into_memory(self) -> Vec<f32> {
        self.data
    }

    fn columns(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (dim, width) = (self.dim, self.width);
        (0..dim).step_by(width).map(move |start| start..dim.min(start + width))
    }

    /// The row of an index of the space, panel by panel: the panel's first column, and the values.
    pub(super) fn row(&self, index: usize) -> impl Iterator<Item = (usize, &[f32])> {
        let row = index - self.range.start;
        self.columns().map(move |c| {
            let at = self.range.len() * c.start + row * c.len();
            (c.start, &self.data[at..at + c.len()])
        })
    }

    /// A slice for each panel and each of `blocks`, which together are the whole range. No two slices overlap.
    fn split<'a>(&'a mut self, space: Space, blocks: &[(usize, Range<usize>)]) -> Vec<Output<'a>> {
        let columns: Vec<_> = self.columns().collect();
        let mut rest = self.data.as_mut_slice();
        let mut outputs = Vec::with_capacity(columns.len() * blocks.len());
        for columns in columns {
            for (block, range) in blocks {
                let (data, tail) = rest.split_at_mut(range.len() * columns.len());
                rest = tail;
                outputs.push(Output { space, block: *block, columns: columns.clone(), data });
            }
        }
        outputs
    }
}

/// One block of rows of one panel of an accumulator.
struct Output<'a> {
    space: Space,
    block: usize,
    columns: Range<usize>,
    data: &'a mut [f32],
}

/// A product of a tile that a block of the outputs adds: with the tile, or with its transpose.
struct Term {
    /// Place of the tile in the workspace.
    slot: usize,
    id: TileId,
    transposed: bool,
}

/// What the pass leaves for the projection.
pub(super) struct GradientSums {
    pub query: Option<Accumulator>,
    pub passage: Option<Accumulator>,
    /// Σ G·(s − s⁺) over the shard's tiles. Because Σ_j G_ij = −D_i for every row, this is the shard's part of ∂L/∂β. A sum over negatives
    /// plus one over positives would be the same, but would cancel where all cosines are close.
    pub beta: f64,
    /// A power of two. All of the above must be multiplied by it.
    pub scale: f64,
}

/// The pass. `stored` says that the workspace holds the cosines of every tile from the first pass, and `wanted` which towers need
/// gradients.
pub(super) fn gradients(
    task: Task<'_>,
    combined: &Combined,
    stored: bool,
    wanted: [bool; 2],
    workspace: &mut Workspace,
) -> Result<GradientSums> {
    let Task { state, plan, .. } = task;
    // Divided by this, the largest share of a row in a block is about 1 (`Combined::log_magnitude`). It is a power of two, so that the
    // division changes exponents alone.
    let shift = (combined.log_magnitude * std::f64::consts::LOG2_E).round();
    let shift = if shift.is_finite() { shift } else { 0.0 };
    let coefficients = Block::ALL.map(|b| coefficients(state, combined, b, shift));
    let (dim, width) = (state.dim(), plan.width);
    let [query_memory, passage_memory] = &mut workspace.sums;
    let accumulator = |wanted: bool, memory: &mut Vec<f32>, range| {
        wanted.then(|| Accumulator::new(std::mem::take(memory), range, dim, width)).transpose()
    };
    let mut query = accumulator(wanted[0], query_memory, state.rows.clone())?;
    let mut passage = accumulator(wanted[1], passage_memory, 0..state.order.len())?;

    let edges = |id: TileId| {
        let region = plan.region(id);
        let of = |k: usize| if region.anchors[k] { coefficients[region.blocks[k].index()].as_ref() } else { None };
        Edges { rows: of(0), cols: of(1), count_cols: region.sum_cols && !plan.on_diagonal(id) }
    };
    // If cosines are stored, slot k holds tile k. If not, each wave uses the slots anew. Tiles without any coefficient are left out.
    let mut work: Vec<(usize, TileId)> = plan.tiles.iter().copied().enumerate().collect();
    work.retain(|(_, id)| edges(*id).rows.is_some() || edges(*id).cols.is_some());
    let len = plan.tile_len();
    let wave_len = if stored { work.len() } else { plan.slots.min(work.len()) }.max(1);
    if !stored {
        reserve(&mut workspace.tiles, wave_len * len, "tiles of logits")?;
    }
    let (slots, pool) = (&mut workspace.tiles, &workspace.pool);
    let mut beta = 0.0;
    for wave in work.chunks(wave_len) {
        let slot = |position: usize, tile: usize| if stored { tile } else { position };
        let mut slices: Vec<Option<&mut [f32]>> = slots.chunks_mut(len).map(Some).collect();
        let jobs: Vec<_> = (wave.iter().enumerate())
            .filter_map(|(position, &(tile, id))| slices[slot(position, tile)].take().map(|x| (x, id)))
            .collect();
        let min_len = plan.min_len(jobs.len());
        let dots: Vec<f64> = (jobs.into_par_iter().with_min_len(min_len))
            .map(|(x, id)| {
                if !stored {
                    pool.with(|s| products(task, id, x, &mut s.panels));
                }
                let (tile, masked) = view(task, id);
                gradient_tile(x, &tile, &edges(id), masked, !stored)
            })
            .collect();
        beta = dots.iter().fold(beta, |sum, dot| sum + dot); // in the order of the list, so that waves make no difference

        let terms = terms(plan, wave.iter().enumerate().map(|(position, &(tile, id))| (slot(position, tile), id)));
        let outputs = [(Space::Query, &mut query), (Space::Passage, &mut passage)]
            .into_iter()
            .filter_map(|(space, accumulator)| accumulator.as_mut().map(|a| (space, a)))
            .flat_map(|(space, accumulator)| {
                let all = plan.grid(space).blocks.iter().cloned().enumerate();
                let range = accumulator.range.clone();
                let blocks: Vec<_> = all.filter(|(_, b)| range.start <= b.start && b.end <= range.end).collect();
                accumulator.split(space, &blocks)
            })
            .filter(|output| !terms[output.space as usize][output.block].is_empty());
        let outputs: Vec<_> = outputs.collect();
        let min_len = plan.min_len(outputs.len());
        let slots = &*slots;
        outputs.into_par_iter().with_min_len(min_len).for_each(|output| {
            let terms = &terms[output.space as usize][output.block];
            pool.with(|scratch| collect(task, slots, terms, output, &mut scratch.panels[0]));
        });
    }
    Ok(GradientSums { query, passage, beta, scale: shift.exp2() })
}

/// Coefficients of a block for the indices of its anchors, divided by 2^shift.
fn coefficients(state: &State, combined: &Combined, block: Block, shift: f64) -> Option<Coefficients> {
    let logs = &combined.log_coefficients[block.index()];
    if logs.is_empty() {
        return None;
    }
    Some(match block {
        Block::QP | Block::QQ => Coefficients::new(logs.iter().copied(), shift),
        Block::PQ | Block::PP => Coefficients::new(
            state.order.anchor_row.iter().map(|&row| logs.get(row as usize).copied().unwrap_or(f64::NEG_INFINITY)),
            shift,
        ),
    })
}

/// For every block of indices of both spaces, the tiles that add to its gradients, in the order of the list.
fn terms(plan: &Plan, tiles: impl Iterator<Item = (usize, TileId)>) -> [Vec<Vec<Term>>; 2] {
    let mut terms =
        [Space::Query, Space::Passage].map(|s| plan.grid(s).blocks.iter().map(|_| Vec::new()).collect::<Vec<_>>());
    for (slot, id) in tiles {
        let region = plan.region(id);
        if region.gradients[0] {
            terms[region.spaces[0] as usize][id.row].push(Term { slot, id, transposed: false });
        }
        // A tile on the diagonal is symmetric, and its rows and columns are the same indices. Its product for the rows is the whole.
        if region.gradients[1] && !plan.on_diagonal(id) {
            terms[region.spaces[1] as usize][id.col].push(Term { slot, id, transposed: true });
        }
    }
    terms
}

/// Adds the products of these tiles to a block of the outputs.
fn collect(task: Task<'_>, slots: &[f32], terms: &[Term], output: Output<'_>, scratch: &mut Vec<f32>) {
    let Task { state, batch, plan } = task;
    let len = plan.tile_len();
    for term in terms {
        let [rows, cols] = plan.ranges(term.id);
        let tile = MatRef::new(&slots[term.slot * len..(term.slot + 1) * len], rows.len(), cols.len(), plan.tile);
        let [row_space, col_space] = plan.region(term.id).spaces;
        let (tile, space, range) =
            if term.transposed { (tile.transposed(), row_space, rows) } else { (tile, col_space, cols) };
        let panel = state.panels(space, batch);
        let panel = panel.panel(range, output.columns.clone(), scratch);
        multiply(output.data, output.columns.len(), true, tile, panel);
    }
}
