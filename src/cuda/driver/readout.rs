//! Reads what a call left in the state: results, or the error for inputs that the definition (docs/loss.md) refuses.

mod reading;

use crate::call::ZeroNorm;
use crate::cuda::abi::{
    self, CHANGED_PASSAGE, CHANGED_QUERY, GRAD_LOG_BETA, GRAD_TAU, LOSS, MRR_PQ, MRR_QP, NO_NEGATIVE,
    NO_NEGATIVE_GROUP, NON_FINITE_PASSAGE, NON_FINITE_QUERY, NONE, PRECISION_PQ, PRECISION_QP, REPACKED_PASSAGE,
    REPACKED_QUERY, RESULTS, STATUS_WORDS, Shared, ZERO_PASSAGE, ZERO_QUERY,
};
use crate::cuda::{Plan, Problem, Slot};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::identity::Identity;
use crate::loss::{Block, Loss};
use crate::output::{Evaluation, Metrics, PrefixEvaluation, TemperatureGradient};
use crate::partials::{ExpSum, Partials};
use crate::prefix::Prefix;
use crate::refusal::{Refusal, non_finite, values};
use crate::tower::Tower;
use std::ops::Range;

/// How to read the results of a plan: where they are, and what their errors name.
#[derive(Debug, Clone)]
pub struct Readout {
    loss: Loss,
    zero_norm: ZeroNorm,
    rows: usize,
    passages: usize,
    shard: Range<usize>,
    /// Those of weight above 0, shortest first.
    prefixes: Vec<Prefix>,
    /// Whether the call names them.
    named: bool,
    /// Parts of `results` and `status` that come before those of the prefixes: 1 for that of the whole call, or 0 where the only prefix is
    /// the whole call.
    joint: usize,
    dtype: DType,
    /// Bytes from row to row of both towers.
    row_bytes: [u64; 2],
    results: Range<usize>,
    status: Range<usize>,
    /// Those of the call. Those of the prefixes, which follow, are not read.
    row_losses: Range<usize>,
    // These three have one part for each prefix.
    sums: Range<usize>,
    above: Range<usize>,
    positive: Range<usize>,
    /// Identity of the problem. Partial sums of another identity are not merged with those of this one.
    identity: Identity,
}

/// What the array `status` says is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The call is refused.
    Refused(Refusal),
    /// The embedding had another norm in a backward call than in the forward call.
    Changed(Tower, usize),
}

impl Readout {
    /// The readout of the plan that was made from this problem.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] for a plan that lacks an array of such a plan.
    pub fn new(problem: &Problem<'_>, plan: &Plan) -> Result<Self> {
        let (rows, passages, _) = problem.shape();
        let place = |name: &str, bytes: usize| {
            let array = plan.array(name).filter(|a| a.slot == Slot::State && a.bytes == bytes as u64);
            let range = array.map(|a| a.offset as usize..a.offset as usize + bytes);
            range.ok_or_else(|| Error::StateMismatch {
                saved: format!("a plan without {bytes} bytes of `{name}` in its state"),
                given: format!("a problem of {rows} queries"),
            })
        };
        let (dtype, call) = (problem.dtype, problem.call());
        let (parts, joint) = (problem.prefixes.len(), usize::from(problem.several().is_some()));
        let row_losses = place("row_losses", (joint + parts) * rows * f64::BYTES)?;
        Ok(Self {
            loss: call.loss().clone(),
            zero_norm: call.zero_norm(),
            rows,
            passages,
            shard: problem.rows.clone(),
            prefixes: problem.prefixes.clone(),
            named: call.prefixes().is_some(),
            joint,
            dtype,
            row_bytes: problem.row_strides.map(|stride| (stride * dtype.bytes()) as u64),
            results: place("results", (joint + parts) * RESULTS * f64::BYTES)?,
            status: place("status", (joint + parts) * STATUS_WORDS * u32::BYTES)?,
            row_losses: row_losses.start..row_losses.start + rows * f64::BYTES,
            sums: place("sums", parts * Block::ALL.len() * rows * abi::ExpSum::BYTES)?,
            above: place("above", parts * 2 * rows * u32::BYTES)?,
            positive: place("positive", parts * rows * f64::BYTES)?,
            identity: problem.identity(),
        })
    }

