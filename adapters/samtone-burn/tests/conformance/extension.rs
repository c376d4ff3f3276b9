//! The backend extension on burn's GPU devices, called as generic backend code does. None of burn's own kernels runs, only its memory
//! and its copies: so these also run where burn compiles no kernel, as on samtone's emulated CUDA driver.

use crate::Outcome;
use crate::gradients::{problem, tiled};
use crate::support::case::{Case, Expected, GOLDEN_FILES, files};
use crate::support::compare::{against_definition, verdict};
use crate::support::problem::{Outputs, Problem};
use crate::support::{Form, at_device, burn_dtype};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Cube};
use burn::cubecl::Device;
use burn::cubecl::future::block_on;
use burn::tensor::{DType, TensorData};
use samtone_burn::samtone::Temperature::Fixed;
use samtone_burn::samtone::{self, TemperatureGradient, backend};
use samtone_burn::{Inputs, Loss, Report, Result, SamToNe, SamToNeBackend, Temperature, Wanted, ZeroNorm};
use std::path::Path;

const TYPES: [samtone::DType; 3] = [samtone::DType::F32, samtone::DType::F16, samtone::DType::BF16];
const ALL: Wanted = Wanted { query: true, passage: true, temperature: true };

fn on(device: &Device, values: &[f64], shape: &[usize], dtype: DType) -> FloatTensor<Cube> {
    Cube::float_from_data(TensorData::new(values.to_vec(), shape.to_vec()).convert_dtype(dtype), device)
}

fn numbers(tensor: FloatTensor<Cube>) -> Vec<f64> {
    block_on(Cube::float_into_data(tensor)).unwrap().convert::<f64>().try_to_vec().unwrap()
}

/// Loss, report and the gradients that are wanted.
type Found = (f64, Report, [Option<Vec<f64>>; 3]);

fn call(
    samtone: &SamToNe,
    problem: &Problem,
    temperature: Temperature<FloatTensor<Cube>>,
    device: &Device,
    dtype: DType,
    wanted: Wanted,
) -> Result<Found> {
    let query = on(device, &problem.query, &[problem.rows, problem.dim], dtype);
    let passage = on(device, &problem.passage, &[problem.passages, problem.dim], dtype);
    let outputs = Cube::samtone(samtone, Inputs { query, passage, temperature }, wanted)?;
    let gradients = outputs.gradients.map(|gradient| gradient.map(numbers));
    Ok((numbers(outputs.loss)[0], outputs.report, gradients))
}

/// One problem against `expected`, or the reference if the device rounds what goes in.
fn compare(
    problem: &Problem,
    expected: Option<&Expected>,
    form: Form,
    device: &Device,
    dtype: samtone::DType,
) -> Outcome {
    let name = format!("{} {dtype} {form:?}", problem.name);
    let given = at_device(&problem.rounded(dtype), form, DType::F32);
    let is_same = problem.is_exact_in(dtype) && given.call.temperature() == problem.call.temperature();
    let want = match expected.filter(|_| is_same) {
        Some(expected) => Ok(expected.clone()),
        None => given.run(backend::by_name("reference")?, samtone::DType::F64, 1.0).map(Expected::from),
    };
    let held = on(device, &[form.at(given.call.temperature(), DType::F32).0], &[1], DType::F32);
    let temperature = match form {
        Form::Tau => Temperature::Tau(held),
        Form::LogBeta => Temperature::LogBeta(held),
    };
    let got = call(&SamToNe::new(given.call.clone()), &given, temperature, device, burn_dtype(dtype), ALL);
    let got = got.and_then(|(loss, report, gradients)| report.evaluation().map(|found| (loss, found, gradients)));
    match (got, want) {
        (Ok((loss, evaluation, [Some(grad_query), Some(grad_passage), Some(derivative)])), Ok(want)) => {
            assert!((loss - evaluation.loss).abs() <= 1e-6 * loss.abs(), "the tensor holds {loss}: {evaluation:?}");
            let (tau, derivative) = (given.call.temperature(), derivative[0]);
            let temperature = match form {
                Form::Tau => TemperatureGradient { tau: derivative, log_beta: -tau * derivative },
                Form::LogBeta => TemperatureGradient { tau: -derivative / tau, log_beta: derivative },
            };
            let got = Outputs { evaluation, grad_query, grad_passage, temperature };
            // Gradients come in f32, and are rounded to the embeddings' type by autodiff.
            let checks = against_definition(&got, &want, &given, dtype, 1.0);
            verdict(&checks).map_err(|e| format!("{name}: {e}").into())
        }
        (Err(got), Err(want)) if got == want => Ok(()),
        (got, want) => Err(format!("{name}: {got:?} instead of {:?}", want.err()).into()),
    }
}

