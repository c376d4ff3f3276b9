//! The plan of a call: the edge of its tiles, which tiles it visits, whether cosines are stored or recomputed, and how much memory that
//! takes. It follows from the inputs and the number of threads alone. The number of threads decides only how tiles are split into waves,
//! and whether cosines are stored. Neither changes a bit of a result.

use super::DEFAULT_WORKSPACE_BYTES;
use super::state::State;
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::order::Space;
use crate::prefix::Prefix;
use crate::regions::{Region, cuts, regions};
use std::fmt;
use std::ops::Range;

/// Largest edge of a tile. On two Zen 3 cores, products in tiles of 512² are within 3% of the speed of those in tiles of 1024². With an
/// edge of 256 they lose 7 to 8%, with 128 they lose 9 to 18%. `bench_step --products` compares such schedules on any machine.
const MAX_TILE: usize = 512;
/// Smallest edge of a tile. A plan takes it only if the bound on the workspace is tight.
const MIN_TILE: usize = 16;
/// Most tiles of a plan, so that lists of tiles stay within 15 MiB. A bound on the workspace that cuts the work into more is refused. Only
/// tiles of [`MAX_TILE`] may be more: those of batches beyond 180,000 pairs.
const MAX_TILES: usize = 1 << 18;
/// Widest panel of the embedding dimension in the gradient products.
const MAX_WIDTH: usize = 512;
/// Panels that a worker holds at a time: one for the rows and one for the columns of a tile.
const PANELS: usize = 2;
/// Tiles are visited in squares of this many by this many, so that panels and gradients are used again while caches hold them.
const SQUARE: usize = 8;
/// Tiles that a wave should have for each worker. With fewer, many workers would wait for those that work on the last tiles.
const TILES_PER_WORKER: usize = 4;
/// Tiles of a wave of the first pass without prefixes. The sums of all these tiles are in memory at the same time.
const SUM_WAVE: usize = 256;

/// Names a tile: its region, and its place there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileId {
    pub region: usize,
    /// Index into the blocks of the row space; `col` is one into those of the column space.
    pub row: usize,
    pub col: usize,
}

/// An index space that is cut into blocks of at most the edge of a tile. No block straddles a cut (see [`cuts`]).
#[derive(Debug, Clone)]
pub(super) struct Grid {
    pub blocks: Vec<Range<usize>>,
}

impl Grid {
    fn new(cuts: &[usize], tile: usize) -> Self {
        let blocks = cuts.windows(2).flat_map(|w| {
            let end = w[1];
            (w[0]..end).step_by(tile).map(move |start| start..end.min(start + tile))
        });
        Self { blocks: blocks.collect() }
    }

    /// The blocks that make up `range`, whose ends must be cuts.
    fn within(&self, range: &Range<usize>) -> Range<usize> {
        let below = |bound: usize| self.blocks.partition_point(|b| b.start < bound);
        below(range.start)..below(range.end)
    }
}

/// What a CPU call will do. A plan can be printed, in one line.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(super) tile: usize,
    pub(super) grids: [Grid; 2],
    pub(super) regions: Vec<Region>,
    pub(super) tiles: Vec<TileId>,
    /// The first tiles of the list, whose products the first pass stores.
    pub(super) stored: usize,
    pub(super) workers: usize,
    /// Number of tiles that the workspace holds in the gradient pass, each with its products up to every prefix.
    pub(super) slots: usize,
    /// Elements of the largest panel that is copied; 0 if the caller's memory is read in place.
    panel: usize,
    /// The columns of embeddings between the ends of two prefixes, cut into panels. Those of the first prefix come first.
    pub(super) segments: Vec<Vec<Range<usize>>>,
    loss: String,
}

impl Plan {
    /// The plan for one call on all rows, with the threads of the current rayon pool.
    ///
    /// # Errors
    /// As the call itself: invalid or unsupported inputs, and [`Error::WorkspaceTooSmall`].
    pub fn new(batch: &Batch<'_>) -> Result<Self> {
        let state = State::new(batch, 0..batch.rows())?;
        Self::of(&state, batch)
    }

