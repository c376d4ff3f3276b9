//! One loss over the rows of many ranks: threads, processes or machines, each of which holds a part of the batch.
//!
//! ```text
//! every rank      its queries and passages, their ids, weights, owners, positives
//!     │ gather    heads and options, which must fit together                                  whole.rs
//!     │ gather    lists and embeddings of all ranks, in their own type
//! [1] sums        of the rank's rows against all queries and passages                         cpu::Shard
//!     │ exchange  partial sums of PQ, merged in the order of ranks; then all sums, gathered   sums.rs
//! [2] combine     loss and metrics of the whole batch, the same bits on every rank
//! [3] gradients   of the rank's queries, and the rank's part of those of all passages
//!     │ exchange  each rank gets and adds up the parts of its passages' gradients             group.rs
//! every rank      gradients of its rows
//! ```
//!
//! Between these, the ranks tell each other whether they have failed. If one has, all get the same error. docs/distributed.md of the
//! repository says how much they send.

mod group;
#[cfg(feature = "mpi")]
mod processes;
mod sums;
mod threads;
mod whole;

pub use group::Group;
#[cfg(feature = "mpi")]
pub use mpi;
#[cfg(feature = "mpi")]
pub use processes::Mpi;
pub use threads::Threads;

use crate::batch::{Embeddings, EmbeddingsMut};
use crate::call::Call;
use crate::cpu::{Shard, Workspace};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::output::{Evaluation, GradientBuffers, Gradients, LossAndGradients, TemperatureGradient, check_upstream};
use crate::partials::Partials;
use crate::tower::Tower;
use group::{Watched, agree, all_reduce, gather_one, reduce_scatter};
use std::fmt;
use whole::{Memory, Whole};

/// What one rank has of the batch. The batch is made of the parts of all ranks, in the order of ranks.
///
/// Lists of the call are those of the part: positives and owners name its rows and passages. Ids mean the same on every rank. If some ranks
/// give weights, rows of the others have weight 1; likewise passages of ranks without owners are everyone's. Everything else that decides the
/// result is the same on every rank. The bound on the workspace may differ.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// What is to be computed.
    pub call: &'a Call,
    /// The rank's queries; `None` if it has none. Some rank must have queries.
    pub query: Option<Embeddings<'a>>,
    /// The rank's passages, at least as many as its queries; `None` if it has none.
    pub passage: Option<Embeddings<'a>>,
}

/// What the caller does with the gradients that the ranks compute for the parameters they share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Reduction {
    /// The caller adds them up over ranks. Gradients of embeddings are those of the loss of the whole batch. A rank's temperature
    /// gradient is its part of the sum.
    #[default]
    Sum,
    /// The caller takes their mean over W ranks, as DistributedDataParallel of PyTorch does. Gradients of embeddings are W times those of
    /// the loss of the whole batch, and the temperature gradient is whole on every rank.
    Mean,
}

impl fmt::Display for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sum => "the reduction `Sum`",
            Self::Mean => "the reduction `Mean`",
        })
    }
}

/// The loss of the batch of all ranks of a group, on the CPU.
///
/// ```
/// use samtone::distributed::{Distributed, Part, Threads};
/// use samtone::{Call, Embeddings, Loss};
///
/// let call = Call::new(Loss::samtone_query(), 0.1);
/// let query = [[1.0_f32, 0.2], [0.1, 1.0], [-1.0, 0.3]];
/// let passage = [[0.9_f32, 0.1], [0.3, 0.8], [-0.7, 0.4]];
/// let losses: Vec<f64> = std::thread::scope(|scope| {
///     let rank = |(end, rows): (Threads, std::ops::Range<usize>)| {
///         let (call, query, passage) = (&call, query[rows.clone()].as_flattened(), passage[rows].as_flattened());
///         scope.spawn(move || {
///             let embeddings = |x| Embeddings::new(x, query.len() / 2, 2);
///             let part = Part { call, query: Some(embeddings(query)?), passage: Some(embeddings(passage)?) };
///             let result = Distributed::new(end).loss_and_gradients(&part, 1.0)?;
///             assert_eq!(result.gradients.query.len(), query.len());
///             Ok(result.evaluation.loss)
///         })
///     };
///     let ranks: Vec<_> = Threads::group(2).into_iter().zip([0..1, 1..3]).map(rank).collect();
///     ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<samtone::Result<_>>()
/// })?;
/// assert_eq!(losses[0], losses[1]); // that of all three pairs
/// # Ok::<(), samtone::Error>(())
/// ```
#[derive(Debug)]
pub struct Distributed<G> {
    /// Also why the group is of no more use.
    group: Watched<G>,
    reduction: Reduction,
    workspace: Workspace,
    memory: [Memory; 2],
    /// This rank's part of the gradients of all passages, and what another rank adds to those of its own passages.
    passage_gradients: [Vec<f32>; 2],
}

