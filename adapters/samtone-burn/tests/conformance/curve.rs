//! The example's training follows the curve that every framework must follow, which float64 PyTorch gave without samtone.

#[path = "../../examples/train.rs"]
#[allow(dead_code)]
mod example;

use crate::Outcome;
use burn::tensor::Device;
use serde::Deserialize;
use std::path::Path;

/// f32 drifts from float64 by 1e-5 in these 60 steps; a wrong mask, sign or factor shows in the first ones.
const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Curve {
    loss: Vec<f64>,
    log_beta: f64,
}

pub fn follows(device: &Device) -> Outcome {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dual-encoder/curve.json");
    let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let want: Curve = serde_json::from_str(&text)?;
    let (loss, log_beta) = example::train(device).map_err(|error| error.to_string())?;
    assert_eq!(loss.len(), want.loss.len());
    for (step, (got, want)) in loss.iter().zip(&want.loss).enumerate() {
        assert!((got - want).abs() <= TOLERANCE * want, "step {step}: {got} instead of {want}");
    }
    assert!((log_beta - want.log_beta).abs() <= TOLERANCE, "log beta {log_beta} instead of {}", want.log_beta);
    Ok(())
}
