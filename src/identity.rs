//! Which problem a result belongs to: what partial sums must have in common to be merged, and a saved state with the batch it is
//! used with.
//!
//! An identity has everything that decides the value of a result but the embeddings. It is the same on every backend, and for
//! every shard, workspace, tile and share of skipped tiles. Lists are digests of what they mean, not of how they were given:
//! ids count only by which of them are equal, and defaults are the lists they stand for.

use crate::call::{Call, NoNegative, ZeroNorm};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::loss::{Group, write_groups};
use crate::mask::Keys;
use crate::pairs::Pairs;
use crate::prefix::{self, Prefix};
use std::fmt;

/// Everything that a result depends on, but its embeddings.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Identity {
    rows: usize,
    passages: usize,
    dim: usize,
    dtype: DType,
    /// Those with a coefficient above 0, each with its blocks in the order of `Block::ALL`. Not the loss's name: anything may be
    /// called by the name of another loss.
    groups: Vec<Group>,
    temperature: f64,
    margin: Option<f64>,
    zero_norm: ZeroNorm,
    no_negative: NoNegative,
    positives: Digest,
    weights: Digest,
    query_ids: Digest,
    passage_ids: Digest,
    shared_ids: bool,
    owners: Digest,
    prefixes: Vec<Prefix>,
}

impl Identity {
    pub(crate) fn new(pairs: &Pairs<'_>, keys: &Keys, dtype: DType, dim: usize) -> Self {
        let (rows, passages, call) = (pairs.rows(), pairs.passages(), pairs.call());
        let owners = pairs.exclusive_owners();
        // By name, so that the compiler asks of a new option whether it decides the value of a result.
        let Call {
            loss,
            temperature: _, // below, as the others without a name here
            margin: _,
            zero_norm,
            no_negative,
            workspace_bytes: _, // changes no more than the order of additions
            tile_skipping: _,   // bounded by its own promise
            positives: _,
            weights: _,
            query_ids: _,
            passage_ids: _,
            shared_ids,
            owners: _,
            prefixes: _,
            prefix_weights: _,
        } = call;
        Self {
            rows,
            passages,
            dim,
            dtype,
            groups: loss.groups().iter().filter(|g| g.coefficient() > 0.0).map(Group::in_order).collect(),
            temperature: call.temperature(),
            margin: call.margin(),
            zero_norm: *zero_norm,
            no_negative: *no_negative,
            positives: (0..rows).map(|i| pairs.positive(i) as u64).collect(),
            weights: (0..rows).map(|i| (pairs.weight(i) + 0.0).to_bits()).collect(), // + 0: no negative zero
            query_ids: keys.rows.iter().map(|key| key.query.into()).collect(),
            passage_ids: keys.passages.iter().map(|key| key.passage.into()).collect(),
            shared_ids: *shared_ids,
            owners: (0..passages).map(|n| owners.map_or(-1, |o| i64::from(o[n])) as u64).collect(),
            prefixes: prefix::of(call, dim).unwrap_or_default(), // checked with the batch or problem
        }
    }

    /// The parts by name, in words of which no two are the same for different values.
    fn parts(&self) -> [(&'static str, String); 13] {
        let shape =
            format!("{} queries x {} passages of dimension {}, {}", self.rows, self.passages, self.dim, self.dtype);
        [
            ("", shape),
            ("the loss", Groups(&self.groups).to_string()),
            ("temperature", self.temperature.to_string()),
            ("margin", self.margin.map_or_else(|| "none".into(), |m| m.to_string())),
            ("the policy `zero_norm`", format!("{:?}", self.zero_norm)),
            ("the policy `no_negative`", format!("{:?}", self.no_negative)),
            ("`positives`", self.positives.to_string()),
            ("`weights`", self.weights.to_string()),
            ("`shared_ids`", self.shared_ids.to_string()),
            ("`query_ids`", self.query_ids.to_string()),
            ("`passage_ids`", self.passage_ids.to_string()),
            ("exclusive `owners`", self.owners.to_string()),
            ("`prefixes`", Prefixes(&self.prefixes).to_string()),
        ]
    }

    /// An error that names the first part in which what was saved differs from what is given.
    pub(crate) fn expect(&self, given: &Self) -> Result<()> {
        if self == given {
            return Ok(());
        }
        let mut pairs = self.parts().into_iter().zip(given.parts());
        let differing = pairs.find(|(saved, given)| saved != given);
        let (saved, given) = differing.unwrap_or_default();
        let sentence = |(name, value): (&str, String)| format!("{name} {value}").trim_start().to_string();
        Err(Error::StateMismatch { saved: sentence(saved), given: sentence(given) })
    }
}

/// The digest of a text.
pub(crate) fn digest(text: &str) -> [u64; 2] {
    let Digest(words) = text.bytes().map(u64::from).collect();
    words
}

/// Names and values of what decides a result beside embeddings and lists, in words of which no two are the same for different values.
pub(crate) fn option_texts(call: &Call) -> Vec<(&'static str, String)> {
    let call = call.without_lists();
    let pairs = Pairs::of(&call, 1, 1);
    // No prefix is longer than this.
    let mut identity = Identity::new(&pairs, &Keys::new(&pairs), DType::F32, i32::MAX as usize);
    if call.prefixes.is_none() {
        identity.prefixes.clear(); // the whole embedding, whose length is not known here
    }
    identity.parts().into_iter().filter(|(name, _)| !name.is_empty()).collect()
}

struct Groups<'a>(&'a [Group]);

impl fmt::Display for Groups<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_groups(f, self.0)
    }
}

struct Prefixes<'a>(&'a [Prefix]);

