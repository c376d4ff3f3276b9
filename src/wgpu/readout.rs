//! Turns the bytes of a state into results, or into the error for inputs that were refused. It adds up loss and metrics in f64.

use super::layout::{RESULT_WORDS, STATUS_BYTES};
use super::plan::Plan;
use crate::candidates::NONE;
use crate::error::{Error, Result};
use crate::loss::Block;
use crate::output::{Evaluation, Metrics, TemperatureGradient};
use crate::partials::{ExpSum, Partials, SAME_COSINE, expect_positives};
use crate::refusal::Refusal;
use crate::tower::Tower;
use std::ops::Range;

// Words of the results, of a sum, and of the status: see shaders/common/state.wgsl.
pub(super) const SHIFT: usize = 8;
pub(super) const ACCEPTED: usize = 9;
pub(super) const UPSTREAM: usize = 10;
pub(super) const BETA_SUM: usize = 12;
pub(super) const SUM_WORDS: usize = 4;
pub(super) const NON_FINITE: usize = 0; // + 1 for passages
pub(super) const ZERO_NORM: usize = 2; // + 1 for passages
pub(super) const NO_NEGATIVE: usize = 4;
pub(super) const NO_NEGATIVE_GROUP: usize = 5;
pub(super) const NO_NEGATIVE_PREFIX: usize = 6;

/// A word of the status. Every forward call sets it to [`NONE`]. In a new buffer it is 0.
pub(super) const RAN: usize = 7;

/// Reads numbers of the slot `State` by word. Words of the status count from its start, all others from the results on.
struct State<'a> {
    bytes: &'a [u8],
}

impl State<'_> {
    fn status(&self, word: usize) -> u32 {
        u32::from_le_bytes(self.bytes[4 * word..][..4].try_into().unwrap_or_default())
    }

    fn word(&self, word: usize) -> u32 {
        self.status(STATUS_BYTES as usize / 4 + word)
    }

    fn float(&self, word: usize) -> f64 {
        f64::from(f32::from_bits(self.word(word)))
    }

    fn int(&self, word: usize) -> i32 {
        self.word(word) as i32
    }

    fn scaled(&self, word: usize) -> f64 {
        times_power_of_two(self.float(word), self.int(word + 1))
    }
}

/// x·2^n. It is multiplied in three steps, because 2^n alone may leave the range of f64.
fn times_power_of_two(x: f64, n: i32) -> f64 {
    let n = n.clamp(-4000, 4000);
    let third = n / 3;
    [third, third, n - 2 * third].into_iter().fold(x, |x, n| x * 2_f64.powi(n))
}

impl Plan {
    /// Bytes of the slot `State`. [`Plan::evaluation`] and the other methods that take a state want all of them.
    pub fn state_bytes(&self) -> u64 {
        STATUS_BYTES + 4 * self.layout.state_words as u64
    }