    pub(super) fn of(state: &State, batch: &Batch<'_>) -> Result<Self> {
        let m = batch.rows();
        let segments = segments(&state.prefixes);
        let planes = state.prefixes.len();
        let regions = regions(&state.loss, &state.rows, &state.order, m);
        let grids = |tile: usize| cuts(&state.rows, &state.order, m).map(|cuts| Grid::new(&cuts, tile));
        let few = |tile: &usize| count_tiles(&regions, &grids(*tile)) <= MAX_TILES;
        let least = (MIN_TILE..MAX_TILE).step_by(MIN_TILE).find(few).unwrap_or(MAX_TILE);
        // If the batch allows it, there are at least sixteen tiles, so that a small batch has work for every core, too.
        let mut tile = m.div_ceil(4).next_multiple_of(MIN_TILE).clamp(64, MAX_TILE).max(least);
        let bound = batch.call().workspace_bytes().unwrap_or(DEFAULT_WORKSPACE_BYTES);
        let towers = [Space::Query, Space::Passage].map(|space| state.panels(space, batch));
        let widths = segments.iter().flatten().map(|columns| columns.len());
        let copied = widths.filter(|&width| towers.iter().any(|tower| tower.copies(width))).max().unwrap_or(0);
        let panel = |tile: usize| tile * copied;
        let panel_bytes = |tile: usize| PANELS * panel(tile) * size_of::<f32>();
        let needed = |tile: usize| (planes + 1) * tile * tile * size_of::<f32>() + panel_bytes(tile);
        // The edge of a tile depends on the inputs alone, because it decides the order of additions. The number of threads must not.
        while tile > least && needed(tile) + needed(tile) / 2 > bound {
            tile = (tile / 2).next_multiple_of(MIN_TILE).max(least);
        }
        if needed(tile) > bound {
            let (rows, passages, dim) = (m, batch.passages(), batch.dim());
            return Err(Error::WorkspaceTooSmall { given: bound, needed: needed(tile), rows, passages, dim });
        }

        let grids = grids(tile);
        let tiles = list_tiles(&regions, &grids);
        let tile_bytes = tile * tile * size_of::<f32>();
        let slot_bytes = planes * tile_bytes;
        let threads = rayon::current_num_threads();
        let room = bound - slot_bytes;
        let per_worker = panel_bytes(tile) + tile_bytes;
        let workers = threads.min(room / per_worker).max(1);
        let all = tiles.len() <= (bound - workers * panel_bytes(tile)) / slot_bytes;
        // If not all products are stored, the workspace also holds a tile for each worker of the first pass.
        let slots = if all { tiles.len() } else { (bound - workers * per_worker) / slot_bytes };
        Ok(Self {
            tile,
            grids,
            regions,
            tiles,
            stored: slots,
            workers,
            slots,
            panel: panel(tile),
            segments,
            loss: state.loss.name().into(),
        })
    }

    /// Whether the first pass of a fused call stores the products of every tile for the gradients. If not, it stores those of as many
    /// tiles as the workspace holds. The others are computed twice.
    pub fn stores_logits(&self) -> bool {
        self.stored == self.tiles.len()
    }

    /// Edge of a tile: its length in rows and in columns.
    pub fn tile(&self) -> usize {
        self.tile
    }

    /// Bytes of tiles and panels. They are at most the bound of the call.
    pub fn workspace_bytes(&self) -> usize {
        let of_first_pass = if self.stores_logits() { 0 } else { self.tile_len() };
        (self.slots * self.slot_len() + self.workers * (PANELS * self.panel + of_first_pass)) * size_of::<f32>()
    }

    pub(super) fn panel_len(&self) -> usize {
        self.panel
    }

    pub(super) fn tile_len(&self) -> usize {
        self.tile * self.tile
    }

    /// Elements of a slot: a tile for each prefix.
    pub(super) fn slot_len(&self) -> usize {
        self.segments.len() * self.tile_len()
    }

    /// Columns of the longest prefix.
    fn dim(&self) -> usize {
        self.segments.iter().flatten().map(|columns| columns.len()).sum()
    }

    pub(super) fn grid(&self, space: Space) -> &Grid {
        &self.grids[space as usize]
    }

    pub(super) fn region(&self, id: TileId) -> &Region {
        &self.regions[id.region]
    }

    /// Index ranges of a tile.
    pub(super) fn ranges(&self, id: TileId) -> [Range<usize>; 2] {
        let [rows, cols] = self.region(id).spaces;
        [self.grid(rows).blocks[id.row].clone(), self.grid(cols).blocks[id.col].clone()]
    }

    /// Whether the tile lies on the diagonal of a triangle. Its elements below the diagonal mirror those above.
    pub(super) fn on_diagonal(&self, id: TileId) -> bool {
        self.region(id).triangle && id.row == id.col
    }

