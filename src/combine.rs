//! The O(M) step between the two heavy passes: partial sums → loss, metrics and the coefficients of the gradient.
//!
//! With the logarithm of the negatives relative to the positive, log D_gi = log Σ_b Σ_j exp(β (s^b_ij − s⁺ᵢ)),
//!
//! ```text
//! ℓ_gi − β s⁺ᵢ = log(e_g + D_gi)
//! diagonal      D_i = −Σ_g c_g w̃ᵢ D_gi / (e_g + D_gi)
//! block b       log a^b_i = log Σ_{g∋b} c_g w̃ᵢ exp(−ℓ_gi)
//! ```
//!
//! Everything is f64 and in the log domain: at τ = 0.01 both D and exp(−ℓ) leave the range of f32 on ordinary data.

use crate::call::NoNegative;
use crate::error::{Error, Result};
use crate::loss::{Block, Loss};
use crate::output::{Evaluation, Metrics};
use crate::partials::{Partials, PrefixSums};
use crate::prefix::Prefix;

/// Inputs of the step that its prefixes share.
pub(crate) struct Rows<'a> {
    pub loss: &'a Loss,
    pub beta: f64,
    /// w̃ᵢ.
    pub weight: &'a [f64],
    /// What a row without any term in its softmax gives.
    pub no_negative: NoNegative,
    pub prefixes: &'a [Prefix],
    /// Whether the call names prefixes.
    pub named: bool,
}

/// Outputs of the step.
#[derive(Debug, Clone)]
pub(crate) struct Combined {
    pub evaluation: Evaluation,
    /// Coefficients of each prefix, times its weight.
    pub prefixes: Vec<Derivatives>,
    /// The largest log of a row's share of the gradient in one block and prefix, max log(v a^b_i Σ_j exp(β s^b_ij)), in nats; −∞ if there
    /// is no negative at all. On well-trained towers it lies far below f32's range, so backends divide it out.
    pub log_magnitude: f64,
}

/// What the gradient of a prefix is made from, times the weight v of the prefix.
#[derive(Debug, Clone)]
pub(crate) struct Derivatives {
    /// log(v a^b_i) in nats, by block; −∞ where the row contributes nothing. Empty for an unused block.
    pub log_coefficients: [Vec<f64>; 4],
    /// v D_i, the derivative of the loss with respect to β s⁺ᵢ.
    pub diagonal: Vec<f64>,
    /// v (D_i + Σ_b Σ_j exp(β s^b_ij) a^b_i) s⁺ᵢ, where b are the blocks whose anchor is the query (first), or the positive (second): what
    /// the row adds to x̂·∂L/∂x̂ of that embedding beside Σ G (s − s⁺) over its negatives. Empty for a
    /// single prefix, of which nobody needs it.
    pub radial: [Vec<f64>; 2],
}

/// log Σ exp; −∞ for no terms.
fn log_sum_exp(terms: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + terms.map(|t| (t - max).exp()).sum::<f64>().ln() }
}

/// log(e + exp(x)).
fn log_add(e: f64, x: f64) -> f64 {
    if e == 0.0 {
        return x;
    }
    let y = x - e.ln();
    e.ln() + if y > 0.0 { y + (-y).exp().ln_1p() } else { y.exp().ln_1p() }
}

/// The step, for all prefixes. A row without any negative is named with its prefix if the call names prefixes.
pub(crate) fn combine(rows: &Rows<'_>, partials: &Partials) -> Result<Combined> {
    partials.expect_complete()?;
    let (mut evaluations, mut derivatives, mut log_magnitude) = (Vec::new(), Vec::new(), f64::NEG_INFINITY);
    for (prefix, sums) in rows.prefixes.iter().zip(&partials.prefixes) {
        let (evaluation, of_prefix) = one_prefix(rows, prefix, sums)?;
        let shares = of_prefix.log_coefficients.iter().zip(&sums.sums).flat_map(|(a, sums)| a.iter().zip(sums));
        log_magnitude = shares.map(|(a, sum)| a + sum.ln()).fold(log_magnitude, f64::max);
        evaluations.push(evaluation);
        derivatives.push(of_prefix);
    }
    let evaluation = Evaluation::of_prefixes(evaluations, rows.prefixes, rows.named);
    Ok(Combined { evaluation, prefixes: derivatives, log_magnitude })
}

