//! Trains dual encoders on real text and compares contrastive losses of this crate.
//!
//! ```text
//! cargo run --release --example train               about two minutes on two cores, no download
//! cargo run --release --example train -- --quick    15 seconds
//! cargo run --release --example train -- --help     your own pairs, other losses, sizes
//! cargo run --release --example train -- --prefixes 32,64,128,256    besides: what shorter embeddings find, trained for it or not
//! ```
//!
//! ```text
//! rust_source, doc_pairs, files ─→ data (split, ids) ─→ features ─→ trainer ─→ summary ─→ report
//!                                                                  encoder, optimizer, retrieval, geometry, tsne
//! ```

mod args;
mod data;
mod doc_pairs;
mod encoder;
mod export;
mod features;
mod files;
mod geometry;
mod matrix;
mod optimizer;
#[path = "../shared/output.rs"]
mod output;
mod progress;
mod report;
mod retrieval;
mod rust_source;
mod save;
mod summary;
mod trainer;
mod tsne;

use anyhow::Result;
use args::{Args, Save};
use clap::Parser;
use data::{Dataset, Split};
use encoder::{Architecture, Towers};
use output::{writable_folder, writable_place};
use progress::{Progress, say};
use rayon::prelude::*;
use report::{DataSummary, Map, Report, Seconds, Trainings};
use std::process::ExitCode;
use std::time::Instant;
use summary::VariantSummary;
use trainer::{Prepared, TestEmbeddings};

/// Pairs in a t-SNE picture.
const MAP_PAIRS: usize = 250;
const PERPLEXITY: f64 = 30.0;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One sentence; anyhow's own way would add a backtrace wherever RUST_BACKTRACE is set.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let start = Instant::now();
    let args = Args::parse().resolve()?;
    match &args.export {
        Some(path) => writable_place(path)?,
        None => writable_folder(&args.out)?,
    }
    let dataset = read(&args)?;
    let source = dataset.source.clone();
    let leaks_dropped = dataset.leaks_dropped;
    let data = Prepared::new(dataset, &args);
    if let Some(path) = &args.export {
        export::export(path, &data, &args)?;
        say!("{source}: {} training pairs in {}", data.train_pairs(), path.display());
        return Ok(());
    }
    let summary = DataSummary {
        source,
        train_pairs: data.train_pairs(),
        test_queries: data.test.queries.len(),
        test_candidates: data.test.candidates.len(),
        leaks_dropped,
        queries: data.queries,
        passages: data.passages,
        mean_buckets: data.mean_buckets,
    };
    let mut seconds = Seconds { data: start.elapsed().as_secs_f64(), ..Seconds::default() };
    say!(
        "{}: {} training pairs, {} held-out queries against {} candidates",
        summary.source,
        summary.train_pairs,
        summary.test_queries,
        summary.test_candidates
    );
    say!(
        "texts that occur once: {:.1}% of the training queries, {:.1}% of the passages",
        100.0 * summary.queries.unique_share,
        100.0 * summary.passages.unique_share
    );

    let training = Instant::now();
    let mut pending = Vec::new();
    let planned = args.trainings();
    let results = run_all(&args, &data, &mut pending, |results, done| {
        // Whoever interrupts the rest keeps this.
        let seconds =
            Seconds { training: training.elapsed().as_secs_f64(), total: start.elapsed().as_secs_f64(), ..seconds };
        let trainings = Trainings { done, planned };
        report::write(&args.out, &Report::new(&args, &summary, trainings, results, &[], seconds)).map(drop)
    })?;
    seconds.training = training.elapsed().as_secs_f64();

    let drawing = Instant::now();
    let maps: Vec<Map> = pending.into_par_iter().map(|map| map.draw(&args)).collect();
    seconds.pictures = drawing.elapsed().as_secs_f64();
    seconds.total = start.elapsed().as_secs_f64();
    let trainings = Trainings { done: planned, planned };
    let report = Report::new(&args, &summary, trainings, &results, &maps, seconds);
    let path = report::write(&args.out, &report)?;
    for table in report.tables.iter().chain(&report.prefix_tables) {
        say!("\n{}", report::console_table(table).trim_end());
    }
    if !report.comparisons.is_empty() {
        say!("\nExpectations, and what came out:");
    }
    for same in report.comparisons.chunk_by(|a, b| a.expectation == b.expectation) {
        say!("  {}", same[0].expectation);
        for c in same {
            say!("    {:<8} {} {}: {}", c.architecture.label(), c.metric, c.difference_text(), c.verdict.label());
        }
    }
    say!("\n{:.1} s in all; report: {}", start.elapsed().as_secs_f64(), path.display());
    Ok(())
}