    /// Rough count of floating-point operations of a fused call.
    pub fn flops(&self) -> f64 {
        let products = |(tile, id): (usize, &TileId)| {
            let [rows, cols] = self.ranges(*id);
            let area = 2.0 * rows.len() as f64 * cols.len() as f64 * self.dim() as f64;
            let gradients = self.region(*id).gradients;
            let outputs = f64::from(u8::from(gradients[0]) + u8::from(gradients[1] && !self.on_diagonal(*id)));
            area * (outputs + if tile < self.stored { 1.0 } else { 2.0 })
        };
        self.tiles.iter().enumerate().map(products).sum()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cpu {}: {} tiles of {t} x {t}{}, logits of {} stored, {} workers, workspace {:.1} MiB, {:.1} GFLOP",
            self.loss,
            self.tiles.len(),
            if self.segments.len() > 1 { format!(", {} prefixes", self.segments.len()) } else { String::new() },
            if self.stores_logits() { "all".into() } else { self.stored.to_string() },
            self.workers,
            self.workspace_bytes() as f64 / f64::from(1 << 20),
            self.flops() / 1e9,
            t = self.tile,
        )
    }
}

/// The columns that each prefix has beyond the one before, cut into panels of at most [`MAX_WIDTH`].
fn segments(prefixes: &[Prefix]) -> Vec<Vec<Range<usize>>> {
    let mut start = 0;
    let of_prefix = |prefix: &Prefix| {
        let columns = std::mem::replace(&mut start, prefix.dim)..prefix.dim;
        let panels = columns.len().div_ceil(MAX_WIDTH);
        let width = columns.len().div_ceil(panels).next_multiple_of(MIN_TILE);
        columns.clone().step_by(width).map(|start| start..columns.end.min(start + width)).collect()
    };
    prefixes.iter().map(of_prefix).collect()
}

/// How many tiles [`list_tiles`] gives.
fn count_tiles(regions: &[Region], grids: &[Grid; 2]) -> usize {
    let of = |r: &Region| {
        let [rows, cols] = [(r.spaces[0], &r.rows), (r.spaces[1], &r.cols)]
            .map(|(space, range)| grids[space as usize].within(range).len());
        if r.triangle { rows * (rows + 1) / 2 } else { rows * cols }
    };
    regions.iter().map(of).sum()
}

/// All tiles, region by region, in squares of [`SQUARE`]. The backend takes every sum in the order of this list.
fn list_tiles(regions: &[Region], grids: &[Grid; 2]) -> Vec<TileId> {
    let mut tiles = Vec::new();
    for (region, r) in regions.iter().enumerate() {
        let blocks = |space: Space, range| grids[space as usize].within(range);
        let (rows, all_cols) = (blocks(r.spaces[0], &r.rows), blocks(r.spaces[1], &r.cols));
        for row0 in rows.clone().step_by(SQUARE) {
            for col0 in all_cols.clone().step_by(SQUARE) {
                for row in row0..rows.end.min(row0 + SQUARE) {
                    let cols = col0..all_cols.end.min(col0 + SQUARE);
                    tiles.extend(cols.filter(|&col| !r.triangle || col >= row).map(|col| TileId { region, row, col }));
                }
            }
        }
    }
    tiles
}

impl Plan {
    /// Items that a worker must take at once, so that no more workers run at a time than the plan has.
    pub(super) fn min_len(&self, items: usize) -> usize {
        let pieces = if self.workers >= rayon::current_num_threads() { items } else { self.workers };
        items.div_ceil(pieces.max(1)).max(1)
    }

    /// Tiles of a wave of the first pass.
    pub(super) fn sum_wave(&self) -> usize {
        (SUM_WAVE / self.segments.len()).max(self.workers * TILES_PER_WORKER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Embeddings;
    use crate::call::Call;
    use crate::loss::Loss;

    #[test]
    fn lists_of_tiles_are_bounded() {
        let ones = vec![1.0_f32; 65_536];
        let x = Embeddings::new(&ones, 65_536, 1).unwrap();
        let four = Embeddings::new(&ones[..4], 4, 1).unwrap();
        let plan = |query, bytes: usize| {
            let call = Call::new(Loss::samtone_both(), 0.1).with_workspace_bytes(bytes);
            Plan::new(&Batch::new(&call, query, x).unwrap())
        };
        let Err(Error::WorkspaceTooSmall { given: 2048, needed, rows: 65_536, .. }) = plan(x, 2048) else {
            panic!("16.8 million tiles were accepted")
        };
        let least = plan(x, needed).unwrap();
        assert!(least.tiles.len() <= MAX_TILES && least.tiles.len() > MAX_TILES / 2, "{least}");
        assert_eq!(count_tiles(&least.regions, &least.grids), least.tiles.len());
        assert!(plan(x, needed - 1).is_err());
        assert!(plan(x, 3 * needed).unwrap().tiles.len() <= MAX_TILES);
        // If the batch has few tiles of the smallest edge, the smallest workspace is enough.
        assert_eq!(plan(four, 2048).unwrap().tile(), MIN_TILE);
    }
}