impl fmt::Display for Prefixes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        let one = |p: &Prefix| format!("{} (weight {})", p.dim, p.weight);
        write!(f, "{}", self.0.iter().map(one).collect::<Vec<_>>().join(", "))
    }
}

/// 128 bits of a list of numbers, the same on every machine and in every version of the crate that keeps this comment: for each of
/// two words h, h ← mix((h ⊕ x) + K) over the numbers x, where mix is the finaliser of SplitMix64; the second word takes x·K. Every
/// step is a bijection of h and one of x, so lists of one length that differ in one number always differ. It is no secret: who
/// wants to can find two lists of one digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Digest([u64; 2]);

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl FromIterator<u64> for Digest {
    fn from_iter<T: IntoIterator<Item = u64>>(numbers: T) -> Self {
        const K: u64 = 0x9e37_79b9_7f4a_7c15;
        // From digits of π, which have nothing to do with the numbers.
        let start = [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344];
        let step = |h: u64, x: u64| mix((h ^ x).wrapping_add(K));
        let both = |[a, b]: [u64; 2], x: u64| [step(a, x), step(b, x.wrapping_mul(K))];
        Self(numbers.into_iter().fold(start, both))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "with the digest {:016x}{:016x}", self.0[0], self.0[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Scope;
    use crate::loss::{Block, Loss};

    fn sized(call: &Call, passages: usize) -> Identity {
        let pairs = call.pairs(3, passages).unwrap();
        Identity::new(&pairs, &Keys::new(&pairs), DType::F32, 8)
    }

    fn of(call: &Call) -> Identity {
        sized(call, 4)
    }

    #[test]
    fn what_means_the_same_is_the_same() {
        let groups = vec![
            Group::new(1.0, &[Block::QQ, Block::QP], 1).unwrap(),
            Group::new(0.0, &[Block::PP], 2).unwrap(),
            Group::new(1.0, &[Block::PQ], 1).unwrap(),
        ];
        let spelled = Call::new(Loss::custom("mine", groups).unwrap(), 0.05).with_margin(f64::INFINITY);
        let spelled = spelled.with_positives([0, 1, 2]).with_weights([1.0; 3]);
        let spelled = spelled.with_query_ids([9, -4, 7]).with_passage_ids([3, 2, 1, 0]);
        let spelled = spelled.with_hard_negative_owners([0, 1, 2, 0], Scope::All);
        let spelled = spelled.with_workspace_bytes(1 << 20).with_tile_skipping(0.01);
        assert_eq!(of(&Call::new(Loss::samtone_query(), 0.05)), of(&spelled));
    }

    #[test]
    fn the_part_that_differs_is_named() {
        let call = Call::new(Loss::samtone_query(), 0.05).with_query_ids([1, 2, 3]).with_passage_ids([4, 5, 6, 7]);
        let own = of(&call);
        let but = |change: &dyn Fn(Call) -> Call| of(&change(call.clone()));
        let info_nce = Call::new(Loss::info_nce(), 0.05).with_query_ids([1, 2, 3]).with_passage_ids([4, 5, 6, 7]);
        let cases = [
            ("the loss 1·{qp}", of(&info_nce)),
            ("temperature 0.06", but(&|c| c.with_temperature(0.06))),
            ("margin -0.1", but(&|c| c.with_margin(-0.1))),
            ("`zero_norm` ZeroGradient", but(&|c| c.with_zero_norm(ZeroNorm::ZeroGradient))),
            ("`no_negative` Zero", but(&|c| c.with_no_negative(NoNegative::Zero))),
            ("`positives`", but(&|c| c.with_positives([0, 2, 1]))),
            ("`weights`", but(&|c| c.with_weights([1.0, 1.0, 2.0]))),
            ("`query_ids`", but(&|c| c.with_query_ids([1, 2, 1]))),
            ("`passage_ids`", but(&|c| c.with_passage_ids([4, 5, 6, 4]))),
            ("`shared_ids` true", but(&|c| c.with_shared_ids(true))),
            ("exclusive `owners`", but(&|c| c.with_hard_negative_owners([-1, -1, -1, 2], Scope::Own))),
            (
                "`prefixes` 3 (weight 0.5), 8 (weight 1)",
                but(&|c| c.with_prefixes([3, 8]).with_prefix_weights([0.5, 1.0])),
            ),
            ("3 queries x 5 passages of dimension 8, f32", sized(&call.clone().with_passage_ids([4, 5, 6, 7, 8]), 5)),
            ("f16", Identity { dtype: DType::F16, ..own.clone() }),
            ("dimension 9", Identity { dim: 9, ..own.clone() }),
        ];
        for (part, other) in &cases {
            let error = own.expect(other).unwrap_err().to_string();
            let (saved, given) = error.split_once("but is used with").unwrap();
            // Of lists there are only digests.
            assert!(given.contains(part) && saved.contains(part) == part.ends_with('`'), "{part}: {error}");
        }
        own.expect(&own.clone()).unwrap();
    }

    #[test]
    fn digests_do_not_change_from_version_to_version() {
        let digest: Digest = [1, 2, 3].into_iter().collect();
        assert_eq!(digest.to_string(), "with the digest cd8d705991914ea1567ea22f0616f374");
        let lists: [&[u64]; 6] = [&[], &[0], &[0, 0], &[1], &[1, 0], &[0, 1]];
        for (i, a) in lists.iter().enumerate() {
            for b in &lists[..i] {
                let digest = |x: &[u64]| x.iter().copied().collect::<Digest>();
                assert_ne!(digest(a), digest(b), "{a:?}, {b:?}");
            }
        }
    }
}
