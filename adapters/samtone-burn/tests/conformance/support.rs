//! Problems of the main crate's tests, its golden files, comparison and tolerances, and how burn computes them.
#![allow(dead_code)] // each module of the shared ones has more than these tests need

#[path = "../../../../tests/support/case.rs"]
pub mod case;
#[path = "../../../../tests/support/compare.rs"]
pub mod compare;
#[path = "../../../../tests/support/problem.rs"]
pub mod problem;
#[path = "../../../../tests/support/tolerance.rs"]
pub mod tolerance;

use burn::tensor::{DType, Device, Tensor, TensorData};
use compare::Check;
use problem::{Outputs, Problem};
use samtone_burn::samtone::TemperatureGradient;
use samtone_burn::{Result, SamToNe, Temperature};

/// A matrix of `dtype` on `device`.
pub fn matrix(values: &[f64], dim: usize, device: &Device, dtype: DType) -> Tensor<2> {
    let data = TensorData::new(values.to_vec(), [values.len() / dim, dim]);
    Tensor::from_data(data, (device, dtype))
}

pub fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().try_to_vec().unwrap()
}

/// What burn calls an element type of samtone.
pub fn burn_dtype(dtype: samtone_burn::samtone::DType) -> DType {
    match dtype {
        samtone_burn::samtone::DType::F64 => DType::F64,
        samtone_burn::samtone::DType::F32 => DType::F32,
        samtone_burn::samtone::DType::F16 => DType::F16,
        samtone_burn::samtone::DType::BF16 => DType::BF16,
    }
}

/// The widest type that holds a temperature on the device.
pub fn temperature_dtype(device: &Device) -> DType {
    if device.supports_dtype(DType::F64) { DType::F64 } else { DType::F32 }
}

/// Which number a temperature's tensor holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    Tau,
    LogBeta,
}

impl Form {
    /// The tensor's number for τ, as `dtype` holds it, and the τ that it then is.
    pub fn at(self, tau: f64, dtype: DType) -> (f64, f64) {
        let round = |x: f64| if dtype == DType::F64 { x } else { f64::from(x as f32) };
        match self {
            Self::Tau => (round(tau), round(tau)),
            Self::LogBeta => (round(-tau.ln()), (-round(-tau.ln())).exp()),
        }
    }
}

/// The problem at the temperature that a tensor of this type holds.
pub fn at_device(problem: &Problem, form: Form, held: DType) -> Problem {
    let (_, tau) = form.at(problem.call.temperature(), held);
    problem.clone().with(|call| call.with_temperature(tau))
}

/// Loss and gradients by burn's autodiff, `upstream` being a factor behind the loss. `problem` is one [`at_device`].
pub fn run(problem: &Problem, form: Form, device: &Device, dtype: DType, upstream: f64) -> Result<Outputs> {
    let device = device.clone().autodiff();
    let q = matrix(&problem.query, problem.dim, &device, dtype).require_grad();
    let p = matrix(&problem.passage, problem.dim, &device, dtype).require_grad();
    let tau = problem.call.temperature();
    let held = temperature_dtype(&device);
    let t = Tensor::<1>::from_data(TensorData::new(vec![form.at(tau, held).0], [1]), (&device, held)).require_grad();
    let temperature = match form {
        Form::Tau => Temperature::Tau(t.clone()),
        Form::LogBeta => Temperature::LogBeta(t.clone()),
    };
    let samtone = SamToNe::new(problem.call.clone());
    let (loss, report) = samtone.forward_with_metrics(q.clone(), p.clone(), temperature)?;
    let evaluation = report.evaluation()?;
    let (got, want) = (numbers(loss.clone())[0], evaluation.loss);
    assert!((got - want).abs() <= 1e-6 * want.abs(), "the tensor holds {got}, the report {want}");
    let gradients = (loss * upstream).backward();
    let of = |tensor: &Tensor<2>| {
        let gradient = tensor.grad(&gradients).unwrap();
        assert_eq!((gradient.dtype(), gradient.dims()), (tensor.dtype(), tensor.dims()));
        numbers(gradient)
    };
    let derivative = t.grad(&gradients).unwrap();
    assert_eq!((derivative.dtype(), derivative.dims()), (held, [1]));
    let derivative = numbers(derivative)[0];
    let temperature = match form {
        Form::Tau => TemperatureGradient { tau: derivative, log_beta: -tau * derivative },
        Form::LogBeta => TemperatureGradient { tau: -derivative / tau, log_beta: derivative },
    };
    Ok(Outputs { evaluation, grad_query: of(&q), grad_passage: of(&p), temperature })
}

/// Gradients in 16 bits are rounded once more than the table of tolerances knows of: by half a unit in the last place of what
/// they are, or of the smallest normal number.
pub fn rounded(checks: Vec<Check>, problem: &Problem, dtype: DType) -> Vec<Check> {
    let (relative, absolute) = match dtype {
        DType::F16 => (2_f64.powi(-11), 2_f64.powi(-25)),
        DType::BF16 => (2_f64.powi(-8), 0.0),
        _ => return checks,
    };
    let length = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
    let add = |check: Check| {
        let towers = match check.output {
            "grad_q" => length(&problem.query),
            "grad_p" => length(&problem.passage),
            _ => return check,
        };
        let more = relative * check.size + absolute * towers * (problem.dim as f64).sqrt();
        Check { allowed: check.allowed + more, ..check }
    };
    checks.into_iter().map(add).collect()
}
