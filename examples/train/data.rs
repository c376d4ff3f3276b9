//! Pairs, the identity of texts, and the split into training and held-out texts.

use anyhow::{Result, bail};
use std::collections::{HashMap, HashSet};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A query and its positive passage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// What is searched with.
    pub query: String,
    /// What should be found.
    pub passage: String,
    /// Pairs of one group never stand on both sides of the split; none: the query text is the group.
    pub group: Option<String>,
}

/// Held-out queries, the candidates they search in, and what counts as found.
#[derive(Debug, Default)]
pub struct TestSet {
    /// Query texts.
    pub queries: Vec<String>,
    /// Candidate texts.
    pub candidates: Vec<String>,
    /// Identity of each candidate's text: duplicates of a relevant text are relevant.
    pub candidate_ids: Vec<i64>,
    /// For each query the sorted ids of its relevant texts.
    pub relevant: Vec<Vec<i64>>,
    /// For each query one relevant candidate.
    pub positives: Vec<usize>,
}

/// Everything the experiment reads.
#[derive(Debug)]
pub struct Dataset {
    /// One sentence: where the pairs come from.
    pub source: String,
    /// Training pairs.
    pub train: Vec<Pair>,
    /// Held-out texts.
    pub test: TestSet,
    /// Held-out pairs dropped because training contains them.
    pub leaks_dropped: usize,
}

/// A seeded 64-bit hash that is the same on every machine.
pub fn text_hash(text: &str, seed: u64) -> u64 {
    xxh3_64_with_seed(text.as_bytes(), seed)
}

/// Identity of a text for duplicate masks and relevance: its hash without regard to case and white space.
pub fn text_id(text: &str) -> i64 {
    let mut normal = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        normal.extend(word.chars().flat_map(char::to_lowercase));
        normal.push(' ');
    }
    text_hash(&normal, 0).cast_signed()
}

/// `count` of 0..total, drawn at random, in ascending order.
pub fn sample_indices(total: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..total).collect();
    if count < total {
        fastrand::Rng::with_seed(seed).shuffle(&mut all);
        all.truncate(count);
        all.sort_unstable();
    }
    all
}

/// How the pairs are split.
pub struct Split {
    /// Share of the pairs to hold out.
    pub test_fraction: f64,
    /// Most held-out pairs.
    pub max_test: usize,
    /// Least training pairs, a whole batch.
    pub min_train: usize,
    /// Draws the held-out sample.
    pub seed: u64,
}

/// Fewer held-out queries say nothing.
pub const MIN_TEST: usize = 50;

/// Splits by the hash of the group: groups are held out in the order of their hash until they make up the share.
pub fn split_by_group(pairs: Vec<Pair>, source: String, split: &Split) -> Result<Dataset> {
    let total = pairs.len();
    let group_hash = |pair: &Pair| match &pair.group {
        Some(group) => text_hash(group, 0),
        None => text_id(&pair.query).cast_unsigned(),
    };
    let mut sizes: HashMap<u64, usize> = HashMap::new();
    for pair in &pairs {
        *sizes.entry(group_hash(pair)).or_default() += 1;
    }
    let mut groups: Vec<(u64, usize)> = sizes.into_iter().collect();
    groups.sort_unstable();
    let wanted = (total as f64 * split.test_fraction) as usize;
    let different = groups.len();
    let mut held_out = HashSet::new();
    let mut count = 0;
    for (group, size) in groups {
        if count >= wanted {
            break;
        }
        // A group that overshoots by more than the share itself would leave nothing to train on.
        if count + size <= 2 * wanted {
            held_out.insert(group);
            count += size;
        }
    }
    let (test, train): (Vec<Pair>, Vec<Pair>) = pairs.into_iter().partition(|p| held_out.contains(&group_hash(p)));

    // With groups a held-out passage must be new; without, passages are a shared collection and only pairs must be new.
    let grouped = train.iter().chain(&test).any(|p| p.group.is_some());
    let key = |p: &Pair| if grouped { (0, text_id(&p.passage)) } else { (text_id(&p.query), text_id(&p.passage)) };
    let seen: HashSet<_> = train.iter().map(key).collect();
    let before = test.len();
    let test: Vec<Pair> = test.into_iter().filter(|p| !seen.contains(&key(p))).collect();
    let leaks_dropped = before - test.len();

    if train.len() < split.min_train || test.len() < MIN_TEST {
        let few = wanted < MIN_TEST || total - wanted < split.min_train;
        let sources = "(--pairs FILE, --beir FOLDER, or fetch more crates with `cargo fetch`)";
        let advice = if different > 1 && few {
            format!("give more pairs {sources}, or lower --batch")
        } else if before >= MIN_TEST && train.len() >= split.min_train {
            format!(
                "{leaks_dropped} held-out pairs were dropped because training contains them; give pairs that repeat less {sources}"
            )
        } else {
            let kind = if grouped { "groups" } else { "queries" };
            format!(
                "the pairs are of {different} different {kind}, and all pairs of one of them stay on one side; give pairs of more \
                 different {kind} {sources}"
            )
        };
        bail!(
            "{total} pairs gave {} for training and {} held out, but a batch needs {} and the test {MIN_TEST}; {advice}",
            train.len(),
            test.len(),
            split.min_train
        );
    }
    let keep = sample_indices(test.len(), split.max_test, split.seed);
    let test = TestSet::from_pairs(keep.into_iter().map(|i| test[i].clone()).collect());
    Ok(Dataset { source, train, test, leaks_dropped })
}