fn read(args: &Args) -> Result<Dataset> {
    let split = Split {
        test_fraction: args.test_fraction,
        max_test: args.max_test.unwrap_or(0) as usize,
        min_train: args.batch as usize,
        seed: args.seed,
    };
    let max_pairs = args.max_pairs as usize;
    if let Some(folder) = &args.beir {
        return files::read_beir(folder, &split, args.max_candidates as usize);
    }
    if let Some(path) = &args.pairs {
        let mut pairs = files::read_pairs(path)?;
        let keep = data::sample_indices(pairs.len(), max_pairs, args.seed);
        if keep.len() < pairs.len() {
            pairs = keep.into_iter().map(|i| pairs[i].clone()).collect();
        }
        return data::split_by_group(pairs, path.display().to_string(), &split);
    }
    let collected = rust_source::collect(max_pairs, args.max_per_crate as usize, args.seed)?;
    data::split_by_group(collected.pairs, collected.source, &split)
}

/// A picture to be drawn when training is over.
struct PendingMap {
    architecture: Architecture,
    title: String,
    tower_gap: f64,
    points: Vec<f32>,
}

impl PendingMap {
    fn new(title: String, towers: &Towers, embeddings: &TestEmbeddings, data: &Prepared, args: &Args) -> Self {
        let dim = towers.dim;
        let mut queries = embeddings.queries.clone();
        let mut positives = geometry::positives_of(&data.test, &embeddings.candidates, dim);
        matrix::normalise_rows(&mut queries, dim);
        matrix::normalise_rows(&mut positives, dim);
        let tower_gap = geometry::tower_gap(&queries, &positives, dim);
        let rows = data::sample_indices(data.test.queries.len(), MAP_PAIRS, args.seed);
        let pick = |x: &[f32]| rows.iter().flat_map(|i| x[i * dim..][..dim].to_vec()).collect::<Vec<f32>>();
        let points = [pick(&queries), pick(&positives)].concat();
        Self { architecture: towers.architecture(), title, tower_gap, points }
    }

    fn draw(self, args: &Args) -> Map {
        let mut queries = tsne::embed(&self.points, args.dim(), PERPLEXITY, args.seed);
        let passages = queries.split_off(queries.len() / 2);
        Map { architecture: self.architecture, title: self.title, tower_gap: self.tower_gap, queries, passages }
    }
}

