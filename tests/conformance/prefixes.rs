//! Losses of Matryoshka prefixes, on every kind of data, with every option, and at the edges of what a prefix may be.

use super::support::data::problem;
use super::support::problem::Problem;
use super::{Case, Kind, Make, OPTIONS, decades, losses, with_option};
use samtone::{Loss, ZeroNorm};
use std::sync::Arc;

/// A case on `shape` = M × N × d, with prefixes that end at `dims`.
fn case(loss: &Loss, kind: Kind, shape: (usize, usize, usize), tau: f64, dims: &[usize], more: (&str, u64)) -> Case {
    let (change, seed) = (more.0.to_string(), more.1);
    let (loss, dims) = (loss.clone(), dims.to_vec());
    let name = format!("prefixes {dims:?} of {} {} {shape:?} τ={tau} {change}", loss.name(), kind.name());
    let make: Make = Arc::new(move |dtype, attempt| {
        // Prefixes multiply what a gradient may reach, so norms spread less.
        let decades = decades(dtype) / 2.0;
        let made = problem(loss.clone(), kind, shape, tau, seed + attempt, decades).map_err(|e| e.to_string())?;
        let made = made.with(|call| call.with_prefixes(dims.clone()));
        match change.as_str() {
            "" => Ok(made),
            option if OPTIONS.contains(&option) => with_option(option, made),
            other => changed(other, made),
        }
    });
    Case { name, upstream: [1.0, -0.5, 64.0][seed as usize % 3], make, in_turn: true }
}

fn changed(change: &str, mut made: Problem) -> Result<Problem, String> {
    let (d, prefixes) = (made.dim, made.call.prefixes().map_or(0, <[usize]>::len));
    Ok(match change {
        "weights" => {
            let weight = |k: usize| [0.25, 3.0, 0.0, 1.0][k % 4];
            made.with(|call| call.with_prefix_weights((0..prefixes).map(weight).collect::<Vec<_>>()))
        }
        "stored in part" => made.with(|call| call.with_workspace_bytes(300 << 10)),
        "zeros in front" => {
            made.query[..2].fill(0.0);
            made.passage[2 * d..2 * d + 5].fill(0.0);
            made.passage[3 * d..4 * d].fill(0.0);
            made.with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient))
        }
        "an error for zeros in front" => {
            made.passage[2 * d..2 * d + 5].fill(0.0);
            made
        }
        "garbage behind the last" => {
            let behind = made.call.prefixes().and_then(|dims| dims.last().copied()).unwrap_or(d);
            for row in made.query.chunks_mut(d).chain(made.passage.chunks_mut(d)) {
                row[behind..].fill(60_000.0);
            }
            made
        }
        _ => return Err(format!("no change `{change}`")),
    })
}

pub fn cases() -> Result<Vec<Case>, String> {
    let mut cases = Vec::new();
    let losses = losses()?;
    let ladders: [&[usize]; 4] = [&[4, 8, 16, 24], &[1, 2, 24], &[5, 17, 23], &[24]];
    let mut seed = 0;
    for kind in Kind::ALL {
        for loss in &losses {
            let tau = [0.01, 0.05, 0.2][seed % 3];
            cases.push(case(loss, kind, (13, 19, 24), tau, ladders[seed % ladders.len()], ("", seed as u64)));
            seed += 1;
        }
    }
    for (k, option) in OPTIONS.iter().enumerate() {
        // Prefixes decide margins and ties apart, so a problem in which all are decided needs few rows and prefixes.
        let kind = if option.contains("duplicates") { Kind::Duplicates } else { Kind::Random };
        for loss in [Loss::samtone_both(), Loss::gte()] {
            cases.push(case(&loss, kind, (11, 17, 12), 0.05, &[5, 12], (option, 100 + k as u64)));
        }
    }
    let changes = ["weights", "zeros in front", "an error for zeros in front", "garbage behind the last"];
    for (k, change) in changes.into_iter().enumerate() {
        cases.push(case(
            &Loss::samtone_both(),
            Kind::Random,
            (9, 12, 16),
            0.05,
            &[5, 6, 9, 11],
            (change, 200 + k as u64),
        ));
    }
    let every: Vec<usize> = (1..=40).collect();
    let shapes = [
        ((33, 47, 40), every.as_slice(), ""),
        ((70, 90, 700), &[64, 128, 256, 512, 700], ""),
        ((300, 421, 30), &[7, 16, 30], ""),
        ((300, 421, 30), &[7, 16, 30], "stored in part"),
        ((40, 50, 1100), &[1100], ""),
    ];
    for (k, (shape, dims, change)) in shapes.into_iter().enumerate() {
        // In a cone every one of so many rows would be near some tie.
        let hard = if shape.0 < 300 { Kind::Anisotropic } else { Kind::Random };
        for (tau, kind) in [(0.01, hard), (0.02, Kind::Trained)] {
            let more = (change, 300 + k as u64);
            cases.push(case(&Loss::samtone_both(), kind, shape, tau, dims, more));
        }
    }
    Ok(cases)
}
