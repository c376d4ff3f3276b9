//! Line charts, histograms and scatter plots as inline SVG. Colours are CSS classes, so that the page's light and dark themes
//! apply, which is why this is not left to a plotting library: those write fixed colours into every element.

use std::fmt::Write;

/// Room around the plot for ticks and titles, in SVG units.
const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 42.0;

/// A curve with its style.
pub struct Series {
    /// Shown on hovering.
    pub label: String,
    /// Index of the colour.
    pub colour: usize,
    /// Masked variants are dashed.
    pub dashed: bool,
    /// (x, y) in data units.
    pub points: Vec<(f64, f64)>,
}

/// What the vertical axis shows.
#[derive(Clone, Copy, PartialEq)]
pub enum Scale {
    /// Proportional.
    Linear,
    /// Logarithmic; values must be above 0, others are left out.
    Log,
}

/// A chart of lines.
pub struct LineChart<'a> {
    /// Describes the picture to those who cannot see it.
    pub title: &'a str,
    /// Below the horizontal axis.
    pub x_label: &'a str,
    /// Beside the vertical axis.
    pub y_label: &'a str,
    /// Of the vertical axis.
    pub scale: Scale,
    /// Whether the vertical axis starts at 0.
    pub from_zero: bool,
    /// Prints the vertical ticks in percent.
    pub percent: bool,
    /// A vertical line with meaning, such as ratio 1.
    pub mark: Option<f64>,
    /// The curves.
    pub series: Vec<Series>,
}

/// About `count` round numbers from low to high.
pub fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let raw = (high - low) / count.max(1) as f64;
    if !(raw > 0.0 && raw.is_finite()) {
        return vec![low];
    }
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw).unwrap_or(10.0 * power);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|k| k as f64 * step).collect()
}

fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let range = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let all: Vec<f64> =
        range.flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e))).filter(|t| (low..=high).contains(t)).collect();
    if all.len() <= 7 { all } else { all.into_iter().filter(|t| t.log10().fract().abs() < 1e-9).collect() }
}

/// Without trailing zeros, as many decimals as the spacing of the ticks needs.
fn number(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// `&`, `<`, `>` and quotes as entities.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl LineChart<'_> {
    /// The picture, `width` × `height`.
    pub fn svg(&self, width: f64, height: f64) -> String {
        let usable = |y: f64| y.is_finite() && (self.scale == Scale::Linear || y > 0.0);
        let all = || self.series.iter().flat_map(|s| &s.points).filter(|(_, y)| usable(*y));
        let bounds = |f: fn(&(f64, f64)) -> f64| {
            all().map(f).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)))
        };
        let (x_low, x_high) = bounds(|p| p.0);
        let (mut y_low, mut y_high) = bounds(|p| p.1);
        if all().next().is_none() {
            return format!("<p class=\"empty\">{}: nothing to draw</p>", escape(self.title));
        }
        let log = self.scale == Scale::Log;
        let warp = |y: f64| if log { y.log10() } else { y };
        if self.from_zero && !log {
            y_low = 0.0;
        }
        let pad = ((warp(y_high) - warp(y_low)) * 0.06).max(1e-9);
        let unwarp = |y: f64| if log { 10f64.powf(y) } else { y };
        y_high = unwarp(warp(y_high) + pad);
        if !self.from_zero || log {
            y_low = unwarp(warp(y_low) - pad);
        }
        let x_of = |x: f64| LEFT + (x - x_low) / (x_high - x_low).max(f64::MIN_POSITIVE) * (width - LEFT - RIGHT);
        let y_of =
            |y: f64| height - BOTTOM - (warp(y) - warp(y_low)) / (warp(y_high) - warp(y_low)) * (height - TOP - BOTTOM);

        let mut svg = open(self.title, width, height);
        let y_ticks = if log { log_ticks(y_low, y_high) } else { ticks(y_low, y_high, 5) };
        for tick in y_ticks {
            let y = y_of(tick);
            let text = if self.percent { format!("{}%", number(tick * 100.0)) } else { number(tick) };
            let _ = write!(
                svg,
                r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}"/><text class="tick end" x="{:.1}" y="{:.1}">{text}</text>"#,
                width - RIGHT,
                LEFT - 7.0,
                y + 3.5
            );
        }
        for tick in ticks(x_low, x_high, 6) {
            let (x, bottom) = (x_of(tick), height - BOTTOM);
            let _ = write!(
                svg,
                r#"<line class="axis" x1="{x:.1}" x2="{x:.1}" y1="{bottom}" y2="{:.1}"/><text class="tick mid" x="{x:.1}" y="{:.1}">{}</text>"#,
                bottom + 4.0,
                bottom + 16.0,
                number(tick)
            );
        }
        let _ = write!(
            svg,
            r#"<line class="axis" x1="{LEFT}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}"/>"#,
            width - RIGHT,
            y = height - BOTTOM
        );
        if let Some(mark) = self.mark {
            let _ = write!(
                svg,
                r#"<line class="mark" x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{:.1}"/>"#,
                height - BOTTOM,
                x = x_of(mark)
            );
        }
        for s in &self.series {
            let mut path = String::new();
            for (x, y) in s.points.iter().filter(|(_, y)| usable(*y)) {
                let _ = write!(path, "{}{:.1} {:.1}", if path.is_empty() { "M" } else { "L" }, x_of(*x), y_of(*y));
            }
            let dashed = if s.dashed { " dashed" } else { "" };
            let _ = write!(
                svg,
                r#"<path class="line c{}{dashed}" d="{path}"><title>{}</title></path>"#,
                s.colour,
                escape(&s.label)
            );
        }
        let _ = write!(
            svg,
            r#"<text class="name mid" x="{:.1}" y="{:.1}">{}</text><text class="name mid" transform="translate(12 {:.1}) rotate(-90)">{}</text></svg>"#,
            (LEFT + width - RIGHT) / 2.0,
            height - 6.0,
            escape(self.x_label),
            (TOP + height - BOTTOM) / 2.0,
            escape(self.y_label)
        );
        svg
    }
}

