//! The training of this example as one file, for the same training in a framework.

use super::args::Args;
use super::encoder::Architecture;
use super::features::Features;
use super::save::{view, write};
use super::trainer::{Batches, Prepared, initial_towers};
use anyhow::Result;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::Path;

/// Writes pairs, initial parameters of a symmetric dual encoder and the batches of `--steps` steps, all of the first seed.
///
/// Texts are rows of equal length: `query_buckets`, `query_weights` (pairs × most buckets of a text, filled up with bucket 0
/// and weight 0), and the same for `passage_`. Besides: `query_ids` and `passage_ids` (pairs, 64-bit integers; equal texts have
/// equal ids), `table` (buckets × width), `projection` (width × dim), `batches` (steps × batch, indices of pairs).
pub fn export(path: &Path, data: &Prepared, args: &Args) -> Result<()> {
    let towers = initial_towers(Architecture::Sde, args, args.seed);
    let (steps, batch) = (args.steps.unwrap_or(0) as usize, args.batch as usize);
    let mut order = Batches::new(data.train_pairs(), batch, args.seed);
    let batches: Vec<u32> = (0..steps).flat_map(|_| order.next().to_vec()).collect();

    let texts = data.train.each_ref().map(Padded::new);
    let mut tensors = Vec::new();
    for ((prefix, padded), ids) in ["query", "passage"].iter().zip(&texts).zip(&data.ids) {
        let shape = vec![ids.len(), padded.length];
        let integers = |name: &str| format!("{prefix}_{name}");
        tensors.push((
            integers("buckets"),
            TensorView::new(Dtype::U32, shape.clone(), bytemuck::cast_slice(&padded.buckets))?,
        ));
        tensors.push((integers("weights"), view(&padded.weights, shape)?));
        tensors.push((integers("ids"), TensorView::new(Dtype::I64, vec![ids.len()], bytemuck::cast_slice(ids))?));
    }
    tensors.push(("table".into(), view(&towers.tables[0], vec![args.buckets(), towers.width])?));
    tensors.push(("projection".into(), view(&towers.projection, vec![towers.width, towers.dim])?));
    tensors.push(("batches".into(), TensorView::new(Dtype::U32, vec![steps, batch], bytemuck::cast_slice(&batches))?));
    write(path, tensors, HashMap::new())
}

/// Texts of equal length.
struct Padded {
    length: usize,
    buckets: Vec<u32>,
    weights: Vec<f32>,
}

impl Padded {
    fn new(features: &Features) -> Self {
        let rows = || (0..features.len()).map(|text| features.row(text));
        let length = rows().map(<[_]>::len).max().unwrap_or(0);
        let (mut buckets, mut weights) = (Vec::new(), Vec::new());
        for (text, row) in rows().enumerate() {
            buckets.extend(row.iter().map(|(bucket, _)| *bucket));
            weights.extend(row.iter().map(|(_, weight)| *weight));
            buckets.resize((text + 1) * length, 0);
            weights.resize((text + 1) * length, 0.0);
        }
        Self { length, buckets, weights }
    }
}

#[cfg(test)]
mod tests {
    use super::super::data::{Pair, Split, split_by_group};
    use super::*;
    use clap::Parser;
    use safetensors::SafeTensors;

    /// What is read back gives the embeddings of the example's own encoder, padding and all.
    #[test]
    fn an_exported_text_has_the_embedding_of_the_encoder() {
        let pairs = (0..240).map(|i| Pair {
            query: format!("count the {i} sheep{}", " again".repeat(i % 3)),
            passage: format!("fn sheep_{i}() -> u32 {{ {} }}", i % 7),
            group: Some(i.to_string()),
        });
        let split = Split { test_fraction: 0.25, max_test: 60, min_train: 16, seed: 1 };
        let dataset = split_by_group(pairs.collect(), "sheep".into(), &split).unwrap();
        let args = ["train", "--batch", "16", "--steps", "5", "--table-bits", "8", "--width", "6", "--dim", "3"];
        let args = Args::parse_from(args).resolve().unwrap();
        let data = Prepared::new(dataset, &args);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("exported.safetensors");
        export(&path, &data, &args).unwrap();

        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
        let integers = |name: &str| -> Vec<u32> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
        let (table, projection) = (floats("table"), floats("projection"));
        assert_eq!(file.tensor("batches").unwrap().shape(), [5, 16]);
        let batch = &integers("batches")[64..];
        let towers = initial_towers(Architecture::Sde, &args, args.seed);
        for (prefix, tower, features) in
            [("query", samtone::Tower::Query, &data.train[0]), ("passage", samtone::Tower::Passage, &data.train[1])]
        {
            let (buckets, weights) = (integers(&format!("{prefix}_buckets")), floats(&format!("{prefix}_weights")));
            let length = file.tensor(&format!("{prefix}_buckets")).unwrap().shape()[1];
            let want = towers.encode(tower, features, batch).embeddings;
            for (text, want) in batch.iter().zip(want.chunks_exact(3)) {
                let span = *text as usize * length..(*text as usize + 1) * length;
                let mut got = [0.0; 3];
                for (bucket, weight) in buckets[span.clone()].iter().zip(&weights[span]) {
                    for (w, h) in table[*bucket as usize * 6..][..6].iter().enumerate() {
                        (0..3).for_each(|k| got[k] += weight * h * projection[w * 3 + k]);
                    }
                }
                assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-5), "{got:?} {want:?}");
            }
        }
    }
}
