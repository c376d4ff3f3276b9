//! Whole trainings: the shared curve, derivatives of all parameters by differences, and large batches in chunks.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use samtone_candle::{Call, Loss, SamToNe, Temperature};
use serde::Deserialize;

#[path = "../examples/train.rs"]
mod example;

#[derive(Deserialize)]
struct Curve {
    loss: Vec<f64>,
}

/// What the second training has besides.
#[derive(Deserialize)]
struct Prefixes {
    prefixes: Vec<usize>,
    prefix_weights: Vec<f64>,
    prefix_losses: Vec<Vec<f64>>,
}

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dual-encoder/");

fn read<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    serde_json::from_str(&std::fs::read_to_string(format!("{FOLDER}{name}")).unwrap()).unwrap()
}

/// The example's training, which must follow the curve of float64 PyTorch, whose loss is written out and owes nothing to this crate.
fn follows(call: Call, curve: &str) -> Vec<example::Step> {
    let want: Curve = read(curve);
    let got = example::train(&format!("{FOLDER}pairs.safetensors"), call).unwrap();
    assert_eq!((got.len(), want.loss.len()), (60, 60));
    for (step, (got, want)) in got.iter().zip(want.loss).enumerate() {
        let got = f64::from(got.loss);
        assert!((got - want).abs() <= TOLERANCE * want, "step {step}: {got} instead of {want}");
    }
    got
}

const TOLERANCE: f64 = 1e-3;

#[test]
fn the_example_follows_the_curve_of_every_framework() {
    assert!(follows(example::call(), "curve.json").iter().all(|step| step.prefixes.is_empty()));
}

#[test]
fn the_example_follows_the_curve_with_prefixes() {
    let with: Prefixes = read("curve_prefixes.json");
    let call = example::call().with_prefixes(with.prefixes).with_prefix_weights(with.prefix_weights);
    let got = follows(call, "curve_prefixes.json");
    assert_eq!(got.len(), with.prefix_losses.len());
    for (step, (got, want)) in got.iter().zip(with.prefix_losses).enumerate() {
        assert_eq!(got.prefixes.len(), want.len());
        for (k, (got, want)) in got.prefixes.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= TOLERANCE * want, "step {step}, prefix {k}: {got} instead of {want}");
        }
    }
}

fn wave(rows: usize, dim: usize, frequency: f64) -> Tensor {
    let values: Vec<f64> = (0..rows * dim).map(|i| (i as f64 * frequency + 0.3).sin()).collect();
    Tensor::from_vec(values, (rows, dim), &Device::Cpu).unwrap()
}

/// Two towers of two layers each, in f64, with embeddings in f32.
struct Towers {
    layers: Vec<Var>,
    log_beta: Var,
}

impl Towers {
    fn new() -> Self {
        let layer = |(k, (rows, dim)): (usize, (usize, usize))| {
            Var::from_tensor(&(wave(rows, dim, 0.7 + k as f64 * 0.37) * 0.5).unwrap()).unwrap()
        };
        let layers = [(6, 8), (8, 5), (7, 9), (9, 5)].into_iter().enumerate().map(layer).collect();
        Self { layers, log_beta: Var::new(10f64.ln(), &Device::Cpu).unwrap() }
    }

    fn parameters(&self) -> impl Iterator<Item = &Var> {
        self.layers.iter().chain([&self.log_beta])
    }

    fn encode(&self, tower: usize, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.layers[2 * tower])?.tanh()?.matmul(&self.layers[2 * tower + 1])?.to_dtype(DType::F32)
    }
}

fn inputs() -> [Tensor; 2] {
    [wave(12, 6, 1.3), wave(16, 7, 1.9)]
}

fn op() -> SamToNe {
    let passages: Vec<i64> = (0..16).map(|i| i64::from(i != 3) * i).collect(); // passage 3 repeats passage 0
    SamToNe::new(Call::new(Loss::samtone_both(), 0.1).with_passage_ids(passages))
}

