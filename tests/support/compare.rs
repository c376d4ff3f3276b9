//! Compares what a backend gave with what the definition says. A check passes if `difference <= allowed`, so NaN fails.

use super::case::Expected;
use super::problem::{Outputs, Problem};
use super::tolerance::{GOLDEN, Tolerance};
use samtone::DType;
use std::fmt;

/// One output, compared.
#[derive(Debug, Clone)]
pub struct Check {
    pub output: &'static str,
    /// Distance of the two, in the measure of this output.
    pub difference: f64,
    /// The largest distance that passes.
    pub allowed: f64,
    /// Size of the wanted output in the same measure.
    pub size: f64,
    /// The entry that is furthest off: index, got, want.
    pub worst: (usize, f64, f64),
}

impl Check {
    pub fn passed(&self) -> bool {
        self.difference <= self.allowed
    }

    /// The difference relative to the size of the output.
    pub fn relative(&self) -> f64 {
        ratio(self.difference, self.size)
    }

    /// The allowed difference relative to the size of the output.
    pub fn tolerance(&self) -> f64 {
        ratio(self.allowed, self.size)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (index, got, want) = self.worst;
        write!(
            f,
            "{} is off by {:.2e} relative, allowed {:.2e}; worst at index {index}: got {got:e}, want {want:e}",
            self.output,
            self.relative(),
            self.tolerance()
        )
    }
}

fn ratio(x: f64, size: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x / size }
}

/// Index, got and want of the entry with the largest |got − want|·factor; a NaN outranks every number.
fn worst(got: &[f64], want: &[f64], factor: impl Fn(usize) -> f64) -> (usize, f64, f64) {
    let mut found = (0, 0.0);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let distance = (g - w).abs() * factor(i);
        if distance > found.1 || distance.is_nan() {
            found = (i, distance);
            if distance.is_nan() {
                break;
            }
        }
    }
    (found.0, got.get(found.0).copied().unwrap_or(f64::NAN), want.get(found.0).copied().unwrap_or(f64::NAN))
}

/// Largest difference, relative to the largest entry of `want`. Lengths that differ never pass.
pub fn entrywise(output: &'static str, got: &[f64], want: &[f64], tolerance: f64) -> Check {
    let size = want.iter().fold(0.0_f64, |max, w| max.max(w.abs()));
    let worst = worst(got, want, |_| 1.0);
    let difference = if got.len() == want.len() { (worst.1 - worst.2).abs() } else { f64::NAN };
    Check { output, difference, allowed: tolerance * size, size, worst }
}

/// Reference against a file: every output to [`GOLDEN`], relative to its largest entry.
pub fn against_golden(got: &Outputs, want: &Expected) -> Vec<Check> {
    let losses = [&got.prefix_losses(), &want.prefix_losses].map(|x| x.iter().map(|(_, l)| *l).collect::<Vec<_>>());
    let mut checks = vec![
        entrywise("loss", &[got.evaluation.loss], &[want.loss], GOLDEN),
        entrywise("row_losses", &got.evaluation.row_losses, &want.row_losses, GOLDEN),
        entrywise("grad_q", &got.grad_query, &want.grad_query, GOLDEN),
        entrywise("grad_p", &got.grad_passage, &want.grad_passage, GOLDEN),
        entrywise("grad_temperature", &[got.temperature.tau], &[want.grad_tau], GOLDEN),
    ];
    if !losses.iter().all(Vec::is_empty) {
        checks.extend([prefix_dims(got, want), entrywise("prefix_losses", &losses[0], &losses[1], GOLDEN)]);
    }
    checks
}

