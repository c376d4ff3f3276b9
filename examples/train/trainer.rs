//! One run: training with a loss of this crate, and its measurements.

use super::args::{Args, Mask};
use super::data::{Dataset, TestSet, Uniqueness, text_id, uniqueness};
use super::encoder::{Architecture, TouchedRows, Towers};
use super::features::{Features, Featuriser, InverseFrequency};
use super::geometry::{positives_of, same_tower_ratios, tower_gap};
use super::matrix::{leading_columns, normalise_rows};
use super::optimizer::{Adam, RowAdagrad};
use super::retrieval::{Retrieval, Scores, retrieve};
use anyhow::{Context, Result};
use samtone::{Batch, Call, Embeddings, EmbeddingsMut, GradientBuffers, Loss, Tower, cpu};
use serde::Serialize;
use std::collections::HashMap;
use std::time::Instant;

/// Length of the character n-grams.
const NGRAM: usize = 3;
/// Held-out evaluations along a run, besides the one before the first step.
const EVALUATIONS: usize = 5;

/// The data as the encoders read it.
pub struct Prepared {
    /// Training queries and passages.
    pub train: [Features; 2],
    /// Ids of their texts.
    pub ids: [Vec<i64>; 2],
    test_queries: Features,
    test_candidates: Features,
    inverse_frequency: InverseFrequency,
    /// Held-out texts and relevance.
    pub test: TestSet,
    /// How often training queries repeat.
    pub queries: Uniqueness,
    /// How often training passages repeat.
    pub passages: Uniqueness,
    /// Mean number of hash buckets of a training query and passage.
    pub mean_buckets: [f64; 2],
}

impl Prepared {
    /// Hashes all texts; the weights come from training texts alone.
    pub fn new(data: Dataset, args: &Args) -> Self {
        let featuriser = Featuriser { buckets: args.buckets(), max_words: args.max_words as usize, ngram: NGRAM };
        let q = featuriser.counts(data.train.iter().map(|p| p.query.as_str()));
        let p = featuriser.counts(data.train.iter().map(|p| p.passage.as_str()));
        let idf = InverseFrequency::fit(featuriser.buckets, &[&q, &p]);
        let ids = [
            data.train.iter().map(|p| text_id(&p.query)).collect::<Vec<_>>(),
            data.train.iter().map(|p| text_id(&p.passage)).collect(),
        ];
        let train = [idf.weigh(q), idf.weigh(p)];
        Self {
            mean_buckets: [train[0].mean_buckets(), train[1].mean_buckets()],
            queries: uniqueness(&ids[0]),
            passages: uniqueness(&ids[1]),
            train,
            ids,
            test_queries: idf.weigh(featuriser.counts(data.test.queries.iter().map(String::as_str))),
            test_candidates: idf.weigh(featuriser.counts(data.test.candidates.iter().map(String::as_str))),
            test: data.test,
            inverse_frequency: idf,
        }
    }

    /// Weight of each bucket.
    pub fn inverse_frequency(&self) -> &[f32] {
        self.inverse_frequency.weights()
    }

    /// What a reader of saved towers must know to use them.
    pub fn metadata(&self, variant: &Variant, seed: u64, args: &Args) -> HashMap<String, String> {
        let entries = [
            ("architecture", variant.architecture.slug().to_string()),
            ("loss", variant.loss.clone()),
            ("duplicates_masked", (variant.mask == Mask::On).to_string()),
            ("prefixes", if variant.prefixes { format!("{:?}", args.prefixes) } else { "none".into() }),
            ("seed", seed.to_string()),
            ("steps", args.steps.unwrap_or(0).to_string()),
            ("hash", "xxh3_64, seed 1 for words, 2 for n-grams of <word>; bucket = hash mod buckets".into()),
            ("buckets", args.buckets().to_string()),
            ("max_words", args.max_words.to_string()),
            ("ngram", NGRAM.to_string()),
            ("weights", "(1 + ln count) * inverse_frequency, scaled to sum 1".into()),
        ];
        entries.into_iter().map(|(k, v)| (k.to_string(), v)).collect()
    }

    /// Training pairs.
    pub fn train_pairs(&self) -> usize {
        self.ids[0].len()
    }
}

/// What distinguishes a run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Variant {
    /// What the towers share.
    pub architecture: Architecture,
    /// Name of the preset.
    pub loss: String,
    /// Whether duplicates are masked.
    pub mask: Mask,
    /// Whether the prefixes of the command line are trained, too.
    pub prefixes: bool,
}

/// Seconds by part of a run.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Timing {
    /// Encoding the batches.
    pub encode: f64,
    /// The loss and its gradients.
    pub loss: f64,
    /// Backward pass of the encoders and the optimisers.
    pub update: f64,
    /// Held-out evaluations.
    pub evaluate: f64,
}