fn types(device: &Device) -> Vec<samtone::DType> {
    TYPES.into_iter().filter(|&dtype| Cube::supports_dtype(device, burn_dtype(dtype))).collect()
}

/// Every preset and type, with all masks and none, the temperature in either form.
pub fn presets(device: &Device) -> Outcome {
    for (name, ..) in Loss::PRESETS {
        for masked in [false, true] {
            let problem = problem(Loss::by_name(name)?, masked);
            for dtype in types(device) {
                compare(&problem, None, Form::LogBeta, device, dtype)?;
            }
            compare(&problem, None, Form::Tau, device, samtone::DType::F32)?;
        }
    }
    Ok(())
}

/// Every preset and type, with all masks and none: prefixes that end before the embedding and a weight of 0 among theirs.
pub fn prefixes(device: &Device) -> Outcome {
    for (name, ..) in Loss::PRESETS {
        for masked in [false, true] {
            let problem = problem(Loss::by_name(name)?, masked);
            let problem = problem.with(|call| call.with_prefixes([1, 2, 4]).with_prefix_weights([0.25, 0.0, 2.0]));
            for dtype in types(device) {
                compare(&problem, None, Form::LogBeta, device, dtype)?;
            }
        }
    }
    Ok(())
}

/// The golden files of the main crate, and several tiles and parts of a batch.
pub fn golden(device: &Device) -> Outcome {
    let files = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"))?;
    assert_eq!(files.len(), GOLDEN_FILES);
    for dtype in types(device) {
        for file in &files {
            let Case { problem, expected } = Case::read(file)?;
            compare(&problem, Some(&expected), Form::Tau, device, dtype)?;
        }
        compare(&tiled(), None, Form::LogBeta, device, dtype)?;
    }
    Ok(())
}

/// What is not wanted is not there, and changes nothing else; the same call gives the same bits.
pub fn wanted(device: &Device) -> Outcome {
    let problem = tiled();
    let samtone = SamToNe::new(problem.call.clone());
    let run = |wanted| -> Result<_> {
        let (loss, report, gradients) = call(&samtone, &problem, Fixed, device, DType::F32, wanted)?;
        Ok((loss, report.evaluation()?, gradients))
    };
    let (loss, evaluation, [q, p, t]) = run(ALL)?;
    assert!([&q, &p, &t].iter().all(|x| x.as_ref().is_some_and(|x| x.iter().all(|v| v.is_finite()))));
    assert_eq!(run(ALL)?, (loss, evaluation.clone(), [q.clone(), p.clone(), t.clone()]));
    let of_query = Wanted { query: true, ..Wanted::default() };
    assert_eq!(run(of_query)?, (loss, evaluation.clone(), [q, None, None]));
    let of_passage = Wanted { passage: true, ..Wanted::default() };
    assert_eq!(run(of_passage)?, (loss, evaluation.clone(), [None, p, None]));
    let of_temperature = Wanted { temperature: true, ..Wanted::default() };
    assert_eq!(run(of_temperature)?, (loss, evaluation.clone(), [None, None, t]));
    let (alone, metrics, gradients) = run(Wanted::default())?;
    assert_eq!((alone, metrics, gradients), (loss, evaluation, [None, None, None]));
    Ok(())
}

/// Calls that are refused, the device going on as before.
pub fn refused(device: &Device) -> Outcome {
    let problem = problem(Loss::samtone_query(), false);
    let samtone = SamToNe::new(problem.call.clone());
    let with = |row: usize, value: f64| {
        let mut problem = problem.clone();
        problem.query[row * 5..row * 5 + 5].fill(0.0);
        problem.query[row * 5 + 2] = value;
        problem
    };
    for (problem, samtone, sentence) in [
        (with(3, 0.0), samtone.clone(), "the query embedding in row 3 has norm zero"),
        (with(4, f64::NAN), samtone.clone(), "the query embedding in row 4 contains NaN at column 2"),
        (with(5, f64::INFINITY), samtone.clone(), "the query embedding in row 5 contains inf at column 2"),
        (problem.clone(), samtone.with(|call| call.with_workspace_bytes(1)), "option `workspace_bytes` is 1"),
        (problem.clone(), samtone.with(|call| call.with_margin(f64::NAN)), "argument `margin` is NaN"),
        (
            with(2, 1.0),
            samtone.with(|call| call.with_prefixes([2, 5])),
            "the query embedding in row 2 has norm zero in its first 2 entries",
        ),
        (Problem { passages: 3, ..problem.clone() }, samtone.clone(), "argument `passage` is 3 rows; allowed"),
    ] {
        let mut problem = problem;
        problem.passage.truncate(problem.passages * problem.dim);
        let found = call(&samtone, &problem, Fixed, device, DType::F32, ALL);
        match found.and_then(|(_, report, _)| report.evaluation()) {
            Err(error) if error.to_string().starts_with(sentence) => {}
            other => return Err(format!("{other:?} instead of `{sentence}`").into()),
        }
    }
    if matches!(device, Device::Cuda(_)) {
        let query = on(device, &problem.query, &[problem.rows, problem.dim], DType::F32);
        let passage = on(device, &problem.passage, &[problem.passages, problem.dim], DType::F32);
        let inputs = Inputs { query, passage, temperature: Fixed };
        Cube::graph_prepare(device).map_err(|error| error.to_string())?;
        Cube::graph_start_capture(device).map_err(|error| error.to_string())?;
        let captured = Cube::samtone(&samtone, inputs, ALL);
        Cube::graph_stop_capture(device).map_err(|error| format!("the capture did not survive: {error}"))?;
        let sentence = captured.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(sentence.starts_with("argument `query` is of a stream that is being captured"), "{sentence}");
    }
    let zero = call(
        &samtone.with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient)),
        &with(3, 0.0),
        Fixed,
        device,
        DType::F32,
        ALL,
    )?;
    assert!(zero.0.is_finite());
    compare(&problem, None, Form::Tau, device, samtone::DType::F32)
}