    /// The first fault. A refusal comes first. `status` is the array of that name.
    fn fault(&self, status: &[u8]) -> Option<Fault> {
        let word = |at: usize| row_of(status, at);
        // The call has the words of the first prefix of which a row has no negative.
        let prefix =
            || (0..self.prefixes.len()).find(|k| row_of(status, self.part(*k) * STATUS_WORDS + NO_NEGATIVE).is_some());
        let no_negative = word(NO_NEGATIVE);
        let no_negative = no_negative.map(|row| (row, word(NO_NEGATIVE_GROUP).unwrap_or(0), prefix().unwrap_or(0)));
        let words = [[REPACKED_QUERY, CHANGED_QUERY], [REPACKED_PASSAGE, CHANGED_PASSAGE]];
        let changed = |k: usize, tower| Some(Fault::Changed(tower, words[k].into_iter().filter_map(word).min()?));
        let refusal = self.refusal(status, 0, no_negative).map(Fault::Refused);
        refusal.or(changed(0, Tower::Query)).or(changed(1, Tower::Passage))
    }

    /// The first fault after the partial sums of a shard. They are incomplete, so it does not matter yet which rows have no negative. Faults
    /// of embeddings are the same for all prefixes, and those of the call are not there yet.
    fn fault_of_partials(&self, status: &[u8]) -> Option<Fault> {
        self.refusal(status, self.part(0), None).map(Fault::Refused)
    }

    /// The first refusal in a part of `status`.
    fn refusal(&self, status: &[u8], part: usize, no_negative: Option<(usize, usize, usize)>) -> Option<Refusal> {
        let word = |at: usize| row_of(status, part * STATUS_WORDS + at);
        let zero_norm = [ZERO_QUERY, ZERO_PASSAGE].map(|at| word(at).filter(|_| self.zero_norm == ZeroNorm::Error));
        Refusal::first([NON_FINITE_QUERY, NON_FINITE_PASSAGE].map(word), zero_norm, no_negative)
    }

    /// How many entries of an embedding are read: those of the longest prefix.
    fn entries(&self) -> usize {
        self.prefixes.last().map_or(0, |prefix| prefix.dim)
    }

    /// Which part of `results` and `status` is that of a prefix.
    fn part(&self, prefix: usize) -> usize {
        self.joint + prefix
    }

    /// An error if the status names a row that does not exist. Then no call of this plan has written the state: the call may have been
    /// captured but never run, or the state may be of another plan.
    fn expect_row(&self, fault: Fault) -> Result<()> {
        let (what, row, count) = match fault {
            Fault::Refused(Refusal::NonFinite(tower, row) | Refusal::ZeroNorm(tower, row))
            | Fault::Changed(tower, row) => {
                (tower.to_string(), row, if tower == Tower::Query { self.rows } else { self.passages })
            }
            Fault::Refused(Refusal::NoNegative(row, ..)) => (Tower::Query.to_string(), row, self.rows),
        };
        if row < count {
            return Ok(());
        }
        Err(Error::StateMismatch {
            saved: format!("no call that has run: it names the {what} embedding in row {row}"),
            given: format!("{count} such rows"),
        })
    }

    /// The error for a row that a backward call found changed.
    fn changed(&self, tower: Tower, row: usize, bytes: &[u8]) -> Error {
        let values = values(bytes, self.dtype);
        if values.iter().any(|value| !value.is_finite()) {
            return non_finite(tower, row, &values);
        }
        let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
        Error::StateMismatch {
            saved: format!("a {tower} embedding in row {row} that a backward call found to be another one"),
            given: format!("one of norm {norm}"),
        }
    }

