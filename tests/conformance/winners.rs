//! Batches in which every positive wins. P@1 and MRR are exactly 1 there, whatever rounding does to the sum of the weights.

use super::{Case, Make};
use crate::support::data::{Kind, problem};
use samtone::Loss;
use std::sync::Arc;

pub fn cases() -> Result<Vec<Case>, String> {
    // Numbers of rows whose weights miss 1 when they are added one after the other, and when they are added as the kernels of CUDA do,
    // which have a block for each 64 of them.
    let shapes = [(9, 12, 16), (69, 75, 72), (90, 90, 96)];
    let losses = [Loss::samtone_both(), Loss::bidirectional(), Loss::gte()];
    let case = |((m, n, d), loss): ((usize, usize, usize), Loss)| {
        let name = format!("every positive wins, {} {:?}, weights 0.1, 0.2, 0.7, 0", loss.name(), (m, n, d));
        let make: Make = Arc::new(move |_, more| {
            let mut problem =
                problem(loss.clone(), Kind::Random, (m, n, d), 0.05, 7000 + more, 0.0).map_err(|e| e.to_string())?;
            // Row k of a tower points along axis k, and a little to the side.
            for tower in [&mut problem.query, &mut problem.passage] {
                for (k, x) in tower.iter_mut().enumerate() {
                    *x = 0.01 * *x + if k % d == k / d { 1.0 } else { 0.0 };
                }
            }
            let weights: Vec<f32> = (0..m).map(|i| [0.1, 0.2, 0.7, 0.0][i % 4]).collect();
            let problem = problem.with(|call| call.with_weights(weights));
            let sum: f64 = problem.normalized_weights().iter().sum();
            if sum == 1.0 {
                return Err(format!("the weights of {m} rows sum to 1, which shows nothing"));
            }
            Ok(problem)
        });
        Case { name, upstream: 1.0, make, in_turn: false }
    };
    Ok(shapes.into_iter().zip(losses).map(case).collect())
}
