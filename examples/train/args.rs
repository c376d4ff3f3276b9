//! The command line.

use super::encoder::Architecture;
use super::summary::pictured;
use super::trainer::Variant;
use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use samtone::{Call, Loss};
use serde::Serialize;
use std::path::PathBuf;

/// Longest embedding, and widest table.
const MOST_ENTRIES: i64 = 8192;
/// Length of an embedding without --dim and --prefixes.
const DIM: u32 = 128;

/// Trains dual encoders on real text and compares contrastive losses, with and without masking of duplicates.
///
/// Without arguments: the first sentence of each doc comment in the Rust sources that cargo keeps on this machine is a query,
/// its function the passage. Ends with a table and a report folder.
#[derive(Debug, Parser, Serialize)]
#[command(version)]
pub struct Args {
    /// End within about 15 seconds: one seed, one architecture, few steps.
    #[arg(long)]
    pub quick: bool,
    /// Pairs to train on: TSV (query, passage, optional group) or JSON lines ({"query", "passage", optional "group"}).
    /// Pairs of one group stay on one side of the split.
    #[arg(long, value_name = "FILE", conflicts_with = "beir")]
    pub pairs: Option<PathBuf>,
    /// A BEIR dataset: corpus.jsonl, queries.jsonl, qrels/*.tsv.
    #[arg(long, value_name = "FOLDER")]
    pub beir: Option<PathBuf>,
    /// Folder of the report; created if need be. The report is written anew after each training, so that an interrupt keeps what
    /// is done.
    #[arg(long, value_name = "FOLDER", default_value = "report")]
    pub out: PathBuf,
    /// Trains nothing: writes what a training reads (hashed texts, ids, initial towers, batches) as safetensors, for the same
    /// training in another framework.
    #[arg(long, value_name = "FILE")]
    pub export: Option<PathBuf>,
    /// Losses to compare: any preset of the crate.
    #[arg(long, value_delimiter = ',', value_parser = loss_name,
          default_value = "info_nce,bidirectional,pair,samtone_query,samtone_both")]
    pub losses: Vec<String>,
    /// Architectures to train [default: both; with --quick ade-spl].
    #[arg(long, value_delimiter = ',')]
    pub architectures: Vec<Architecture>,
    /// Whether the loss is told which texts are duplicates, by ids.
    #[arg(long, value_delimiter = ',', default_value = "off,on")]
    pub masks: Vec<Mask>,
    /// Softmax temperature τ.
    #[arg(long, default_value_t = 0.01, value_parser = temperature)]
    pub temperature: f64,
    /// Pairs in a batch.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..=65_536))]
    pub batch: u32,
    /// Length of an embedding [default: 128, or the longest prefix].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MOST_ENTRIES))]
    pub dim: Option<u32>,
    /// Matryoshka: ascending lengths such as 32,64,128,256. The losses of the t-SNE pictures are trained a second time, with the sum of
    /// the losses of these prefixes. The report then shows what each length finds, trained with and without prefixes.
    #[arg(long, value_name = "LENGTHS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=MOST_ENTRIES))]
    pub prefixes: Vec<u32>,
    /// Columns of the embedding tables.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=MOST_ENTRIES))]
    pub width: u32,
    /// Rows of an embedding table, as a power of two.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(8..=24))]
    pub table_bits: u32,
    /// Words of a text that are read.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_words: u32,
    /// Steps of a run [default: 100; with --quick 40].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: Option<u32>,
    /// Seeds, each with its own parameters and order of batches [default: 3; with --quick 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub seeds: Option<u32>,
    /// First seed; also draws the sample of the data.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Learning rate of the tables (Adagrad), falling linearly to 0.
    #[arg(long, default_value_t = 0.1, value_parser = rate)]
    pub table_rate: f32,
    /// Learning rate of the projection (Adam), falling linearly to 0.
    #[arg(long, default_value_t = 0.003, value_parser = rate)]
    pub projection_rate: f32,
    /// Share of the pairs to hold out.
    #[arg(long, default_value_t = 0.2)]
    pub test_fraction: f64,
    /// Most held-out queries [default: 2000; with --quick 1000].
    #[arg(long, value_parser = clap::value_parser!(u32).range(50..))]
    pub max_test: Option<u32>,
    /// Most candidates, for --beir.
    #[arg(long, default_value_t = 20_000)]
    pub max_candidates: u32,
    /// Most pairs.
    #[arg(long, default_value_t = 40_000)]
    pub max_pairs: u32,
    /// Most pairs of one crate, for the default data.
    #[arg(long, default_value_t = 1500)]
    pub max_per_crate: u32,
    /// Which towers and embeddings to save as safetensors, of the first seed.
    #[arg(long, default_value = "pictured")]
    pub save: Save,
}

