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
use crate::partials::Partials;

/// Inputs of the step, one entry for each row.
pub(crate) struct Rows<'a> {
    /// β s⁺ᵢ.
    pub positive_logit: &'a [f64],
    /// w̃ᵢ.
    pub weight: &'a [f64],
    /// What a row without any term in its softmax gives.
    pub no_negative: NoNegative,
}

/// Outputs of the step.
#[derive(Debug, Clone)]
pub(crate) struct Combined {
    pub evaluation: Evaluation,
    /// log a^b_i in nats, by block; −∞ where the row contributes nothing. Empty for an unused block.
    pub log_coefficients: [Vec<f64>; 4],
    /// D_i, the derivative of the loss with respect to β s⁺ᵢ.
    pub diagonal: Vec<f64>,
    /// The largest log of a row's share of the gradient in one block, max log(a^b_i Σ_j exp(β s^b_ij)), in nats; −∞ if there
    /// is no negative at all. On well-trained towers it lies far below f32's range, so backends divide it out.
    pub log_magnitude: f64,
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

pub(crate) fn combine(loss: &Loss, rows: &Rows<'_>, partials: &Partials) -> Result<Combined> {
    partials.expect_complete()?;
    let m = partials.rows;
    let mut row_losses = vec![0.0; m];
    let mut diagonal = vec![0.0; m];
    let mut log_coefficients = Block::ALL.map(|b| if loss.uses(b) { vec![f64::NEG_INFINITY; m] } else { Vec::new() });
    for i in 0..m {
        let (positive, weight) = (rows.positive_logit[i], rows.weight[i]);
        for (g, group) in loss.groups().iter().enumerate().filter(|(_, g)| g.coefficient() > 0.0) {
            let e = f64::from(group.positive_copies());
            let log_d = log_sum_exp(group.blocks().iter().map(|b| partials.sums[b.index()][i].ln() - positive));
            if e == 0.0 && log_d == f64::NEG_INFINITY {
                if weight == 0.0 || rows.no_negative == NoNegative::Zero {
                    continue;
                }
                return Err(Error::NoNegative { loss: loss.name().into(), group: g, row: i });
            }
            let relative = log_add(e, log_d);
            row_losses[i] += group.coefficient() * relative;
            if weight == 0.0 {
                continue;
            }
            diagonal[i] -= group.coefficient() * weight * (log_d - relative).exp();
            let log_coefficient = (group.coefficient() * weight).ln() - relative - positive;
            for b in group.blocks() {
                let a = &mut log_coefficients[b.index()][i];
                *a = log_sum_exp([*a, log_coefficient].into_iter());
            }
        }
    }
    let shares = log_coefficients.iter().zip(&partials.sums).flat_map(|(a, sums)| a.iter().zip(sums));
    let log_magnitude = shares.map(|(a, sum)| a + sum.ln()).fold(f64::NEG_INFINITY, f64::max);
    let loss = row_losses.iter().zip(rows.weight).map(|(l, w)| l * w).sum();
    let [query_to_passage, passage_to_query] = [0, 1].map(|k| metrics(&partials.above[k], rows.weight));
    Ok(Combined {
        evaluation: Evaluation { loss, row_losses, query_to_passage, passage_to_query },
        log_coefficients,
        diagonal,
        log_magnitude,
    })
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
