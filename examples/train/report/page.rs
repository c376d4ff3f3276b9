//! The HTML page. Every sentence about results is computed from them.

use super::super::args::Mask;
use super::super::data::Uniqueness;
use super::super::encoder::Architecture;
use super::super::geometry::Histogram;
use super::super::summary::{Table, VariantSummary, Verdict, loss_label, title};
use super::chart::{LineChart, Scale, Series, escape, outline, scatter};
use super::{DataSummary, Report, Trainings, prefixes};
use samtone::Loss;
use std::fmt::Write;

const STYLE: &str = include_str!("style.css");
/// Colours in the style sheet.
pub(super) const COLOURS: usize = 8;
/// Points of a loss curve; each is the mean of the steps it stands for.
const CURVE_POINTS: usize = 40;

/// The whole page.
pub fn html(report: &Report<'_>) -> String {
    let mut body = String::new();
    body += &head(report);
    body += &results(report);
    body += &expectations(report);
    body += &curves(report);
    body += &prefixes::section(report);
    body += &maps(report);
    body += &histograms(report);
    body += &data(report.data);
    body += &timings(report);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Contrastive losses of dual encoders, compared</title><style>{STYLE}</style></head>\
         <body><main>{body}</main></body></html>\n"
    )
}

fn head(report: &Report<'_>) -> String {
    let (config, data) = (report.config, report.data);
    let seeds = config.seed_list().len();
    let runs = report.trainings.done;
    let unfinished = match report.trainings {
        Trainings { done, planned } if done < planned => {
            format!("<p><b>Unfinished: {done} of {planned} trainings are done.</b> Means are over those.</p>")
        }
        _ => String::new(),
    };
    let figure = |value: String, words: &str| format!("<div><b>{value}</b><span>{words}</span></div>");
    let figures = [
        figure(thousands(data.train_pairs), "training pairs"),
        figure(thousands(data.test_queries), "held-out queries"),
        figure(thousands(data.test_candidates), "candidates for each"),
        figure(format!("{:.0}%", 100.0 * data.passages.unique_share), "of training passages occur once"),
        figure(runs.to_string(), "runs"),
        figure(format!("{:.0} s", report.seconds.total), "in all"),
    ];
    format!(
        "<h1>Contrastive losses of dual encoders, compared</h1>{unfinished}\
         <p class=\"lead\">Trained on {}. {} losses, {}, {} for each; batch {}, temperature {}, {} steps.</p>\
         <div class=\"figures\">{}</div>",
        escape(&data.source),
        config.losses.len(),
        config.architectures.iter().map(|a| a.label()).collect::<Vec<_>>().join(" and "),
        if seeds == 1 { "one seed".into() } else { format!("{seeds} seeds") },
        config.batch,
        config.temperature,
        config.steps.unwrap_or(0),
        figures.concat()
    )
}

fn results(report: &Report<'_>) -> String {
    let spread = if report.config.seed_list().len() > 1 {
        "Mean ± standard deviation over seeds"
    } else {
        "One seed, so no spread is known"
    };
    let mut out = format!(
        "<h2>Held-out retrieval</h2><p class=\"note\">{spread}; the best of each column is coloured. A candidate is relevant if \
         its text equals the positive of the query, or of a query with the same text.</p>"
    );
    out.extend(report.tables.iter().map(table));
    out
}

pub(super) fn table(table: &Table) -> String {
    let labels = table.labels.len();
    let mut out =
        format!("<div class=\"scroll\"><table><caption>{}</caption><thead><tr class=\"groups\">", escape(&table.title));
    for label in &table.labels {
        let _ = write!(out, "<th class=\"label\" rowspan=\"2\">{}</th>", escape(label));
    }
    for architecture in &table.architectures {
        let _ = write!(out, "<th class=\"group\" colspan=\"{}\">{architecture}</th>", table.metrics.len());
    }
    out += "</tr><tr>";
    for metric in table.architectures.iter().flat_map(|_| &table.metrics) {
        let _ = write!(out, "<th>{metric}</th>");
    }
    out += "</tr></thead><tbody>";
    for row in &table.rows {
        out += "<tr>";
        for (c, cell) in row.iter().enumerate() {
            let class = match cell.best {
                true => " class=\"best\"",
                false if c < labels => " class=\"label\"",
                false => "",
            };
            let _ = write!(out, "<td{class}>{}</td>", escape(&cell.text));
        }
        out += "</tr>";
    }
    out + "</tbody></table></div>"
}

