//! From runs to results: means over seeds, the tables of the paper, and what its claims come to here.

use super::args::{Args, Mask};
use super::encoder::Architecture;
use super::geometry::Histogram;
use super::retrieval::Scores;
use super::trainer::{Outcome, Variant};
use samtone::{Block, Loss};
use serde::Serialize;

/// Mean and sample standard deviation over seeds.
#[derive(Debug, Clone, Serialize)]
pub struct Stat {
    /// Mean.
    pub mean: f64,
    /// Sample standard deviation; none for one seed.
    pub std: Option<f64>,
    /// One for each seed, in their order.
    pub values: Vec<f64>,
}

impl Stat {
    /// Of at least one value.
    pub fn new(values: Vec<f64>) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let square: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        Self { mean, std: (values.len() > 1).then(|| (square / (count - 1.0)).sqrt()), values }
    }

    /// `30.12 ± 0.20`, in percent.
    pub fn percent(&self) -> String {
        match self.std {
            Some(std) => format!("{:.2} ± {:.2}", 100.0 * self.mean, 100.0 * std),
            None => format!("{:.2}", 100.0 * self.mean),
        }
    }
}

/// What held-out queries find.
#[derive(Debug, Clone, Serialize)]
pub struct Quality {
    /// Precision at 1.
    pub p_at_1: Stat,
    /// Mean reciprocal rank.
    pub mrr: Stat,
    /// NDCG at 10.
    pub ndcg_at_10: Stat,
}

impl Quality {
    /// Of the scores of each seed.
    fn new(scores: &[Scores]) -> Self {
        let stat = |f: fn(&Scores) -> f64| Stat::new(scores.iter().map(f).collect());
        Self { p_at_1: stat(|s| s.p_at_1), mrr: stat(|s| s.mrr), ndcg_at_10: stat(|s| s.ndcg_at_10) }
    }
}

/// All seeds of a variant.
#[derive(Debug, Serialize)]
pub struct VariantSummary {
    /// Architecture, loss, mask, prefixes.
    pub variant: Variant,
    /// With whole embeddings.
    #[serde(flatten)]
    pub quality: Quality,
    /// With their leading entries alone, of each length in [`Args::lengths`]; empty where lengths are not compared.
    pub by_length: Vec<Quality>,
    /// ‖mean q̂ − mean p̂‖.
    pub tower_gap: Stat,
    /// (step, mean held-out MRR).
    pub mrr_curve: Vec<(usize, f64)>,
    /// Mean training loss of each step, nats.
    pub loss_curve: Vec<f64>,
    /// The same of each prefix; empty without.
    pub prefix_loss_curves: Vec<Vec<f64>>,
    /// Mean in-batch MRR of each step.
    pub in_batch_mrr_curve: Vec<f64>,
    /// Query–first candidate cosines of all seeds.
    pub top_cosine: Histogram,
    /// sim(qᵢ,qⱼ)/sim(qᵢ,pⱼ) of all seeds.
    pub ratio: Histogram,
    /// Milliseconds of a training step.
    pub step_ms: f64,
    /// Share of them spent in the loss and its gradients.
    pub loss_share: f64,
}

