//! From runs to results: means over seeds, the tables of the paper, and what its claims come to here.

use super::args::{Args, Mask};
use super::encoder::Architecture;
use super::geometry::Histogram;
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

/// All seeds of a variant.
#[derive(Debug, Serialize)]
pub struct VariantSummary {
    /// Architecture, loss, mask.
    pub variant: Variant,
    /// Precision at 1.
    pub p_at_1: Stat,
    /// Mean reciprocal rank.
    pub mrr: Stat,
    /// NDCG at 10.
    pub ndcg_at_10: Stat,
    /// ‖mean q̂ − mean p̂‖.
    pub tower_gap: Stat,
    /// (step, mean held-out MRR).
    pub mrr_curve: Vec<(usize, f64)>,
    /// Mean training loss of each step, nats.
    pub loss_curve: Vec<f64>,
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
            p_at_1: stat(&|r| r.scores().p_at_1),
            mrr: stat(&|r| r.scores().mrr),
            ndcg_at_10: stat(&|r| r.scores().ndcg_at_10),
            tower_gap: stat(&|r| r.tower_gap),
            mrr_curve: (0..runs[0].curve.len()).map(|k| (runs[0].curve[k].0, mean(&|r| r.curve[k].1.mrr))).collect(),
            loss_curve: steps.clone().map(|k| mean(&|r| r.steps[k].loss)).collect(),
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
type Row<'a> = (Vec<String>, Vec<Option<&'a VariantSummary>>);

/// Columns: labels, then P@1, MRR, NDCG@10 for each architecture.
fn table(title: &str, labels: &[&str], architectures: &[Architecture], rows: Vec<Row<'_>>) -> Table {
    let metrics: [Metric; 3] = [("P@1", |v| &v.p_at_1), ("MRR", |v| &v.mrr), ("NDCG@10", |v| &v.ndcg_at_10)];
    let stats = |columns: &[Option<&VariantSummary>]| -> Vec<Option<Stat>> {
        columns.iter().flat_map(|v| metrics.iter().map(|(_, f)| v.map(|v| f(v).clone()))).collect()
    };
    let stats: Vec<Vec<Option<Stat>>> = rows.iter().map(|(_, columns)| stats(columns)).collect();
    let best = |column: usize| {
        stats.iter().filter_map(|row| row[column].as_ref()).map(|s| s.mean).fold(f64::NEG_INFINITY, f64::max)
    };
    let cells = rows.iter().zip(&stats).map(|((labels, _), stats)| {
        let labels = labels.iter().map(|text| Cell { text: text.clone(), best: false });
        let numbers = stats.iter().enumerate().map(|(c, stat)| match stat {
            Some(stat) => Cell { text: stat.percent(), best: rows.len() > 1 && stat.mean == best(c) },
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

/// The paper's Tables 1 and 3 for these results.
pub fn tables(args: &Args, results: &[VariantSummary]) -> Vec<Table> {
    let find = |architecture: Architecture, loss: &str, mask: Mask| {
        let wanted = Variant { architecture, loss: loss.to_string(), mask };
        results.iter().find(|v| v.variant == wanted)
    };
    let columns = |loss: &str, mask: Mask| -> Vec<Option<&VariantSummary>> {
        args.architectures.iter().map(|a| find(*a, loss, mask)).collect()
    };
    let mut tables = Vec::new();
    for (mask, words) in [(Mask::Off, "duplicates count as negatives"), (Mask::On, "duplicates masked")] {
        if args.masks.contains(&mask) {
            let rows = args.losses.iter().map(|loss| (vec![loss_label(loss)], columns(loss, mask))).collect();
            let title = format!("Losses by architecture (as Table 1 of the paper), {words}, in %");
            tables.push(table(&title, &["Loss"], &args.architectures, rows));
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
        tables.push(table(title, &["Same-tower negatives on", "Masked"], &args.architectures, rows));
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
    let mrr: Metric = ("MRR", |v| &v.mrr);
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
            let find = |(loss, mask): (&str, Mask)| {
                let wanted = Variant { architecture, loss: loss.to_string(), mask };
                results.iter().find(|v| v.variant == wanted).map(|v| &value(v).values)
            };
            if let (Some(left), Some(right)) = (find(left), find(right)) {
                let differences: Vec<f64> = left.iter().zip(right).map(|(l, r)| l - r).collect();
                found.push(Comparison {
                    expectation: expectation.to_string(),
                    architecture,
                    metric,
                    verdict: Verdict::of(&differences, expected),
                    difference: Stat::new(differences),
                });
            }
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
