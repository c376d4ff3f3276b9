//! A group of MPI processes (feature `mpi`).

use super::group::Group;
use crate::error::{Error, Result};
use mpi::datatype::Equivalence;
use mpi::point_to_point::{Destination, Source, Status, send_receive_into};
use mpi::topology::Communicator;
use std::fmt;

/// Bytes of a message. MPI counts in 32 bits, so longer ones travel in pieces.
const MOST: usize = 1 << 30;

/// The processes of an MPI communicator, such as `universe.world()` of the crate [`mpi`].
///
/// MPI has no time-outs: whoever waits for a rank that is alive and never makes its call waits for ever. If a process dies, `mpirun` ends the
/// others and says which one it was. A rank that returns from `main` before the others does not die: `MPI_Finalize` waits for them, and they
/// wait for it. So a rank that cannot go on calls [`give_up`](super::Distributed::give_up), or ends with [`std::process::exit`] or
/// [`Communicator::abort`]. One that panics does so by itself. Messages have tag 0; a program that sends messages of its own gives a duplicate
/// of its communicator. An MPI call that fails ends the process by MPI's own error handler, unless the communicator has
/// another.
pub struct Mpi<C: Communicator> {
    communicator: C,
    most: usize,
}

/// A rank that panics ends the others. Otherwise `MPI_Finalize` and the others would wait for each other for ever.
impl<C: Communicator> Drop for Mpi<C> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.communicator.abort(1);
        }
    }
}

impl<C: Communicator> fmt::Debug for Mpi<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mpi").finish_non_exhaustive()
    }
}

impl<C: Communicator> Mpi<C> {
    /// All processes of `communicator` make the same calls.
    pub fn new(communicator: C) -> Self {
        Self { communicator, most: MOST }
    }

    /// Messages of at most so many bytes, at least one: for tests of how long ones are cut.
    #[doc(hidden)]
    pub fn with_message_bytes(mut self, most: usize) -> Self {
        self.most = most.max(1);
        self
    }
}

impl<C: Communicator> Group for Mpi<C> {
    fn rank(&self) -> usize {
        self.communicator.rank() as usize
    }

    fn size(&self) -> usize {
        self.communicator.size() as usize
    }

    fn exchange(&mut self, to: usize, out: &[u8], from: usize, into: &mut [u8]) -> Result<()> {
        pieces(&self.communicator, to, out, from, into, self.most)
    }
}

/// The exchange in messages of at most `most` bytes.
fn pieces<C: Communicator>(
    communicator: &C,
    to: usize,
    out: &[u8],
    from: usize,
    into: &mut [u8],
    most: usize,
) -> Result<()> {
    let size = communicator.size() as usize;
    if let Some(peer) = [to, from].into_iter().find(|&peer| peer >= size) {
        return Err(Error::Engine { engine: "MPI", reason: format!("there is no rank {peer} among {size}") });
    }
    let full = |status: Status, due: usize| match status.count(u8::equivalent_datatype()) as usize {
        sent if sent == due => Ok(()),
        sent => {
            let reason = format!("rank {from} has sent {sent} bytes, where {due} were due");
            Err(Error::Engine { engine: "MPI", reason })
        }
    };
    let [to, source] = [to, from].map(|rank| communicator.process_at_rank(rank as i32));
    let (mut out, mut into) = (out.chunks(most), into.chunks_mut(most));
    loop {
        // The n-th piece that arrives here is the n-th of the sender, which may have more or fewer than this rank sends.
        match (out.next(), into.next()) {
            (Some(out), Some(into)) => full(send_receive_into(out, &to, &mut *into, &source), into.len())?,
            (Some(out), None) => to.send(out),
            (None, Some(into)) => full(source.receive_into(&mut *into), into.len())?,
            (None, None) => return Ok(()),
        }
    }
}