impl VariantSummary {
    /// From the runs of one variant, one for each seed.
    pub fn new(runs: &[Outcome]) -> Self {
        let stat = |f: &dyn Fn(&Outcome) -> f64| Stat::new(runs.iter().map(f).collect());
        let mean = |f: &dyn Fn(&Outcome) -> f64| stat(f).mean;
        let steps = 0..runs[0].steps.len();
        let timing = |f: fn(&super::trainer::Timing) -> f64| runs.iter().map(|r| f(&r.timing)).sum::<f64>();
        let (encode, loss, update) = (timing(|t| t.encode), timing(|t| t.loss), timing(|t| t.update));
        let total = encode + loss + update;
        Self {
            variant: runs[0].variant.clone(),
            quality: Quality::new(&runs.iter().map(Outcome::scores).collect::<Vec<_>>()),
            by_length: (0..runs[0].by_length.len())
                .map(|k| Quality::new(&runs.iter().map(|r| r.by_length[k]).collect::<Vec<_>>()))
                .collect(),
            tower_gap: stat(&|r| r.tower_gap),
            mrr_curve: (0..runs[0].curve.len()).map(|k| (runs[0].curve[k].0, mean(&|r| r.curve[k].1.mrr))).collect(),
            loss_curve: steps.clone().map(|k| mean(&|r| r.steps[k].loss)).collect(),
            prefix_loss_curves: (0..runs[0].steps[0].prefix_losses.len())
                .map(|prefix| steps.clone().map(|k| mean(&|r| r.steps[k].prefix_losses[prefix])).collect())
                .collect(),
            in_batch_mrr_curve: steps.map(|k| mean(&|r| r.steps[k].in_batch_mrr)).collect(),
            top_cosine: Histogram::new(
                runs.iter().flat_map(|r| r.top_cosines.iter().map(|c| f64::from(*c))).collect(),
                0.0,
                1.0,
                50,
            ),
            ratio: Histogram::new(runs.iter().flat_map(|r| r.ratios.iter().copied()).collect(), -1.0, 3.0, 64),
            step_ms: 1e3 * total / (runs.len() * runs[0].steps.len()) as f64,
            loss_share: loss / total,
        }
    }
}

/// How a preset is called in the report.
pub fn loss_label(name: &str) -> String {
    match name {
        "info_nce" => "InfoNCE".into(),
        "bidirectional" => "Bidirectional".into(),
        "pair" => "PAIR".into(),
        "samtone_query" => "SamToNe, query tower".into(),
        "samtone_passage" => "SamToNe, passage tower".into(),
        "samtone_both" => "SamToNe, both towers".into(),
        other => other.into(),
    }
}

/// How a variant is called within an architecture.
pub fn title(variant: &Variant) -> String {
    let masked = if variant.mask == Mask::On { ", duplicates masked" } else { "" };
    let prefixes = if variant.prefixes { ", with prefixes" } else { "" };
    format!("{}{masked}{prefixes}", loss_label(&variant.loss))
}

/// Whether the loss has same-tower negatives.
fn same_tower(name: &str) -> bool {
    Loss::by_name(name).is_ok_and(|loss| loss.uses(Block::QQ) || loss.uses(Block::PP))
}

/// The losses that the pictures contrast: one without same-tower negatives and one with, the paper's choice where present.
pub fn pictured(args: &Args) -> Vec<(String, Mask)> {
    let mask = if args.masks.contains(&Mask::Off) { Mask::Off } else { Mask::On };
    let choose = |preferred: &str, with: bool| {
        let candidates = || args.losses.iter().filter(|l| same_tower(l) == with);
        candidates().find(|l| *l == preferred).or_else(|| candidates().next()).map(|l| (l.clone(), mask))
    };
    [choose("bidirectional", false), choose("samtone_query", true)].into_iter().flatten().collect()
}

/// A table for the console and the page.
#[derive(Debug, Serialize)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// Heads of the columns that say what a row is.
    pub labels: Vec<String>,
    /// Heads of the groups of columns that follow, each with all metrics.
    pub architectures: Vec<&'static str>,
    /// Heads of the columns in each group.
    pub metrics: Vec<&'static str>,
    /// Cells, labels first.
    pub rows: Vec<Vec<Cell>>,
}

/// A cell of a table.
#[derive(Debug, Serialize)]
pub struct Cell {
    /// Its text.
    pub text: String,
    /// Whether it is the best of its column.
    pub best: bool,
}

