//! Dual encoders of burn's modules.

use crate::Outcome;
use crate::support::{matrix, numbers};
use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig, Tanh};
use burn::tensor::{DType, Device, Tensor};
use samtone_burn::{Call, Loss, SamToNe, Temperature};

/// Numbers without the structure of a wave, whose matrices are of rank 2.
fn wave(rows: usize, dim: usize, frequency: f64, device: &Device) -> Tensor<2> {
    let values: Vec<f64> = (0..rows * dim).map(|i| ((i * i) as f64 * frequency + 0.3).sin() + 0.1).collect();
    matrix(&values, dim, device, DType::F32)
}

/// The temperature is that of the encoder.
fn samtone() -> SamToNe {
    SamToNe::new(Call::new(Loss::samtone_both(), 0.1).with_query_ids([1, 2, 3, 1, 5, 6]))
}

/// Two layers that both towers share, and the log-scale.
#[derive(Module, Debug)]
struct Encoder {
    hidden: Linear,
    activation: Tanh,
    output: Linear,
    log_beta: Param<Tensor<1>>,
}

impl Encoder {
    fn new(device: &Device) -> Self {
        let weights = |rows, columns, frequency| Param::from_tensor(wave(rows, columns, frequency, device) * 0.5);
        let mut hidden = LinearConfig::new(7, 11).init(device);
        let mut output = LinearConfig::new(11, 4).with_bias(false).init(device);
        hidden.weight = weights(7, 11, 1.3);
        hidden.bias = Some(Param::from_tensor(Tensor::full([11], 0.05, device)));
        output.weight = weights(11, 4, 2.1);
        let log_beta = Param::from_tensor(Tensor::from_floats([1.5], device));
        Self { hidden, activation: Tanh::new(), output, log_beta }
    }

    fn encode(&self, x: Tensor<2>) -> Tensor<2> {
        self.output.forward(self.activation.forward(self.hidden.forward(x)))
    }

    fn loss(&self, q: Tensor<2>, p: Tensor<2>) -> Result<Tensor<1>, samtone_burn::Error> {
        samtone().forward(self.encode(q), self.encode(p), Temperature::LogBeta(self.log_beta.val()))
    }
}

/// The loss as the parameters move along their gradient, and along one weight.
pub fn finite_differences(device: &Device) -> Outcome {
    let device = device.clone().autodiff();
    let encoder = Encoder::new(&device);
    let (q, p) = (wave(6, 7, 0.7, &device), wave(8, 7, 0.9, &device));
    let gradients = encoder.loss(q.clone(), p.clone())?.backward();
    let of = |weight: &Param<Tensor<2>>| weight.val().grad(&gradients).unwrap();
    let (hidden, output) = (of(&encoder.hidden.weight), of(&encoder.output.weight));
    let log_beta = encoder.log_beta.val().grad(&gradients).unwrap();
    let square = |x: Vec<f64>| x.iter().map(|v| v * v).sum::<f64>();
    let slopes = [square(numbers(hidden.clone())), square(numbers(output.clone())), square(numbers(log_beta.clone()))];
    for (k, slope) in slopes.into_iter().enumerate() {
        assert!(slope > 1e-6, "gradient {k} vanishes");
        let step = 2e-2 / slope.sqrt();
        let at = |step: f64| {
            let mut moved = encoder.clone();
            let move_by = |weight: Param<Tensor<2>>, along: &Tensor<2>| {
                Param::from_tensor(weight.val().inner() + along.clone() * step)
            };
            match k {
                0 => moved.hidden.weight = move_by(moved.hidden.weight, &hidden),
                1 => moved.output.weight = move_by(moved.output.weight, &output),
                _ => {
                    moved.log_beta = Param::from_tensor(moved.log_beta.val().inner() + log_beta.clone() * step);
                }
            }
            moved.loss(q.clone().inner(), p.clone().inner()).map(|loss| numbers(loss)[0])
        };
        let difference = (at(step)? - at(-step)?) / (2.0 * step);
        assert!((difference - slope).abs() <= 5e-3 * slope, "gradient {k}: {difference} instead of {slope}");
    }
    Ok(())
}

/// Encodes chunks without a graph, takes one loss of all embeddings, and backpropagates chunk by chunk, as GradCache does.
pub fn chunks(device: &Device) -> Outcome {
    let device = device.clone().autodiff();
    let encoder = Encoder::new(&device);
    let (q, p) = (wave(6, 7, 0.7, &device), wave(8, 7, 0.9, &device));
    let whole = encoder.loss(q.clone(), p.clone())?.backward();
    let want = numbers(encoder.hidden.weight.val().grad(&whole).unwrap());

    let pieces = |x: &Tensor<2>| x.clone().chunk(2, 0);
    let embed = |x: &Tensor<2>| {
        let parts = pieces(x).into_iter().map(|part| encoder.encode(part).detach());
        Tensor::cat(parts.collect(), 0).detach().require_grad()
    };
    let (eq, ep) = (embed(&q), embed(&p));
    let log_beta = Temperature::LogBeta(encoder.log_beta.val());
    let cached = samtone().forward(eq.clone(), ep.clone(), log_beta)?.backward();
    let mut sum = vec![0.0; want.len()];
    for (x, embeddings) in [(&q, &eq), (&p, &ep)] {
        let gradient = Tensor::from_inner(embeddings.grad(&cached).unwrap());
        for (part, upstream) in pieces(x).into_iter().zip(gradient.chunk(2, 0)) {
            let surrogate = (encoder.encode(part) * upstream).sum().backward();
            let part = numbers(encoder.hidden.weight.val().grad(&surrogate).unwrap());
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
    }
    let size = want.iter().map(|x| x * x).sum::<f64>().sqrt();
    let off = sum.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
    assert!(size > 1e-3 && off <= 1e-5 * size, "off by {off:e} of {size:e}");
    Ok(())
}