/// Duplicate masking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mask {
    /// Every other text of the batch is a negative.
    Off,
    /// Texts with equal ids are not.
    On,
}

/// What is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Save {
    /// Nothing.
    None,
    /// The runs that the t-SNE pictures show.
    Pictured,
    /// Every loss, mask and architecture.
    All,
}

fn loss_name(name: &str) -> Result<String, samtone::Error> {
    Loss::by_name(name).map(|loss| loss.name().to_string())
}

fn temperature(text: &str) -> Result<f64> {
    let value: f64 = text.parse()?;
    Call::new(Loss::info_nce(), value).check()?;
    Ok(value)
}

fn rate(text: &str) -> Result<f32> {
    let value: f32 = text.parse()?;
    ensure!(value.is_finite() && value > 0.0, "a learning rate is a finite number above 0");
    Ok(value)
}

impl Args {
    /// Fills in what depends on --quick, and rejects what clap cannot.
    pub fn resolve(mut self) -> Result<Self> {
        if !(0.01..=0.9).contains(&self.test_fraction) {
            bail!("--test-fraction is {}; allowed: 0.01 to 0.9", self.test_fraction);
        }
        let longest = self.prefixes.last().copied();
        let dim = *self.dim.get_or_insert(longest.unwrap_or(DIM));
        if let Some(longest) = longest {
            self.call(Loss::info_nce(), true).check().context("--prefixes")?;
            ensure!(
                longest <= dim,
                "--prefixes ends with {longest}; allowed: at most {dim}, the length of an embedding (--dim)"
            );
        }
        if self.architectures.is_empty() {
            self.architectures =
                if self.quick { vec![Architecture::AdeSpl] } else { vec![Architecture::Sde, Architecture::AdeSpl] };
        }
        fn unique<T: PartialEq + Clone>(list: &mut Vec<T>) {
            let mut seen: Vec<T> = Vec::new();
            list.retain(|x| {
                !seen.contains(x) && {
                    seen.push(x.clone());
                    true
                }
            });
        }
        unique(&mut self.architectures);
        unique(&mut self.losses);
        unique(&mut self.masks);
        let (steps, seeds, max_test) = if self.quick { (40, 1, 1000) } else { (100, 3, 2000) };
        self.steps.get_or_insert(steps);
        self.seeds.get_or_insert(seeds);
        self.max_test.get_or_insert(max_test);
        Ok(self)
    }

    /// The seeds.
    pub fn seed_list(&self) -> Vec<u64> {
        (0..u64::from(self.seeds.unwrap_or(0))).map(|k| self.seed.wrapping_add(k)).collect()
    }

    /// Number of trainings.
    pub fn trainings(&self) -> usize {
        self.architectures.iter().map(|a| self.variants(*a).len()).sum::<usize>() * self.seed_list().len()
    }

