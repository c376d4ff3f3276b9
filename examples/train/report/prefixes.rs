//! The section on Matryoshka prefixes: what each length of an embedding finds, trained with and without them, and how their losses fall.

use super::super::args::Mask;
use super::super::encoder::Architecture;
use super::super::summary::{VariantSummary, loss_label};
use super::Report;
use super::chart::{LineChart, Scale, Series, escape};
use super::page::{COLOURS, colour, figure, loss_chart, smoothed, table};
use std::fmt::Write;

/// Nothing without prefixes.
pub fn section(report: &Report<'_>) -> String {
    let config = report.config;
    if report.prefix_tables.is_empty() {
        return String::new();
    }
    let lengths: Vec<String> = config.prefixes.iter().map(u32::to_string).collect();
    let dim = config.dim();
    let mut out = format!(
        "<h2>Prefixes of embeddings (Matryoshka)</h2><p class=\"note\">Each loss here was trained twice, from the same parameters and on \
         the same batches: on whole embeddings of {dim} entries, and on the sum of the losses of their first {} entries. Then held-out \
         texts are searched with the leading entries alone. Half the entries take half the memory of an index, and half the \
         multiplications of a search. The better of both trainings is coloured.</p>",
        lengths.join(", ")
    );
    out.extend(report.prefix_tables.iter().map(table));
    out += "<ul class=\"legend\">";
    for (loss, _) in config.compared_with_prefixes() {
        let _ = write!(out, "<li><i class=\"c{}\"></i>{}</li>", colour(report, &loss), escape(&loss_label(&loss)));
    }
    out += "<li><i class=\"dash\"></i>trained without prefixes</li></ul><div class=\"grid2\">";
    out.extend(config.architectures.iter().map(|a| by_length(report, *a)));
    out += "</div><ul class=\"legend\">";
    for (k, length) in lengths.iter().enumerate() {
        let _ = write!(out, "<li><i class=\"c{}\"></i>{length} entries</li>", k % COLOURS);
    }
    out += "</ul><div class=\"grid2\">";
    out.extend(report.results.iter().filter(|v| v.variant.prefixes).map(|v| losses(v, &lengths)));
    out + "</div>"
}

/// Those of an architecture that were trained with prefixes or without, by loss.
fn compared<'a>(report: &Report<'a>, architecture: Architecture, loss: &str, mask: Mask) -> Vec<&'a VariantSummary> {
    let is_one = |v: &&VariantSummary| {
        (v.variant.architecture, v.variant.loss.as_str(), v.variant.mask) == (architecture, loss, mask)
    };
    report.results.iter().filter(is_one).collect()
}

fn by_length(report: &Report<'_>, architecture: Architecture) -> String {
    let lengths = report.config.lengths();
    let (mut series, mut captions) = (Vec::new(), Vec::new());
    for (loss, mask) in report.config.compared_with_prefixes() {
        let mut kept = Vec::new();
        for v in compared(report, architecture, &loss, mask) {
            let words = if v.variant.prefixes { "with prefixes" } else { "without" };
            let mrr: Vec<f64> = v.by_length.iter().map(|quality| quality.mrr.mean).collect();
            kept.push(format!("{:.0}% {words}", 100.0 * mrr[0] / mrr[mrr.len() - 1]));
            series.push(Series {
                label: format!("{}, {words}", loss_label(&loss)),
                colour: colour(report, &loss),
                dashed: !v.variant.prefixes,
                points: lengths.iter().map(|d| *d as f64).zip(mrr).collect(),
            });
        }
        if !kept.is_empty() {
            captions.push(format!("{} {}", loss_label(&loss), kept.join(", ")));
        }
    }
    let title = format!("{}: held-out MRR by length of the embedding", architecture.label());
    let chart = LineChart {
        title: &title,
        x_label: "leading entries searched with",
        y_label: "MRR",
        scale: Scale::Linear,
        from_zero: false,
        percent: false,
        mark: None,
        series,
    };
    let (shortest, dim) = (lengths[0], report.config.dim());
    let caption = format!("Of the MRR of all {dim} entries, the first {shortest} keep: {}.", captions.join(" · "));
    figure(&title, chart, &caption)
}

fn losses(v: &VariantSummary, lengths: &[String]) -> String {
    let series = v.prefix_loss_curves.iter().zip(lengths).enumerate();
    let series = series.map(|(k, (curve, length))| Series {
        label: format!("{length} entries"),
        colour: k % COLOURS,
        dashed: false,
        points: smoothed(curve),
    });
    let title = format!("{}, {}: loss of each prefix", v.variant.architecture.label(), loss_label(&v.variant.loss));
    figure(&title, loss_chart(&title, series.collect()), "")
}