/// Every training. After each of them `finished` gets the results so far, and of how many trainings they are.
fn run_all(
    args: &Args,
    data: &Prepared,
    pending: &mut Vec<PendingMap>,
    finished: impl Fn(&[VariantSummary], usize) -> Result<()>,
) -> Result<Vec<VariantSummary>> {
    let seeds = args.seed_list();
    let pictured = summary::pictured(args);
    let progress = Progress::new(args.trainings() as u64 * u64::from(args.steps.unwrap_or(0)));
    let (mut results, mut done) = (Vec::new(), 0);
    for &architecture in &args.architectures {
        if !pictured.is_empty() {
            let towers = trainer::initial_towers(architecture, args, args.seed);
            let embeddings = trainer::embed_test(&towers, data);
            pending.push(PendingMap::new("before training".into(), &towers, &embeddings, data, args));
        }
        for variant in args.variants(architecture) {
            let title = summary::title(&variant);
            let (mut outcomes, before) = (Vec::new(), results.len());
            for &seed in &seeds {
                let outcome = trainer::train(&variant, seed, data, args, |step, measured| {
                    progress.step();
                    progress.message(format!(
                        "{} {title}, seed {seed}: step {step}, loss {:.3}, in-batch MRR {:.3}",
                        architecture.label(),
                        measured.loss,
                        measured.in_batch_mrr
                    ));
                })?;
                let (outcome, towers) = outcome;
                let is_pictured = !variant.prefixes && pictured.contains(&(variant.loss.clone(), variant.mask));
                let is_saved = args.save == Save::All || args.save == Save::Pictured && is_pictured;
                if seed == args.seed && (is_pictured || is_saved) {
                    let embeddings = trainer::embed_test(&towers, data);
                    if is_saved {
                        let metadata = data.metadata(&variant, seed, args);
                        save::save_towers(&args.out, &variant, &towers, data.inverse_frequency(), metadata)?;
                        save::save_embeddings(&args.out, &variant, &embeddings, &data.test, towers.dim)?;
                    }
                    if is_pictured {
                        pending.push(PendingMap::new(format!("after {title}"), &towers, &embeddings, data, args));
                    }
                }
                outcomes.push(outcome);
                results.truncate(before);
                results.push(VariantSummary::new(&outcomes));
                done += 1;
                finished(&results, done)?;
            }
            let mrr = results[before].quality.mrr.percent();
            progress.line(&format!("{:<8} {title:<42} MRR {mrr}", architecture.label()));
        }
    }
    progress.finish();
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::data::{Pair, split_by_group};
    use super::*;

    /// A small training that is over in a moment, with these arguments besides.
    fn sheep(folder: &std::path::Path, arguments: &str) -> (Args, Prepared, DataSummary) {
        let pairs = (0..240).map(|i| Pair {
            query: format!("count the {i} sheep"),
            passage: format!("fn sheep_{i}() -> u32 {{ {} }}", i % 7),
            group: None,
        });
        let split = Split { test_fraction: 0.3, max_test: 60, min_train: 16, seed: 1 };
        let dataset = split_by_group(pairs.collect(), "sheep".into(), &split).unwrap();
        let small = "--batch 16 --steps 5 --table-bits 8 --width 6 --seeds 2 --masks off";
        let args = ["train"].into_iter().chain(small.split(' ')).chain(arguments.split(' '));
        let args = Args { out: folder.into(), save: Save::None, ..Args::parse_from(args).resolve().unwrap() };
        let data = Prepared::new(dataset, &args);
        let summary = DataSummary {
            source: "sheep".into(),
            train_pairs: data.train_pairs(),
            test_queries: data.test.queries.len(),
            test_candidates: data.test.candidates.len(),
            leaks_dropped: 0,
            queries: data.queries,
            passages: data.passages,
            mean_buckets: data.mean_buckets,
        };
        (args, data, summary)
    }

    fn results_in(folder: &std::path::Path) -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(folder.join("results.json")).unwrap()).unwrap()
    }

    /// What is written after each training stays when the program ends before the last one.
    #[test]
    fn an_interrupt_keeps_the_trainings_that_are_done() {
        let folder = tempfile::tempdir().unwrap();
        let (args, data, summary) = sheep(folder.path(), "--dim 4 --losses info_nce,pair");
        let planned = args.trainings();
        let ended = run_all(&args, &data, &mut Vec::new(), |results, done| {
            let trainings = Trainings { done, planned };
            let report = Report::new(&args, &summary, trainings, results, &[], Seconds::default());
            report::write(&args.out, &report)?;
            anyhow::ensure!(done < 3, "interrupted");
            Ok(())
        });
        assert_eq!(ended.unwrap_err().to_string(), "interrupted");

        let file = results_in(folder.path());
        assert_eq!(file["trainings"], serde_json::json!({"done": 3, "planned": 8}));
        let seeds = |k: usize| file["results"][k]["mrr"]["values"].as_array().map(Vec::len);
        assert_eq!([seeds(0), seeds(1), seeds(2)], [Some(2), Some(1), None]);
        let page = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
        assert!(page.contains("Unfinished: 3 of 8 trainings are done."));
        assert!(!page.contains("Matryoshka"));
    }

    /// The losses of the pictures are trained twice, and every length is searched with. The report is whole after each training.
    #[test]
    fn prefixes_are_trained_searched_and_reported() {
        let folder = tempfile::tempdir().unwrap();
        let losses = "--architectures sde --losses info_nce,bidirectional,samtone_query";
        let (args, data, summary) = sheep(folder.path(), &format!("{losses} --prefixes 2,3 --dim 5"));
        assert_eq!((args.trainings(), args.lengths()), (10, vec![2, 3, 5]));
        let write = |results: &[VariantSummary], done| {
            let trainings = Trainings { done, planned: 10 };
            report::write(&args.out, &Report::new(&args, &summary, trainings, results, &[], Seconds::default()))
        };
        let results = run_all(&args, &data, &mut Vec::new(), |results, done| write(results, done).map(drop)).unwrap();
        let trained: Vec<_> = results.iter().map(|v| (v.variant.loss.as_str(), v.variant.prefixes)).collect();
        let [bidirectional, samtone] = ["bidirectional", "samtone_query"].map(|loss| [(loss, false), (loss, true)]);
        assert_eq!(trained, [&[("info_nce", false)][..], &bidirectional, &samtone].concat());

        assert!(results[0].by_length.is_empty());
        for v in &results[1..] {
            assert_eq!(v.by_length[2].mrr.values, v.quality.mrr.values, "all entries are the whole embedding");
            assert_ne!(v.by_length[0].mrr.values, v.quality.mrr.values);
            assert_eq!(v.prefix_loss_curves.len(), if v.variant.prefixes { 2 } else { 0 });
        }
        for [plain, with] in [[&results[1], &results[2]], [&results[3], &results[4]]] {
            assert_ne!(plain.quality.mrr.values, with.quality.mrr.values);
            for (step, loss) in with.loss_curve.iter().enumerate() {
                let sum: f64 = with.prefix_loss_curves.iter().map(|curve| curve[step]).sum();
                assert!((sum - loss).abs() < 1e-9, "step {step}: {sum} {loss}");
            }
        }

        let file = results_in(folder.path());
        assert_eq!(file["results"][4]["by_length"][1]["mrr"]["values"].as_array().map(Vec::len), Some(2));
        let rows = file["prefix_tables"][1]["rows"].as_array().unwrap();
        let heads = rows.iter().map(|row| [0, 1].map(|c| row[c]["text"].as_str().unwrap_or_default()).join(" "));
        assert_eq!(heads.collect::<Vec<_>>(), ["2 no", "2 yes", "3 no", "3 yes", "5 no", "5 yes"]);
        let page = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
        for text in [
            "Retrieval by length of the embedding, SamToNe, query tower, in %",
            "on whole embeddings of 5 entries, and on the sum of the losses of their first 2, 3 entries",
            "SDE: held-out MRR by length of the embedding",
            "Of the MRR of all 5 entries, the first 2 keep: Bidirectional ",
            "SDE, Bidirectional: loss of each prefix",
            "The first 2 entries find more if they were trained as a prefix",
        ] {
            assert!(page.contains(text), "{text}");
        }
        let curves = page.matches("<title>SamToNe, query tower, with prefixes</title>").count();
        assert_eq!(curves, 1, "only the chart of lengths shows what was trained with prefixes beside what was not");
    }
}
