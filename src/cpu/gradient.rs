//! Third pass: tiles of gradients of logits, and their products with the raw embeddings.
//!
//! It works in waves of as many tiles as the workspace holds. First every tile of the wave becomes Ĝ; one worker does all of a tile. Then
//! every block of the outputs adds up the products of its tiles in the order of the list; one worker does all of a block. No two workers
//! ever add to the same number, and the list decides the order of every addition. So results have the same bits for any number of threads
//! and any workspace.

use super::Task;
use super::epilogue::{Coefficients, Edges, TileGradient, gradient_tile};
use super::matmul::{MatRef, multiply};
use super::plan::{Plan, TileId};
use super::state::State;
use super::sums::{products, view};
use super::workspace::Workspace;
use crate::combine::{Combined, Derivatives};
use crate::error::Result;
use crate::loss::Block;
use crate::memory::reserve;
use crate::order::Space;
use rayon::prelude::*;
use std::ops::Range;

/// Σ Ĝ·x for a range of indices of one space. It is cut into the panels of the plan, and each panel is row-major, so a block of rows of a
/// panel is one slice.
pub(super) struct Accumulator {
    data: Vec<f32>,
    /// Indices it covers.
    pub range: Range<usize>,
    /// The columns of each panel, and the prefix that they belong to.
    panels: Vec<(usize, Range<usize>)>,
}

impl Accumulator {
    /// Zeros in this memory. [`Accumulator::into_memory`] gives the memory back.
    fn new(mut data: Vec<f32>, range: Range<usize>, plan: &Plan) -> Result<Self> {
        let segments = plan.segments.iter().enumerate();
        let panels: Vec<_> = segments.flat_map(|(k, panels)| panels.iter().map(move |c| (k, c.clone()))).collect();
        let dim: usize = panels.iter().map(|(_, columns)| columns.len()).sum();
        reserve(&mut data, range.len() * dim, "the sums of the gradients")?;
        data.fill(0.0);
        Ok(Self { data, range, panels })
    }

    pub(super) fn into_memory(self) -> Vec<f32> {
        self.data
    }

    /// The row of an index of the space, panel by panel: the panel's first column, and the values.
    pub(super) fn row(&self, index: usize) -> impl Iterator<Item = (usize, &[f32])> {
        let row = index - self.range.start;
        self.panels.iter().map(move |(_, c)| {
            let at = self.range.len() * c.start + row * c.len();
            (c.start, &self.data[at..at + c.len()])
        })
    }

    /// A slice for each panel and each of `blocks`, which together are the whole range. No two slices overlap.
    fn split<'a>(&'a mut self, space: Space, blocks: &[(usize, Range<usize>)]) -> Vec<Output<'a>> {
        let mut rest = self.data.as_mut_slice();
        let mut outputs = Vec::with_capacity(self.panels.len() * blocks.len());
        for (prefix, columns) in &self.panels {
            for (block, range) in blocks {
                let (data, tail) = rest.split_at_mut(range.len() * columns.len());
                rest = tail;
                outputs.push(Output { space, block: *block, prefix: *prefix, columns: columns.clone(), data });
            }
        }
        outputs
    }
}

/// One block of rows of one panel of an accumulator.
struct Output<'a> {
    space: Space,
    block: usize,
    /// The shortest prefix that has these columns.
    prefix: usize,
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
    /// For each prefix but the longest, and for each index of the query space and of the passage space, Σ G·s over the pairs of the index,
    /// where s⁺ is subtracted from s if the index is the anchor.
    pub radial: Vec<[Vec<f64>; 2]>,
    /// A power of two. All of the above must be multiplied by it.
    pub scale: f64,
}