type Metric = (&'static str, fn(&VariantSummary) -> &Stat);
type Side = (&'static str, Mask);
type Row<'a> = (Vec<String>, Vec<Option<&'a Quality>>);

/// Columns: labels, then P@1, MRR, NDCG@10 for each architecture. The best is that of each `peers` rows.
fn table(title: &str, labels: &[&str], architectures: &[Architecture], peers: usize, rows: Vec<Row<'_>>) -> Table {
    type OfQuality = (&'static str, fn(&Quality) -> &Stat);
    let metrics: [OfQuality; 3] = [("P@1", |v| &v.p_at_1), ("MRR", |v| &v.mrr), ("NDCG@10", |v| &v.ndcg_at_10)];
    let stats = |columns: &[Option<&Quality>]| -> Vec<Option<Stat>> {
        columns.iter().flat_map(|v| metrics.iter().map(|(_, f)| v.map(|v| f(v).clone()))).collect()
    };
    let stats: Vec<Vec<Option<Stat>>> = rows.iter().map(|(_, columns)| stats(columns)).collect();
    let of = |peers: &[Vec<Option<Stat>>], column: usize| {
        let means = peers.iter().filter_map(|row| row[column].as_ref()).map(|s| s.mean);
        (peers.len() > 1).then(|| means.fold(f64::NEG_INFINITY, f64::max))
    };
    let best = stats.chunks(peers).flat_map(|peers| peers.iter().map(move |_| peers));
    let cells = rows.iter().zip(&stats).zip(best).map(|(((labels, _), stats), peers)| {
        let labels = labels.iter().map(|text| Cell { text: text.clone(), best: false });
        let numbers = stats.iter().enumerate().map(|(c, stat)| match stat {
            Some(stat) => Cell { text: stat.percent(), best: of(peers, c) == Some(stat.mean) },
            None => Cell { text: "–".into(), best: false },
        });
        labels.chain(numbers).collect()
    });
    let rows = cells.collect();
    Table {
        title: title.into(),
        labels: labels.iter().map(|l| l.to_string()).collect(),
        architectures: architectures.iter().map(|a| a.label()).collect(),
        metrics: metrics.iter().map(|(name, _)| *name).collect(),
        rows,
    }
}

fn find<'a>(
    results: &'a [VariantSummary],
    architecture: Architecture,
    loss: &str,
    mask: Mask,
    prefixes: bool,
) -> Option<&'a VariantSummary> {
    let wanted = Variant { architecture, loss: loss.to_string(), mask, prefixes };
    results.iter().find(|v| v.variant == wanted)
}

/// What each length of an embedding finds, one table for each loss that was trained with and without prefixes.
pub fn prefix_tables(args: &Args, results: &[VariantSummary]) -> Vec<Table> {
    let of = |(loss, mask): (String, Mask)| {
        let mut rows = Vec::new();
        for (k, length) in args.lengths().into_iter().enumerate() {
            for (prefixes, word) in [(false, "no"), (true, "yes")] {
                let quality = |a: &Architecture| find(results, *a, &loss, mask, prefixes).map(|v| &v.by_length[k]);
                let labels = vec![length.to_string(), word.to_string()];
                rows.push((labels, args.architectures.iter().map(quality).collect()));
            }
        }
        let title = format!("Retrieval by length of the embedding, {}, in %", loss_label(&loss));
        table(&title, &["Entries", "Trained with prefixes"], &args.architectures, 2, rows)
    };
    args.compared_with_prefixes().into_iter().map(of).collect()
}

/// The paper's Tables 1 and 3 for these results.
pub fn tables(args: &Args, results: &[VariantSummary]) -> Vec<Table> {
    let columns = |loss: &str, mask: Mask| -> Vec<Option<&Quality>> {
        args.architectures.iter().map(|a| find(results, *a, loss, mask, false).map(|v| &v.quality)).collect()
    };
    let mut tables = Vec::new();
    for (mask, words) in [(Mask::Off, "duplicates count as negatives"), (Mask::On, "duplicates masked")] {
        if args.masks.contains(&mask) {
            let rows = args.losses.iter().map(|loss| (vec![loss_label(loss)], columns(loss, mask))).collect();
            let title = format!("Losses by architecture (as Table 1 of the paper), {words}, in %");
            tables.push(table(&title, &["Loss"], &args.architectures, usize::MAX, rows));
        }
    }
    let mut rows = Vec::new();
    for (towers, loss) in [("neither", "bidirectional"), ("queries", "samtone_query"), ("both", "samtone_both")] {
        for (mask, word) in [(Mask::Off, "no"), (Mask::On, "yes")] {
            if args.losses.iter().any(|l| l == loss) && args.masks.contains(&mask) {
                rows.push((vec![towers.to_string(), word.to_string()], columns(loss, mask)));
            }
        }
    }
    if rows.len() > 1 {
        let title = "Same-tower negatives and duplicates (as Table 3 of the paper), in %";
        tables.push(table(title, &["Same-tower negatives on", "Masked"], &args.architectures, usize::MAX, rows));
    }
    tables
}

