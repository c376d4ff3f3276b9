//! Tensors on a CUDA device against the same on the CPU. Without a device every test says that it is skipped, and fails if the variable
//! `SAMTONE_REQUIRE` names `cuda`.
#![cfg(feature = "cuda")]

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use samtone_candle::samtone::Temperature::Fixed;
use samtone_candle::{Call, Loss, SamToNe, Scope, Temperature, ZeroNorm};

const ROWS: usize = 6;
const PASSAGES: usize = 9;
const DIM: usize = 5;
const TAU: f64 = 0.1;

fn device() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var("SAMTONE_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name.trim() == "cuda"), "it is required, but {error}");
            eprintln!("SKIPPED, no CUDA device: {error}");
            None
        }
    }
}

fn wave(rows: usize, dim: usize, frequency: f32) -> Tensor {
    let values: Vec<f32> = (0..rows * dim).map(|i| (i as f32 * frequency + 0.3).sin() + 0.1).collect();
    Tensor::from_vec(values, (rows, dim), &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    // Rounded types are widened on the CPU, so that the comparison owes nothing to the device.
    let tensor = tensor.to_device(&Device::Cpu).unwrap();
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let (off, size) = (norm(&mut got.iter().zip(want).map(|(g, w)| g - w)), norm(&mut want.iter().copied()));
    assert!(off <= tolerance * size + 1e-7, "{what}: off by {off:e} of {size:e}");
}

fn var(tensor: &Tensor, device: &Device) -> Var {
    Var::from_tensor(&tensor.to_device(device).unwrap()).unwrap()
}

fn op(loss: Loss) -> SamToNe {
    SamToNe::new(Call::new(loss, TAU))
}

fn masked(call: Call) -> Call {
    call.with_query_ids([1, 2, 1, 4, 5, 6])
        .with_passage_ids([1, 2, 3, 4, 2, 6, 7, 8, 9])
        .with_shared_ids(true)
        .with_positives([0, 1, 2, 3, 4, 4])
        .with_weights([1.0, 0.5, 2.0, 0.0, 1.0, 1.0])
        .with_hard_negative_owners([-1, -1, -1, -1, -1, -1, 0, 3, -1], Scope::Own)
        .with_margin(0.4)
}

fn of(gradients: &GradStore, var: &Var) -> Vec<f64> {
    let gradient = gradients.get(var).unwrap();
    assert_eq!((gradient.dtype(), gradient.dims()), (var.dtype(), var.dims()));
    assert!(gradient.device().same_device(var.device()));
    numbers(gradient)
}

/// Every preset and type, all masks, an upstream factor, both forms of the temperature on either device.
#[test]
fn gradients_are_those_of_the_cpu() -> Result<()> {
    let Some(cuda) = device() else { return Ok(()) };
    for (name, ..) in Loss::PRESETS {
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
            for mask in [false, true] {
                let what = format!("{name}, {dtype:?}, masks: {mask}");
                // Without masks there is no margin either, also where the preset has one.
                let plain = op(Loss::by_name(name).unwrap()).with(|call| call.with_margin(f64::INFINITY));
                let op = if mask { plain.with(masked) } else { plain };
                let [q, p] = [wave(ROWS, DIM, 0.7).to_dtype(dtype)?, wave(PASSAGES, DIM, 0.9).to_dtype(dtype)?];
                for log in [false, true] {
                    let value = Tensor::new(&[if log { -TAU.ln() } else { TAU }], &Device::Cpu)?;
                    let run = |towers: &Device, temperature: &Device| -> Result<[Vec<f64>; 4]> {
                        let (q, p, t) = (var(&q, towers), var(&p, towers), var(&value, temperature));
                        let held = if log { Temperature::LogBeta(&t) } else { Temperature::Tau(&t) };
                        let loss = op.forward(&q, &p, held)?;
                        assert!(loss.device().same_device(towers) && loss.dtype() == DType::F32);
                        let gradients = (&loss * 3.0)?.backward()?;
                        Ok([numbers(&loss), of(&gradients, &q), of(&gradients, &p), of(&gradients, &t)])
                    };
                    let want = match run(&Device::Cpu, &Device::Cpu) {
                        Ok(want) => want,
                        Err(_) => continue, // a row without any negative
                    };
                    for temperature in [&Device::Cpu, &cuda] {
                        let got = run(&cuda, temperature)?;
                        let tolerances = [1e-5, tolerance, tolerance, 1e-3];
                        for ((got, want), tolerance) in got.iter().zip(&want).zip(tolerances) {
                            assert_close(got, want, tolerance, &what);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// Results and gradients of prefixes that end before the embedding, a weight of 0 among theirs, with all masks and none.
#[test]
fn prefixes_are_those_of_the_cpu() -> Result<()> {
    let Some(cuda) = device() else { return Ok(()) };
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
        for mask in [false, true] {
            let what = format!("{dtype:?}, masks: {mask}");
            let plain = op(Loss::samtone_both());
            let op = if mask { plain.with(masked) } else { plain };
            let op = op.with(|call| call.with_prefixes([1, 2, 4]).with_prefix_weights([0.25, 0.0, 2.0]));
            let [q, p] = [wave(ROWS, DIM, 0.7).to_dtype(dtype)?, wave(PASSAGES, DIM, 0.9).to_dtype(dtype)?];
            let run = |device: &Device| -> Result<_> {
                let (q, p, t) = (var(&q, device), var(&p, device), Var::new(TAU, device)?);
                let (loss, evaluation) = op.forward_with_metrics(&q, &p, Temperature::Tau(&t))?;
                let gradients = (&loss * 3.0)?.backward()?;
                Ok((evaluation, [numbers(&loss), of(&gradients, &q), of(&gradients, &p), of(&gradients, &t)]))
            };
            let ((want, want_numbers), (got, got_numbers)) = (run(&Device::Cpu)?, run(&cuda)?);
            assert_close(&got.row_losses, &want.row_losses, 1e-5, &what);
            assert_eq!(got.prefixes.iter().map(|x| (x.dim, x.weight)).collect::<Vec<_>>(), [(1, 0.25), (4, 2.0)]);
            for (got, want) in got.prefixes.iter().zip(&want.prefixes) {
                assert_close(&[got.loss], &[want.loss], 1e-5, &what);
                assert_eq!(got.query_to_passage, want.query_to_passage, "{what}");
                assert_eq!(got.passage_to_query, want.passage_to_query, "{what}");
            }
            for ((got, want), tolerance) in
                got_numbers.iter().zip(&want_numbers).zip([1e-5, tolerance, tolerance, 1e-3])
            {
                assert_close(got, want, tolerance, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn strided_and_transposed_inputs_give_the_same_gradients() -> Result<()> {
    let Some(cuda) = device() else { return Ok(()) };
    let op = op(Loss::samtone_both());
    let (wide, tall) = (var(&wave(ROWS, 8, 0.7), &cuda), var(&wave(DIM, PASSAGES, 0.9), &cuda));
    let (q, p) = (wide.narrow(1, 2, DIM)?, tall.t()?);
    let strided = op.forward(&q, &p, Fixed)?.backward()?;
    let (q, p) = (Var::from_tensor(&q.contiguous()?)?, Var::from_tensor(&p.contiguous()?)?);
    let plain = op.forward(&q, &p, Fixed)?.backward()?;
    let got = strided.get(&wide).unwrap().narrow(1, 2, DIM)?;
    assert_eq!(numbers(&got), of(&plain, &q));
    assert_eq!(numbers(&strided.get(&tall).unwrap().t()?), of(&plain, &p));
    Ok(())
}

#[test]
fn metrics_are_those_of_the_cpu_and_frozen_arguments_get_no_gradient() -> Result<()> {
    let Some(cuda) = device() else { return Ok(()) };
    let op = op(Loss::samtone_both()).with(masked);
    let [q, p] = [wave(ROWS, DIM, 0.7), wave(PASSAGES, DIM, 0.9)];
    let want = op.evaluate(&q, &p, Fixed)?;
    let (q, p, tau) = (var(&q, &cuda), var(&p, &cuda), Var::new(TAU, &cuda)?);
    for evaluation in [op.evaluate(&q, &p, Fixed)?, op.forward_with_metrics(&q, &p, Fixed)?.1] {
        assert_close(&evaluation.row_losses, &want.row_losses, 1e-5, "row losses");
        assert_eq!(evaluation.query_to_passage, want.query_to_passage);
        assert_eq!(evaluation.passage_to_query, want.passage_to_query);
    }
    let all = op.forward(&q, &p, Temperature::Tau(&tau))?.backward()?;
    for only in 0..3 {
        let pick = |k: usize, var: &Var| if k == only { var.as_tensor().clone() } else { var.as_detached_tensor() };
        let result = op.forward(&pick(0, &q), &pick(1, &p), Temperature::Tau(&pick(2, &tau)))?;
        let gradients = result.backward()?;
        for (k, var) in [&q, &p, &tau].into_iter().enumerate() {
            assert_eq!(gradients.get(var).is_some(), k == only, "argument {k}, tracked is {only}");
            if k == only {
                assert_close(&of(&gradients, var), &of(&all, var), 1e-6, "the only tracked argument");
            }
        }
    }
    assert!(!op.forward(&q.detach(), &p.detach(), Fixed)?.track_op());
    Ok(())
}

/// Two clusters, far from each other at this τ: their cosines in common are squares that are skipped. Query i's gradient is then off by at
/// most ηβ/M per unit of its norm (docs/skipping.md), and everything but the gradients keeps its bits.
#[test]
fn tile_skipping_stays_within_its_bound() -> Result<()> {
    const CLUSTER: usize = 64;
    const SHARE: f64 = 0.5;
    let Some(cuda) = device() else { return Ok(()) };
    let (rows, tau) = (2 * CLUSTER, 0.2);
    let clustered = |frequency: f32| -> Result<Var> {
        let centres = Tensor::new(&[[2f32, 0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0, 0.0]], &Device::Cpu)?;
        let centres = centres.repeat((1, CLUSTER))?.reshape((rows, DIM))?;
        Ok(var(&(centres + (wave(rows, DIM, frequency) * 0.3)?)?, &cuda))
    };
    let (q, p) = (clustered(0.7)?, clustered(0.9)?);
    let run = |op: SamToNe| -> Result<_> {
        let (loss, evaluation) = op.forward_with_metrics(&q, &p, Fixed)?;
        let gradients = loss.backward()?;
        Ok((evaluation, numbers(&loss), of(&gradients, &q), of(&gradients, &p)))
    };
    let plain = op(Loss::info_nce()).with(|call| call.with_temperature(tau));
    let (want, got) = (run(plain.clone())?, run(plain.with(|call| call.with_tile_skipping(SHARE)))?);
    assert_eq!((&got.0, &got.1), (&want.0, &want.1));
    assert!(got.2 != want.2 && got.3 != want.3, "nothing is skipped");
    let norm = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
    let queries = numbers(&q);
    for (row, (query, (got, want))) in queries.chunks(DIM).zip(got.2.chunks(DIM).zip(want.2.chunks(DIM))).enumerate() {
        let off = got.iter().zip(want).map(|(g, w)| g - w).collect::<Vec<_>>();
        let off = norm(query) * norm(&off) * tau * rows as f64;
        assert!(off <= SHARE + 1e-4, "row {row} is off by {off}");
    }
    Ok(())
}

/// The memory of a call is that of the next, also for another type, other shapes and another thread; what it gave stays.
#[test]
fn results_outlive_the_calls_after_them() -> Result<()> {
    let Some(cuda) = device() else { return Ok(()) };
    let op = op(Loss::samtone_query());
    let (q, p) = (var(&wave(ROWS, DIM, 0.7), &cuda), var(&wave(PASSAGES, DIM, 0.9), &cuda));
    let first = op.forward(&q, &p, Fixed)?;
    let (small_q, small_p) = (q.narrow(0, 0, 3)?.to_dtype(DType::F16)?, p.narrow(0, 0, 4)?.to_dtype(DType::F16)?);
    let small = op.forward(&small_q, &small_p, Fixed)?;
    let again = op.forward(&q, &p, Fixed)?;
    assert_eq!(numbers(&first), numbers(&again));
    assert_ne!(numbers(&first), numbers(&small));
    assert_eq!(of(&first.backward()?, &q), of(&again.backward()?, &q));
    std::thread::scope(|scope| {
        let threads = [0; 4].map(|_| scope.spawn(|| numbers(&op.forward(&q, &p, Fixed).unwrap())));
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), numbers(&first)));
    });
    Ok(())
}

/// Nothing waits, so what is wrong inside a tensor is NaN, and a sentence where results are read; the rest is refused at once.
#[test]
fn bad_input_is_nan_or_a_sentence() -> Result<()> {
    let Some(cuda) = device() else { return Ok(()) };
    let op = op(Loss::samtone_query());
    let (q, p) = (var(&wave(ROWS, DIM, 0.7), &cuda), var(&wave(PASSAGES, DIM, 0.9), &cuda));
    let zero = Var::from_tensor(&q.zeros_like()?)?;
    let late: Vec<f32> = (0..ROWS * DIM).map(|i| if i / DIM == 2 && i % DIM < 2 { 0.0 } else { 1.0 }).collect();
    let late = var(&Tensor::from_vec(late, (ROWS, DIM), &Device::Cpu)?, &cuda);
    let loss = op.forward(&zero, &p, Fixed)?;
    assert!(numbers(&loss)[0].is_nan());
    assert!(of(&loss.backward()?, &p).iter().all(|x| x.is_nan()));
    let ignored = op.with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient)).forward(&zero, &p, Fixed)?;
    assert!(numbers(&ignored)[0].is_finite());
    let infinite = (op.forward(&q, &p, Fixed)? * f64::INFINITY)?.backward()?;
    assert!(of(&infinite, &q).iter().all(|x| !x.is_finite()));
    for (result, sentence) in [
        (op.evaluate(&zero, &p, Fixed), "the query embedding in row 0 has norm zero"),
        (op.forward_with_metrics(&zero, &p, Fixed).map(|(_, e)| e), "the query embedding in row 0 has norm zero"),
        (op.evaluate(&q, &p.to_dtype(DType::F16)?, Fixed), "argument `passage` is of type f16; allowed: the type of"),
        (op.evaluate(&q, &p.narrow(1, 0, 3)?, Fixed), "argument `passage` is embeddings of dimension 3"),
        (op.evaluate(&p, &q, Fixed), "argument `passage` is 6 rows"),
        (op.evaluate(&q, &wave(PASSAGES, DIM, 0.9), Fixed), "argument `passage` is on the CPU; allowed: the device of"),
        (
            op.evaluate(&wave(ROWS, DIM, 0.7), &p, Fixed),
            "argument `passage` is on CUDA device 0; allowed: the device of",
        ),
        (op.with(|call| call.with_passage_ids([1])).evaluate(&q, &p, Fixed), "argument `passage_ids` is a slice of 1"),
        (
            op.with(|call| call.with_prefixes([2, DIM]).with_tile_skipping(0.1)).evaluate(&q, &p, Fixed),
            "argument `tile_skipping` is 0.1; allowed: no tile skipping with prefixes on CUDA",
        ),
        (
            op.with(|call| call.with_prefixes([2, DIM])).evaluate(&late, &p, Fixed),
            "the query embedding in row 2 has norm zero in its first 2 entries",
        ),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with(sentence), "{error}");
    }
    Ok(())
}