    /// Metrics, loss and row losses. `head` is the beginning of the state: see [`Readout::head`].
    fn evaluation(&self, head: &[u8]) -> Evaluation {
        let results: Vec<f64> = numbers(&head[self.results.clone()], f64::from_le_bytes).collect();
        let metrics = |part: usize| {
            let metric = |at: usize| results[part * RESULTS + at];
            [[PRECISION_QP, MRR_QP], [PRECISION_PQ, MRR_PQ]]
                .map(|[precision, mrr]| Metrics { precision_at_1: metric(precision), mrr: metric(mrr) })
        };
        let row_losses = numbers(&head[self.row_losses.clone()], f64::from_le_bytes).collect();
        let of_prefix = |(k, prefix): (usize, &Prefix)| {
            let [query_to_passage, passage_to_query] = metrics(self.part(k));
            let loss = results[self.part(k) * RESULTS + LOSS];
            PrefixEvaluation { dim: prefix.dim, weight: prefix.weight, loss, query_to_passage, passage_to_query }
        };
        let prefixes = if self.named { self.prefixes.iter().enumerate().map(of_prefix).collect() } else { Vec::new() };
        Evaluation { prefixes, ..Evaluation::plain(results[LOSS], row_losses, metrics(0)) }
    }

    fn temperature(&self, head: &[u8]) -> TemperatureGradient {
        let results: Vec<f64> = numbers(&head[self.results.clone()], f64::from_le_bytes).collect();
        TemperatureGradient { tau: results[GRAD_TAU], log_beta: results[GRAD_LOG_BETA] }
    }

    /// Partial sums from the arrays `sums`, `above` and `positive`.
    fn partials(&self, sums: &[u8], above: &[u8], positive: &[u8]) -> Partials {
        let uses = |b| self.loss.uses(b);
        let mut out =
            Partials::new(self.rows, uses, self.shard.clone(), self.identity.clone(), self.positives(positive));
        let [of_sums, of_above] =
            [Block::ALL.len() * abi::ExpSum::BYTES, 2 * u32::BYTES].map(|bytes| bytes * self.rows);
        let arrays = sums.chunks_exact(of_sums).zip(above.chunks_exact(of_above));
        for (of_prefix, (sums, above)) in out.prefixes.iter_mut().zip(arrays) {
            for (block, rows) in of_prefix.sums.iter_mut().zip(sums.chunks(self.rows * abi::ExpSum::BYTES)) {
                for (sum, bytes) in block.iter_mut().zip(rows.chunks_exact(abi::ExpSum::BYTES)) {
                    let found: abi::ExpSum = bytemuck::pod_read_unaligned(bytes);
                    *sum = ExpSum::new(found.sum, found.exponent);
                }
            }
            for (block, rows) in of_prefix.above.iter_mut().zip(above.chunks(self.rows * u32::BYTES)) {
                block.iter_mut().zip(numbers(rows, u32::from_le_bytes)).for_each(|(count, value)| *count = value);
            }
        }
        out
    }

    /// s⁺ of all rows for each prefix, from the array `positive`.
    fn positives(&self, positive: &[u8]) -> Vec<Vec<f64>> {
        let of_prefixes = positive.chunks_exact(self.rows * f64::BYTES);
        of_prefixes.map(|of_prefix| numbers(of_prefix, f64::from_le_bytes).collect()).collect()
    }

    /// The arrays `sums` and `above` for these partial sums.
    fn encode(&self, partials: &Partials) -> (Vec<u8>, Vec<u8>) {
        let mut sums = vec![0; self.sums.len()];
        let blocks = partials.prefixes.iter().flat_map(|of_prefix| &of_prefix.sums);
        for (block, rows) in blocks.zip(sums.chunks_mut(self.rows * abi::ExpSum::BYTES)) {
            for (sum, bytes) in block.iter().zip(rows.chunks_exact_mut(abi::ExpSum::BYTES)) {
                let (sum, exponent) = sum.parts();
                bytes.copy_from_slice(bytemuck::bytes_of(&abi::ExpSum { sum, exponent, padding: 0 }));
            }
        }
        let above = partials.prefixes.iter().flat_map(|of_prefix| of_prefix.above.iter().flatten());
        (sums, above.flat_map(|count| count.to_le_bytes()).collect())
    }

    /// Where in the state the loss is, an f64: its first byte.
    pub fn loss_offset(&self) -> usize {
        self.results.start + f64::BYTES * LOSS
    }

