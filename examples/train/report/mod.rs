//! The report: one HTML page that needs nothing else, results.json beside it, and the tables on the console.

mod chart;
mod page;
mod prefixes;

use super::args::Args;
use super::data::Uniqueness;
use super::encoder::Architecture;
use super::output::whole_content;
use super::summary::{Comparison, Table, VariantSummary, comparisons, prefix_tables, tables};
use anyhow::Result;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What the pages tell about the data.
#[derive(Debug, Serialize)]
pub struct DataSummary {
    /// Where it comes from.
    pub source: String,
    /// Training pairs.
    pub train_pairs: usize,
    /// Held-out queries.
    pub test_queries: usize,
    /// What they search among.
    pub test_candidates: usize,
    /// Held-out pairs dropped because training has them too.
    pub leaks_dropped: usize,
    /// Training queries.
    pub queries: Uniqueness,
    /// Training passages.
    pub passages: Uniqueness,
    /// Mean hash buckets of a training query and passage.
    pub mean_buckets: [f64; 2],
}

/// Seconds by phase.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Seconds {
    /// Reading, splitting, hashing.
    pub data: f64,
    /// All runs with their evaluations.
    pub training: f64,
    /// t-SNE.
    pub pictures: f64,
    /// Everything up to writing the report.
    pub total: f64,
}

/// A t-SNE picture of held-out queries and their positives.
#[derive(Debug, Serialize)]
pub struct Map {
    /// What the towers share.
    pub architecture: Architecture,
    /// When, and trained by what.
    pub title: String,
    /// ‖mean q̂ − mean p̂‖ in the embedding space.
    pub tower_gap: f64,
    /// Places of the queries.
    pub queries: Vec<[f64; 2]>,
    /// Places of the passages.
    pub passages: Vec<[f64; 2]>,
}

/// How far the program has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Trainings {
    /// Those that the results are of.
    pub done: usize,
    /// Those that the command line asks for.
    pub planned: usize,
}

/// Everything that is reported, and the whole of results.json.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    /// Version of this crate.
    pub version: &'static str,
    /// The command line with its defaults.
    pub config: &'a Args,
    /// Threads that computed.
    pub threads: usize,
    /// What is done of what was asked for.
    pub trainings: Trainings,
    /// The data.
    pub data: &'a DataSummary,
    /// Means over seeds.
    pub results: &'a [VariantSummary],
    /// Tables 1 and 3.
    pub tables: Vec<Table>,
    /// What each length of an embedding finds, if there are prefixes.
    pub prefix_tables: Vec<Table>,
    /// Expectations next to what came out.
    pub comparisons: Vec<Comparison>,
    /// t-SNE.
    pub maps: &'a [Map],
    /// Times.
    pub seconds: Seconds,
}

impl<'a> Report<'a> {
    /// Of these results.
    pub fn new(
        config: &'a Args,
        data: &'a DataSummary,
        trainings: Trainings,
        results: &'a [VariantSummary],
        maps: &'a [Map],
        seconds: Seconds,
    ) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            config,
            threads: rayon::current_num_threads(),
            trainings,
            data,
            results,
            tables: tables(config, results),
            prefix_tables: prefix_tables(config, results),
            comparisons: comparisons(config, results),
            maps,
            seconds,
        }
    }
}

/// Writes report.html and results.json; returns the path of the page.
pub fn write(folder: &Path, report: &Report<'_>) -> Result<PathBuf> {
    let put = |name: &str, content: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        whole_content(&path, content)?;
        Ok(path)
    };
    put("results.json", &serde_json::to_string_pretty(report)?)?;
    put("report.html", &page::html(report))
}

/// A table for the console, the best of each column marked with `*`.
pub fn console_table(table: &Table) -> String {
    let text = |cell: &super::summary::Cell| format!("{}{}", cell.text, if cell.best { "*" } else { " " });
    let numbers = table.architectures.iter().flat_map(|a| table.metrics.iter().map(move |m| format!("{a} {m} ")));
    let head: Vec<String> = table.labels.iter().cloned().chain(numbers).collect();
    let lines: Vec<Vec<String>> =
        std::iter::once(head).chain(table.rows.iter().map(|row| row.iter().map(text).collect())).collect();
    let width = |c: usize| lines.iter().map(|line| line[c].chars().count()).max().unwrap_or(0);
    let mut out = format!("{}\n", table.title);
    for line in &lines {
        let cells = line.iter().enumerate().map(|(c, text)| {
            let fill = " ".repeat(width(c) - text.chars().count());
            // Labels are words and stand left, numbers right.
            if c < table.labels.len() { format!("{text}{fill}") } else { format!("{fill}{text}") }
        });
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}
