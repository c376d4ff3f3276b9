//! Memory that outlives a call. So the next step of a training need not map and clear pages again.

use super::gradient::GradientSums;
use crate::error::{Error, Result};
use crate::memory::reserve;
use std::sync::{Mutex, PoisonError};

/// Memory of the CPU backend that calls can use again. A trainer that holds one spares the operating system mapping and clearing memory in
/// every step. Results have the same bits either way.
///
/// It grows to what the largest call needed: at most the call's bound, and O((M + N)·d) for the sums of the gradients.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Tiles of cosines.
    pub(super) tiles: Vec<f32>,
    /// Sums of the gradients of either tower.
    pub(super) sums: [Vec<f32>; 2],
    pub(super) pool: Pool,
}

impl Workspace {
    /// An empty workspace. It allocates when a call needs memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes back the memory that a gradient pass took.
    pub(super) fn recycle(&mut self, sums: GradientSums) {
        let [query, passage] = &mut self.sums;
        for (slot, accumulator) in [(query, sums.query), (passage, sums.passage)] {
            if let Some(accumulator) = accumulator {
                *slot = accumulator.into_memory();
            }
        }
    }
}

/// Bytes that a call takes for each row and each passage, whatever d is: keys, thresholds, norms, partial sums, coefficients.
/// tests/memory.rs checks that calls take no more.
const BYTES_PER_INDEX: usize = 300;
/// The same for each further prefix.
const BYTES_PER_INDEX_AND_PREFIX: usize = 200;

/// An error if there is no memory for what a call needs for `indices` rows and passages. This allocates that much and frees it again. The
/// collections that need it grow one by one later, and would abort without memory.
pub(super) fn expect_room(indices: usize, prefixes: usize) -> Result<()> {
    let each = BYTES_PER_INDEX + (prefixes - 1) * BYTES_PER_INDEX_AND_PREFIX;
    let (bytes, mut room) = (indices.saturating_mul(each), Vec::<u8>::new());
    let result = room.try_reserve_exact(bytes);
    std::hint::black_box(&room); // otherwise the compiler may leave out an allocation that nothing uses
    result.map_err(|_| Error::OutOfMemory { bytes, purpose: "keys and sums of the rows" })
}

/// Buffers that one worker needs at a time.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub tile: Vec<f32>,
    pub panels: [Vec<f32>; 2],
}

/// Buffers that no worker is using now. Before a call there is one for each of its workers.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Scratch>>);

impl Pool {
    /// Makes buffers for that many workers, each with a tile and two panels of these lengths. An error if there is no memory for them.
    pub(super) fn prepare(&self, workers: usize, tile: usize, panel: usize) -> Result<()> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pool.resize_with(workers, Scratch::default); // an earlier call may have left more, with more threads and smaller tiles
        for scratch in pool.iter_mut() {
            reserve(&mut scratch.tile, tile, "tiles of logits")?;
            for buffer in &mut scratch.panels {
                reserve(buffer, panel, "panels of embeddings")?;
            }
        }
        Ok(())
    }

    /// Runs `f` with buffers that nothing else uses meanwhile.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Scratch) -> R) -> R {
        let mut scratch = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        let result = f(&mut scratch);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
        result
    }
}