/// What the paper, or its authors' outlook, leads one to expect of a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Expected {
    /// Above 0.
    Higher,
    /// Below 0.
    Lower,
}

/// What the seeds say about an expectation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every seed has the expected sign.
    Agrees,
    /// Every seed has the other sign.
    Contradicts,
    /// The seeds differ in sign.
    Undecided,
    /// One seed shows no spread, so nothing is concluded.
    OneSeed,
}

impl Verdict {
    fn of(differences: &[f64], expected: Expected) -> Self {
        let sign = match expected {
            Expected::Higher => 1.0,
            Expected::Lower => -1.0,
        };
        if differences.len() < 2 {
            Self::OneSeed
        } else if differences.iter().all(|d| d * sign > 0.0) {
            Self::Agrees
        } else if differences.iter().all(|d| d * sign < 0.0) {
            Self::Contradicts
        } else {
            Self::Undecided
        }
    }

    /// In words.
    pub fn label(self) -> &'static str {
        match self {
            Self::Agrees => "agrees",
            Self::Contradicts => "contradicts",
            Self::Undecided => "undecided",
            Self::OneSeed => "one seed, no verdict",
        }
    }
}

/// An expectation next to what came out. Differences are taken seed by seed: equal parameters and batches at the start.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// What is expected, and who says so.
    pub expectation: String,
    /// Where it was tried.
    pub architecture: Architecture,
    /// Which number.
    pub metric: &'static str,
    /// The difference, one for each seed.
    pub difference: Stat,
    /// What the seeds say.
    pub verdict: Verdict,
}

impl Comparison {
    /// Of two sides, if both have been measured.
    fn new(
        expectation: &str,
        architecture: Architecture,
        metric: &'static str,
        expected: Expected,
        left: Option<&Stat>,
        right: Option<&Stat>,
    ) -> Option<Self> {
        let differences: Vec<f64> = left?.values.iter().zip(&right?.values).map(|(l, r)| l - r).collect();
        Some(Self {
            expectation: expectation.to_string(),
            architecture,
            metric,
            verdict: Verdict::of(&differences, expected),
            difference: Stat::new(differences),
        })
    }

    /// The difference with its sign, in percentage points for shares.
    pub fn difference_text(&self) -> String {
        let (scale, unit) = if self.metric == "tower gap" { (1.0, "") } else { (100.0, " points") };
        let std = self.difference.std.map_or(String::new(), |std| format!(" ± {:.3}", scale * std));
        format!("{:+.3}{std}{unit}", scale * self.difference.mean)
    }
}