/// The outline of a histogram: (left edge, share), (right edge, share) of each bin.
pub fn outline(low: f64, high: f64, shares: &[f64]) -> Vec<(f64, f64)> {
    let width = (high - low) / shares.len() as f64;
    let edge = |k: usize| low + k as f64 * width;
    shares.iter().enumerate().flat_map(|(k, share)| [(edge(k), *share), (edge(k + 1), *share)]).collect()
}

/// A map of points without axes, as t-SNE has none: queries as discs, passages as squares.
pub fn scatter(title: &str, queries: &[[f64; 2]], passages: &[[f64; 2]], size: f64) -> String {
    let all = || queries.iter().chain(passages);
    let bounds =
        |axis: usize| all().map(|p| p[axis]).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
    let (x, y) = (bounds(0), bounds(1));
    let span = (x.1 - x.0).max(y.1 - y.0).max(f64::MIN_POSITIVE);
    let inner = size - 24.0;
    let place = |p: &[f64; 2]| {
        [(p[0], x), (p[1], y)].map(|(v, (low, high))| size / 2.0 + (v - (low + high) / 2.0) / span * inner)
    };
    let mut svg = open(title, size, size);
    for p in passages {
        let [x, y] = place(p);
        let _ =
            write!(svg, r#"<rect class="passage" x="{:.1}" y="{:.1}" width="4.4" height="4.4"/>"#, x - 2.2, y - 2.2);
    }
    for q in queries {
        let [x, y] = place(q);
        let _ = write!(svg, r#"<circle class="query" cx="{x:.1}" cy="{y:.1}" r="2.4"/>"#);
    }
    svg + "</svg>"
}

fn open(title: &str, width: f64, height: f64) -> String {
    let title = escape(title);
    format!(r#"<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}"><title>{title}</title>"#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(
            ticks(0.0, 1.0, 5).iter().map(|t| number(*t)).collect::<Vec<_>>(),
            ["0", "0.2", "0.4", "0.6", "0.8", "1"]
        );
        assert!(ticks(0.213, 0.347, 5).iter().all(|t| (0.213..=0.347).contains(t)));
        assert_eq!(log_ticks(0.9, 60.0), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(ticks(3.0, 3.0, 5), [3.0]);
    }

    #[test]
    fn charts_survive_odd_data() {
        for points in [vec![], vec![(1.0, 2.0)], vec![(0.0, f64::NAN), (1.0, -1.0)], vec![(0.0, 1.0), (1.0, 1.0)]] {
            for scale in [Scale::Linear, Scale::Log] {
                let series = vec![Series { label: "<a>".into(), colour: 0, dashed: true, points: points.clone() }];
                let chart = LineChart {
                    title: "t&",
                    x_label: "",
                    y_label: "",
                    scale,
                    from_zero: false,
                    percent: false,
                    mark: None,
                    series,
                };
                let svg = chart.svg(300.0, 200.0);
                assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("<a>"), "{svg}");
            }
        }
    }
}
