//! What will run: tile size, which tiles of which matrices, stored or recomputed, and how much memory that takes. A pure
//! function of the inputs and the number of threads; only the split into waves depends on the latter, never a bit of a result.

use super::DEFAULT_WORKSPACE_BYTES;
use super::state::{Order, Space, State};
use super::tower::Panels;
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::loss::{Block, Loss};
use crate::options::Options;
use std::fmt;
use std::ops::Range;

/// Largest tile edge: on two Zen 3 cores, products in tiles of 512² run within 3% of tiles of 1024², and edges of 256 and 128
/// lose 7 to 8 and 9 to 18%. `bench_step --products` compares such schedules on the machine at hand.
const MAX_TILE: usize = 512;
/// Smallest tile edge, taken only under a tight workspace bound.
const MIN_TILE: usize = 16;
/// Widest panel of the embedding dimension in the gradient products.
const MAX_WIDTH: usize = 512;
/// Panels a worker holds at a time: both edges of a tile.
const PANELS: usize = 2;
/// Tiles are visited in squares of this many tiles, so that panels and gradients are reused while they are near.
const SQUARE: usize = 8;
/// Tiles a worker should find in a wave, so that the last ones do not leave the others idle.
const TILES_PER_WORKER: usize = 4;
/// Bound on the tiles of a wave of the logsumexp pass, whose tiles need no memory beyond a wave's sums.
pub(super) const SUM_WAVE: usize = 256;

/// A rectangle or triangle of one matrix of cosines, with what its two edges take part in.
#[derive(Debug, Clone)]
pub(super) struct Region {
    /// Spaces of the row and column indices.
    pub spaces: [Space; 2],
    /// Indices in cut points of the two spaces (see [`Grid`]).
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    /// Blocks of the row's and the column's softmax.
    pub blocks: [Block; 2],
    /// Whether row and column are the same index space and range: tiles below the diagonal are skipped.
    pub triangle: bool,
    /// Whether columns' sums are taken here.
    pub sum_cols: bool,
    /// Whether row anchors, column anchors take part at all.
    pub anchors: [bool; 2],
    /// Whether gradients of the rows, of the columns are added here.
    pub gradients: [bool; 2],
}

/// Which tile of which region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileId {
    pub region: usize,
    /// Index into the blocks of the row space and of the column space.
    pub row: usize,
    pub col: usize,
}

/// An index space cut into blocks of at most one tile edge; no block straddles a region's border.
#[derive(Debug, Clone)]
pub(super) struct Grid {
    pub blocks: Vec<Range<usize>>,
}

impl Grid {
    fn new(mut cuts: Vec<usize>, tile: usize) -> Self {
        cuts.sort_unstable();
        cuts.dedup();
        let blocks = cuts.windows(2).flat_map(|w| {
            let end = w[1];
            (w[0]..end).step_by(tile).map(move |start| start..end.min(start + tile))
        });
        Self { blocks: blocks.collect() }
    }

    /// The blocks that tile `range`, whose ends are cuts.
    fn within(&self, range: &Range<usize>) -> Range<usize> {
        let below = |bound: usize| self.blocks.partition_point(|b| b.start < bound);
        below(range.start)..below(range.end)
    }
}

/// What a CPU call will do. `Display` tells it in one line.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(super) tile: usize,
    pub(super) grids: [Grid; 2],
    pub(super) regions: Vec<Region>,
    pub(super) tiles: Vec<TileId>,
    pub(super) stored: bool,
    pub(super) workers: usize,
    /// Tile buffers of the gradient pass.
    pub(super) slots: usize,
    /// Elements of one panel of f32 rows; 0 where the caller's memory is read in place.
    panel: usize,
    /// Width of the panels of the embedding dimension, and their number.
    pub(super) width: usize,
    dim: usize,
    loss: String,
}

impl Plan {
    /// The plan for one call on all rows, with the threads of the current rayon pool.
    ///
    /// # Errors
    /// As the call itself: invalid or unsupported inputs, and [`Error::WorkspaceTooSmall`].
    pub fn new(loss: &Loss, batch: &Batch<'_>, options: &Options) -> Result<Self> {
        let state = State::new(loss, batch, options, 0..batch.rows())?;
        Self::of(&state, batch)
    }