    /// Where in the state ∂L/∂τ is, an f64: its first byte. ∂L/∂log β follows it.
    #[cfg(feature = "cudarc")]
    pub(super) fn temperature_offset(&self) -> usize {
        const { assert!(GRAD_LOG_BETA == GRAD_TAU + 1) }
        self.results.start + f64::BYTES * GRAD_TAU
    }

    /// Element type of the embeddings.
    #[cfg(feature = "cudarc")]
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// How many bytes at the beginning of the state hold results, status and row losses.
    fn head(&self) -> usize {
        self.results.end.max(self.status.end).max(self.row_losses.end)
    }
}

/// The row that a word of the array `status` names.
fn row_of(status: &[u8], word: usize) -> Option<usize> {
    numbers(status, u32::from_le_bytes).nth(word).filter(|&row| row != NONE).map(|row| row as usize)
}

/// Numbers from little-endian bytes.
fn numbers<T, const N: usize>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> impl Iterator<Item = T> {
    bytes.chunks_exact(N).map(move |chunk| {
        let mut word = [0; N];
        word.copy_from_slice(chunk);
        from(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Call;
    use Fault::Refused as refused;
    use half::f16;

    fn readout(zero_norm: ZeroNorm) -> Readout {
        readout_of(&Call::new(Loss::samtone_query(), 0.1).with_zero_norm(zero_norm))
    }

    /// Of two queries and three passages of dimension 4.
    fn readout_of(call: &Call) -> Readout {
        let problem = Problem::new(call.pairs(2, 3).unwrap(), DType::F16, 4).unwrap();
        Readout::new(&problem, &Plan::new(&problem).unwrap()).unwrap()
    }

    /// Prefixes of weight above 0 are those of 1 and of 3 entries.
    fn readout_of_prefixes() -> Readout {
        let call = Call::new(Loss::samtone_query(), 0.1).with_prefixes([1, 2, 3]);
        readout_of(&call.with_prefix_weights([0.5, 0.0, 2.0]))
    }

    fn status(words: &[(usize, u32)]) -> Vec<u8> {
        status_of_parts(&[words])
    }

    fn status_of_parts(parts: &[&[(usize, u32)]]) -> Vec<u8> {
        let of_part = |words: &&[(usize, u32)]| {
            let mut all = [NONE; STATUS_WORDS];
            words.iter().for_each(|&(at, row)| all[at] = row);
            all
        };
        parts.iter().flat_map(of_part).flat_map(u32::to_le_bytes).collect()
    }

    #[test]
    fn faults_come_in_the_order_of_the_other_backends() {
        let strict = readout(ZeroNorm::Error);
        assert_eq!(strict.fault(&status(&[])), None);
        let both = status(&[(NON_FINITE_PASSAGE, 0), (ZERO_QUERY, 1), (NO_NEGATIVE, 0)]);
        assert_eq!(strict.fault(&both), Some(refused(Refusal::ZeroNorm(Tower::Query, 1))));
        assert_eq!(readout(ZeroNorm::ZeroGradient).fault(&both), Some(refused(Refusal::NonFinite(Tower::Passage, 0))));
        let last = status(&[(NO_NEGATIVE, 1), (NO_NEGATIVE_GROUP, 2)]);
        assert_eq!(strict.fault(&last), Some(refused(Refusal::NoNegative(1, 2, 0))));
        let changed = [(REPACKED_PASSAGE, 0), (CHANGED_QUERY, 1), (REPACKED_QUERY, 0)];
        assert_eq!(strict.fault(&status(&changed)), Some(Fault::Changed(Tower::Query, 0)));
        assert_eq!(strict.fault(&status(&changed[..2])), Some(Fault::Changed(Tower::Query, 1)));
        assert_eq!(strict.fault(&status(&changed[..1])), Some(Fault::Changed(Tower::Passage, 0)));
        assert_eq!(
            strict.fault(&status(&[changed[1], (ZERO_PASSAGE, 2)])),
            Some(refused(Refusal::ZeroNorm(Tower::Passage, 2)))
        );
    }

    #[test]
    fn a_fault_names_its_prefix() {
        let readout = readout_of_prefixes();
        let prefix_of = |fault: Option<Fault>| {
            let Some(refused(refusal)) = fault else { panic!("{fault:?}") };
            match refusal.error("two", DType::F16, Some(&readout.prefixes), |_, _| Ok(Vec::new())) {
                Error::NoNegative { group: 2, row: 1, prefix, .. }
                | Error::ZeroNorm { tower: Tower::Passage, row: 2, prefix } => prefix,
                other => panic!("{other}"),
            }
        };
        let none = [(NO_NEGATIVE, 1), (NO_NEGATIVE_GROUP, 2)];
        for (parts, dim) in [([&none[..], &none, &[]], 1), ([&none, &[], &none], 3), ([&none, &none, &none], 1)] {
            assert_eq!(prefix_of(readout.fault(&status_of_parts(&parts))), Some(dim), "{parts:?}");
        }
        let zero = [(ZERO_PASSAGE, 2), (NO_NEGATIVE, 1)];
        let status = status_of_parts(&[&zero, &zero, &zero]);
        assert_eq!(prefix_of(readout.fault(&status)), Some(1));
        // After partial sums, the part of the call is not there yet. Rows without negatives are not known either.
        let unwritten = [(NON_FINITE_QUERY, 0), (CHANGED_QUERY, 0)];
        assert_eq!(readout.fault_of_partials(&status_of_parts(&[&unwritten, &none, &none])), None);
        assert_eq!(readout.fault_of_partials(&status_of_parts(&[&unwritten, &zero, &zero])), readout.fault(&status));
        let whole = readout_of(&Call::new(Loss::samtone_query(), 0.1).with_prefixes([4]));
        assert_eq!(whole.fault_of_partials(&self::status(&zero)), whole.fault(&self::status(&zero)));
    }

    #[test]
    fn results_of_prefixes_follow_those_of_the_call() {
        let evaluation = |call: &Call| {
            let readout = readout_of(call);
            let mut head = vec![0; readout.head()];
            // Every number says where it is.
            let mut put = |range: Range<usize>| {
                let numbers = head[range].chunks_exact_mut(f64::BYTES).enumerate();
                numbers.for_each(|(k, bytes)| bytes.copy_from_slice(&(k as f64).to_le_bytes()));
            };
            put(readout.results.clone());
            put(readout.row_losses.clone());
            assert_eq!(readout.temperature(&head), TemperatureGradient { tau: 7.0, log_beta: 8.0 });
            readout.evaluation(&head)
        };
        let metrics = |precision_at_1: f64| Metrics { precision_at_1, mrr: precision_at_1 + 1.0 };
        let call = Call::new(Loss::samtone_query(), 0.1);
        let plain = Evaluation::plain(0.0, vec![0.0, 1.0], [metrics(1.0), metrics(3.0)]);
        assert_eq!(evaluation(&call), plain);
        let of = |dim: usize, weight: f64, first: f64| PrefixEvaluation {
            dim,
            weight,
            loss: first,
            query_to_passage: metrics(first + 1.0),
            passage_to_query: metrics(first + 3.0),
        };
        let whole = Evaluation { prefixes: vec![of(4, 1.0, 0.0)], ..plain.clone() };
        assert_eq!(evaluation(&call.clone().with_prefixes([4])), whole);
        let two = Evaluation { prefixes: vec![of(1, 0.5, 16.0), of(3, 2.0, 32.0)], ..plain.clone() };
        assert_eq!(evaluation(&call.clone().with_prefixes([1, 2, 3]).with_prefix_weights([0.5, 0.0, 2.0])), two);
        let heavy = Evaluation { prefixes: vec![of(4, 2.0, 16.0)], ..plain };
        assert_eq!(evaluation(&call.with_prefixes([4]).with_prefix_weights([2.0])), heavy);
    }

    #[test]
    fn an_element_that_is_not_finite_is_found_in_its_row() {
        let row: Vec<u8> = [1.0, f32::NEG_INFINITY, f32::NAN, 0.0]
            .into_iter()
            .flat_map(|value| f16::from_f32(value).to_le_bytes())
            .collect();
        let readout = readout(ZeroNorm::Error);
        assert_eq!(readout.expect_row(refused(Refusal::NonFinite(Tower::Passage, 2))), Ok(()));
        for fault in [Refusal::ZeroNorm(Tower::Query, 2), Refusal::NonFinite(Tower::Passage, 3)].map(refused) {
            assert!(matches!(readout.expect_row(fault), Err(Error::StateMismatch { .. })), "{fault:?}");
        }
        let error_of = |bytes: &[u8]| {
            Refusal::NonFinite(Tower::Query, 7).error("", readout.dtype, None, |_, _| Ok(bytes.to_vec()))
        };
        let error = error_of(&row);
        assert_eq!(error, Error::NonFinite { tower: Tower::Query, row: 7, column: 1, value: f64::NEG_INFINITY });
        assert!(error_of(&[0; 8]).to_string().contains("overwritten"));
        assert_eq!(readout.changed(Tower::Query, 7, &row), error);
        let two: Vec<u8> = [2.0; 1].into_iter().flat_map(|value| f16::from_f32(value).to_le_bytes()).collect();
        let sentence = readout.changed(Tower::Passage, 1, &two).to_string();
        assert!(sentence.contains("passage embedding in row 1") && sentence.contains("norm 2;"), "{sentence}");
    }

    #[test]
    fn partials_survive_the_way_to_the_device_and_back() {
        let readout = readout(ZeroNorm::Error);
        let sums: Vec<u8> = (0..4 * 2)
            .flat_map(|k| [(1.0 + f64::from(k) / 8.0).to_bits(), if k == 3 { -7_i32 as u32 as u64 } else { 30 }])
            .flat_map(u64::to_le_bytes)
            .collect();
        let above: Vec<u8> = [5_u32, 0, 1, 2].iter().flat_map(|count| count.to_le_bytes()).collect();
        let positive: Vec<u8> = [0.25, -1.0].iter().flat_map(|s: &f64| s.to_le_bytes()).collect();
        let partials = readout.partials(&sums, &above, &positive);
        assert_eq!(partials.prefixes[0].positive, [0.25, -1.0]);
        assert_eq!(partials.prefixes[0].sums[Block::PQ.index()][1], ExpSum::new(1.375, -7));
        assert_eq!(partials.prefixes[0].sums[Block::PP.index()], [], "a block that the loss does not use");
        assert_eq!(partials.prefixes[0].above, [[5, 0], [1, 2]]);
        let (encoded, counts) = readout.encode(&partials);
        assert_eq!((encoded.len(), counts), (sums.len(), above.clone()));
        let again = readout.partials(&encoded, &above, &positive);
        for (sum, same) in partials.prefixes[0].sums.iter().flatten().zip(again.prefixes[0].sums.iter().flatten()) {
            assert!((sum.ln() - same.ln()).abs() < 1e-14, "{sum:?} {same:?}");
        }
    }

    #[test]
    fn partials_of_each_prefix_have_their_place() {
        let readout = readout_of_prefixes();
        // Two prefixes, four blocks, two rows.
        let words = (0..2 * 4 * 2).flat_map(|k| [f64::from(k).to_bits(), k as u64]);
        let sums: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let above: Vec<u8> = (0..2 * 2 * 2_u32).flat_map(u32::to_le_bytes).collect();
        let positive: Vec<u8> = [0.25, -1.0, 0.5, 0.75].iter().flat_map(|s: &f64| s.to_le_bytes()).collect();
        let partials = readout.partials(&sums, &above, &positive);
        let [short, long] = [&partials.prefixes[0], &partials.prefixes[1]];
        assert_eq!((&short.positive[..], &long.positive[..]), (&[0.25, -1.0][..], &[0.5, 0.75][..]));
        assert_eq!(short.sums[Block::PQ.index()], [2, 3].map(|k| ExpSum::new(f64::from(k), k)));
        assert_eq!(long.sums[Block::PQ.index()], [10, 11].map(|k| ExpSum::new(f64::from(k), k)));
        assert_eq!((&short.above, &long.above), (&[vec![0, 1], vec![2, 3]], &[vec![4, 5], vec![6, 7]]));
        let (encoded, counts) = readout.encode(&partials);
        assert_eq!((encoded.len(), &counts), (sums.len(), &above));
        // Blocks that the loss does not use are 0.
        assert_eq!(readout.partials(&encoded, &counts, &positive), partials);
    }
}