    /// What is trained of an architecture, once for each seed.
    pub fn variants(&self, architecture: Architecture) -> Vec<Variant> {
        let compared = self.compared_with_prefixes();
        let mut variants = Vec::new();
        for loss in &self.losses {
            for &mask in &self.masks {
                let plain = Variant { architecture, loss: loss.clone(), mask, prefixes: false };
                let with =
                    compared.contains(&(loss.clone(), mask)).then(|| Variant { prefixes: true, ..plain.clone() });
                variants.extend([Some(plain), with].into_iter().flatten());
            }
        }
        variants
    }

    /// The losses that are trained with and without prefixes: those of the pictures, if there are prefixes.
    pub fn compared_with_prefixes(&self) -> Vec<(String, Mask)> {
        if self.prefixes.is_empty() { Vec::new() } else { pictured(self) }
    }

    /// What a training computes, apart from what its batches have of their own.
    pub fn call(&self, loss: Loss, prefixes: bool) -> Call {
        let call = Call::new(loss, self.temperature);
        if prefixes { call.with_prefixes(self.prefixes.iter().map(|d| *d as usize).collect::<Vec<_>>()) } else { call }
    }

    /// Length of an embedding.
    pub fn dim(&self) -> usize {
        self.dim.unwrap_or(DIM) as usize
    }

    /// How many leading entries of an embedding are searched with, apart from a search with all of them, if there are prefixes. All of
    /// them are the last.
    pub fn lengths(&self) -> Vec<usize> {
        let mut lengths: Vec<usize> = self.prefixes.iter().map(|d| *d as usize).collect();
        if lengths.last().is_some_and(|d| *d < self.dim()) {
            lengths.push(self.dim());
        }
        lengths
    }

    /// Rows of an embedding table.
    pub fn buckets(&self) -> usize {
        1 << self.table_bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(arguments: &str) -> Result<Args> {
        Args::try_parse_from(["train"].into_iter().chain(arguments.split_whitespace()))?.resolve()
    }

    #[test]
    fn embeddings_are_as_long_as_the_longest_prefix() {
        for (arguments, dim, lengths) in [
            ("", 128, vec![]),
            ("--prefixes 32,64,256", 256, vec![32, 64, 256]),
            ("--prefixes 8", 8, vec![8]),
            ("--prefixes 8,16 --dim 24", 24, vec![8, 16, 24]),
            ("--dim 24", 24, vec![]),
        ] {
            let args = resolved(arguments).unwrap();
            assert_eq!((args.dim(), args.lengths()), (dim, lengths), "{arguments}");
        }
    }

    #[test]
    fn prefixes_add_a_training_to_each_pictured_loss() {
        let trainings = |arguments| resolved(arguments).unwrap().trainings();
        assert_eq!(trainings("--losses pair,samtone_query,bidirectional"), 36);
        assert_eq!(trainings("--losses pair,samtone_query,bidirectional --prefixes 8"), 48);
        assert_eq!(trainings("--quick --losses info_nce --masks on --prefixes 8"), 2);
    }

    #[test]
    fn bad_prefixes_are_named() {
        for (prefixes, want) in [
            (
                "64,32",
                "--prefixes: argument `prefixes` is 32 at position 1; allowed: ascending numbers of entries, here at least 65",
            ),
            (
                "64,64",
                "--prefixes: argument `prefixes` is 64 at position 1; allowed: ascending numbers of entries, here at least 65",
            ),
            ("32,256 --dim 128", "--prefixes ends with 256; allowed: at most 128, the length of an embedding (--dim)"),
            ("0", "invalid value '0' for '--prefixes <LENGTHS>': 0 is not in 1..=8192"),
            ("8,9000", "invalid value '9000' for '--prefixes <LENGTHS>': 9000 is not in 1..=8192"),
            ("8,all", "invalid value 'all' for '--prefixes <LENGTHS>': invalid digit found in string"),
            ("8,", "invalid value '' for '--prefixes <LENGTHS>': cannot parse integer from empty string"),
        ] {
            let error = format!("{:#}", resolved(&format!("--prefixes {prefixes}")).err().unwrap());
            assert!(error.contains(want), "{prefixes}: {error}");
        }
    }
}
