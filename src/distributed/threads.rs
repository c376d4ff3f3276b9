//! A group whose ranks are threads of one process.

use super::group::Group;
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a rank waits for another unless it is told otherwise.
const TIMEOUT: Duration = Duration::from_secs(600);

/// A rank's end of a group of threads of one process: for tests, and for towers that threads of one process encode.
///
/// Each rank needs a thread of its own, in which it may wait for the others: tasks of one rayon pool are none. A rank that drops its end has
/// left. Whoever waits for it gets an error.
///
/// ```
/// use samtone::distributed::{Group, Threads};
/// let ends = Threads::group(3);
/// std::thread::scope(|scope| {
///     for mut end in ends {
///         scope.spawn(move || {
///             let (rank, mut received) = (end.rank(), [0]);
///             end.exchange((rank + 1) % 3, &[rank as u8], (rank + 2) % 3, &mut received).unwrap();
///             assert_eq!(usize::from(received[0]), (rank + 2) % 3);
///         });
///     }
/// });
/// ```
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
    timeout: Duration,
}

#[derive(Debug)]
struct Shared {
    size: usize,
    mail: Mutex<Mail>,
    /// Something was sent, or somebody left.
    news: Condvar,
}

#[derive(Debug)]
struct Mail {
    /// What rank a has sent to rank b and b has not taken yet, at a·W + b.
    sent: Vec<VecDeque<Vec<u8>>>,
    left: Vec<bool>,
}

impl Shared {
    fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Threads {
    /// The ends of a group of `size` ranks, at least one, in the order of ranks.
    pub fn group(size: usize) -> Vec<Self> {
        let size = size.max(1);
        let mail = Mail { sent: vec![VecDeque::new(); size * size], left: vec![false; size] };
        let shared = Arc::new(Shared { size, mail: Mutex::new(mail), news: Condvar::new() });
        (0..size).map(|rank| Self { rank, shared: shared.clone(), timeout: TIMEOUT }).collect()
    }

    /// How long this rank waits for another, in one exchange. Default: ten minutes.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        let start = Instant::now();
        let failed = |reason: String| Error::Engine { engine: "a group of threads", reason };
        let mut mail = self.shared.mail();
        loop {
            if let Some(message) = mail.sent[from * self.shared.size + self.rank].pop_front() {
                return Ok(message);
            }
            if mail.left[from] {
                return Err(failed(format!("rank {from} has left, and rank {} waits for it", self.rank)));
            }
            let Some(rest) = self.timeout.checked_sub(start.elapsed()).filter(|rest| !rest.is_zero()) else {
                let reason =
                    format!("rank {} has waited for rank {from} for {:?}, its timeout", self.rank, self.timeout);
                return Err(failed(reason));
            };
            mail = self.shared.news.wait_timeout(mail, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn exchange(&mut self, to: usize, out: &[u8], from: usize, into: &mut [u8]) -> Result<()> {
        // Nobody should wait for a rank that has got an error.
        self.try_exchange(to, out, from, into).inspect_err(|_| self.leave())
    }
}

impl Threads {
    fn leave(&self) {
        self.shared.mail().left[self.rank] = true;
        self.shared.news.notify_all();
    }

    fn try_exchange(&self, to: usize, out: &[u8], from: usize, into: &mut [u8]) -> Result<()> {
        let size = self.shared.size;
        if let Some(peer) = [to, from].into_iter().find(|&peer| peer >= size) {
            let reason = format!("there is no rank {peer} among {size}");
            return Err(Error::Engine { engine: "a group of threads", reason });
        }
        let mut message = Vec::new();
        let refused = |_| Error::OutOfMemory { bytes: out.len(), purpose: "a message to another rank" };
        message.try_reserve_exact(out.len()).map_err(refused)?;
        message.extend_from_slice(out);
        self.shared.mail().sent[self.rank * self.shared.size + to].push_back(message);
        self.shared.news.notify_all();
        let message = self.receive(from)?;
        if message.len() != into.len() {
            let reason = format!("rank {from} has sent {} bytes, where {} were due", message.len(), into.len());
            return Err(Error::Engine { engine: "a group of threads", reason });
        }
        into.copy_from_slice(&message);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.leave();
    }
}
