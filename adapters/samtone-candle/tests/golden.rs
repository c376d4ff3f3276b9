//! Every golden file of the repository through candle's autograd, by the repository's own table of tolerances.

#[allow(dead_code)] // what other tests use of these
#[path = "../../../tests/support"]
mod support {
    pub mod case;
    pub mod compare;
    pub mod problem;
    pub mod tolerance;
}

use candle_core::{DType, Device, Result, Tensor, Var};
use samtone_candle::samtone::{self, TemperatureGradient, backend};
use samtone_candle::{SamToNe, Temperature};
use std::path::Path;
use support::case::{Case, Expected, GOLDEN_FILES, files};
use support::compare::{against_definition, verdict};
use support::problem::{Outputs, Problem};

const UPSTREAM: f64 = -2.5;

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn through_candle(problem: &Problem, dtype: DType) -> Result<Outputs> {
    let var = |x: &[f64], rows| {
        let x: Vec<f32> = x.iter().map(|&v| v as f32).collect();
        Var::from_tensor(&Tensor::from_vec(x, (rows, problem.dim), &Device::Cpu)?.to_dtype(dtype)?)
    };
    let (q, p) = (var(&problem.query, problem.rows)?, var(&problem.passage, problem.passages)?);
    let tau = Var::new(problem.call.temperature(), &Device::Cpu)?;
    let (loss, evaluation) = SamToNe::new(problem.call.clone()).forward_with_metrics(&q, &p, Temperature::Tau(&tau))?;
    assert_eq!(f64::from(loss.to_scalar::<f32>()?), f64::from(evaluation.loss as f32));
    let gradients = (loss * UPSTREAM)?.backward()?;
    let gradient = |var: &Var| numbers(gradients.get(var).expect("tracked"));
    let derivative = gradient(&tau)?[0];
    let temperature = TemperatureGradient { tau: derivative, log_beta: -derivative * problem.call.temperature() };
    Ok(Outputs { evaluation, grad_query: gradient(&q)?, grad_passage: gradient(&p)?, temperature })
}

/// 16-bit gradients are rounded to their type at last, which the table, made for f32 gradients, knows nothing of.
#[test]
fn golden_files_through_candle() {
    let files = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")).unwrap();
    assert_eq!(files.len(), GOLDEN_FILES);
    let reference = backend::by_name("reference").unwrap();
    for path in files {
        let case = Case::read(&path).unwrap();
        // Relative rounding error of the type, and the absolute one of its subnormal numbers.
        for (dtype, of_core, rounding, least) in [
            (DType::F32, samtone::DType::F32, 0.0, 0.0),
            (DType::F16, samtone::DType::F16, 2f64.powi(-11), 2f64.powi(-25)),
            (DType::BF16, samtone::DType::BF16, 2f64.powi(-8), 0.0),
        ] {
            let problem = case.problem.rounded(of_core);
            let want: Expected = problem.run(reference, samtone::DType::F64, UPSTREAM).unwrap().into();
            let got = through_candle(&problem, dtype).unwrap();
            let mut checks = against_definition(&got, &want, &problem, of_core, UPSTREAM);
            for check in &mut checks {
                let x = match check.output {
                    "grad_q" => &problem.query,
                    "grad_p" => &problem.passage,
                    _ => continue,
                };
                let norms = x.iter().map(|v| v * v).sum::<f64>() * problem.dim as f64; // over all entries of a gradient
                check.allowed += rounding * check.size + least * norms.sqrt();
            }
            verdict(&checks).unwrap_or_else(|error| panic!("{} in {dtype:?}: {error}", problem.name));
        }
    }
}