/// The pass. The workspace holds the products of the first `stored` tiles from the first pass. `wanted` says which towers need gradients.
pub(super) fn gradients(
    task: Task<'_>,
    combined: &Combined,
    stored: usize,
    wanted: [bool; 2],
    workspace: &mut Workspace,
) -> Result<GradientSums> {
    let Task { state, batch, plan } = task;
    // Divided by this, the largest share of a row in a block is about 1 (`Combined::log_magnitude`). It is a power of two, so that the
    // division changes exponents alone.
    let shift = (combined.log_magnitude * std::f64::consts::LOG2_E).round();
    let shift = if shift.is_finite() { shift } else { 0.0 };
    let of_prefix = |d: &Derivatives| Block::ALL.map(|b| coefficients(state, d, b, shift));
    let coefficients: Vec<_> = combined.prefixes.iter().map(of_prefix).collect();
    let [query_memory, passage_memory] = &mut workspace.sums;
    let accumulator = |wanted: bool, memory: &mut Vec<f32>, range| {
        wanted.then(|| Accumulator::new(std::mem::take(memory), range, plan)).transpose()
    };
    let mut query = accumulator(wanted[0], query_memory, state.rows.clone())?;
    let mut passage = accumulator(wanted[1], passage_memory, 0..state.order.len())?;

    let edges = |id: TileId, k: usize| {
        let region = plan.region(id);
        let of = |axis: usize| {
            if region.anchors[axis] { coefficients[k][region.blocks[axis].index()].as_ref() } else { None }
        };
        Edges { rows: of(0), cols: of(1), count_cols: region.sum_cols && !plan.on_diagonal(id) }
    };
    // Tiles without any coefficient are left out. Slot k holds tile k if its products are stored. They come first, in a wave of their own.
    // Each later wave uses the slots anew.
    let mut work: Vec<(usize, TileId)> = plan.tiles.iter().copied().enumerate().collect();
    work.retain(|(_, id)| edges(*id, 0).rows.is_some() || edges(*id, 0).cols.is_some());
    let (first, rest) = work.split_at(work.partition_point(|(tile, _)| *tile < stored));
    let (len, prefixes) = (plan.slot_len(), plan.segments.len());
    reserve(&mut workspace.tiles, len * stored.max(plan.slots.min(rest.len())), "tiles of logits")?;
    let (slots, pool) = (&mut workspace.tiles, &workspace.pool);

    let mut beta = 0.0;
    let indices = [batch.rows(), state.order.len()];
    let mut radial = vec![indices.map(|count| vec![0.0; count]); prefixes - 1];
    let of_tile = |planes: &mut [f32], id: TileId, computed: bool| -> Vec<TileGradient> {
        if !computed {
            pool.with(|s| products(task, id, planes, &mut s.panels, |_, _| ()));
        }
        // From the longest prefix to the shortest: what its gradients say counts for the columns of every shorter one, too.
        let mut longer: Option<&[f32]> = None;
        let mut of_prefixes = Vec::with_capacity(prefixes);
        for (k, x) in planes.chunks_mut(plan.tile_len()).enumerate().rev() {
            let (tile, masked) = view(task, id, k);
            of_prefixes.push(gradient_tile(x, longer, &tile, &edges(id, k), masked, k + 1 < prefixes));
            longer = Some(x);
        }
        of_prefixes
    };
    // A shard without rows has no tiles.
    let waves = [(first, true)].into_iter().chain(rest.chunks(plan.slots.max(1)).map(|wave| (wave, false)));
    for (wave, computed) in waves.filter(|(wave, _)| !wave.is_empty()) {
        let slot = |position: usize, tile: usize| if computed { tile } else { position };
        let mut slices: Vec<Option<&mut [f32]>> = slots.chunks_mut(len).map(Some).collect();
        let mut jobs: Vec<_> = (wave.iter().enumerate())
            .filter_map(|(position, &(tile, id))| slices[slot(position, tile)].take().map(|x| (x, id)))
            .collect();
        // In pieces, because the sums of all tiles of a piece are in memory at the same time. One thread merges them, in the order of
        // the list, so that neither waves nor pieces make a difference.
        while !jobs.is_empty() {
            let rest = jobs.split_off(plan.sum_wave().min(jobs.len()));
            let piece = std::mem::replace(&mut jobs, rest);
            let min_len = plan.min_len(piece.len());
            let found: Vec<_> = piece
                .into_par_iter()
                .with_min_len(min_len)
                .map(|(planes, id)| (id, of_tile(planes, id, computed)))
                .collect();
            for (id, of_prefixes) in found {
                for (k, found) in of_prefixes.into_iter().rev().enumerate() {
                    beta += found.beta;
                    if let Some(radial) = radial.get_mut(k) {
                        merge(radial, plan, id, &found);
                    }
                }
            }
        }

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
    Ok(GradientSums { query, passage, beta, radial, scale: shift.exp2() })
}

/// Adds what a tile found along its axes, where gradients are added, too.
fn merge(radial: &mut [Vec<f64>; 2], plan: &Plan, id: TileId, found: &TileGradient) {
    let region = plan.region(id);
    let added = [region.gradients[0], region.gradients[1] && !plan.on_diagonal(id)];
    for (axis, range) in plan.ranges(id).into_iter().enumerate().filter(|(axis, _)| added[*axis]) {
        let into = &mut radial[region.spaces[axis] as usize][range];
        into.iter_mut().zip(&found.radial[axis]).for_each(|(a, b)| *a += b);
    }
}

/// Coefficients of a block for the indices of its anchors, divided by 2^shift.
fn coefficients(state: &State, derivatives: &Derivatives, block: Block, shift: f64) -> Option<Coefficients> {
    let logs = &derivatives.log_coefficients[block.index()];
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
        let at = term.slot * plan.slot_len() + output.prefix * len;
        let tile = MatRef::new(&slots[at..at + len], rows.len(), cols.len(), plan.tile);
        let [row_space, col_space] = plan.region(term.id).spaces;
        let (tile, space, range) =
            if term.transposed { (tile.transposed(), row_space, rows) } else { (tile, col_space, cols) };
        let panel = state.panels(space, batch);
        let panel = panel.panel(range, output.columns.clone(), scratch);
        multiply(output.data, output.columns.len(), true, tile, panel);
    }
}
