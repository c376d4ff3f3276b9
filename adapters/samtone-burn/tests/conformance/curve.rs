//! The example's training follows the curve that every framework must follow, which float64 PyTorch gave without samtone.

#[path = "../../examples/train.rs"]
#[allow(dead_code)]
mod example;

use crate::Outcome;
use burn::tensor::Device;
use libtest_mimic::Failed;
use samtone_burn::Call;
use serde::Deserialize;
use std::path::Path;

/// f32 drifts from float64 by 1e-5 in these 60 steps; a wrong mask, sign or factor shows in the first ones.
const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Curve {
    loss: Vec<f64>,
    log_beta: f64,
}

/// What the second training has besides.
#[derive(Deserialize)]
struct Prefixes {
    prefixes: Vec<usize>,
    prefix_weights: Vec<f64>,
    prefix_losses: Vec<Vec<f64>>,
}

fn read<T: for<'de> Deserialize<'de>>(name: &str) -> Result<T, Failed> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dual-encoder").join(name);
    let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(serde_json::from_str(&text)?)
}

fn compare(device: &Device, call: Call, curve: &str) -> Result<Vec<example::Step>, Failed> {
    let want: Curve = read(curve)?;
    let (steps, log_beta) = example::train(device, call).map_err(|error| error.to_string())?;
    assert_eq!((steps.len(), want.loss.len()), (60, 60));
    for (step, (got, want)) in steps.iter().zip(&want.loss).enumerate() {
        assert!((got.loss - want).abs() <= TOLERANCE * want, "step {step}: {} instead of {want}", got.loss);
    }
    assert!((log_beta - want.log_beta).abs() <= TOLERANCE, "log beta {log_beta} instead of {}", want.log_beta);
    Ok(steps)
}

pub fn follows(device: &Device) -> Outcome {
    let steps = compare(device, example::call(), "curve.json")?;
    assert!(steps.iter().all(|step| step.prefixes.is_empty()));
    Ok(())
}

pub fn with_prefixes(device: &Device) -> Outcome {
    let with: Prefixes = read("curve_prefixes.json")?;
    let call = example::call().with_prefixes(with.prefixes).with_prefix_weights(with.prefix_weights);
    let steps = compare(device, call, "curve_prefixes.json")?;
    assert_eq!(steps.len(), with.prefix_losses.len());
    for (step, (got, want)) in steps.iter().zip(&with.prefix_losses).enumerate() {
        assert_eq!(got.prefixes.len(), want.len());
        for (k, (got, want)) in got.prefixes.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= TOLERANCE * want, "step {step}, prefix {k}: {got} instead of {want}");
        }
    }
    Ok(())
}