fn expectations(report: &Report<'_>) -> String {
    if report.comparisons.is_empty() {
        return String::new();
    }
    let count = |verdict: Verdict| report.comparisons.iter().filter(|c| c.verdict == verdict).count();
    let data = report.data;
    let summary = if count(Verdict::OneSeed) > 0 {
        "One seed allows no verdict; the differences below may be noise.".to_string()
    } else {
        format!(
            "Of {} comparisons {} agree, {} contradict, and {} are undecided because the seeds differ in sign. For a given seed \
             all losses start from the same parameters and see the same batches, so differences are taken seed by seed.",
            report.comparisons.len(),
            count(Verdict::Agrees),
            count(Verdict::Contradicts),
            count(Verdict::Undecided)
        )
    };
    let mut out = format!(
        "<h2>What the paper expects, and what came out</h2><p>{summary} Repeated passages are the paper's reason for harm from \
         same-tower negatives on both towers: 17% of TriviaQA's training documents are unique, 98% of MS MARCO's, and here \
         {:.0}% of the passages.</p>\
         <div class=\"scroll\"><table><thead><tr><th class=\"label\">Expectation</th><th class=\"label\">Encoder</th>\
         <th>Metric</th><th>Difference</th><th class=\"label\">Verdict</th></tr></thead><tbody>",
        100.0 * data.passages.unique_share
    );
    for same in report.comparisons.chunk_by(|a, b| a.expectation == b.expectation) {
        for (k, c) in same.iter().enumerate() {
            let class = match c.verdict {
                Verdict::Agrees => "agrees",
                Verdict::Contradicts => "contradicts",
                Verdict::Undecided => "undecided",
                Verdict::OneSeed => "one_seed",
            };
            out += "<tr>";
            if k == 0 {
                let _ = write!(out, "<td class=\"text\" rowspan=\"{}\">{}</td>", same.len(), escape(&c.expectation));
            }
            let _ = write!(
                out,
                "<td class=\"word\">{}</td><td>{}</td><td>{}</td><td class=\"label verdict {class}\">{}</td></tr>",
                c.architecture.label(),
                c.metric,
                c.difference_text().replace('-', "−"),
                c.verdict.label()
            );
        }
    }
    out + "</tbody></table></div>"
}

pub(super) fn colour(report: &Report<'_>, loss: &str) -> usize {
    report.config.losses.iter().position(|l| l == loss).unwrap_or(0) % COLOURS
}

/// Colours of the losses, and the dash of masked ones where both appear.
fn legend(report: &Report<'_>, masks: bool) -> String {
    let mut out = String::from("<ul class=\"legend\">");
    for loss in &report.config.losses {
        let _ = write!(out, "<li><i class=\"c{}\"></i>{}</li>", colour(report, loss), escape(&loss_label(loss)));
    }
    if masks && report.config.masks.len() > 1 {
        out += "<li><i class=\"dash\"></i>duplicates masked</li>";
    }
    out + "</ul>"
}

fn series<'a>(
    report: &'a Report<'_>,
    architecture: Architecture,
    keep: impl Fn(&VariantSummary) -> bool + 'a,
    points: impl Fn(&VariantSummary) -> Vec<(f64, f64)> + 'a,
) -> Vec<Series> {
    let chosen = plain(report, architecture).filter(|v| keep(v));
    chosen
        .map(|v| Series {
            label: title(&v.variant),
            colour: colour(report, &v.variant.loss),
            dashed: v.variant.mask == Mask::On && report.config.masks.len() > 1,
            points: points(v),
        })
        .collect()
}

/// Results of an architecture, trained without prefixes.
fn plain<'a>(report: &Report<'a>, architecture: Architecture) -> impl Iterator<Item = &'a VariantSummary> {
    report.results.iter().filter(move |v| v.variant.architecture == architecture && !v.variant.prefixes)
}

