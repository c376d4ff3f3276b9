//! First pass: from tiles of cosines to the sums of exponentials and the ranks of every row.

use super::Task;
use super::epilogue::{Tile, TileSums, sum_tile};
use super::matmul::multiply;
use super::plan::TileId;
use super::workspace::{Pool, Scratch};
use crate::error::Result;
use crate::loss::Block;
use crate::partials::Partials;
use rayon::prelude::*;

/// x ← X·Yᵀ for the rows and columns of a tile: products of raw embeddings.
pub(super) fn products(task: Task<'_>, id: TileId, x: &mut [f32], panels: &mut [Vec<f32>; 2]) {
    let Task { state, batch, plan } = task;
    let [row_space, col_space] = plan.region(id).spaces;
    let [rows, cols] = plan.ranges(id);
    let (left, right) = (state.panels(row_space, batch), state.panels(col_space, batch));
    let dim = state.dim();
    let step = if left.is_direct() && right.is_direct() { dim } else { plan.width };
    let [left_buffer, right_buffer] = panels;
    for start in (0..dim).step_by(step) {
        let chunk = start..dim.min(start + step);
        let a = left.panel(rows.clone(), chunk.clone(), left_buffer);
        let b = right.panel(cols.clone(), chunk, right_buffer);
        multiply(x, plan.tile, start > 0, a, b.transposed());
    }
}

/// A tile as the epilogue sees it, and whether any of its pairs may be masked.
pub(super) fn view(task: Task<'_>, id: TileId) -> (Tile<'_>, bool) {
    let Task { state, plan, .. } = task;
    let [row_space, col_space] = plan.region(id).spaces;
    let [rows, cols] = plan.ranges(id);
    // Default keys mask a pair only if both indices are the same, because the order of the passages begins with the positives of the rows.
    let masked = state.masked || (rows.start < cols.end && cols.start < rows.end);
    let tile = Tile {
        rows: rows.len(),
        cols: cols.len(),
        stride: plan.tile,
        row_start: rows.start,
        col_start: cols.start,
        row_side: state.side(row_space),
        col_side: state.side(col_space),
        beta: state.beta,
    };
    (tile, masked)
}

/// Computes a tile of cosines and its sums.
fn visit(task: Task<'_>, id: TileId, x: &mut [f32], panels: &mut [Vec<f32>; 2]) -> TileSums {
    products(task, id, x, panels);
    let (tile, masked) = view(task, id);
    let plan = task.plan;
    let cols = plan.region(id).sum_cols && !plan.on_diagonal(id);
    match (masked, cols) {
        (true, true) => sum_tile::<true, true>(x, &tile),
        (true, false) => sum_tile::<true, false>(x, &tile),
        (false, true) => sum_tile::<false, true>(x, &tile),
        (false, false) => sum_tile::<false, false>(x, &tile),
    }
}

/// All sums of the shard. If `store` is given, it has room for every tile, and receives the cosines.
pub(super) fn partials(task: Task<'_>, mut store: Option<&mut [f32]>, pool: &Pool) -> Result<Partials> {
    let Task { state, batch, plan } = task;
    let mut out = Partials::new(
        batch.rows(),
        |b| state.loss.uses(b),
        state.rows.clone(),
        state.identity.clone(),
        state.positive.clone(),
    );
    let len = plan.tile_len();
    pool.prepare(plan.workers, if store.is_some() { 0 } else { len }, plan.panel_len())?;
    let per_wave = plan.sum_wave();
    for (w, wave) in plan.tiles.chunks(per_wave).enumerate() {
        let min_len = plan.min_len(wave.len());
        let sums: Vec<TileSums> = match &mut store {
            Some(store) => store[w * per_wave * len..]
                .par_chunks_mut(len)
                .zip(wave)
                .with_min_len(min_len)
                .map(|(x, &id)| pool.with(|s| visit(task, id, x, &mut s.panels)))
                .collect(),
            None => wave
                .par_iter()
                .with_min_len(min_len)
                .map(|&id| {
                    pool.with(|s| {
                        let Scratch { tile, panels } = s;
                        visit(task, id, tile, panels)
                    })
                })
                .collect(),
        };
        // One thread merges, in the order of the tiles. That is O(edge) work for each tile, beside O(edge²·d) above.
        for (&id, sums) in wave.iter().zip(&sums) {
            merge(&mut out, task, id, sums);
        }
    }
    Ok(out)
}

/// Adds the sums of a tile to those of its anchors' rows.
fn merge(out: &mut Partials, task: Task<'_>, id: TileId, tile: &TileSums) {
    let Task { state, plan, .. } = task;
    let region = plan.region(id);
    let axes = [(&tile.rows, &tile.rows_above), (&tile.cols, &tile.cols_above)];
    for (axis, (sums, above)) in axes.into_iter().enumerate() {
        if !region.anchors[axis] {
            continue;
        }
        let (space, block, range) = (region.spaces[axis], region.blocks[axis], &plan.ranges(id)[axis]);
        // Metrics are of the two directions of retrieval, so same-tower blocks have no ranks.
        let mut ranks = match block {
            Block::QP => Some(&mut out.above[0]),
            Block::PQ => Some(&mut out.above[1]),
            Block::QQ | Block::PP => None,
        };
        let into = &mut out.sums[block.index()];
        for ((index, sum), above) in range.clone().zip(sums).zip(above) {
            let row = state.anchor_row(space, index);
            if let Some(into) = into.get_mut(row) {
                into.merge(*sum);
            }
            if let Some(ranks) = &mut ranks {
                ranks[row] += above;
            }
        }
    }
}
