//! What tensors may be like: views, frozen, without autodiff.

use crate::Outcome;
use crate::support::{matrix, numbers};
use burn::tensor::{DType, Device, Tensor};
use samtone_burn::samtone::Temperature::Fixed;
use samtone_burn::{Call, Loss, SamToNe, Temperature};

const TAU: f64 = 0.1;

pub fn wave(rows: usize, dim: usize, frequency: f64, device: &Device) -> Tensor<2> {
    let values: Vec<f64> = (0..rows * dim).map(|i| (i as f64 * frequency + 0.3).sin() + 0.1).collect();
    matrix(&values, dim, device, DType::F32)
}

fn both() -> SamToNe {
    SamToNe::new(Call::new(Loss::samtone_both(), TAU))
}

/// Gradients of query and passage.
fn gradients(q: &Tensor<2>, p: &Tensor<2>) -> Result<[Option<Vec<f64>>; 2], samtone_burn::Error> {
    let loss = both().forward(q.clone(), p.clone(), Fixed)?;
    let gradients = loss.backward();
    Ok([q, p].map(|x| x.grad(&gradients).map(numbers)))
}

pub fn strided(device: &Device) -> Outcome {
    let device = device.clone().autodiff();
    let samtone = both();
    let wide = wave(8, 12, 0.7, &device).require_grad();
    let tall = wave(5, 9, 0.9, &device).require_grad();
    let views = || (wide.clone().slice([1..7, 3..8]), tall.clone().transpose());
    let (q, p) = views();
    let strided = samtone.forward(q, p, Fixed)?.backward();
    let (q, p) = views();
    let copy = |x: Tensor<2>| matrix(&numbers(x.clone()), x.dims()[1], &device, DType::F32).require_grad();
    let (q, p) = (copy(q), copy(p));
    let [dq, dp] = gradients(&q, &p)?;
    assert_eq!(Some(numbers(wide.grad(&strided).unwrap().slice([1..7, 3..8]))), dq);
    assert_eq!(Some(numbers(tall.grad(&strided).unwrap().transpose())), dp);
    let loss = |q: Tensor<2>, p: Tensor<2>| samtone.forward(q, p, Fixed).map(numbers);
    // Flipped rows, rows repeated, one row.
    let (q, p) = (wave(6, 5, 0.7, &device), wave(9, 5, 0.9, &device));
    let plain = |x: Tensor<2>| matrix(&numbers(x.clone()), x.dims()[1], &device, DType::F32);
    for (q, p) in [
        (q.clone().flip([0]), p.clone().flip([1])),
        (q.clone().slice([2..3, 0..5]).expand([4, 5]), p.clone()),
        (q.slice([3..4, 0..5]), p),
    ] {
        assert_eq!(loss(q.clone(), p.clone())?, loss(plain(q), plain(p))?);
    }
    Ok(())
}

pub fn frozen(device: &Device) -> Outcome {
    let device = device.clone().autodiff();
    let (q, p) = (wave(6, 5, 0.7, &device).require_grad(), wave(9, 5, 0.9, &device).require_grad());
    let [both_q, both_p] = gradients(&q, &p)?;
    let (still_q, still_p) = (wave(6, 5, 0.7, &device), wave(9, 5, 0.9, &device));
    assert_eq!(gradients(&q, &still_p)?, [both_q, None]);
    assert_eq!(gradients(&still_q, &p)?, [None, both_p]);
    let samtone = both();
    let none = samtone.forward(still_q.clone(), still_p.clone(), Fixed)?;
    assert!(!none.is_tracked());
    let (none, evaluated) = (numbers(none)[0], samtone.evaluate(q.clone(), p.clone(), Fixed)?.loss);
    assert!((none - evaluated).abs() <= 2e-7 * evaluated, "{none} instead of {evaluated}"); // devices add rows up in f32 pairs
    // The temperature alone.
    let log_beta = Tensor::<1>::from_floats([2.0], &device).require_grad();
    let loss = samtone.forward(still_q, still_p, Temperature::LogBeta(log_beta.clone()))?;
    let alone = numbers(log_beta.grad(&loss.backward()).unwrap());
    let loss = samtone.forward(q, p, Temperature::LogBeta(log_beta.clone()))?;
    assert_eq!(numbers(log_beta.grad(&loss.backward()).unwrap()), alone);
    Ok(())
}