/// A backend on the embeddings of `problem`, which `dtype` holds exactly, against the definition, by the tolerance table.
///
/// To its relative tolerance each output adds what rounded cosines cost however good the arithmetic: a cosine off by ε moves
/// a logit by βε and the loss by βε·Σ|∂L/∂(βs)|, and gradients that cancel (equal rows, all cosines alike) keep as much noise
/// around 0. Σ|∂L/∂(βs)| of a row is twice what its positive lacks of probability 1, which vanishes with the loss: trained
/// towers are held to the same digits.
pub fn against_definition(
    got: &Outputs,
    want: &Expected,
    problem: &Problem,
    dtype: DType,
    upstream: f64,
) -> Vec<Check> {
    let tolerance = Tolerance::of(dtype);
    let beta = problem.call.beta();
    let logit = 2.0 * beta * tolerance.cosine;
    let weights = problem.normalized_weights();
    let missing: Vec<f64> = want.row_losses.iter().map(|&l| missing_probability(problem, l)).collect();
    let mean: f64 = weights.iter().zip(&missing).map(|(w, s)| w * s).sum();
    let spread = weights.iter().zip(&missing).map(|(w, s)| (w * s).powi(2)).sum::<f64>().sqrt();
    let relative = tolerance.gradient * (0.01 * beta).max(1.0);
    // A loss of small coefficients has small gradients.
    let all = total_weight(problem) * problem.call.loss().groups().iter().map(|g| g.coefficient()).sum::<f64>();
    let noise = upstream.abs() * (2.0 * logit * spread + beta * tolerance.probability * all.min(1.0));
    // ∂L/∂β is a sum of G·s that cancels like the gradient itself; τ and log β only rescale it.
    let beta_noise = upstream.abs() * 4.0 * tolerance.cosine * mean;
    let (tau, log_beta) = (want.grad_tau, -want.grad_tau / beta);

    let mut checks = vec![
        scalar("loss", got.evaluation.loss, want.loss, tolerance.loss * want.loss.abs() + logit * mean),
        row_losses(&got.evaluation.row_losses, &want.row_losses, &missing, tolerance.loss, logit),
        frobenius("grad_q", &got.grad_query, &want.grad_query, &problem.query, problem, relative, noise),
        frobenius("grad_p", &got.grad_passage, &want.grad_passage, &problem.passage, problem, relative, noise),
        scalar("grad_temperature", got.temperature.tau, tau, relative * tau.abs() + beta * beta * beta_noise),
        scalar("grad_log_beta", got.temperature.log_beta, log_beta, relative * log_beta.abs() + beta * beta_noise),
    ];
    if let Some(metrics) = want.metrics {
        checks.push(of_metrics("metrics", &got.metrics(), &metrics, tolerance.metric));
    }
    if !want.prefix_losses.is_empty() || !got.prefix_losses().is_empty() {
        checks.push(prefix_dims(got, want));
        let weights = got.evaluation.prefixes.iter().map(|p| p.weight);
        for ((got, want), weight) in got.prefix_losses().iter().zip(&want.prefix_losses).zip(weights) {
            // What is missing is counted with the weights of the prefixes.
            let allowed = tolerance.loss * want.1.abs() + logit * mean / weight;
            checks.push(scalar("prefix_losses", got.1, want.1, allowed));
        }
        if let Some(metrics) = &want.prefix_metrics {
            checks.push(of_metrics("prefix_metrics", &got.prefix_metrics(), metrics, tolerance.metric));
        }
    }
    checks
}

/// The prefixes of which there are results.
fn prefix_dims(got: &Outputs, want: &Expected) -> Check {
    let dims = |losses: &[(usize, f64)]| losses.iter().map(|(dim, _)| *dim as f64).collect::<Vec<_>>();
    entrywise("prefixes", &dims(&got.prefix_losses()), &dims(&want.prefix_losses), 0.0)
}

/// Σ_k v_k; 1 without prefixes.
fn total_weight(problem: &Problem) -> f64 {
    match (problem.call.prefix_weights(), problem.call.prefixes()) {
        (Some(weights), _) => weights.iter().sum(),
        (None, Some(prefixes)) => prefixes.len() as f64,
        (None, None) => 1.0,
    }
}

