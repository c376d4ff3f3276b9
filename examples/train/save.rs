//! Towers and embeddings as safetensors, results as JSON.

use super::data::TestSet;
use super::encoder::{Architecture, Towers};
use super::output::whole_file;
use super::trainer::{TestEmbeddings, Variant};
use anyhow::Result;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::Path;

/// Name of a variant in file names: `ade-spl-samtone_query-masked-prefixes`.
pub fn file_stem(variant: &Variant) -> String {
    let mask = match variant.mask {
        super::args::Mask::Off => "",
        super::args::Mask::On => "-masked",
    };
    let prefixes = if variant.prefixes { "-prefixes" } else { "" };
    format!("{}-{}{mask}{prefixes}", variant.architecture.slug(), variant.loss)
}

/// Writes `towers-….safetensors`: table.shared, or table.query and table.passage (buckets × width), projection (width × dim),
/// and the inverse document frequency of each bucket; the metadata tells how text is hashed.
pub fn save_towers(
    folder: &Path,
    variant: &Variant,
    towers: &Towers,
    inverse_frequency: &[f32],
    metadata: HashMap<String, String>,
) -> Result<()> {
    let (width, dim) = (towers.width, towers.dim);
    let names: &[&str] = match towers.architecture() {
        Architecture::Sde => &["table.shared"],
        Architecture::AdeSpl => &["table.query", "table.passage"],
    };
    let mut tensors = Vec::new();
    for (name, table) in names.iter().zip(&towers.tables) {
        tensors.push((*name, view(table, vec![table.len() / width, width])?));
    }
    tensors.push(("projection", view(&towers.projection, vec![width, dim])?));
    tensors.push(("inverse_frequency", view(inverse_frequency, vec![inverse_frequency.len()])?));
    write(&folder.join(format!("towers-{}.safetensors", file_stem(variant))), tensors, metadata)
}

/// Writes `embeddings-….safetensors`: query (queries × dim), passage (candidates × dim), and for each query the candidate that
/// is its positive.
pub fn save_embeddings(
    folder: &Path,
    variant: &Variant,
    embeddings: &TestEmbeddings,
    test: &TestSet,
    dim: usize,
) -> Result<()> {
    let positives: Vec<u32> = test.positives.iter().map(|p| *p as u32).collect();
    let positives = TensorView::new(Dtype::U32, vec![positives.len()], bytemuck::cast_slice(&positives))
        .map(|view| ("positive", view))?;
    let tensors = vec![
        ("query", view(&embeddings.queries, vec![test.queries.len(), dim])?),
        ("passage", view(&embeddings.candidates, vec![test.candidates.len(), dim])?),
        positives,
    ];
    write(&folder.join(format!("embeddings-{}.safetensors", file_stem(variant))), tensors, HashMap::new())
}

pub fn view(data: &[f32], shape: Vec<usize>) -> Result<TensorView<'_>> {
    Ok(TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(data))?)
}

pub fn write<N: AsRef<str> + Ord + std::fmt::Display>(
    path: &Path,
    tensors: Vec<(N, TensorView<'_>)>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    whole_file(path, |draft| Ok(safetensors::serialize_to_file(tensors, Some(metadata), draft)?))
}

#[cfg(test)]
mod tests {
    use super::super::args::Mask;
    use super::*;

    #[test]
    fn saved_towers_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let towers = Towers::new(Architecture::AdeSpl, 256, 3, 2, 5);
        let variant =
            Variant { architecture: Architecture::AdeSpl, loss: "pair".into(), mask: Mask::On, prefixes: true };
        save_towers(folder.path(), &variant, &towers, &[1.0; 256], HashMap::new()).unwrap();
        let bytes = std::fs::read(folder.path().join("towers-ade-spl-pair-masked-prefixes.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let table = file.tensor("table.passage").unwrap();
        assert_eq!(table.shape(), [256, 3]);
        assert_eq!(table.data(), bytemuck::cast_slice::<f32, u8>(&towers.tables[1]));
    }
}
