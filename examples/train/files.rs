//! Pairs of the user: TSV, JSON lines, or a BEIR folder. Every complaint names the file and the line.

use super::data::{Dataset, MIN_TEST, Pair, Split, TestSet, sample_indices, text_hash, text_id};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Reads `FILE.jsonl` / `FILE.json` / `FILE.ndjson` as JSON lines, {"query": …, "passage": …, "group": … (optional)}, anything
/// else as TSV, query ⇥ passage [⇥ group], with an optional header line `query ⇥ passage`.
pub fn read_pairs(path: &Path) -> Result<Vec<Pair>> {
    let json = path.extension().is_some_and(|e| ["jsonl", "json", "ndjson"].iter().any(|j| e.eq_ignore_ascii_case(j)));
    let mut pairs = Vec::new();
    for_each_line(path, |number, line| {
        let pair = if json {
            serde_json::from_str::<PairLine>(line)
                .map(|p| Pair { query: p.query, passage: p.passage, group: p.group })
                .context("expected {\"query\": \"…\", \"passage\": \"…\"} and optionally \"group\": \"…\"")?
        } else {
            let mut columns = line.split('\t');
            let (Some(query), Some(passage)) = (columns.next(), columns.next()) else {
                bail!("expected query and passage separated by a tab, found no tab");
            };
            let group = columns.next().filter(|g| !g.is_empty()).map(str::to_string);
            ensure!(columns.next().is_none(), "expected 2 or 3 columns, found {}", line.split('\t').count());
            if number == 1 && query.eq_ignore_ascii_case("query") && passage.eq_ignore_ascii_case("passage") {
                return Ok(());
            }
            Pair { query: query.into(), passage: passage.into(), group }
        };
        ensure!(!pair.query.trim().is_empty(), "the query is empty");
        ensure!(!pair.passage.trim().is_empty(), "the passage is empty");
        pairs.push(pair);
        Ok(())
    })?;
    Ok(pairs)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PairLine {
    query: String,
    passage: String,
    #[serde(default)]
    group: Option<String>,
}

/// Reads a BEIR folder: corpus.jsonl, queries.jsonl and qrels/*.tsv (query-id ⇥ corpus-id ⇥ score). Trains on qrels/train.tsv
/// and tests on qrels/test.tsv (else dev.tsv); if only one of them exists, its queries are split by their hash. The
/// candidates are the corpus, or a sample of `max_candidates` which contains every relevant document.
pub fn read_beir(folder: &Path, split: &Split, max_candidates: usize) -> Result<Dataset> {
    let corpus = read_texts(&folder.join("corpus.jsonl"))?;
    let queries = read_texts(&folder.join("queries.jsonl"))?;
    let read = |name: &str| -> Result<Option<Vec<(usize, usize)>>> {
        let path = folder.join("qrels").join(name);
        path.exists().then(|| read_qrels(&path, &queries, &corpus)).transpose()
    };
    let held_out = match read("test.tsv")? {
        Some(test) => Some(test),
        None => read("dev.tsv")?,
    };
    let (train, test) = match (read("train.tsv")?, held_out) {
        (Some(train), Some(test)) => (train, test),
        (Some(one), None) | (None, Some(one)) => {
            let limit = (split.test_fraction * u64::MAX as f64) as u64;
            one.into_iter().partition(|(q, _)| text_hash(&queries.texts[*q], 0) >= limit)
        }
        (None, None) => bail!(
            "{} contains neither train.tsv nor test.tsv nor dev.tsv; a BEIR folder has corpus.jsonl, queries.jsonl and \
             qrels/*.tsv",
            folder.join("qrels").display()
        ),
    };
    let train: Vec<Pair> = train
        .into_iter()
        .map(|(q, p)| Pair { query: queries.texts[q].clone(), passage: corpus.texts[p].clone(), group: None })
        .collect();
    let mut by_query: Vec<(usize, Vec<usize>)> = Vec::new();
    let mut place: HashMap<usize, usize> = HashMap::new();
    for (q, p) in test {
        let at = *place.entry(q).or_insert_with(|| {
            by_query.push((q, Vec::new()));
            by_query.len() - 1
        });
        by_query[at].1.push(p);
    }
    if train.len() < split.min_train || by_query.len() < MIN_TEST {
        bail!(
            "{} gave {} training pairs and {} held-out queries, but a batch needs {} and the test {MIN_TEST}; choose a larger \
             dataset or lower --batch",
            folder.display(),
            train.len(),
            by_query.len(),
            split.min_train
        );
    }
    let keep = sample_indices(by_query.len(), split.max_test, split.seed);
    let by_query: Vec<_> = keep.into_iter().map(|i| by_query[i].clone()).collect();
    let test = beir_test_set(&by_query, &queries, &corpus, max_candidates, split.seed);
    let name = folder.file_name().map_or_else(|| folder.display().to_string(), |n| n.to_string_lossy().into_owned());
    Ok(Dataset { source: format!("the BEIR dataset {name}"), train, test, leaks_dropped: 0 })
}

fn beir_test_set(
    by_query: &[(usize, Vec<usize>)],
    queries: &Texts,
    corpus: &Texts,
    max_candidates: usize,
    seed: u64,
) -> TestSet {
    let mut chosen = vec![false; corpus.texts.len()];
    for p in by_query.iter().flat_map(|(_, positives)| positives) {
        chosen[*p] = true;
    }
    let required = chosen.iter().filter(|c| **c).count();
    let others: Vec<usize> = (0..chosen.len()).filter(|p| !chosen[*p]).collect();
    for i in sample_indices(others.len(), max_candidates.saturating_sub(required), seed) {
        chosen[others[i]] = true;
    }
    let documents: Vec<usize> = (0..chosen.len()).filter(|p| chosen[*p]).collect();
    let place: HashMap<usize, usize> = documents.iter().enumerate().map(|(at, p)| (*p, at)).collect();
    let mut test = TestSet::default();
    for p in documents {
        test.candidates.push(corpus.texts[p].clone());
        test.candidate_ids.push(text_id(&corpus.texts[p]));
    }
    for (q, positives) in by_query {
        test.queries.push(queries.texts[*q].clone());
        let mut ids: Vec<i64> = positives.iter().map(|p| text_id(&corpus.texts[*p])).collect();
        ids.sort_unstable();
        ids.dedup();
        test.relevant.push(ids);
        test.positives.push(place[&positives[0]]);
    }
    test
}

struct Texts {
    by_id: HashMap<String, usize>,
    texts: Vec<String>,
}

#[derive(Deserialize)]
struct TextLine {
    #[serde(rename = "_id")]
    id: String,
    #[serde(default)]
    title: String,
    text: String,
}

fn read_texts(path: &Path) -> Result<Texts> {
    let mut texts = Texts { by_id: HashMap::new(), texts: Vec::new() };
    for_each_json(path, |line: TextLine| {
        let text = if line.title.is_empty() { line.text } else { format!("{} {}", line.title, line.text) };
        ensure!(texts.by_id.insert(line.id.clone(), texts.texts.len()).is_none(), "the id {:?} occurs twice", line.id);
        texts.texts.push(text);
        Ok(())
    })?;
    Ok(texts)
}

/// (query, passage) of each judgement with a score above 0.
fn read_qrels(path: &Path, queries: &Texts, corpus: &Texts) -> Result<Vec<(usize, usize)>> {
    let mut pairs = Vec::new();
    for_each_line(path, |number, line| {
        let columns: Vec<&str> = line.split('\t').collect();
        let [query, document, score] = columns[..] else {
            bail!("expected query-id, corpus-id and score separated by tabs, found {} columns", columns.len());
        };
        let score: f64 = match score.trim().parse() {
            Ok(score) => score,
            Err(_) if number == 1 => return Ok(()),
            Err(_) => bail!("expected a number as score, found {score:?}"),
        };
        let q = *queries.by_id.get(query).with_context(|| format!("queries.jsonl has no query {query:?}"))?;
        let p = *corpus.by_id.get(document).with_context(|| format!("corpus.jsonl has no document {document:?}"))?;
        if score > 0.0 {
            pairs.push((q, p));
        }
        Ok(())
    })?;
    Ok(pairs)
}

fn for_each_json<T: DeserializeOwned>(path: &Path, mut each: impl FnMut(T) -> Result<()>) -> Result<()> {
    for_each_line(path, |_, line| {
        each(serde_json::from_str(line).context("expected {\"_id\": \"…\", \"text\": \"…\"}")?)
    })
}

/// Calls `each` with the number (from 1) and content of each line that is not blank; its error gets file and line.
fn for_each_line(path: &Path, mut each: impl FnMut(usize, &str) -> Result<()>) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let place = || format!("{}, line {}", path.display(), index + 1);
        let line = line.with_context(place)?;
        let line = line.trim_start_matches('\u{feff}').trim_end_matches('\r');
        if !line.trim().is_empty() {
            each(index + 1, line).with_context(place)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A folder under the system's temporary one that is removed at the end.
    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            File::create(path).unwrap().write_all(content.as_bytes()).unwrap();
        }
        folder
    }

    fn failure(name: &str, content: &str) -> String {
        let folder = folder(&[(name, content)]);
        format!("{:#}", read_pairs(&folder.path().join(name)).unwrap_err())
    }

    #[test]
    fn tsv_and_jsonl_agree() {
        let folder = folder(&[
            ("a.tsv", "\u{feff}query\tpassage\nwhat\tthat\r\n\nwho\tme\tg\n"),
            (
                "a.jsonl",
                "{\"query\":\"what\",\"passage\":\"that\"}\n{\"query\":\"who\",\"passage\":\"me\",\"group\":\"g\"}\n",
            ),
        ]);
        let tsv = read_pairs(&folder.path().join("a.tsv")).unwrap();
        assert_eq!(tsv, read_pairs(&folder.path().join("a.jsonl")).unwrap());
        assert_eq!(tsv[1], Pair { query: "who".into(), passage: "me".into(), group: Some("g".into()) });
    }

    #[test]
    fn malformed_lines_are_named() {
        for (name, content, complaint) in [
            ("x.tsv", "a\tb\nno tab\n", "line 2: expected query and passage"),
            ("x.tsv", "a\tb\tc\td\n", "line 1: expected 2 or 3 columns, found 4"),
            ("x.tsv", "a\t \n", "line 1: the passage is empty"),
            ("x.jsonl", "{\"query\":\"a\",\"passage\":\"b\"}\n{\"query\":1}\n", "line 2: expected {"),
            ("x.jsonl", "{\"query\":\"a\",\"passage\":\"b\",\"pasage\":\"c\"}\n", "unknown field `pasage`"),
        ] {
            let message = failure(name, content);
            assert!(message.contains(name) && message.contains(complaint), "{message}");
        }
        assert!(format!("{:#}", read_pairs(Path::new("absent.tsv")).unwrap_err()).contains("cannot open absent.tsv"));
    }

    fn beir(qrels: &[(&str, String)]) -> tempfile::TempDir {
        let lines = |kind: &str, n: usize| -> String {
            (0..n).map(|i| format!("{{\"_id\":\"{kind}{i}\",\"title\":\"\",\"text\":\"{kind} text {i}\"}}\n")).collect()
        };
        let (corpus, queries) = (lines("d", 300), lines("q", 200));
        let mut files = vec![("corpus.jsonl", corpus.as_str()), ("queries.jsonl", queries.as_str())];
        files.extend(qrels.iter().map(|(name, content)| (*name, content.as_str())));
        folder(&files)
    }

    fn qrels(range: std::ops::Range<usize>) -> String {
        let rows: String = range.map(|i| format!("q{i}\td{i}\t1\nq{i}\td{}\t2\nq{i}\td299\t0\n", i + 50)).collect();
        format!("query-id\tcorpus-id\tscore\n{rows}")
    }

    const SPLIT: Split = Split { test_fraction: 0.4, max_test: 1000, min_train: 8, seed: 1 };

    #[test]
    fn beir_folder() {
        let folder = beir(&[("qrels/train.tsv", qrels(0..100)), ("qrels/test.tsv", qrels(100..200))]);
        let data = read_beir(folder.path(), &SPLIT, 220).unwrap();
        assert_eq!((data.train.len(), data.test.queries.len(), data.test.candidates.len()), (200, 100, 220));
        assert_eq!(data.test.queries[3], "q text 103");
        assert_eq!(data.test.relevant[3].len(), 2);
        assert_eq!(data.test.candidates[data.test.positives[3]], "d text 103");
    }

    #[test]
    fn one_qrels_file_is_split_by_query() {
        let folder = beir(&[("qrels/test.tsv", qrels(0..200))]);
        let data = read_beir(folder.path(), &SPLIT, 1000).unwrap();
        assert_eq!(data.train.len() + 2 * data.test.queries.len(), 400);
        assert!(data.train.iter().all(|p| !data.test.queries.contains(&p.query)));
    }

    #[test]
    fn beir_complaints() {
        let folder = beir(&[("qrels/test.tsv", "q1\td1\t1\nq1\tnowhere\t1\n".into())]);
        let message = format!("{:#}", read_beir(folder.path(), &SPLIT, 10).unwrap_err());
        assert!(message.contains("test.tsv, line 2: corpus.jsonl has no document \"nowhere\""), "{message}");
        let message = format!("{:#}", read_beir(beir(&[]).path(), &SPLIT, 10).unwrap_err());
        assert!(message.contains("neither train.tsv"), "{message}");
    }
}
