//! An ordinary training loop of burn with SamToNe as its loss: the dual encoder of adapters/dual-encoder, whose README.md says what
//! is trained on what.
//!
//!     cargo run --release --example train                      # on the CPU
//!     cargo run --release --example train --features wgpu      # on the first wgpu device
//!     cargo run --release --example train -- 8 16 32           # with prefixes

use burn::module::{Module, Param};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData, module::embedding};
use safetensors::{Dtype, SafeTensors};
use samtone_burn::{Call, Loss, SamToNe, Temperature};
use std::error::Error;
use std::io::{self, Write};
use std::path::Path;

/// Both towers.
#[derive(Module, Debug)]
struct DualEncoder {
    table: Param<Tensor<2>>,
    projection: Param<Tensor<2>>,
    log_beta: Param<Tensor<1>>,
}

impl DualEncoder {
    /// The weighted mean of the rows of `table` that a text's words hash to, projected.
    fn encode(&self, buckets: Tensor<2, Int>, weights: Tensor<2>) -> Tensor<2> {
        let rows = embedding(self.table.val(), buckets);
        (rows * weights.unsqueeze_dim(2)).sum_dim(1).squeeze_dim::<2>(1).matmul(self.projection.val())
    }
}

/// The losses before a step.
pub struct Step {
    pub loss: f64,
    /// That of each prefix of the call.
    pub prefixes: Vec<f64>,
}

/// The loss of the specification.
pub fn call() -> Call {
    Call::new(Loss::samtone_query(), 0.05)
}

/// Trains with `call`, whose temperature is the first one. What each step had, and log β after the last.
pub fn train(device: &Device, call: Call) -> Result<(Vec<Step>, f64), Box<dyn Error>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dual-encoder/pairs.safetensors");
    let bytes = std::fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let data = Pairs(SafeTensors::deserialize(&bytes)?);
    let device = device.clone().autodiff();

    let samtone = SamToNe::new(call);
    let mut model = DualEncoder {
        table: Param::from_tensor(data.floats("table", &device)?),
        projection: Param::from_tensor(data.floats("projection", &device)?),
        log_beta: Param::from_tensor(Tensor::from_floats([samtone.call().beta().ln() as f32], &device)),
    };
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).init();
    let towers = [data.tower("query")?, data.tower("passage")?];
    let mut curve = Vec::new();
    for pairs in data.batches()? {
        let encode = |tower: &Tower| {
            let (buckets, weights) = tower.select(&pairs, &device);
            model.encode(buckets, weights)
        };
        let [q, p] = [encode(&towers[0]), encode(&towers[1])];
        let [query_ids, passage_ids] = [towers[0].ids_of(&pairs), towers[1].ids_of(&pairs)];
        let samtone = samtone.with(|call| call.with_query_ids(query_ids).with_passage_ids(passage_ids));
        let (loss, report) = samtone.forward_with_metrics(q, p, Temperature::LogBeta(model.log_beta.val()))?;
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.01, model, gradients);
        let prefixes = report.evaluation()?.prefixes.iter().map(|prefix| prefix.loss).collect();
        curve.push(Step { loss: f64::from(loss.into_scalar::<f32>()), prefixes });
    }
    Ok((curve, f64::from(model.log_beta.val().into_scalar::<f32>())))
}

/// The texts of one tower, hashed.
struct Tower {
    length: usize,
    buckets: Vec<i64>,
    weights: Vec<f32>,
    ids: Vec<i64>,
}

impl Tower {
    fn select(&self, pairs: &[usize], device: &Device) -> (Tensor<2, Int>, Tensor<2>) {
        let shape = [pairs.len(), self.length];
        let of = |pair: &usize| pair * self.length..(pair + 1) * self.length;
        let buckets: Vec<i64> = pairs.iter().flat_map(|pair| self.buckets[of(pair)].to_vec()).collect();
        let weights: Vec<f32> = pairs.iter().flat_map(|pair| self.weights[of(pair)].to_vec()).collect();
        let buckets = Tensor::from_data(TensorData::new(buckets, shape), device);
        (buckets, Tensor::from_data(TensorData::new(weights, shape), device))
    }

    fn ids_of(&self, pairs: &[usize]) -> Vec<i64> {
        pairs.iter().map(|&pair| self.ids[pair]).collect()
    }
}

struct Pairs<'a>(SafeTensors<'a>);

impl Pairs<'_> {
    /// Shape and numbers of the tensor `name`, little-endian.
    fn read<const N: usize, T>(
        &self,
        name: &str,
        dtype: Dtype,
        number: fn([u8; N]) -> T,
    ) -> Result<(Vec<usize>, Vec<T>), Box<dyn Error>> {
        let tensor = self.0.tensor(name)?;
        if tensor.dtype() != dtype {
            return Err(format!("`{name}` is of type {:?} instead of {dtype:?}", tensor.dtype()).into());
        }
        let (numbers, _) = tensor.data().as_chunks::<N>();
        Ok((tensor.shape().to_vec(), numbers.iter().map(|&bytes| number(bytes)).collect()))
    }

    fn floats(&self, name: &str, device: &Device) -> Result<Tensor<2>, Box<dyn Error>> {
        let (shape, numbers) = self.read(name, Dtype::F32, f32::from_le_bytes)?;
        Ok(Tensor::from_data(TensorData::new(numbers, shape), device))
    }

    fn tower(&self, tower: &str) -> Result<Tower, Box<dyn Error>> {
        let bucket = |bytes| i64::from(u32::from_le_bytes(bytes));
        let (shape, buckets) = self.read(&format!("{tower}_buckets"), Dtype::U32, bucket)?;
        let (_, weights) = self.read(&format!("{tower}_weights"), Dtype::F32, f32::from_le_bytes)?;
        let (_, ids) = self.read(&format!("{tower}_ids"), Dtype::I64, i64::from_le_bytes)?;
        Ok(Tower { length: shape[1], buckets, weights, ids })
    }

    /// The pairs of each step.
    fn batches(&self) -> Result<Vec<Vec<usize>>, Box<dyn Error>> {
        let (shape, pairs) = self.read("batches", Dtype::U32, |bytes| u32::from_le_bytes(bytes) as usize)?;
        Ok(pairs.chunks(shape[1]).map(<[usize]>::to_vec).collect())
    }
}

#[allow(dead_code)] // the test that compares the curve includes this file
fn main() -> Result<(), Box<dyn Error>> {
    #[cfg(feature = "wgpu")]
    let device = Device::wgpu_options().init()?;
    #[cfg(not(feature = "wgpu"))]
    let device = Device::flex();
    let length = |text: String| text.parse::<usize>().map_err(|_| format!("`{text}` is no length of a prefix"));
    let prefixes = std::env::args().skip(1).map(length).collect::<Result<Vec<_>, _>>()?;
    let call = if prefixes.is_empty() { call() } else { call().with_prefixes(prefixes) };
    let (curve, log_beta) = train(&device, call)?;
    for (step, Step { loss, prefixes }) in curve.iter().enumerate() {
        let of_prefixes: String = prefixes.iter().map(|loss| format!("  {loss:.6}")).collect();
        writeln!(io::stdout(), "step {step:2}  loss {loss:.6}{of_prefixes}")?;
    }
    writeln!(io::stdout(), "log beta {log_beta:.6}")?;
    Ok(())
}