/// What a call is asked for.
#[derive(Clone, Copy)]
enum Wanted {
    Evaluation,
    Gradients { upstream: f64 },
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Evaluation => f.write_str("no gradients"),
            Self::Gradients { upstream } => write!(f, "gradients, and `upstream` {:?}", upstream + 0.0), // no negative zero
        }
    }
}

impl<G: Group> Distributed<G> {
    /// This rank's calls on `group`. The memory of a call serves the next one.
    pub fn new(group: G) -> Self {
        let memory = [Memory::default(), Memory::default()];
        let passage_gradients = [Vec::new(), Vec::new()];
        let (reduction, workspace) = (Reduction::Sum, Workspace::new());
        Self { group: Watched { engine: group, failed: None }, reduction, workspace, memory, passage_gradients }
    }

    /// What the caller does with gradients. The same on every rank.
    pub fn with_reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// This rank's end of the group.
    pub fn group(&self) -> &G {
        &self.group.engine
    }

    /// The end itself.
    pub fn into_group(self) -> G {
        self.group.engine
    }

    /// Loss, row losses and metrics of the whole batch, the same bits on every rank. Every rank makes the same call.
    ///
    /// # Errors
    /// As [`Distributed::loss_and_gradients`].
    pub fn evaluate(&mut self, part: &Part<'_>) -> Result<Evaluation> {
        Ok(self.run(part, Wanted::Evaluation, Ok(GradientBuffers::default()))?.0)
    }

    /// Loss and metrics of the whole batch, and the gradients of this rank's rows, times `upstream` and what [`Reduction`] says. Every rank
    /// makes the same call with the same `upstream`.
    ///
    /// # Errors
    /// The same error on every rank: [`Error::Rank`] for what is wrong with the part of one or has failed there,
    /// [`Error::InvalidArgument`] for parts that do not fit together, and [`Error::Unsupported`] for f64. If ranks cannot reach each other,
    /// each gets the error of its engine, such as [`Error::Engine`]. Then the group is of no more use, and every later call gets that error.
    pub fn loss_and_gradients(&mut self, part: &Part<'_>, upstream: f64) -> Result<LossAndGradients> {
        let of = |x: Option<Embeddings<'_>>| x.map_or([0, 0], |x| [x.rows(), x.dim()]);
        let shapes = [of(part.query), of(part.passage)];
        // Without memory this rank still takes part, so that the others learn of it.
        let mut vectors = [Vec::new(), Vec::new()];
        let mut rooms = vectors.iter_mut().zip(shapes);
        let room = rooms.try_for_each(|(x, [rows, dim])| crate::memory::reserve(x, rows * dim, "the gradients"));
        let [query, passage] = &mut vectors;
        let buffers = room.and_then(|()| {
            Ok(GradientBuffers { query: buffer(query, shapes[0])?, passage: buffer(passage, shapes[1])? })
        });
        let (evaluation, temperature) = self.run(part, Wanted::Gradients { upstream }, buffers)?;
        let [query, passage] = vectors;
        Ok(LossAndGradients { evaluation, gradients: Gradients { query, passage, temperature } })
    }

    /// [`Distributed::loss_and_gradients`], into buffers of the caller, of any type and row stride. Ranks may leave out different ones.
    ///
    /// # Errors
    /// As [`Distributed::loss_and_gradients`]. Buffers are written only when nothing can fail any more on this rank.
    pub fn loss_and_gradients_into(
        &mut self,
        part: &Part<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        self.run(part, Wanted::Gradients { upstream }, Ok(buffers))
    }

    /// Takes part in the call that the other ranks make, where this rank cannot: it has failed before, and `reason` says how. Every rank
    /// gets the error that this function returns.
    pub fn give_up(&mut self, reason: &str) -> Error {
        let error = Error::Rank { rank: self.group.rank(), reason: reason.into() };
        let given = error.clone();
        self.guarded(|this| agree::<()>(&mut this.group, Err(given))).err().unwrap_or(error)
    }

    /// Adds up over ranks what each has in `numbers`, such as gradients of parameters that the ranks share, with [`Reduction::Sum`]. The
    /// order of additions is fixed, and every rank gets the same bits. Every rank makes the same call.
    ///
    /// # Errors
    /// [`Error::Engine`] as above, and [`Error::InvalidArgument`] for ranks that have different numbers of numbers.
    pub fn sum(&mut self, numbers: &mut [f32]) -> Result<()> {
        self.guarded(|this| all_reduce(&mut this.group, numbers))
    }

    /// `buffers` may be why this rank fails.
    fn run(
        &mut self,
        part: &Part<'_>,
        wanted: Wanted,
        buffers: Result<GradientBuffers<'_>>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        self.guarded(|this| this.together(part, wanted, buffers))
    }