/// Metrics may differ as sums over rows do. Where every positive wins they are 1, and not nearly.
fn of_metrics(output: &'static str, got: &[f64], want: &[f64], allowed: f64) -> Check {
    let check = Check { allowed, size: 1.0, ..entrywise(output, got, want, 0.0) };
    match got.iter().zip(want).position(|(got, want)| *want == 1.0 && *got != 1.0) {
        Some(k) => Check { difference: (got[k] - 1.0).abs(), allowed: 0.0, worst: (k, got[k], 1.0), ..check },
        None => check,
    }
}

/// An upper bound of Σ_g c_g (1 − probability of the positive) of a row: with D the sum of the negatives relative to the
/// positive, D/(e + D) ≤ log(1 + D/e), which is the loss of the group less the log e that it has without negatives.
fn missing_probability(problem: &Problem, row_loss: f64) -> f64 {
    let groups = || problem.call.loss().groups().iter().filter(|g| g.coefficient() > 0.0);
    let prefixes = total_weight(problem);
    let all = prefixes * groups().map(|g| g.coefficient()).sum::<f64>();
    let least = prefixes * groups().map(|g| g.coefficient() * f64::from(g.positive_copies()).ln()).sum::<f64>();
    if least.is_finite() { all.min((row_loss - least).max(0.0)) } else { all }
}

fn scalar(output: &'static str, got: f64, want: f64, allowed: f64) -> Check {
    Check { output, difference: (got - want).abs(), allowed, size: want.abs(), worst: (0, got, want) }
}

/// The row that uses most of what it is allowed.
fn row_losses(got: &[f64], want: &[f64], missing: &[f64], relative: f64, logit: f64) -> Check {
    let allowed: Vec<f64> = want.iter().zip(missing).map(|(w, s)| relative * w.abs() + 2.0 * logit * s).collect();
    let worst = worst(got, want, |i| 1.0 / allowed[i].max(f64::MIN_POSITIVE));
    let difference = if got.len() == want.len() { (worst.1 - worst.2).abs() } else { f64::NAN };
    let allowed = allowed.get(worst.0).copied().unwrap_or(f64::NAN);
    Check { output: "row_losses", difference, allowed, size: worst.2.abs(), worst }
}

/// Frobenius norms of ‖xᵢ‖·gᵢ: a gradient grows as its embedding shrinks, and unscaled the tiniest row alone would count.
fn frobenius(
    output: &'static str,
    got: &[f64],
    want: &[f64],
    x: &[f64],
    problem: &Problem,
    relative: f64,
    noise: f64,
) -> Check {
    let dim = problem.dim;
    let norm = |row: &[f64]| {
        let largest = row.iter().fold(0.0_f64, |max, v| max.max(v.abs()));
        if largest == 0.0 { 1.0 } else { largest * row.iter().map(|v| (v / largest).powi(2)).sum::<f64>().sqrt() }
    };
    let norms: Vec<f64> = x.chunks(dim).map(norm).collect();
    // The gradient of a prefix grows as the norm of the prefix shrinks, and so does what rounded cosines cost.
    let shortest = problem.call.prefixes().map_or(dim, |dims| dims[0]);
    let stretches = x.chunks(dim).zip(&norms).map(|(row, whole)| whole / norm(&row[..shortest]));
    let stretch = stretches.filter(|s| s.is_finite()).fold(1.0, f64::max);
    let length = |entries: &mut dyn Iterator<Item = f64>| {
        entries.enumerate().map(|(k, v)| (v * norms[k / dim]).powi(2)).sum::<f64>().sqrt()
    };
    let size = length(&mut want.iter().copied());
    let difference =
        if got.len() == want.len() { length(&mut got.iter().zip(want).map(|(g, w)| g - w)) } else { f64::NAN };
    let worst = worst(got, want, |k| norms[k / dim]);
    Check { output, difference, allowed: relative * size + noise * stretch, size, worst }
}

/// An error that lists every failed check.
pub fn verdict(checks: &[Check]) -> Result<(), String> {
    let failed: Vec<_> = checks.iter().filter(|c| !c.passed()).map(Check::to_string).collect();
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
}
