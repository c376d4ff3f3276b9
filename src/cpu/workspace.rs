//! Memory that outlives a call, so that a training step neither maps nor clears pages again.

use super::gradient::GradientSums;
use crate::error::{Error, Result};
use crate::memory::reserve;
use std::sync::{Mutex, PoisonError};

/// Memory of the CPU backend, kept between calls. A trainer that holds one saves the operating system the work of mapping
/// and clearing it in every step; results are the same bits either way.
///
/// It grows to what the largest call needed: the bound of the call, and O((M + N)·d) for the sums of the gradients.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Tiles of cosines.
    pub(super) tiles: Vec<f32>,
    /// Sums of the gradients of either tower.
    pub(super) sums: [Vec<f32>; 2],
    pub(super) pool: Pool,
}

impl Workspace {
    /// An empty one; it allocates when a call needs memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes back what a gradient pass borrowed.
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
/// tests/memory.rs holds calls to it.
const BYTES_PER_INDEX: usize = 300;

/// An error where there is no memory for what a call keeps of `indices` rows and passages. It is asked for and given back before
/// the collections that need it grow one by one, because those abort where they are refused.
pub(super) fn expect_room(indices: usize) -> Result<()> {
    let (bytes, mut room) = (indices.saturating_mul(BYTES_PER_INDEX), Vec::<u8>::new());
    let result = room.try_reserve_exact(bytes);
    std::hint::black_box(&room); // lest the compiler leave out memory that nothing uses
    result.map_err(|_| Error::OutOfMemory { bytes, purpose: "keys and sums of the rows" })
}

/// Buffers one worker needs at a time.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub tile: Vec<f32>,
    pub panels: [Vec<f32>; 2],
}

/// Scratch of whoever is working; as many as have ever worked at once.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Scratch>>);

impl Pool {
    /// Makes room for `workers` at once, each with a tile and two panels of these lengths, or gives an error.
    pub(super) fn prepare(&self, workers: usize, tile: usize, panel: usize) -> Result<()> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pool.resize_with(workers, Scratch::default); // more may be left of a call with more threads and smaller tiles
        for scratch in pool.iter_mut() {
            reserve(&mut scratch.tile, tile, "tiles of logits")?;
            for buffer in &mut scratch.panels {
                reserve(buffer, panel, "panels of embeddings")?;
            }
        }
        Ok(())
    }

    /// Runs `f` with a scratch of its own.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Scratch) -> R) -> R {
        let mut scratch = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        let result = f(&mut scratch);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
        result
    }
}
