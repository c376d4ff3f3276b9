//! First pass: from tiles of cosines to the sums of exponentials and the ranks of every row.

use super::Task;
use super::epilogue::{Tile, TileSums, sum_tile};
use super::matmul::multiply;
use super::plan::TileId;
use super::workspace::{Pool, Scratch};
use crate::error::Result;
use crate::loss::Block;
use crate::memory::reserve;
use crate::partials::{Partials, PrefixSums};
use rayon::prelude::*;
use std::ops::Range;

/// x ← X·Yᵀ over the columns of segment `k`, for the rows and columns of a tile; x ← x + X·Yᵀ unless it is the first segment. One segment
/// after the other, this leaves the products of raw embeddings up to each prefix.
pub(super) fn add_products(task: Task<'_>, id: TileId, k: usize, x: &mut [f32], panels: &mut [Vec<f32>; 2]) {
    let Task { state, batch, plan } = task;
    let [row_space, col_space] = plan.region(id).spaces;
    let [rows, cols] = plan.ranges(id);
    let (left, right) = (state.panels(row_space, batch), state.panels(col_space, batch));
    let [left_buffer, right_buffer] = panels;
    let mut multiply_columns = |columns: Range<usize>, add: bool| {
        let a = left.panel(rows.clone(), columns.clone(), left_buffer);
        let b = right.panel(cols.clone(), columns, right_buffer);
        multiply(x, plan.tile, add, a, b.transposed());
    };
    let panels = &plan.segments[k];
    if left.is_direct() && right.is_direct() {
        multiply_columns(panels[0].start..panels[panels.len() - 1].end, k > 0);
    } else {
        let each = panels.iter().enumerate();
        each.for_each(|(i, columns)| multiply_columns(columns.clone(), k > 0 || i > 0));
    }
}

/// The products of a tile up to every prefix, each in a tile of its own of the slot `planes`. `each` is called for every one.
pub(super) fn products(
    task: Task<'_>,
    id: TileId,
    planes: &mut [f32],
    panels: &mut [Vec<f32>; 2],
    mut each: impl FnMut(usize, &[f32]),
) {
    let len = task.plan.tile_len();
    for k in 0..task.plan.segments.len() {
        let (shorter, rest) = planes.split_at_mut(k * len);
        let plane = &mut rest[..len];
        if let Some(shorter) = shorter.rchunks(len).next() {
            plane.copy_from_slice(shorter);
        }
        add_products(task, id, k, plane, panels);
        each(k, plane);
    }
}

/// A tile as the epilogue sees it for prefix `k`, and whether any of its pairs may be masked.
pub(super) fn view(task: Task<'_>, id: TileId, k: usize) -> (Tile<'_>, bool) {
    let Task { state, plan, .. } = task;
    let [row_space, col_space] = plan.region(id).spaces;
    let [rows, cols] = plan.ranges(id);
    let (row_side, col_side) = (state.side(row_space), state.side(col_space));
    // Default keys mask a pair only if both indices are the same, because the order of the passages begins with the positives of the rows.
    let masked = state.masked || (rows.start < cols.end && cols.start < rows.end);
    let tile = Tile {
        rows: rows.len(),
        cols: cols.len(),
        stride: plan.tile,
        row_start: rows.start,
        col_start: cols.start,
        row_side,
        col_side,
        row: &row_side.numbers[k],
        col: &col_side.numbers[k],
        beta: state.beta,
    };
    (tile, masked)
}

/// The sums of a tile of products up to prefix `k`.
fn sums(task: Task<'_>, id: TileId, k: usize, x: &[f32]) -> TileSums {
    let (tile, masked) = view(task, id, k);
    let region = task.plan.region(id);
    let cols = region.sum_cols && !task.plan.on_diagonal(id);
    // Metrics are of the two directions of retrieval, so same-tower blocks have no ranks.
    let ranks = matches!(region.blocks[0], Block::QP | Block::PQ);
    sum_tile(x, &tile, masked, cols, ranks)
}

/// All sums of the shard. If `store` is given, it receives the products of the first tiles, which the plan stores.
pub(super) fn partials(task: Task<'_>, mut store: Option<&mut Vec<f32>>, pool: &Pool) -> Result<Partials> {
    let Task { state, batch, plan } = task;
    let mut out = Partials::new(
        batch.rows(),
        |b| state.loss.uses(b),
        state.rows.clone(),
        state.identity.clone(),
        state.positive.clone(),
    );
    let stored = if store.is_some() { plan.stored } else { 0 };
    pool.prepare(plan.workers, if stored == plan.tiles.len() { 0 } else { plan.tile_len() }, plan.panel_len())?;
    let (len, prefixes) = (plan.slot_len(), plan.segments.len());
    if let Some(store) = &mut store {
        reserve(store, stored * len, "tiles of logits")?;
    }
    let mut slots = store.iter_mut().flat_map(|store| store.chunks_mut(len)).take(stored);
    for wave in plan.tiles.chunks(plan.sum_wave()) {
        let jobs: Vec<_> = wave.iter().map(|&id| (id, slots.next())).collect();
        let of_tile = |(id, slot): (TileId, Option<&mut [f32]>)| -> Vec<TileSums> {
            pool.with(|scratch| match slot {
                Some(planes) => {
                    let mut all = Vec::with_capacity(prefixes);
                    products(task, id, planes, &mut scratch.panels, |k, x| all.push(sums(task, id, k, x)));
                    all
                }
                None => {
                    let Scratch { tile, panels } = scratch;
                    let of_prefix = |k| {
                        add_products(task, id, k, tile, panels);
                        sums(task, id, k, tile)
                    };
                    (0..prefixes).map(of_prefix).collect()
                }
            })
        };
        let min_len = plan.min_len(jobs.len());
        let all: Vec<Vec<TileSums>> = jobs.into_par_iter().with_min_len(min_len).map(of_tile).collect();
        // One thread merges, in the order of the tiles. That is O(edge) work for each tile, beside O(edge²·d) above.
        for (&id, of_tile) in wave.iter().zip(&all) {
            for (out, sums) in out.prefixes.iter_mut().zip(of_tile) {
                merge(out, task, id, sums);
            }
        }
    }
    Ok(out)
}

/// Adds the sums of a tile to those of its anchors' rows.
fn merge(out: &mut PrefixSums, task: Task<'_>, id: TileId, tile: &TileSums) {
    let Task { state, plan, .. } = task;
    let region = plan.region(id);
    let axes = [(&tile.rows, &tile.rows_above), (&tile.cols, &tile.cols_above)];
    for (axis, (sums, above)) in axes.into_iter().enumerate() {
        if !region.anchors[axis] {
            continue;
        }
        let (space, block, range) = (region.spaces[axis], region.blocks[axis], &plan.ranges(id)[axis]);
        let into = &mut out.sums[block.index()];
        for (index, sum) in range.clone().zip(sums) {
            if let Some(into) = into.get_mut(state.anchor_row(space, index)) {
                into.merge(*sum);
            }
        }
        let Some(ranks) = out.above.get_mut(block.index()) else { continue }; // QP and PQ alone have ranks
        for (index, above) in range.clone().zip(above) {
            ranks[state.anchor_row(space, index)] += above;
        }
    }
}