/// Along directions through all parameters of both towers and the temperature at once, against the loss in f64.
#[test]
fn derivatives_of_a_dual_encoder_are_those_of_differences() -> Result<()> {
    let (towers, [x, y]) = (Towers::new(), inputs());
    let evaluate = || -> Result<f64> {
        let (q, p) = (towers.encode(0, &x)?, towers.encode(1, &y)?);
        Ok(op().evaluate(&q, &p, Temperature::LogBeta(&towers.log_beta))?.loss)
    };
    let (q, p) = (towers.encode(0, &x)?, towers.encode(1, &y)?);
    let gradients = op().forward(&q, &p, Temperature::LogBeta(&towers.log_beta))?.backward()?;
    let start: Vec<Tensor> = towers.parameters().map(|p| p.as_tensor().copy()).collect::<Result<_>>()?;
    for direction in 0..4 {
        let along: Vec<Tensor> = (start.iter().enumerate())
            .map(|(k, p)| wave(1, p.elem_count(), 2.1 + (7 * direction + k) as f64).reshape(p.dims()))
            .collect::<Result<_>>()?;
        let at = |t: f64| -> Result<f64> {
            for ((parameter, start), along) in towers.parameters().zip(&start).zip(&along) {
                parameter.set(&(start + (along * t)?)?)?;
            }
            evaluate()
        };
        // Differences of fourth order: a wide step, because the embeddings are rounded to f32.
        let h = 1e-3;
        let difference = (8.0 * (at(h)? - at(-h)?) - (at(2.0 * h)? - at(-2.0 * h)?)) / (12.0 * h);
        at(0.0)?;
        let mut derivative = 0.0;
        for (parameter, along) in towers.parameters().zip(&along) {
            let gradient = gradients.get(parameter).expect("every parameter is tracked");
            derivative += (gradient * along)?.sum_all()?.to_scalar::<f64>()?;
        }
        assert!(derivative.abs() > 0.1, "direction {direction} tells nothing: {derivative}");
        assert!((derivative - difference).abs() < 3e-4 * derivative.abs(), "{derivative} against {difference}");
    }
    Ok(())
}

/// GradCache (Gao et al. 2021): the memory of the encoders is that of a chunk, the loss and its gradients that of the batch.
#[test]
fn chunks_give_the_gradients_of_the_whole_batch() -> Result<()> {
    let (towers, inputs) = (Towers::new(), inputs());
    let temperature = Temperature::LogBeta(&towers.log_beta);
    let (q, p) = (towers.encode(0, &inputs[0])?, towers.encode(1, &inputs[1])?);
    let whole = op().forward(&q, &p, temperature)?.backward()?;

    const CHUNK: usize = 4;
    let chunks = |x: &Tensor| -> Result<Vec<Tensor>> {
        (0..x.dim(0)?).step_by(CHUNK).map(|at| x.narrow(0, at, CHUNK)).collect()
    };
    // 1. Embeddings without a graph, chunk by chunk. 2. One call on all of them.
    let mut embeddings = Vec::new();
    for (tower, x) in inputs.iter().enumerate() {
        let encoded = chunks(x)?.iter().map(|x| Ok(towers.encode(tower, x)?.detach())).collect::<Result<Vec<_>>>()?;
        embeddings.push(Var::from_tensor(&Tensor::cat(&encoded, 0)?)?);
    }
    let cached = op().forward(&embeddings[0], &embeddings[1], temperature)?.backward()?;
    // 3. Each chunk again, now with its graph, and its share of the embeddings' gradients as upstream gradient.
    let mut parts: Vec<GradStore> = Vec::new();
    for (tower, x) in inputs.iter().enumerate() {
        let gradient = cached.get(&embeddings[tower]).expect("tracked");
        for (x, gradient) in chunks(x)?.iter().zip(chunks(gradient)?) {
            parts.push((towers.encode(tower, x)? * gradient)?.sum_all()?.backward()?);
        }
    }
    for (k, parameter) in towers.layers.iter().enumerate() {
        let shares: Vec<_> = parts.iter().filter_map(|part| part.get(parameter)).collect();
        assert_eq!(shares.len(), if k < 2 { 3 } else { 4 });
        let sum = shares.into_iter().try_fold(parameter.zeros_like()?, |sum, share| sum + share)?;
        let whole = whole.get(parameter).expect("tracked");
        let off: f64 = (&sum - whole)?.sqr()?.sum_all()?.sqrt()?.to_scalar()?;
        let size: f64 = whole.sqr()?.sum_all()?.sqrt()?.to_scalar()?;
        assert!(off <= 1e-6 * size, "layer {k}: off by {off:e} of {size:e}");
    }
    let of = |gradients: &GradStore| gradients.get(&towers.log_beta).expect("tracked").to_scalar::<f64>();
    assert_eq!(of(&cached)?, of(&whole)?);
    Ok(())
}
