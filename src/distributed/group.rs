//! Ranks that compute one loss together, and what they do together.

use crate::error::{Error, Result};
use std::ops::Range;

/// One rank's end of a group of ranks 0, 1, …, W − 1, each of which has an end of its own.
///
/// An engine implements [`exchange`](Group::exchange), from which the other collective operations are made. All ranks call the same
/// operations in the same order. If a call fails, the ranks no longer agree where they are, and the group is of no more use.
pub trait Group {
    /// The rank of this end, below [`size`](Group::size).
    fn rank(&self) -> usize;

    /// W, the number of ranks, at least 1.
    fn size(&self) -> usize;

    /// Sends `out` to rank `to` and receives `into` from rank `from`, both at once. Rank `from` sends as many bytes as `into` holds. Both
    /// ranks are others than this one, or both are this one.
    ///
    /// # Errors
    /// Those of the engine, such as a peer that has left or did not answer in time. The sentence names the peer if the engine does.
    fn exchange(&mut self, to: usize, out: &[u8], from: usize, into: &mut [u8]) -> Result<()>;
}

/// Of each step of an exchange of everyone with everyone: whom this rank sends to, and whom it receives from. In every step each rank has one
/// of either.
pub(super) fn steps<G: Group>(group: &G) -> impl Iterator<Item = (usize, usize)> + use<G> {
    let (rank, size) = (group.rank(), group.size());
    (1..size).map(move |step| ((rank + step) % size, (rank + size - step) % size))
}

/// Where the part of each rank begins and ends, if these are their lengths.
pub(super) fn ranges(lengths: impl IntoIterator<Item = usize>) -> Vec<Range<usize>> {
    let mut end = 0;
    let range = |length: usize| {
        let start = end;
        end += length;
        start..end
    };
    lengths.into_iter().map(range).collect()
}

/// Two parts of one slice that do not overlap.
fn apart<'a, T>(all: &'a mut [T], read: &Range<usize>, write: &Range<usize>) -> (&'a [T], &'a mut [T]) {
    if read.end <= write.start {
        let (left, right) = all.split_at_mut(write.start);
        (&left[read.clone()], &mut right[..write.len()])
    } else {
        let (left, right) = all.split_at_mut(read.start);
        (&right[..read.len()], &mut left[write.clone()])
    }
}

/// Fills `all` with the parts of every rank, `parts` of it, of which this rank's is there already. A rank sends W − 1 times its part.
pub(super) fn gather<T: bytemuck::Pod>(group: &mut impl Group, all: &mut [T], parts: &[Range<usize>]) -> Result<()> {
    let own = &parts[group.rank()];
    for (to, from) in steps(group) {
        let (out, into) = apart(all, own, &parts[from]);
        group.exchange(to, bytemuck::cast_slice(out), from, bytemuck::cast_slice_mut(into))?;
    }
    Ok(())
}

/// The items of every rank, in the order of ranks, where each has one.
pub(super) fn gather_one<T: bytemuck::Pod>(group: &mut impl Group, own: T) -> Result<Vec<T>> {
    let mut all = vec![own; group.size()];
    gather(group, &mut all, &ranges(vec![1; group.size()]))?;
    Ok(all)
}

/// What each rank says, in the order of ranks.
pub(super) fn gather_texts(group: &mut impl Group, own: &str) -> Result<Vec<String>> {
    let lengths = gather_one(group, own.len() as u64)?;
    let parts = ranges(lengths.iter().map(|&length| length as usize));
    let mut all = vec![0; parts.last().map_or(0, |part| part.end)];
    all[parts[group.rank()].clone()].copy_from_slice(own.as_bytes());
    gather(group, &mut all, &parts)?;
    Ok(parts.into_iter().map(|part| String::from_utf8_lossy(&all[part]).into_owned()).collect())
}

/// Adds up over ranks what each has in `whole`, and leaves this rank's part of the sum in `parts[rank]` of it. The order of the additions is
/// fixed: first what this rank has itself, then rank − 1, rank − 2, and so on around the circle of ranks. `received` is memory of the size of
/// this rank's part.
pub(super) fn reduce_scatter(
    group: &mut impl Group,
    whole: &mut [f32],
    parts: &[Range<usize>],
    received: &mut [f32],
) -> Result<()> {
    let rank = group.rank();
    for (to, from) in steps(group) {
        let (out, own) = apart(whole, &parts[to], &parts[rank]);
        group.exchange(to, bytemuck::cast_slice(out), from, bytemuck::cast_slice_mut(received))?;
        own.iter_mut().zip(&*received).for_each(|(sum, x)| *sum += x);
    }
    Ok(())
}