fn one_prefix(rows: &Rows<'_>, prefix: &Prefix, partials: &PrefixSums) -> Result<(Evaluation, Derivatives)> {
    let m = rows.weight.len();
    let mut row_losses = vec![0.0; m];
    let mut diagonal = vec![0.0; m];
    let mut log_coefficients =
        Block::ALL.map(|b| if rows.loss.uses(b) { vec![f64::NEG_INFINITY; m] } else { Vec::new() });
    for i in 0..m {
        let (positive, weight) = (rows.beta * partials.positive[i], rows.weight[i]);
        for (g, group) in rows.loss.groups().iter().enumerate().filter(|(_, g)| g.coefficient() > 0.0) {
            let e = f64::from(group.positive_copies());
            let log_d = log_sum_exp(group.blocks().iter().map(|b| partials.sums[b.index()][i].ln() - positive));
            if e == 0.0 && log_d == f64::NEG_INFINITY {
                if weight == 0.0 || rows.no_negative == NoNegative::Zero {
                    continue;
                }
                let prefix = rows.named.then_some(prefix.dim);
                return Err(Error::NoNegative { loss: rows.loss.name().into(), group: g, row: i, prefix });
            }
            let relative = log_add(e, log_d);
            row_losses[i] += group.coefficient() * relative;
            if weight == 0.0 {
                continue;
            }
            let factor = prefix.weight * (group.coefficient() * weight);
            diagonal[i] -= factor * (log_d - relative).exp();
            let log_coefficient = factor.ln() - relative - positive;
            for b in group.blocks() {
                let a = &mut log_coefficients[b.index()][i];
                *a = log_sum_exp([*a, log_coefficient].into_iter());
            }
        }
    }
    let share = |b: Block, i: usize| match log_coefficients[b.index()].get(i) {
        Some(log) => (log + partials.sums[b.index()][i].ln()).exp(),
        None => 0.0,
    };
    // D_i is minus the sum of all shares. So D_i with the shares of two blocks is minus the shares of the other two. As a sum of these it
    // keeps its digits, which a difference would lose.
    let radial = [[Block::PQ, Block::PP], [Block::QP, Block::QQ]].map(|others| {
        let left = |i: usize| -(share(others[0], i) + share(others[1], i)) * partials.positive[i];
        if rows.prefixes.len() > 1 { (0..m).map(left).collect() } else { Vec::new() }
    });
    let loss = row_losses.iter().zip(rows.weight).map(|(l, w)| l * w).sum();
    let evaluation = Evaluation::plain(loss, row_losses, [0, 1].map(|k| metrics(&partials.above[k], rows.weight)));
    Ok((evaluation, Derivatives { log_coefficients, diagonal, radial }))
}

fn metrics(above: &[u32], weight: &[f64]) -> Metrics {
    let sum = |f: fn(u32) -> f64| above.iter().zip(weight).map(|(&a, w)| w * f(a)).sum();
    Metrics::from_sums(sum(|a| f64::from(u8::from(a == 0))), sum(|a| 1.0 / (1.0 + f64::from(a))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_add_survives_both_ends() {
        assert_eq!(log_add(1.0, f64::NEG_INFINITY), 0.0);
        assert_eq!(log_add(2.0, f64::NEG_INFINITY), 2_f64.ln());
        assert_eq!(log_add(1.0, 2000.0), 2000.0);
        assert_eq!(log_add(0.0, -3.0), -3.0);
        // log1p keeps what log(1 + D) would round away.
        assert_eq!(log_add(1.0, -60.0), (-60_f64).exp());
    }
}