/// A step of training, measured on its batch.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// Loss, nats.
    pub loss: f64,
    /// That of each prefix, if prefixes are trained.
    pub prefix_losses: Vec<f64>,
    /// In-batch MRR, query → passage; the loss computes it along the way.
    pub in_batch_mrr: f64,
}

/// What a run leaves behind.
pub struct Outcome {
    /// What was run.
    pub variant: Variant,
    /// One for each step.
    pub steps: Vec<Step>,
    /// (step, scores) on held-out queries; the last is the result.
    pub curve: Vec<(usize, Scores)>,
    /// After the last step, with the leading entries of embeddings alone: one for each of the command line's lengths, if they are compared.
    pub by_length: Vec<Scores>,
    /// Seconds.
    pub timing: Timing,
    /// Query–first candidate cosines.
    pub top_cosines: Vec<f32>,
    /// sim(qᵢ,qⱼ) / sim(qᵢ,pⱼ).
    pub ratios: Vec<f64>,
    /// ‖mean q̂ − mean p̂‖.
    pub tower_gap: f64,
}

impl Outcome {
    /// Scores after the last step.
    pub fn scores(&self) -> Scores {
        self.curve[self.curve.len() - 1].1
    }
}

/// Embeddings of the held-out texts.
pub struct TestEmbeddings {
    /// queries × dim.
    pub queries: Vec<f32>,
    /// candidates × dim.
    pub candidates: Vec<f32>,
}

/// Embeds the held-out texts.
pub fn embed_test(towers: &Towers, data: &Prepared) -> TestEmbeddings {
    TestEmbeddings {
        queries: towers.encode_all(Tower::Query, &data.test_queries),
        candidates: towers.encode_all(Tower::Passage, &data.test_candidates),
    }
}

/// Towers before the first step of any run with this seed.
pub fn initial_towers(architecture: Architecture, args: &Args, seed: u64) -> Towers {
    Towers::new(architecture, args.buckets(), args.width as usize, args.dim(), seed)
}

fn evaluate(towers: &Towers, data: &Prepared) -> Retrieval {
    let TestEmbeddings { queries, candidates } = embed_test(towers, data);
    retrieve(&data.test, queries, candidates, towers.dim)
}

/// Trains one variant; returns its measurements and towers. `progress` is called after each step.
pub fn train(
    variant: &Variant,
    seed: u64,
    data: &Prepared,
    args: &Args,
    progress: impl Fn(usize, &Step),
) -> Result<(Outcome, Towers)> {
    let call = args.call(Loss::by_name(&variant.loss)?, variant.prefixes);
    let total_steps = args.steps.unwrap_or(0) as usize;
    let mut trainer = Trainer::new(initial_towers(variant.architecture, args, seed));
    let mut order = Batches::new(data.train_pairs(), args.batch as usize, seed);
    let mut timing = Timing::default();
    let mut steps = Vec::with_capacity(total_steps);
    let mut curve = Vec::new();
    let mut last = evaluate(&trainer.towers, data);
    curve.push((0, last.scores));
    for step in 0..total_steps {
        let decay = 1.0 - step as f32 / total_steps as f32;
        let rates = (args.table_rate * decay, args.projection_rate * decay);
        let batch = order.next();
        let measured = trainer
            .step(&call, variant.mask, data, batch, rates, &mut timing)
            .with_context(|| format!("{} with {}, step {step}", variant.architecture.label(), call.loss()))?;
        progress(step + 1, &measured);
        steps.push(measured);
        let now = step + 1;
        if now * EVALUATIONS / total_steps != step * EVALUATIONS / total_steps {
            let start = Instant::now();
            last = evaluate(&trainer.towers, data);
            curve.push((now, last.scores));
            timing.evaluate += start.elapsed().as_secs_f64();
        }
    }
    let towers = trainer.towers;
    let TestEmbeddings { mut queries, mut candidates } = embed_test(&towers, data);
    let is_compared = args.compared_with_prefixes().contains(&(variant.loss.clone(), variant.mask));
    let lengths = if is_compared { args.lengths() } else { Vec::new() };
    let search = |length: usize| {
        let [queries, candidates] = [&queries, &candidates].map(|rows| leading_columns(rows, towers.dim, length));
        retrieve(&data.test, queries, candidates, length).scores
    };
    let by_length = lengths.into_iter().map(search).collect();
    normalise_rows(&mut queries, towers.dim);
    normalise_rows(&mut candidates, towers.dim);
    let positives = positives_of(&data.test, &candidates, towers.dim);
    let outcome = Outcome {
        variant: variant.clone(),
        steps,
        curve,
        by_length,
        timing,
        top_cosines: last.top_cosines,
        ratios: same_tower_ratios(&queries, &positives, towers.dim, seed),
        tower_gap: tower_gap(&queries, &positives, towers.dim),
    };
    Ok((outcome, towers))
}