    /// A group in which somebody may still wait for this rank must not be used again.
    fn guarded<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(failed) = &self.group.failed {
            return Err(failed.clone());
        }
        call(self)
    }

    fn together(
        &mut self,
        part: &Part<'_>,
        wanted: Wanted,
        buffers: Result<GradientBuffers<'_>>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        let Self { group, reduction, workspace, memory, passage_gradients, .. } = self;
        let (rank, size) = (group.rank(), group.size());
        let upstream = match wanted {
            Wanted::Evaluation => 1.0,
            Wanted::Gradients { upstream } => upstream,
        };
        let buffers = buffers.and_then(|buffers| check_upstream(upstream).map(|()| buffers));
        let (whole, mut buffers) = Whole::agree(group, part, buffers, &wanted.to_string(), *reduction)?;
        whole.embeddings(group, part, memory)?;
        let batch = whole.batch(memory)?;
        let local = |error: Error| located(&whole, error);

        let mut first = || -> Result<(Shard<'_>, Partials)> {
            let shard = Shard::of_rows(&batch, whole.rows[rank].clone())?;
            let partials = match wanted {
                Wanted::Evaluation => shard.partials()?, // no later pass needs its cosines
                Wanted::Gradients { .. } => workspace.partials(&shard)?,
            };
            Ok((shard, partials))
        };
        let (shard, partials) = agree(group, first().map_err(local))?;
        let merged = sums::merge(group, partials, &whole.rows)?;
        let combined = shard.combine(&merged).map_err(local);
        let Wanted::Gradients { .. } = wanted else {
            let none = TemperatureGradient { tau: 0.0, log_beta: 0.0 };
            return Ok((agree(group, combined)?.evaluation, none));
        };

        let scale = match reduction {
            Reduction::Sum => 1.0,
            Reduction::Mean => size as f64,
        };
        let [passages, received] = passage_gradients;
        let (own, [_, n]) = (whole.passages[rank].len(), whole.shape());
        let wanted = [buffers.query.is_some(), whole.passage_gradient];
        let second = combined.and_then(|combined| {
            if whole.passage_gradient {
                for (memory, rows) in [(&mut *passages, n), (&mut *received, own)] {
                    crate::memory::reserve(memory, rows * whole.dim, "the gradients of all passages")?;
                }
            }
            let sums = workspace.gradient_sums(&shard, &combined, wanted)?;
            Ok((combined, sums))
        });
        let (combined, sums) = agree(group, second)?;
        let upstream = upstream * scale;
        let temperature = sums.temperature(&shard, upstream);
        // Of W equal factors that the pass has multiplied by, the temperature keeps none.
        let part = [temperature.tau / scale, temperature.log_beta / scale];
        let [tau, log_beta] = match reduction {
            Reduction::Sum => part,
            Reduction::Mean => {
                let all = gather_one(group, part)?;
                all.iter().fold([0.0; 2], |sum, part| [sum[0] + part[0], sum[1] + part[1]])
            }
        };
        if whole.passage_gradient {
            let passage = Some(EmbeddingsMut::new(&mut *passages, n, whole.dim)?);
            sums.write(&shard, &combined, upstream, GradientBuffers { query: None, passage });
            let parts: Vec<_> =
                whole.passages.iter().map(|range| range.start * whole.dim..range.end * whole.dim).collect();
            reduce_scatter(group, passages, &parts, received)?;
        }
        // Nothing can fail any more on this rank.
        let query = buffers.query.take();
        sums.write(&shard, &combined, upstream, GradientBuffers { query, passage: None });
        if let Some(mut buffer) = buffers.passage {
            let own = &whole.passages[rank];
            store(&passages[own.start * whole.dim..own.end * whole.dim], &mut buffer);
        }
        workspace.take_back(sums);
        Ok((combined.evaluation, TemperatureGradient { tau, log_beta }))
    }
}

/// A buffer for a rank that has rows.
fn buffer(x: &mut Vec<f32>, [rows, dim]: [usize; 2]) -> Result<Option<EmbeddingsMut<'_>>> {
    (rows > 0).then(|| EmbeddingsMut::new(x, rows, dim)).transpose()
}

/// The error, with the rank whose row it is about instead of the row among those of all ranks.
fn located(whole: &Whole, error: Error) -> Error {
    let named = |tower: Tower, row: &mut usize| {
        let (rank, local) = whole.owner(tower, *row)?;
        *row = local;
        Some(rank)
    };
    let mut local = error.clone();
    let rank = match &mut local {
        Error::NonFinite { tower, row, .. } | Error::ZeroNorm { tower, row, .. } => named(*tower, row),
        Error::NoNegative { row, .. } => named(Tower::Query, row),
        _ => None,
    };
    rank.map_or(error, |rank| Error::Rank { rank, reason: local.to_string() })
}

/// Contiguous rows into a buffer of any type and row stride.
fn store(rows: &[f32], buffer: &mut EmbeddingsMut<'_>) {
    let (dim, stride) = (buffer.dim(), buffer.row_stride());
    crate::batch::for_each_dtype!(DataMut, buffer.data_mut(), to => {
        crate::batch::copy_rows(rows.iter().map(|&x| Element::from_f64(f64::from(x))), to, dim, stride)
    });
}