/// Rows that are not contiguous are read where they are: tensors of other threads, too, whose streams are others.
pub fn threads(device: &Device) -> Outcome {
    let problem = tiled();
    let samtone = SamToNe::new(problem.call.clone());
    let want = call(&samtone, &problem, Fixed, device, DType::F32, ALL)?;
    let here = on(device, &problem.query, &[problem.rows, problem.dim], DType::F32);
    let run = || {
        let passage = on(device, &problem.passage, &[problem.passages, problem.dim], DType::F32);
        let inputs = Inputs { query: here.clone(), passage, temperature: Fixed };
        let outputs = Cube::samtone(&samtone, inputs, ALL)?;
        Ok::<_, samtone_burn::Error>((
            numbers(outputs.loss)[0],
            outputs.gradients.map(|gradient| gradient.map(numbers)),
        ))
    };
    let all = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3).map(|_| scope.spawn(run)).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect::<Result<Vec<_>>>()
    })?;
    assert!(all.iter().all(|(loss, gradients)| (loss, gradients) == (&want.0, &want.2)));
    Ok(())
}

/// Two clusters, far from each other at this τ: only CUDA's kernels skip the cosines that they have in common. Query i's gradient is
/// then off by at most ηβ/M per unit of its norm (docs/skipping.md), and everything but the gradients keeps its bits.
pub fn skipping(device: &Device) -> Outcome {
    const CLUSTER: usize = 64;
    const SHARE: f64 = 0.5;
    let (rows, dim, tau) = (2 * CLUSTER, 5, 0.2);
    let clustered = |frequency: f64| {
        let centre = |row: usize, column: usize| if column == row / CLUSTER { 2.0 } else { 0.0 };
        let at = |i: usize| centre(i / dim, i % dim) + 0.3 * ((i as f64 * frequency + 0.3).sin() + 0.1);
        (0..rows * dim).map(|i| f64::from(at(i) as f32)).collect::<Vec<_>>()
    };
    let (query, passage) = (clustered(0.7), clustered(0.9));
    let problem = Problem {
        rows,
        passages: rows,
        query,
        passage,
        ..problem(Loss::info_nce(), false).with(|call| call.with_temperature(tau))
    };
    let run = |samtone: SamToNe| -> Result<_> {
        let (loss, report, gradients) = call(&samtone, &problem, Fixed, device, DType::F32, ALL)?;
        Ok((loss, report.evaluation()?, gradients.map(Option::unwrap_or_default)))
    };
    let samtone = SamToNe::new(problem.call.clone());
    let (want, got) = (run(samtone.clone())?, run(samtone.with(|call| call.with_tile_skipping(SHARE)))?);
    assert_eq!((&got.0, &got.1), (&want.0, &want.1));
    let [dq, dp, _] = &want.2;
    let is_same = (&got.2[0], &got.2[1]) == (dq, dp);
    assert_eq!(is_same, !matches!(device, Device::Cuda(_)), "whether nothing is skipped");
    let norm = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
    for (row, query) in problem.query.chunks(dim).enumerate() {
        let of_row = row * dim..(row + 1) * dim;
        let off: Vec<f64> = got.2[0][of_row.clone()].iter().zip(&dq[of_row]).map(|(g, w)| g - w).collect();
        let off = norm(query) * norm(&off) * tau * rows as f64;
        assert!(off <= SHARE + 1e-4, "row {row} is off by {off}");
    }
    Ok(())
}