impl TestSet {
    /// Every query searches among all passages. A passage is relevant if its text equals the positive of any pair with the
    /// same query text.
    pub fn from_pairs(pairs: Vec<Pair>) -> Self {
        let mut by_query: HashMap<i64, Vec<i64>> = HashMap::new();
        for pair in &pairs {
            by_query.entry(text_id(&pair.query)).or_default().push(text_id(&pair.passage));
        }
        for ids in by_query.values_mut() {
            ids.sort_unstable();
            ids.dedup();
        }
        let relevant = pairs.iter().map(|p| by_query[&text_id(&p.query)].clone()).collect();
        let candidate_ids = pairs.iter().map(|p| text_id(&p.passage)).collect();
        let positives = (0..pairs.len()).collect();
        let (queries, candidates) = pairs.into_iter().map(|p| (p.query, p.passage)).unzip();
        Self { queries, candidates, candidate_ids, relevant, positives }
    }
}

/// How much a side of the data repeats itself.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Uniqueness {
    /// Rows.
    pub rows: usize,
    /// Different texts.
    pub distinct: usize,
    /// Share of the rows whose text occurs once.
    pub unique_share: f64,
}

/// Counts the texts behind `ids`.
pub fn uniqueness(ids: &[i64]) -> Uniqueness {
    let mut counts: HashMap<i64, usize> = HashMap::new();
    for id in ids {
        *counts.entry(*id).or_default() += 1;
    }
    let unique = counts.values().filter(|n| **n == 1).count();
    Uniqueness { rows: ids.len(), distinct: counts.len(), unique_share: unique as f64 / ids.len().max(1) as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(query: &str, passage: &str, group: &str) -> Pair {
        let group = (!group.is_empty()).then(|| group.to_string());
        Pair { query: query.into(), passage: passage.into(), group }
    }

    fn split(pairs: Vec<Pair>) -> Result<Dataset> {
        split_by_group(pairs, String::new(), &Split { test_fraction: 0.3, max_test: 1000, min_train: 8, seed: 1 })
    }

    #[test]
    fn groups_stay_on_one_side_and_nothing_leaks() {
        let mut pairs = Vec::new();
        for g in 0..40 {
            for i in 0..10 {
                pairs.push(pair(&format!("query {g} {i}"), &format!("passage {g} {i}"), &format!("crate{g}")));
            }
            pairs.push(pair(&format!("another {g}"), "fn shared() {}", &format!("crate{g}")));
        }
        let data = split(pairs).unwrap();
        let groups: HashSet<_> = data.train.iter().map(|p| p.group.clone().unwrap()[5..].to_string()).collect();
        for query in &data.test.queries {
            assert!(!groups.contains(query.split(' ').nth(1).unwrap()), "{query}");
        }
        assert!(data.leaks_dropped > 0);
        assert!(!data.test.candidates.iter().any(|c| c == "fn shared() {}"));
        let share = data.test.queries.len() as f64 / 440.0;
        assert!((0.25..0.4).contains(&share), "{share}");
    }

    #[test]
    fn without_groups_equal_queries_stay_together() {
        let pairs = (0..400).map(|i| pair(&format!("Query  {}", i / 2), &format!("passage {i}"), "")).collect();
        let data = split(pairs).unwrap();
        let train: HashSet<_> = data.train.iter().map(|p| text_id(&p.query)).collect();
        assert!(data.test.queries.iter().all(|q| !train.contains(&text_id(q))));
    }

    #[test]
    fn too_few_pairs_say_what_to_do() {
        let message = split((0..5).map(|i| pair(&i.to_string(), "b", "")).collect()).unwrap_err().to_string();
        assert!(message.contains("--pairs") && message.contains("5 pairs"), "{message}");
        assert!(message.contains("give more pairs") && message.contains("lower --batch"), "{message}");
    }

    /// More of the same pairs would help nobody.
    #[test]
    fn pairs_that_cannot_be_split_say_why() {
        let one_query = (0..1000).map(|i| pair("the same", &format!("passage {i}"), ""));
        let one_group = (0..1000).map(|i| pair(&format!("query {i}"), &format!("passage {i}"), "one"));
        let shared_passages = (0..1000).map(|i| pair(&format!("query {i}"), "the same", &format!("group {i}")));
        for (pairs, reason, advice) in [
            (
                one_query.collect(),
                "the pairs are of 1 different queries",
                "give pairs of more different queries (--pairs",
            ),
            (
                vec![pair("a", "b", ""); 5],
                "the pairs are of 1 different queries",
                "give pairs of more different queries",
            ),
            (one_group.collect(), "the pairs are of 1 different groups", "give pairs of more different groups"),
            (shared_passages.collect(), "300 held-out pairs were dropped", "give pairs that repeat less (--pairs"),
        ] {
            let message = split(pairs).unwrap_err().to_string();
            assert!(message.contains(reason) && message.contains(advice), "{message}");
            assert!(!message.contains("give more pairs"), "{message}");
        }
    }

    #[test]
    fn equal_texts_are_relevant() {
        let test = TestSet::from_pairs(vec![pair("Q", "x  y", ""), pair("r", "X y", ""), pair(" q ", "z", "")]);
        assert_eq!(test.candidate_ids[0], test.candidate_ids[1]);
        assert_eq!(test.relevant[0].len(), 2);
        assert_eq!(test.relevant[0], test.relevant[2]);
        assert_eq!(test.relevant[1], [test.candidate_ids[1]]);
    }

    #[test]
    fn uniqueness_counts_rows() {
        let u = uniqueness(&[1, 1, 2, 3]);
        assert_eq!((u.rows, u.distinct, u.unique_share), (4, 3, 0.5));
    }
}