pub fn repeated(device: &Device) -> Outcome {
    let device = device.clone().autodiff();
    let (q, p) = (wave(150, 24, 0.7, &device).require_grad(), wave(170, 24, 0.9, &device).require_grad());
    let once = gradients(&q, &p)?;
    assert!(once.iter().flatten().flatten().all(|x| x.is_finite()));
    for _ in 0..3 {
        assert_eq!(gradients(&q, &p)?, once);
    }
    Ok(())
}

/// The number in a tensor stands in for that of the call, which may then be any.
pub fn temperature(device: &Device) -> Outcome {
    let (q, p) = (wave(6, 5, 0.7, device), wave(9, 5, 0.9, device));
    let evaluate = |tau: f64, given: Temperature| {
        both().with(|call| call.with_temperature(tau)).evaluate(q.clone(), p.clone(), given)
    };
    let want = evaluate(0.125, Fixed)?;
    assert_ne!(evaluate(0.5, Fixed)?, want);
    for other in [0.5, f64::NAN] {
        let tau = Tensor::<1>::from_floats([0.125], device);
        assert_eq!(evaluate(other, Temperature::Tau(tau))?, want);
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn skips(device: &Device) -> bool {
    *device == Device::cuda(0).autodiff()
}

#[cfg(not(feature = "cuda"))]
fn skips(_: &Device) -> bool {
    false
}

/// Only CUDA's kernels leave anything out of gradients, however much they are allowed to, and none do so of the loss.
pub fn skipping(device: &Device) -> Outcome {
    let device = device.clone().autodiff();
    let (q, p) = (wave(150, 24, 0.7, &device).require_grad(), wave(170, 24, 0.9, &device).require_grad());
    let run = |samtone: SamToNe| -> Result<_, samtone_burn::Error> {
        let (loss, report) = samtone.forward_with_metrics(q.clone(), p.clone(), Fixed)?;
        let gradients = loss.clone().backward();
        Ok((report.evaluation()?, numbers(loss), [&q, &p].map(|x| numbers(x.grad(&gradients).unwrap()))))
    };
    let samtone = both();
    let (evaluation, loss, gradients) = run(samtone.clone())?;
    for share in [1e-3, 0.999] {
        let (same_evaluation, same_loss, others) = run(samtone.with(|call| call.with_tile_skipping(share)))?;
        assert_eq!((same_evaluation, same_loss), (evaluation.clone(), loss.clone()));
        assert!(others == gradients || skips(&device));
    }
    Ok(())
}

/// Tensors that autodiff does not know of, alone and beside ones that it does.
pub fn constants(device: &Device) -> Outcome {
    let tracking = device.clone().autodiff();
    let samtone = both();
    let (q, p) = (wave(6, 5, 0.7, device), wave(9, 5, 0.9, device));
    let plain = samtone.forward(q.clone(), p.clone(), Fixed)?;
    assert_eq!(plain.device(), *device);
    let tracked = wave(6, 5, 0.7, &tracking).require_grad();
    let [dq, dp] = gradients(&tracked, &p)?;
    assert_eq!(gradients(&tracked, &wave(9, 5, 0.9, &tracking))?, [dq.clone(), None]);
    assert_eq!(dp, None);
    let loss = samtone.forward(tracked, p, Fixed)?;
    assert_eq!(loss.device(), tracking);
    let balanced = tracking.gradient_checkpointing();
    let q = wave(6, 5, 0.7, &balanced).require_grad();
    assert_eq!(gradients(&q, &wave(9, 5, 0.9, &balanced))?, [dq, None]);
    assert_eq!(numbers(loss), numbers(plain));
    Ok(())
}