    pub(super) fn of(state: &State, batch: &Batch<'_>) -> Result<Self> {
        let (m, d) = (batch.rows(), batch.dim());
        let panels = d.div_ceil(MAX_WIDTH);
        let width = d.div_ceil(panels).next_multiple_of(MIN_TILE).min(d);
        // Sixteen tiles at the least where the batch allows, so that a small batch still has work for every core.
        let mut tile = m.div_ceil(4).next_multiple_of(MIN_TILE).clamp(64, MAX_TILE);
        let bound = state.options.workspace_bytes().unwrap_or(DEFAULT_WORKSPACE_BYTES);
        let direct = [Space::Query, Space::Passage].iter().all(|&s| Panels::is_direct(&state.panels(s, batch)));
        let panel = |tile: usize| if direct { 0 } else { tile * width };
        let panel_bytes = |tile: usize| PANELS * panel(tile) * size_of::<f32>();
        let needed = |tile: usize| 2 * tile * tile * size_of::<f32>() + panel_bytes(tile);
        // The edge depends on the inputs alone: another number of threads must not move a tile's border.
        while tile > MIN_TILE && needed(tile) + needed(tile) / 2 > bound {
            tile = (tile / 2).next_multiple_of(MIN_TILE);
        }
        if needed(tile) > bound {
            let (rows, passages, dim) = (m, batch.passages(), d);
            return Err(Error::WorkspaceTooSmall { given: bound, needed: needed(tile), rows, passages, dim });
        }

        let order = &state.order;
        let grids = grids(&state.rows, order, m, tile);
        let regions = regions(&state.loss, &state.rows, order, m, &grids);
        let tiles = list_tiles(&regions);
        let tile_bytes = tile * tile * size_of::<f32>();
        let threads = rayon::current_num_threads();
        let room = bound - tile_bytes;
        let per_worker = panel_bytes(tile) + tile_bytes;
        let workers = threads.min(room / per_worker).max(1);
        let stored = tiles.len() <= (bound - workers * panel_bytes(tile)) / tile_bytes;
        // Recomputed, the workers of the first pass keep a tile each beside those of the second.
        let slots = if stored { tiles.len() } else { (bound - workers * per_worker) / tile_bytes };
        Ok(Self {
            tile,
            grids,
            regions,
            tiles,
            stored,
            workers,
            slots,
            panel: panel(tile),
            width,
            dim: d,
            loss: state.loss.name().into(),
        })
    }

    /// Whether cosines of the first pass are kept for the second, rather than computed twice.
    pub fn stores_logits(&self) -> bool {
        self.stored
    }

    /// Edge of a tile, in rows and columns.
    pub fn tile(&self) -> usize {
        self.tile
    }

    /// Bytes of tiles and panels: at most the bound in the options.
    pub fn workspace_bytes(&self) -> usize {
        let of_first_pass = if self.stored { 0 } else { self.tile_len() };
        (self.slots * self.tile_len() + self.workers * (PANELS * self.panel + of_first_pass)) * size_of::<f32>()
    }

    pub(super) fn panel_len(&self) -> usize {
        self.panel
    }

    pub(super) fn tile_len(&self) -> usize {
        self.tile * self.tile
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

    /// Whether the tile lies on the diagonal of a triangle, where one triangle of elements mirrors the other.
    pub(super) fn on_diagonal(&self, id: TileId) -> bool {
        self.region(id).triangle && id.row == id.col
    }

    /// Rough count of floating-point operations of a fused call.
    pub fn flops(&self) -> f64 {
        let products = |id: &TileId| {
            let [rows, cols] = self.ranges(*id);
            let area = 2.0 * rows.len() as f64 * cols.len() as f64 * self.dim as f64;
            let gradients = self.region(*id).gradients;
            let outputs = f64::from(u8::from(gradients[0]) + u8::from(gradients[1] && !self.on_diagonal(*id)));
            area * (outputs + if self.stored { 1.0 } else { 2.0 })
        };
        self.tiles.iter().map(products).sum()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cpu {}: {} tiles of {t} x {t}, logits {}, {} workers, workspace {:.1} MiB, {:.1} GFLOP",
            self.loss,
            self.tiles.len(),
            if self.stored { "stored" } else { "recomputed" },
            self.workers,
            self.workspace_bytes() as f64 / f64::from(1 << 20),
            self.flops() / 1e9,
            t = self.tile,
        )
    }
}

