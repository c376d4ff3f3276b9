//! Loss, metrics and gradients by burn's autodiff against the definition in f64.

use crate::Outcome;
use crate::support::case::{Case, Expected, GOLDEN_FILES, files};
use crate::support::compare::{against_definition, verdict};
use crate::support::problem::Problem;
use crate::support::{Form, at_device, burn_dtype, rounded, run, temperature_dtype};
use burn::tensor::Device;
use samtone_burn::samtone::{DType, backend};
use samtone_burn::{Call, Loss, Scope};
use std::path::Path;

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn wave(len: usize, frequency: f64) -> Vec<f64> {
    (0..len).map(|i| (i as f64 * frequency + 0.3).sin() + 0.1).collect()
}

/// 6 queries and 9 passages, with every kind of mask or none.
pub fn problem(loss: Loss, masked: bool) -> Problem {
    let (rows, passages, dim) = (6, 9, 5);
    // Without masks there is no margin either, also where the preset has one.
    let mut call = Call::new(loss, 0.1).with_margin(f64::INFINITY);
    if masked {
        call = call.with_positives([0, 1, 2, 3, 4, 4]).with_weights([1.0, 0.5, 2.0, 0.0, 1.0, 1.0]);
        call = call.with_query_ids([1, 2, 1, 4, 5, 6]).with_passage_ids([1, 2, 3, 4, 2, 6, 7, 8, 9]);
        call = call.with_shared_ids(true).with_margin(0.4).with_workspace_bytes(64 << 20);
        call = call.with_hard_negative_owners([-1, -1, -1, -1, -1, -1, 0, 3, -1], Scope::Own);
    }
    Problem {
        name: format!("{}{}", call.loss().name(), if masked { ", masked" } else { "" }),
        call,
        rows,
        passages,
        dim,
        query: wave(rows * dim, 0.7),
        passage: wave(passages * dim, 0.9),
    }
}

/// One problem on the device against `expected`, or the reference if the device rounds what went in.
fn compare(
    problem: &Problem,
    expected: Option<&Expected>,
    form: Form,
    device: &Device,
    dtype: DType,
    upstream: f64,
) -> Outcome {
    let name = format!("{} {dtype} {form:?}", problem.name);
    let given = at_device(&problem.rounded(dtype), form, temperature_dtype(device));
    let is_same = problem.is_exact_in(dtype) && given.call.temperature() == problem.call.temperature();
    let want = match expected.filter(|_| is_same) {
        Some(expected) => Ok(expected.clone()),
        None => given.run(backend::by_name("reference")?, DType::F64, upstream).map(Expected::from),
    };
    let got = run(&given, form, device, burn_dtype(dtype), upstream);
    match (got, want) {
        (Ok(got), Ok(want)) => {
            let checks = against_definition(&got, &want, &given, dtype, upstream);
            verdict(&rounded(checks, &given, burn_dtype(dtype))).map_err(|e| format!("{name}: {e}").into())
        }
        (Err(got), Err(want)) if got == want => Ok(()),
        (got, want) => Err(format!("{name}: {:?} instead of {:?}", got.err(), want.err()).into()),
    }
}

fn types(device: &Device) -> impl Iterator<Item = DType> {
    TYPES.into_iter().filter(|&dtype| device.supports_dtype(burn_dtype(dtype)))
}

/// Every preset and type, all masks, an upstream factor, a tensor for either form of the temperature.
pub fn presets(device: &Device) -> Outcome {
    for (name, ..) in Loss::PRESETS {
        for masked in [false, true] {
            let problem = problem(Loss::by_name(name)?, masked);
            for dtype in types(device) {
                compare(&problem, None, Form::LogBeta, device, dtype, 3.0)?;
            }
            compare(&problem, None, Form::Tau, device, DType::F32, 3.0)?;
        }
    }
    Ok(())
}

/// Every preset and type, with all masks and none: prefixes that end before the embedding and a weight of 0 among theirs. Behind the last
/// prefix gradients are 0.
pub fn prefixes(device: &Device) -> Outcome {
    let prefixes = |call: Call| call.with_prefixes([1, 2, 4]).with_prefix_weights([0.25, 0.0, 2.0]);
    for (name, ..) in Loss::PRESETS {
        for masked in [false, true] {
            let problem = problem(Loss::by_name(name)?, masked).with(prefixes);
            for dtype in types(device) {
                compare(&problem, None, Form::LogBeta, device, dtype, 3.0)?;
            }
        }
    }
    let problem = problem(Loss::samtone_both(), true).with(prefixes);
    for dtype in types(device) {
        let got = run(&problem.rounded(dtype), Form::Tau, device, burn_dtype(dtype), 3.0)?;
        let of = got.evaluation.prefixes.iter().map(|prefix| (prefix.dim, prefix.weight));
        assert_eq!(of.collect::<Vec<_>>(), [(1, 0.25), (4, 2.0)]);
        for row in got.grad_query.chunks(problem.dim).chain(got.grad_passage.chunks(problem.dim)) {
            assert_eq!(row[4], 0.0);
        }
    }
    Ok(())
}

/// The golden files of the main crate, in every type that the device has.
pub fn golden(device: &Device) -> Outcome {
    let files = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"))?;
    if files.len() != GOLDEN_FILES {
        return Err(format!("{} golden files instead of {GOLDEN_FILES}", files.len()).into());
    }
    for file in files {
        let Case { problem, expected } = Case::read(&file)?;
        for dtype in types(device) {
            compare(&problem, Some(&expected), Form::Tau, device, dtype, 1.0)?;
        }
    }
    Ok(())
}

/// Several tiles and, by a tight bound, several parts of the batch; passages repeat.
pub fn tiled() -> Problem {
    let (rows, passages, dim) = (150, 170, 24);
    let scattered = |len: usize, seed: f64| (0..len).map(|i| ((i * i) as f64 * seed).sin()).collect::<Vec<f64>>();
    let ids: Vec<i64> = (0..passages as i64).map(|n| n % 160).collect();
    Problem {
        name: "tiles".into(),
        call: Call::new(Loss::samtone_both(), 0.05).with_passage_ids(ids).with_workspace_bytes(600_000),
        rows,
        passages,
        dim,
        query: scattered(rows * dim, 0.7),
        passage: scattered(passages * dim, 1.1),
    }
}

pub fn tiles(device: &Device) -> Outcome {
    let problem = tiled();
    for dtype in types(device) {
        compare(&problem, None, Form::LogBeta, device, dtype, 0.5)?;
    }
    Ok(())
}
