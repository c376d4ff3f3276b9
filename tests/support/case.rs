//! Reader of the golden format, docs/golden-format.md. Whatever is wrong with a file becomes a sentence that names the
//! file and the field.

use super::problem::{Outputs, Problem};
use samtone::{Block, Call, Error, Group, Loss, Scope};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A golden file: a problem and what it must give.
#[derive(Debug, Clone)]
pub struct Case {
    pub problem: Problem,
    pub expected: Expected,
}

/// The outputs that a call should give, from a golden file or from the reference; matrices row-major.
#[derive(Debug, Clone)]
pub struct Expected {
    pub loss: f64,
    pub row_losses: Vec<f64>,
    pub grad_query: Vec<f64>,
    pub grad_passage: Vec<f64>,
    pub grad_tau: f64,
    /// P@1 and MRR of query → passage and of passage → query; a file has none.
    pub metrics: Option<[f64; 4]>,
    /// For each prefix of weight above 0: its length, and its loss. Empty for a problem without prefixes.
    pub prefix_losses: Vec<(usize, f64)>,
    /// The metrics of each, in the order of `metrics`; a file has none.
    pub prefix_metrics: Option<Vec<f64>>,
}

impl From<Outputs> for Expected {
    fn from(x: Outputs) -> Self {
        Self {
            metrics: Some(x.metrics()),
            prefix_losses: x.prefix_losses(),
            prefix_metrics: Some(x.prefix_metrics()),
            loss: x.evaluation.loss,
            row_losses: x.evaluation.row_losses,
            grad_query: x.grad_query,
            grad_passage: x.grad_passage,
            grad_tau: x.temperature.tau,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    preset: String,
    groups: Vec<FileGroup>,
    rows: usize,
    passages: usize,
    dim: usize,
    temperature: f64,
    q: Vec<Vec<f64>>,
    p: Vec<Vec<f64>>,
    positives: Option<Vec<u32>>,
    weights: Option<Vec<f64>>,
    query_ids: Option<Vec<i64>>,
    passage_ids: Option<Vec<i64>>,
    shared_ids: Option<bool>,
    hard_negative_owner: Option<Vec<i32>>,
    #[serde(default)]
    hard_negative_scope: FileScope,
    margin: Option<f64>,
    prefixes: Option<Vec<FilePrefix>>,
    prefix_losses: Option<Vec<f64>>,
    loss: f64,
    row_losses: Vec<f64>,
    grad_q: Vec<Vec<f64>>,
    grad_p: Vec<Vec<f64>>,
    grad_temperature: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileGroup {
    coefficient: f64,
    blocks: Vec<FileBlock>,
    positive_copies: u8,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePrefix {
    dim: usize,
    weight: f64,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum FileBlock {
    Qp,
    Pq,
    Qq,
    Pp,
}

#[derive(Deserialize, Clone, Copy, Default)]
#[serde(rename_all = "lowercase")]
enum FileScope {
    #[default]
    All,
    Own,
}

impl Case {
    /// Reads and checks one file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Self::parse(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// From the text of a file, whose byte order mark is passed over; an error starts with the field.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut deserializer = serde_json::Deserializer::from_str(text.trim_start_matches('\u{feff}'));
        let file: File = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| {
            let path = e.path().to_string();
            if path == "." { e.inner().to_string() } else { format!("field `{path}`: {}", e.inner()) }
        })?;
        deserializer.end().map_err(|e| format!("after the last field: {e}"))?;
        file.into_case()
    }
}

impl File {
    fn into_case(self) -> Result<Case, String> {
        let (m, n, d) = (self.rows, self.passages, self.dim);
        let loss = self.loss_of_groups()?;
        // A file without a margin has none, whatever the margin of its preset.
        let call = Call::new(loss, self.temperature).with_margin(self.margin.unwrap_or(f64::INFINITY));
        let (call, prefix_losses) = match (self.prefixes, self.prefix_losses) {
            (None, None) => (call, Vec::new()),
            (Some(prefixes), Some(losses)) if prefixes.len() == losses.len() => {
                let kept = prefixes.iter().zip(losses).filter(|(prefix, _)| prefix.weight > 0.0);
                let losses = kept.map(|(prefix, loss)| (prefix.dim, loss)).collect();
                let (dims, weights): (Vec<_>, Vec<_>) = prefixes.iter().map(|p| (p.dim, p.weight)).unzip();
                (call.with_prefixes(dims).with_prefix_weights(weights), losses)
            }
            (prefixes, losses) => {
                let count = |given: Option<usize>| given.map_or("none".into(), |n| format!("{n} entries"));
                let (prefixes, losses) = (count(prefixes.map(|p| p.len())), count(losses.map(|l| l.len())));
                return Err(format!("field `prefix_losses`: {losses}; allowed: as many as in `prefixes`, {prefixes}"));
            }
        };
        call.check().map_err(|error| match &error {
            // The one argument of these that is no field of its own.
            Error::InvalidArgument { argument: "prefix_weights", .. } => format!("field `prefixes`: {error}"),
            Error::InvalidArgument { argument, .. } => format!("field `{argument}`: {error}"),
            _ => error.to_string(),
        })?;
        let mut call = call.with_shared_ids(self.shared_ids.unwrap_or(false));
        if self.row_losses.len() != m {
            return Err(format!("field `row_losses`: {} numbers; allowed: {m}, as `rows` says", self.row_losses.len()));
        }
        let expected = Expected {
            loss: self.loss,
            row_losses: self.row_losses,
            grad_query: matrix("grad_q", &self.grad_q, ("rows", m), d)?,
            grad_passage: matrix("grad_p", &self.grad_p, ("passages", n), d)?,
            grad_tau: self.grad_temperature,
            metrics: None,
            prefix_losses,
            prefix_metrics: None,
        };
        if let Some(positives) = self.positives {
            call = call.with_positives(positives);
        }
        if let Some(weights) = self.weights {
            call = call.with_weights(exact_weights(&weights)?);
        }
        if let Some(ids) = self.query_ids {
            call = call.with_query_ids(ids);
        }
        if let Some(ids) = self.passage_ids {
            call = call.with_passage_ids(ids);
        }
        if let Some(owners) = self.hard_negative_owner {
            let scope = match self.hard_negative_scope {
                FileScope::All => Scope::All,
                FileScope::Own => Scope::Own,
            };
            call = call.with_hard_negative_owners(owners, scope);
        }
        let problem = Problem {
            name: self.name,
            call,
            rows: m,
            passages: n,
            dim: d,
            query: matrix("q", &self.q, ("rows", m), d)?,
            passage: matrix("p", &self.p, ("passages", n), d)?,
        };
        problem.check().map_err(|e| e.to_string())?;
        Ok(Case { problem, expected })
    }

    /// The loss that `groups` spells. A preset's name promises its groups.
    fn loss_of_groups(&self) -> Result<Loss, String> {
        let group = |(k, g): (usize, &FileGroup)| {
            let blocks: Vec<Block> = g.blocks.iter().map(|b| b.block()).collect();
            Group::new(g.coefficient, &blocks, g.positive_copies).map_err(|e| format!("field `groups[{k}]`: {e}"))
        };
        let groups = self.groups.iter().enumerate().map(group).collect::<Result<Vec<_>, _>>()?;
        let loss = Loss::custom(&self.preset, groups).map_err(|e| format!("field `groups`: {e}"))?;
        match Loss::by_name(&self.preset) {
            Ok(preset) if preset.groups() != loss.groups() => Err(format!(
                "field `groups`: {loss}, but the preset of that name is {preset}; allowed: the same groups, or another name"
            )),
            _ => Ok(loss),
        }
    }
}

impl FileBlock {
    fn block(self) -> Block {
        match self {
            Self::Qp => Block::QP,
            Self::Pq => Block::PQ,
            Self::Qq => Block::QQ,
            Self::Pp => Block::PP,
        }
    }
}

fn matrix(field: &str, x: &[Vec<f64>], (rows_field, rows): (&str, usize), dim: usize) -> Result<Vec<f64>, String> {
    if x.len() != rows {
        return Err(format!("field `{field}`: {} rows; allowed: {rows}, as `{rows_field}` says", x.len()));
    }
    if let Some(i) = x.iter().position(|row| row.len() != dim) {
        return Err(format!("field `{field}[{i}]`: {} numbers; allowed: {dim}, as `dim` says", x[i].len()));
    }
    Ok(x.concat())
}

/// The crate takes weights as f32; rounding them here would blame the backend for the difference.
fn exact_weights(weights: &[f64]) -> Result<Vec<f32>, String> {
    match weights.iter().position(|&w| f64::from(w as f32) != w) {
        Some(i) => Err(format!(
            "field `weights[{i}]`: {} is not an f32 number; allowed: weights rounded to f32, such as {}",
            weights[i],
            f64::from(weights[i] as f32)
        )),
        None => Ok(weights.iter().map(|&w| w as f32).collect()),
    }
}

/// `path` itself, or the `.json` files in the folder `path`, by name. A folder without any is an error.
pub fn files(path: &Path) -> Result<Vec<PathBuf>, String> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let entries = std::fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let entries = entries.map_err(|e| format!("{}: {e}", path.display()))?;
    let mut files: Vec<_> = entries.into_iter().map(|e| e.path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "json"));
    files.sort();
    if files.is_empty() {
        return Err(format!("{}: no .json file in this folder", path.display()));
    }
    Ok(files)
}

/// How many golden files the repository holds. A number, so that a lost file is noticed.
pub const GOLDEN_FILES: usize = 79;

/// Every golden file of the repository, by name.
pub fn golden() -> Result<Vec<Case>, String> {
    // A binary carried to another machine runs in the repository's root there.
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folder = if home.is_dir() { home } else { PathBuf::from("tests/golden") };
    let cases = files(&folder)?.iter().map(|f| Case::read(f)).collect::<Result<Vec<_>, _>>()?;
    if cases.len() != GOLDEN_FILES {
        return Err(format!("{}: {} golden files instead of {GOLDEN_FILES}", folder.display(), cases.len()));
    }
    Ok(cases)
}