/// Towers and the state of their optimisers.
struct Trainer {
    towers: Towers,
    tables: Vec<RowAdagrad>,
    projection: Adam,
    workspace: cpu::Workspace,
}

impl Trainer {
    fn new(towers: Towers) -> Self {
        let tables = towers.tables.iter().map(|t| RowAdagrad::new(t.len() / towers.width)).collect();
        let projection = Adam::new(towers.projection.len());
        Self { towers, tables, projection, workspace: cpu::Workspace::new() }
    }

    fn step(
        &mut self,
        call: &Call,
        mask: Mask,
        data: &Prepared,
        batch: &[u32],
        (table_rate, projection_rate): (f32, f32),
        timing: &mut Timing,
    ) -> Result<Step> {
        let start = Instant::now();
        let [query_features, passage_features] = &data.train;
        let query = self.towers.encode(Tower::Query, query_features, batch);
        let passage = self.towers.encode(Tower::Passage, passage_features, batch);
        let encoded = Instant::now();

        let (rows, dim) = (batch.len(), self.towers.dim);
        let mut call = call.clone();
        if mask == Mask::On {
            let [of_queries, of_passages] =
                data.ids.each_ref().map(|ids| batch.iter().map(|i| ids[*i as usize]).collect::<Vec<_>>());
            call = call.with_query_ids(of_queries).with_passage_ids(of_passages);
        }
        let inputs = Batch::new(
            &call,
            Embeddings::new(&query.embeddings, rows, dim)?,
            Embeddings::new(&passage.embeddings, rows, dim)?,
        )?;
        let (mut query_gradient, mut passage_gradient) = (vec![0.0; rows * dim], vec![0.0; rows * dim]);
        let buffers = GradientBuffers {
            query: Some(EmbeddingsMut::new(&mut query_gradient, rows, dim)?),
            passage: Some(EmbeddingsMut::new(&mut passage_gradient, rows, dim)?),
        };
        let (evaluation, _) = self.workspace.loss_and_gradients_into(&inputs, 1.0, buffers)?;
        let computed = Instant::now();

        let mut projection_gradient = vec![0.0; self.towers.projection.len()];
        let mut pooled = self.towers.backward(&query, &query_gradient, &mut projection_gradient);
        let of_passages = self.towers.backward(&passage, &passage_gradient, &mut projection_gradient);
        match self.towers.architecture() {
            Architecture::Sde => {
                pooled.extend(of_passages);
                self.update_table(0, &[(query_features, batch), (passage_features, batch)], &pooled, table_rate);
            }
            Architecture::AdeSpl => {
                for (tower, features, pooled) in
                    [(Tower::Query, query_features, pooled), (Tower::Passage, passage_features, of_passages)]
                {
                    self.update_table(self.towers.table_of(tower), &[(features, batch)], &pooled, table_rate);
                }
            }
        }
        self.projection.step(&mut self.towers.projection, &projection_gradient, projection_rate);

        timing.encode += (encoded - start).as_secs_f64();
        timing.loss += (computed - encoded).as_secs_f64();
        timing.update += computed.elapsed().as_secs_f64();
        let prefix_losses = evaluation.prefixes.iter().map(|prefix| prefix.loss).collect();
        Ok(Step { loss: evaluation.loss, prefix_losses, in_batch_mrr: evaluation.query_to_passage.mrr })
    }

    fn update_table(&mut self, table: usize, parts: &[(&Features, &[u32])], pooled_gradient: &[f32], rate: f32) {
        let width = self.towers.width;
        let state = &mut self.tables[table].accumulators;
        let touched = TouchedRows::new(state.len(), parts);
        touched.update(&mut self.towers.tables[table], state, width, pooled_gradient, |row, accumulator, gradient| {
            RowAdagrad::step(row, accumulator, gradient, rate);
        });
    }
}

/// Batches of a random order of the pairs, a new one each epoch; a rest smaller than a batch is left out.
pub struct Batches {
    order: Vec<u32>,
    batch: usize,
    at: usize,
    rng: fastrand::Rng,
}

impl Batches {
    /// Of so many pairs.
    pub fn new(pairs: usize, batch: usize, seed: u64) -> Self {
        // Past the end, so that the first call shuffles.
        Self { order: (0..pairs as u32).collect(), batch, at: pairs, rng: fastrand::Rng::with_seed(seed) }
    }

    /// Indices of pairs.
    pub fn next(&mut self) -> &[u32] {
        if self.at + self.batch > self.order.len() {
            self.rng.shuffle(&mut self.order);
            self.at = 0;
        }
        self.at += self.batch;
        &self.order[self.at - self.batch..self.at]
    }
}