/// A curve over steps, each point the mean of the steps that it stands for.
pub(super) fn smoothed(curve: &[f64]) -> Vec<(f64, f64)> {
    let window = curve.len().div_ceil(CURVE_POINTS).max(1);
    let chunks = curve.chunks(window).enumerate();
    chunks
        .map(|(k, c)| ((k * window) as f64 + (c.len() + 1) as f64 / 2.0, c.iter().sum::<f64>() / c.len() as f64))
        .collect()
}

/// Losses by step.
pub(super) fn loss_chart(title: &str, series: Vec<Series>) -> LineChart<'_> {
    LineChart {
        title,
        x_label: "step",
        y_label: "loss (nats, logarithmic)",
        scale: Scale::Log,
        from_zero: false,
        percent: false,
        mark: None,
        series,
    }
}

fn curves(report: &Report<'_>) -> String {
    let mut out = format!(
        "<h2>Training</h2><p class=\"note\">Means over seeds. Losses differ in their number of negatives and directions, so only \
         the shapes of their curves compare; held-out MRR compares directly. Step 0 is the untrained encoder, which already \
         matches shared words.</p>{}<div class=\"grid2\">",
        legend(report, true)
    );
    for &architecture in &report.config.architectures {
        let title = format!("{}: training loss", architecture.label());
        out += &figure(
            &title,
            loss_chart(&title, series(report, architecture, |_| true, |v| smoothed(&v.loss_curve))),
            "",
        );
        let title = format!("{}: held-out MRR", architecture.label());
        out += &figure(
            &title,
            LineChart {
                title: &title,
                x_label: "step",
                y_label: "MRR",
                scale: Scale::Linear,
                from_zero: false,
                percent: false,
                mark: None,
                series: series(
                    report,
                    architecture,
                    |_| true,
                    |v| v.mrr_curve.iter().map(|(s, m)| (*s as f64, *m)).collect(),
                ),
            },
            "",
        );
    }
    out + "</div>"
}

pub(super) fn figure(title: &str, chart: LineChart<'_>, caption: &str) -> String {
    let caption =
        if caption.is_empty() { String::new() } else { format!("<figcaption>{}</figcaption>", escape(caption)) };
    format!("<figure><h3>{}</h3>{}{caption}</figure>", escape(title), chart.svg(520.0, 300.0))
}

fn maps(report: &Report<'_>) -> String {
    if report.maps.is_empty() {
        return String::new();
    }
    let mut out = String::from(
        "<h2>Where the towers lie</h2><p class=\"note\">t-SNE of held-out queries and their positives (as Figure 1 of the paper), \
         first seed. The gap below each map is measured in the embedding space, not on the map: the distance between the mean \
         query and the mean passage.</p><ul class=\"legend\"><li><i class=\"dot round\"></i>query</li>\
         <li><i class=\"dot square\"></i>passage</li></ul><div class=\"grid3\">",
    );
    for map in report.maps {
        let title = format!("{}: {}", map.architecture.label(), map.title);
        let _ = write!(
            out,
            "<figure><h3>{}</h3>{}<figcaption>tower gap {:.3}</figcaption></figure>",
            escape(&title),
            scatter(&title, &map.queries, &map.passages, 320.0),
            map.tower_gap
        );
    }
    out + "</div>"
}