    /// A state on which a forward call has run.
    fn state<'a>(&self, bytes: &'a [u8]) -> Result<State<'a>> {
        let needed = self.state_bytes();
        if (bytes.len() as u64) < needed {
            return Err(Error::invalid("state", format!("{} bytes", bytes.len()), format!("at least {needed}")));
        }
        let state = State { bytes };
        if state.status(RAN) != NONE {
            return Err(no_forward("a state that none has run on"));
        }
        Ok(state)
    }

    /// A state on which a forward call has run to its end and was not refused.
    fn accepted<'a>(&self, bytes: &'a [u8]) -> Result<State<'a>> {
        let state = self.state(bytes)?;
        if state.word(ACCEPTED) == 0 {
            return Err(no_forward("a state whose call was refused, or whose sums have not been combined"));
        }
        Ok(state)
    }

    /// Why the call was refused that left this state; `None` if it was not.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer bytes than [`Plan::state_bytes`], [`Error::StateMismatch`] for those of a state on which no
    /// forward call has run.
    pub fn refusal(&self, state: &[u8]) -> Result<Option<Refusal>> {
        let state = self.state(state)?;
        let row = |word: usize| Some(state.status(word)).filter(|row| *row != NONE).map(|row| row as usize);
        let zero_norm = [0, 1].map(|k| row(ZERO_NORM + k).filter(|_| self.facts.zero_is_error));
        let [group, prefix] = [NO_NEGATIVE_GROUP, NO_NEGATIVE_PREFIX].map(|word| state.status(word) as usize);
        let no_negative = row(NO_NEGATIVE).map(|row| (row, group, prefix));
        Ok(Refusal::first([0, 1].map(|k| row(NON_FINITE + k)), zero_norm, no_negative))
    }

    /// The error for a refusal. `row_bytes` must give a row that is not finite, as the call read it.
    pub fn error_of(&self, refusal: Refusal, row_bytes: impl FnOnce(Tower, usize) -> Result<Vec<u8>>) -> Error {
        let prefixes = self.facts.named.then_some(&*self.facts.prefixes);
        refusal.error(&self.facts.loss, self.facts.raw[0].0, prefixes, row_bytes)
    }

    /// Loss, row losses and metrics from the state after [`Plan::forward`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer bytes than [`Plan::state_bytes`], [`Error::StateMismatch`] for those of a state on which no
    /// forward call has run to its end, or one was refused.
    pub fn evaluation(&self, state: &[u8]) -> Result<Evaluation> {
        let state = self.accepted(state)?;
        let of_prefixes = (0..self.facts.prefixes.len()).map(|k| self.evaluation_of(&state, k)).collect();
        Ok(Evaluation::of_prefixes(of_prefixes, &self.facts.prefixes, self.facts.named))
    }

    /// Loss, row losses and metrics of prefix `k`, not multiplied by its weight.
    fn evaluation_of(&self, state: &State<'_>, k: usize) -> Evaluation {
        let weights = &self.facts.weights;
        let m = weights.len();
        let first = self.layout.row_losses + k * self.layout.prefix_words;
        let row_losses: Vec<f64> = (0..m).map(|i| state.scaled(first + 2 * i)).collect();
        let metrics = |block: Block| {
            let above = |i: usize| state.word(self.sum(k, block, i) + 3);
            let sum = |f: fn(u32) -> f64| (0..m).map(|i| weights[i] * f(above(i))).sum();
            Metrics::from_sums(
                sum(|above| f64::from(u8::from(above == 0))),
                sum(|above| 1.0 / (1.0 + f64::from(above))),
            )
        };
        let loss = row_losses.iter().zip(weights).map(|(l, w)| l * w).sum();
        Evaluation::plain(loss, row_losses, [Block::QP, Block::PQ].map(metrics))
    }

    /// ∂L/∂τ and ∂L/∂log β from the state after [`Plan::backward`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer bytes than [`Plan::state_bytes`], [`Error::StateMismatch`] for those of a state on which no
    /// forward call has run to its end, or one was refused.
    pub fn temperature(&self, state: &[u8]) -> Result<TemperatureGradient> {
        let state = self.accepted(state)?;
        let sum = state.float(BETA_SUM) + state.float(BETA_SUM + 1);
        let upstream = self.facts.upstream * state.scaled(UPSTREAM);
        let grad_beta = upstream * times_power_of_two(sum, state.int(SHIFT));
        Ok(TemperatureGradient::from_beta(grad_beta, self.facts.beta))
    }

    /// Where the sum of a row in a block is, for prefix `k`.
    fn sum(&self, k: usize, block: Block, row: usize) -> usize {
        self.layout.sums + SUM_WORDS * ((Block::ALL.len() * k + block.index()) * self.facts.weights.len() + row)
    }

    /// The partial sums of this shard, from the state after [`Plan::partials`]. The caller merges them with those of the other shards.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer bytes than [`Plan::state_bytes`], [`Error::StateMismatch`] for those of a state on which no
    /// forward call has run.
    pub fn read_partials(&self, state: &[u8]) -> Result<Partials> {
        let state = self.state(state)?;
        let (facts, m) = (&self.facts, self.facts.weights.len());
        let uses = |b: Block| facts.uses[b.index()];
        let mut partials = Partials::new(m, uses, facts.rows.clone(), facts.identity.clone(), self.positives(&state));
        for (k, of_prefix) in partials.prefixes.iter_mut().enumerate() {
            for (block, sums) in Block::ALL.into_iter().zip(&mut of_prefix.sums) {
                for (row, sum) in sums.iter_mut().enumerate() {
                    let at = self.sum(k, block, row);
                    *sum = ExpSum::new(state.float(at) + state.float(at + 1), state.int(at + 2));
                }
            }
            for (block, above) in [Block::QP, Block::PQ].into_iter().zip(&mut of_prefix.above) {
                for (row, above) in above.iter_mut().enumerate() {
                    *above = state.word(self.sum(k, block, row) + 3);
                }
            }
        }
        Ok(partials)
    }

    /// s⁺ of all rows, by prefix.
    fn positives(&self, state: &State<'_>) -> Vec<Vec<f64>> {
        let of_prefix = |k: usize| {
            let first = self.layout.positive + k * self.layout.prefix_words;
            let places = (0..self.facts.weights.len()).map(|i| first + 2 * i);
            places.map(|at| state.float(at) + state.float(at + 1)).collect()
        };
        (0..self.facts.prefixes.len()).map(of_prefix).collect()
    }

    /// An error unless `partials` are of the problem and the embeddings that left this state with [`Plan::partials`]. It compares the
    /// cosines of all rows with their positives.
    ///
    /// # Errors
    /// [`Error::StateMismatch`], which names a row whose cosine differs, or if no forward call has run. [`Error::InvalidArgument`] for
    /// fewer bytes than [`Plan::state_bytes`].
    pub fn check_embeddings(&self, partials: &Partials, state: &[u8]) -> Result<()> {
        partials.expect_problem(&self.facts.identity)?;
        let given = self.positives(&self.state(state)?);
        let mut both = partials.prefixes.iter().zip(&given);
        both.try_for_each(|(saved, given)| expect_positives(&saved.positive, given, SAME_COSINE))
    }

    /// The range of the slot `State` that must be overwritten with merged sums before [`Plan::combine`], and its new bytes. Coefficients
    /// are made from these sums and from the s⁺ that are in the state. So the embeddings must be the same; [`Plan::check_embeddings`]
    /// checks that.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for partial sums that do not cover all rows. [`Error::StateMismatch`] for those of another problem.
    pub fn write_partials(&self, partials: &Partials) -> Result<(Range<u64>, Vec<u8>)> {
        partials.expect_problem(&self.facts.identity)?;
        partials.expect_complete()?;
        let m = self.facts.weights.len();
        let mut words = Vec::with_capacity(SUM_WORDS * 4 * m * partials.prefixes.len());
        for (of_prefix, block) in partials.prefixes.iter().flat_map(|p| Block::ALL.map(|block| (p, block))) {
            for row in 0..m {
                let (sum, exponent) =
                    of_prefix.sums[block.index()].get(row).map_or((0.0, 0), |sum| normalized(sum.parts()));
                let high = sum as f32;
                let low = (sum - f64::from(high)) as f32;
                let above = of_prefix.above.get(block.index()).map_or(0, |above| above[row]);
                words.extend([high.to_bits(), low.to_bits(), exponent as u32, above]);
            }
        }
        let start = STATUS_BYTES + 4 * self.layout.sums as u64;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok((start..start + bytes.len() as u64, bytes))
    }
}

fn no_forward(given: &str) -> Error {
    Error::StateMismatch { saved: "no forward call".into(), given: given.into() }
}

/// The same sum with a number from 1 to 2 and the exponent to match. Merging may leave a number that is beyond the range of f32.
fn normalized((sum, exponent): (f64, i32)) -> (f64, i32) {
    if sum == 0.0 || !sum.is_normal() {
        return (0.0, 0);
    }
    let own = ((sum.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    (times_power_of_two(sum, -own), exponent.saturating_add(own))
}

const _: () = assert!(BETA_SUM + 2 <= RESULT_WORDS);
