//! Trains a small dual encoder with candle, as [the specification](../../dual-encoder/README.md) says:
//!
//! ```text
//! cargo run --release --manifest-path adapters/samtone-candle/Cargo.toml --example train
//! cargo run --release --manifest-path adapters/samtone-candle/Cargo.toml --example train -- 8 16 32     # with prefixes
//! ```

use candle_core::{Device, Error, Result, Tensor, Var, safetensors};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use samtone_candle::{Call, Loss, SamToNe, Temperature};
use std::collections::HashMap;
use std::io::{self, Write};

/// Both towers: weighted mean of embeddings of hashed features, projected.
struct DualEncoder {
    table: Var,
    projection: Var,
}

impl DualEncoder {
    /// `buckets` and `weights` are texts × length.
    fn encode(&self, buckets: &Tensor, weights: &Tensor) -> Result<Tensor> {
        let (texts, length) = buckets.dims2()?;
        let features = self.table.index_select(&buckets.flatten_all()?, 0)?.reshape((texts, length, ()))?;
        features.broadcast_mul(&weights.unsqueeze(2)?)?.sum(1)?.matmul(&self.projection)
    }
}

/// The losses before a step.
pub struct Step {
    pub loss: f32,
    /// That of each prefix of the call.
    pub prefixes: Vec<f64>,
}

/// The loss of the specification.
pub fn call() -> Call {
    Call::new(Loss::samtone_query(), 0.05)
}

/// Trains with `call`, whose temperature is the first one.
pub fn train(path: &str, call: Call) -> Result<Vec<Step>> {
    let device = Device::Cpu;
    let data: HashMap<String, Tensor> = safetensors::load(path, &device)?;
    let encoder =
        DualEncoder { table: Var::from_tensor(&data["table"])?, projection: Var::from_tensor(&data["projection"])? };
    let samtone = SamToNe::new(call);
    let log_beta = Var::new(samtone.call().beta().ln() as f32, &device)?;
    let parameters = vec![encoder.table.clone(), encoder.projection.clone(), log_beta.clone()];
    let settings = ParamsAdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let mut optimizer = AdamW::new(parameters, settings)?;

    let mut curve = Vec::new();
    for step in 0..data["batches"].dim(0)? {
        let pairs = data["batches"].get(step)?;
        let of = |name: &str| data[name].index_select(&pairs, 0);
        let query = encoder.encode(&of("query_buckets")?, &of("query_weights")?)?;
        let passage = encoder.encode(&of("passage_buckets")?, &of("passage_weights")?)?;
        let ids: [Vec<i64>; 2] = [of("query_ids")?.to_vec1()?, of("passage_ids")?.to_vec1()?];
        let [query_ids, passage_ids] = ids;
        let samtone = samtone.with(|call| call.with_query_ids(query_ids).with_passage_ids(passage_ids));
        let (loss, evaluation) = samtone.forward_with_metrics(&query, &passage, Temperature::LogBeta(&log_beta))?;
        optimizer.backward_step(&loss)?;
        let prefixes = evaluation.prefixes.iter().map(|prefix| prefix.loss).collect();
        curve.push(Step { loss: loss.to_scalar()?, prefixes });
    }
    Ok(curve)
}

#[allow(dead_code)] // the test of this training calls `train`
fn main() -> Result<()> {
    let pairs = concat!(env!("CARGO_MANIFEST_DIR"), "/../dual-encoder/pairs.safetensors");
    let length = |text: String| text.parse().map_err(|_| Error::msg(format!("`{text}` is no length of a prefix")));
    let prefixes = std::env::args().skip(1).map(length).collect::<Result<Vec<usize>>>()?;
    let call = if prefixes.is_empty() { call() } else { call().with_prefixes(prefixes) };
    for (step, Step { loss, prefixes }) in train(pairs, call)?.into_iter().enumerate() {
        let of_prefixes: String = prefixes.iter().map(|loss| format!("  {loss:.5}")).collect();
        writeln!(io::stdout(), "step {step:2}  loss {loss:.5}{of_prefixes}")?;
    }
    Ok(())
}