fn histograms(report: &Report<'_>) -> String {
    // Masked and unmasked together would be too many outlines to tell apart.
    let mask = if report.config.masks.contains(&Mask::Off) { Mask::Off } else { Mask::On };
    let mut out = format!(
        "<h2>Similarities</h2><p class=\"note\">Held-out queries, all seeds{}. Left: cosine with the first candidate (as Figure 5 \
         of the paper). Right: sim(q<sub>i</sub>,q<sub>j</sub>) / sim(q<sub>i</sub>,p<sub>j</sub>) of random pairs (as Figure 6); \
         near 1, another query is as far away as its passage.</p>{}<div class=\"grid2\">",
        if report.config.masks.len() > 1 { ", duplicates not masked" } else { "" },
        legend(report, false)
    );
    type Picture = (&'static str, &'static str, &'static str, Option<f64>, fn(&VariantSummary) -> &Histogram);
    let pictures: [Picture; 2] = [
        ("cosine with the first candidate", "cosine", "share of queries", None, |v| &v.top_cosine),
        ("same-tower ratio", "sim(q, q′) / sim(q, p′)", "share of pairs", Some(1.0), |v| &v.ratio),
    ];
    for &architecture in &report.config.architectures {
        for (what, x_label, y_label, mark, histogram) in pictures {
            let title = format!("{}: {what}", architecture.label());
            let chosen = |v: &VariantSummary| v.variant.mask == mask;
            let captions = plain(report, architecture).filter(|v| chosen(v));
            let captions: Vec<String> = captions
                .map(|v| {
                    let h = histogram(v);
                    let outside = match h.outside_share() {
                        share if share < 0.005 => String::new(),
                        share => format!(" ({:.0}% beyond the axis)", 100.0 * share),
                    };
                    format!("{} {:.2}{outside}", loss_label(&v.variant.loss), h.median)
                })
                .collect();
            let chart = LineChart {
                title: &title,
                x_label,
                y_label,
                scale: Scale::Linear,
                from_zero: true,
                percent: true,
                mark,
                series: series(report, architecture, chosen, |v| {
                    let h = histogram(v);
                    outline(h.low, h.high, &h.shares())
                }),
            };
            out += &figure(&title, chart, &format!("Medians: {}.", captions.join(" · ")));
        }
    }
    out + "</div>"
}

fn data(data: &DataSummary) -> String {
    let row = |name: &str, u: &Uniqueness, buckets: f64| {
        format!(
            "<tr><td class=\"label\">{name}</td><td>{}</td><td>{}</td><td>{:.1}%</td><td>{buckets:.0}</td></tr>",
            thousands(u.rows),
            thousands(u.distinct),
            100.0 * u.unique_share
        )
    };
    format!(
        "<h2>Data</h2><p class=\"note\">Texts are equal if they are without regard to case and white space. {} held-out pairs were \
         dropped because training contains them.</p><div class=\"scroll\"><table><thead><tr><th class=\"label\">Training texts</th>\
         <th>Rows</th><th>Different</th><th>Rows whose text occurs once</th><th>Hash buckets per text</th></tr></thead><tbody>{}{}\
         </tbody></table></div>",
        thousands(data.leaks_dropped),
        row("queries", &data.queries, data.mean_buckets[0]),
        row("passages", &data.passages, data.mean_buckets[1])
    )
}

fn timings(report: &Report<'_>) -> String {
    let s = &report.seconds;
    let mut out = format!(
        "<h2>Times and settings</h2><p class=\"note\">Data {:.1} s, training and evaluation {:.1} s, pictures {:.1} s; {} threads.</p>\
         <div class=\"scroll\"><table><thead><tr><th class=\"label\">Encoder</th><th class=\"label\">Loss</th>\
         <th class=\"label\">Groups</th><th class=\"label\">Duplicates masked</th><th>Step, ms</th><th>Loss and gradients, ms</th>\
         <th>Share of the step</th></tr></thead><tbody>",
        s.data, s.training, s.pictures, report.threads
    );
    for v in report.results {
        let formula = Loss::by_name(&v.variant.loss).map(|l| l.to_string()).unwrap_or_default();
        let groups = formula.split_once(" = ").map_or("", |(_, groups)| groups);
        let _ = write!(
            out,
            "<tr><td class=\"label\">{}</td><td class=\"label\">{}{}</td><td class=\"label\">{}</td><td class=\"label\">{}</td>\
             <td>{:.1}</td><td>{:.1}</td><td>{:.0}%</td></tr>",
            v.variant.architecture.label(),
            escape(&loss_label(&v.variant.loss)),
            if v.variant.prefixes { ", with prefixes" } else { "" },
            escape(groups),
            if v.variant.mask == Mask::On { "yes" } else { "no" },
            v.step_ms,
            v.step_ms * v.loss_share,
            100.0 * v.loss_share
        );
    }
    let config = serde_json::to_string_pretty(report.config).unwrap_or_default();
    let _ = write!(
        out,
        "</tbody></table></div><details><summary>All settings</summary><pre>{}</pre></details>",
        escape(&config)
    );
    out
}

/// 12,345.
fn thousands(value: usize) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (k, digit) in digits.chars().enumerate() {
        if k > 0 && (digits.len() - k).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn thousands() {
        assert_eq!([0, 999, 1000, 1234567].map(super::thousands), ["0", "999", "1,000", "1,234,567"]);
    }
}