/// Every expectation that these runs can answer.
pub fn comparisons(args: &Args, results: &[VariantSummary]) -> Vec<Comparison> {
    use Expected::{Higher, Lower};
    let mrr: Metric = ("MRR", |v| &v.quality.mrr);
    let gap: Metric = ("tower gap", |v| &v.tower_gap);
    let (off, on) = (Mask::Off, Mask::On);
    let questions: [(&str, Expected, Metric, Side, Side); 7] = [
        (
            "Same-tower negatives on the query side beat the bidirectional loss (paper, Table 1)",
            Higher,
            mrr,
            ("samtone_query", off),
            ("bidirectional", off),
        ),
        ("SamToNe on the query side beats PAIR (paper, Table 1)", Higher, mrr, ("samtone_query", off), ("pair", off)),
        (
            "Same-tower negatives on both towers lose to the query side alone where passages repeat (paper, §3.4)",
            Lower,
            mrr,
            ("samtone_both", off),
            ("samtone_query", off),
        ),
        (
            "Masking duplicates helps SamToNe on both towers (paper, Limitations)",
            Higher,
            mrr,
            ("samtone_both", on),
            ("samtone_both", off),
        ),
        (
            "Masking duplicates helps SamToNe on the query side (paper, Limitations)",
            Higher,
            mrr,
            ("samtone_query", on),
            ("samtone_query", off),
        ),
        (
            "With duplicates masked, the query side still beats the bidirectional loss",
            Higher,
            mrr,
            ("samtone_query", on),
            ("bidirectional", on),
        ),
        (
            "SamToNe brings the towers closer together than the bidirectional loss (paper, Figure 1)",
            Lower,
            gap,
            ("samtone_query", off),
            ("bidirectional", off),
        ),
    ];
    let mut found = Vec::new();
    for (expectation, expected, (metric, value), left, right) in questions {
        for &architecture in &args.architectures {
            let of = |(loss, mask)| find(results, architecture, loss, mask, false).map(value);
            let compared = Comparison::new(expectation, architecture, metric, expected, of(left), of(right));
            found.extend(compared);
        }
    }
    let shortest = args.prefixes.first().map_or(0, |d| *d);
    for (loss, mask) in args.compared_with_prefixes() {
        let expectation = format!(
            "The first {shortest} entries find more if they were trained as a prefix (Kusupati et al. 2022): {}",
            loss_label(&loss)
        );
        for &architecture in &args.architectures {
            let of = |prefixes| find(results, architecture, &loss, mask, prefixes).map(|v| &v.by_length[0].mrr);
            found.extend(Comparison::new(&expectation, architecture, "MRR", Higher, of(true), of(false)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_sample_deviation() {
        let s = Stat::new(vec![0.1, 0.2, 0.3]);
        assert!((s.mean - 0.2).abs() < 1e-12 && (s.std.unwrap() - 0.1).abs() < 1e-12);
        assert_eq!(s.percent(), "20.00 ± 10.00");
        assert_eq!(Stat::new(vec![0.5]).percent(), "50.00");
    }

    #[test]
    fn the_best_is_that_of_its_peers() {
        let quality: Vec<Quality> = [0.1, 0.3, 0.2, 0.2]
            .iter()
            .map(|&x| Quality::new(&[Scores { p_at_1: x, mrr: x, ndcg_at_10: x }]))
            .collect();
        let best = |peers: usize, count: usize| -> Vec<bool> {
            let rows = quality[..count].iter().map(|q| (vec!["row".into()], vec![Some(q), None])).collect();
            let table = table("", &["Row"], &[Architecture::Sde, Architecture::AdeSpl], peers, rows);
            assert!(table.rows.iter().all(|row| row[4].text == "–" && !row[0].best && !row[4].best));
            table.rows.iter().map(|row| row[1].best).collect()
        };
        assert_eq!(best(usize::MAX, 4), [false, true, false, false]);
        assert_eq!(best(2, 4), [false, true, true, true]);
        assert_eq!(best(usize::MAX, 1), [false], "a single row has no peer");
    }

    #[test]
    fn verdicts_follow_the_signs() {
        use Expected::{Higher, Lower};
        assert_eq!(Verdict::of(&[0.1, 0.2], Higher), Verdict::Agrees);
        assert_eq!(Verdict::of(&[0.1, 0.2], Lower), Verdict::Contradicts);
        assert_eq!(Verdict::of(&[0.1, -0.2, 0.3], Lower), Verdict::Undecided);
        assert_eq!(Verdict::of(&[0.1, 0.0], Higher), Verdict::Undecided);
        assert_eq!(Verdict::of(&[0.1], Higher), Verdict::OneSeed);
    }

    #[test]
    fn the_paper_s_losses_have_the_blocks_their_pictures_need() {
        assert!(same_tower("samtone_query") && same_tower("pair") && !same_tower("bidirectional"));
    }
}