/// Adds up over ranks what each has in `numbers`. Each rank adds up one part, in the order of [`reduce_scatter`], and sends it to all.
pub(super) fn all_reduce(group: &mut impl Group, numbers: &mut [f32]) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let ((), said) = agree_on(group, Ok(((), Calls::Sum.with([numbers.len() as u64]))))?;
    Calls::expect_one(&said)?;
    if let Some(other) = said.iter().position(|words| words != &said[0]) {
        let value = format!("{} numbers on rank 0 and {} on rank {other}", said[0][1], said[other][1]);
        return Err(Error::invalid("numbers", value, "equally many on all ranks"));
    }
    let parts = ranges((0..size).map(|part| numbers.len() / size + usize::from(part < numbers.len() % size)));
    let mut received = vec![0.0; parts[rank].len()];
    reduce_scatter(group, numbers, &parts, &mut received)?;
    gather(group, numbers, &parts)
}

/// What a rank calls, the first of its words.
#[derive(Debug, Clone, Copy)]
pub(super) enum Calls {
    Loss = 1,
    Sum = 2,
}

impl Calls {
    /// The words of a call.
    pub fn with<const N: usize>(self, words: [u64; N]) -> [u64; WORDS] {
        let mut all = [0; WORDS];
        all[0] = self as u64;
        all[1..=N].copy_from_slice(&words);
        all
    }

    /// An error unless all ranks make one call.
    pub fn expect_one(said: &[[u64; WORDS]]) -> Result<()> {
        let name = |words: &[u64; WORDS]| if words[0] == Self::Sum as u64 { "`sum`" } else { "a loss" };
        let Some(other) = said.iter().position(|words| words[0] != said[0][0]) else { return Ok(()) };
        let value = format!("{} on rank {other}", name(&said[other]));
        Err(Error::invalid("call", value, format!("the same on all ranks; rank 0 calls {}", name(&said[0]))))
    }
}

/// Numbers that a rank can say when ranks agree.
pub(super) const WORDS: usize = 8;

/// `own`, if every rank has succeeded. Otherwise the same error on every rank: that of the lowest rank that failed.
///
/// An error that is an [`Error::Rank`] already is about that rank's part, whoever found it.
pub(super) fn agree<T>(group: &mut impl Group, own: Result<T>) -> Result<T> {
    agree_on(group, own.map(|own| (own, [0; WORDS]))).map(|(own, _)| own)
}

/// [`agree`], and with it what each rank says, in the order of ranks. All agreements have messages of one size, and every call begins with
/// one. So a rank can fail where the others make any call.
pub(super) fn agree_on<T>(group: &mut impl Group, own: Result<(T, [u64; WORDS])>) -> Result<(T, Vec<[u64; WORDS]>)> {
    let rank = group.rank();
    let failure = own.as_ref().err().map(|error| match error {
        Error::Rank { rank, reason } => (*rank, reason.clone()),
        other => (rank, other.to_string()),
    });
    let failed = failure.as_ref().map_or(0, |(rank, _)| *rank as u64 + 1);
    let words = own.as_ref().map_or([0; WORDS], |(_, words)| *words);
    let said = gather_one(group, Said { failed, words })?;
    if said.iter().any(|said| said.failed > 0) {
        let reasons = gather_texts(group, failure.as_ref().map_or("", |(_, reason)| reason))?;
        let first = said.iter().zip(reasons).filter(|(said, _)| said.failed > 0).min_by_key(|(said, _)| said.failed);
        if let Some((said, reason)) = first {
            return Err(Error::Rank { rank: said.failed as usize - 1, reason });
        }
    }
    Ok((own?.0, said.iter().map(|said| said.words).collect()))
}

/// The message of an agreement.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Said {
    /// 1 + the rank that has failed; 0 for none.
    failed: u64,
    words: [u64; WORDS],
}

/// An engine that remembers why it is of no more use: the first exchange that failed, whatever the error.
#[derive(Debug)]
pub(super) struct Watched<G> {
    pub engine: G,
    pub failed: Option<Error>,
}

impl<G: Group> Group for Watched<G> {
    fn rank(&self) -> usize {
        self.engine.rank()
    }

    fn size(&self) -> usize {
        self.engine.size()
    }

    fn exchange(&mut self, to: usize, out: &[u8], from: usize, into: &mut [u8]) -> Result<()> {
        self.engine.exchange(to, out, from, into).inspect_err(|error| self.failed = Some(error.clone()))
    }
}