fn grids(rows: &Range<usize>, order: &Order, m: usize, tile: usize) -> [Grid; 2] {
    let (own, extras) = (order.anchors_of(rows), order.extras_of(rows));
    let query = vec![0, rows.start, rows.end, m];
    let passage = vec![0, own.start, own.end, order.anchors, order.passages, extras.start, extras.end, order.len()];
    [Grid::new(query, tile), Grid::new(passage, tile)]
}

/// Every region of a shard, empty ones left out. With all rows in one shard and injective positives these are S (anchors and
/// others), the triangle of QQ, the triangle of PP and PP's others.
fn regions(loss: &Loss, rows: &Range<usize>, order: &Order, m: usize, grids: &[Grid; 2]) -> Vec<Region> {
    use Block::{PP, PQ, QP, QQ};
    use Space::{Passage, Query};
    let (own, own_extras) = (order.anchors_of(rows), order.extras_of(rows));
    let (anchors, others) = (0..order.anchors, order.anchors..order.passages);
    let extras = order.passages..order.len();
    let mut regions = Vec::new();
    let mut add = |spaces: [Space; 2], rows: &Range<usize>, cols: Range<usize>, region: Region| {
        let range = |k: usize, r: &Range<usize>| grids[spaces[k] as usize].within(r);
        if !rows.is_empty() && !cols.is_empty() {
            regions.push(Region { spaces, rows: range(0, rows), cols: range(1, &cols), ..region });
        }
    };
    let template = |blocks: [Block; 2]| Region {
        spaces: [Query, Query],
        rows: 0..0,
        cols: 0..0,
        blocks,
        triangle: false,
        sum_cols: true,
        anchors: [true, true],
        gradients: [true, true],
    };

    // S is always visited: its ranks are the metrics.
    let s = || template([QP, PQ]);
    add([Query, Passage], rows, anchors.clone(), s());
    add([Query, Passage], rows, others.clone(), Region { sum_cols: false, anchors: [true, false], ..s() });
    add([Query, Passage], rows, extras, Region { anchors: [false, true], ..s() });

    // Towards rows of other shards, a symmetric block serves this shard's rows only; both parts of their gradient are here.
    let one_sided = |blocks| Region { sum_cols: false, gradients: [true, false], ..template(blocks) };
    if loss.uses(QQ) {
        add([Query, Query], rows, rows.clone(), Region { triangle: true, ..template([QQ, QQ]) });
        add([Query, Query], rows, 0..rows.start, one_sided([QQ, QQ]));
        add([Query, Query], rows, rows.end..m, one_sided([QQ, QQ]));
    }
    if loss.uses(PP) {
        let space = [Passage, Passage];
        add(space, &own, own.clone(), Region { triangle: true, ..template([PP, PP]) });
        add(space, &own, 0..own.start, one_sided([PP, PP]));
        add(space, &own, own.end..order.anchors, one_sided([PP, PP]));
        let candidates = || Region { sum_cols: false, anchors: [true, false], ..template([PP, PP]) };
        add(space, &own, others.clone(), candidates());
        add(space, &own_extras, anchors, candidates());
        add(space, &own_extras, others, candidates());
    }
    regions
}

/// All tiles, region by region, in squares of [`SQUARE`]: the order in which every sum of the backend is taken.
fn list_tiles(regions: &[Region]) -> Vec<TileId> {
    let mut tiles = Vec::new();
    for (region, r) in regions.iter().enumerate() {
        for row0 in r.rows.clone().step_by(SQUARE) {
            for col0 in r.cols.clone().step_by(SQUARE) {
                for row in row0..r.rows.end.min(row0 + SQUARE) {
                    let cols = col0..r.cols.end.min(col0 + SQUARE);
                    tiles.extend(cols.filter(|&col| !r.triangle || col >= row).map(|col| TileId { region, row, col }));
                }
            }
        }
    }
    tiles
}

impl Plan {
    /// The smallest piece of work that keeps the number of concurrent workers within the plan.
    pub(super) fn min_len(&self, items: usize) -> usize {
        let pieces = if self.workers >= rayon::current_num_threads() { items } else { self.workers };
        items.div_ceil(pieces.max(1)).max(1)
    }

    /// Tiles whose buffers live at the same time in the logsumexp pass when nothing is stored.
    pub(super) fn sum_wave(&self) -> usize {
        SUM_WAVE.max(self.workers * TILES_PER_WORKER)
    }
}
