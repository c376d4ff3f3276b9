//! What is to be computed: everything about a call but its embeddings, in one value that every backend and adapter borrows.
//!
//! An option of a loss is a field here, a method that sets it, and where it is used. The adapters for candle and burn take a [`Call`] as it
//! is; what else may have to learn of an option is in the table of changes in ARCHITECTURE.md.

use crate::error::{Error, Result};
use crate::loss::Loss;
use crate::pairs::Pairs;

/// What to do with an embedding of norm zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ZeroNorm {
    /// [`Error::ZeroNorm`] names the row.
    #[default]
    Error,
    /// Its direction counts as 0: all its cosines are 0, and so is its gradient.
    ZeroGradient,
}

/// What to do with a row whose softmax has no term at all: every negative is masked, and the group holds no copy of the positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NoNegative {
    /// [`Error::NoNegative`] names the row and the group.
    #[default]
    Error,
    /// The row gets 0 from that group, for the loss and for the gradient. Its weight still counts in Σw, so the other rows
    /// get what they would get beside any other row.
    Zero,
}

/// Who sees a hard negative that has an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scope {
    /// Every row.
    #[default]
    All,
    /// Only the row that owns it; in the blocks QP and PP the others drop it.
    Own,
}

/// A loss, its temperature, what is known about the M queries and N passages of a batch, policies and bounds.
///
/// Methods only note what they are given. [`Batch::new`](crate::Batch::new) and [`Problem::new`](crate::Problem::new) check
/// all of it, as soon as M and N are known, and [`Call::check`] what can be checked before.
///
/// ```
/// use samtone::{Call, Loss};
/// let call = Call::new(Loss::samtone_query(), 0.01).with_passage_ids([3, 7, 3, 9]).with_margin(0.1);
/// assert!(call.check().is_ok());
/// let error = call.with_temperature(0.0).check().unwrap_err();
/// assert_eq!(error.to_string(), "argument `temperature` is 0; allowed: a number from 1e-6 to 1e6");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    pub(crate) loss: Loss,
    pub(crate) temperature: f64,
    pub(crate) margin: Option<f64>,
    pub(crate) zero_norm: ZeroNorm,
    pub(crate) no_negative: NoNegative,
    pub(crate) workspace_bytes: Option<usize>,
    pub(crate) tile_skipping: Option<f64>,
    pub(crate) positives: Option<Vec<u32>>,
    pub(crate) weights: Option<Vec<f32>>,
    pub(crate) query_ids: Option<Vec<i64>>,
    pub(crate) passage_ids: Option<Vec<i64>>,
    pub(crate) shared_ids: bool,
    pub(crate) owners: Option<(Vec<i32>, Scope)>,
    pub(crate) prefixes: Option<Vec<usize>>,
    pub(crate) prefix_weights: Option<Vec<f64>>,
}

impl Call {
    /// Smallest temperature. Below it f32 cosines, which resolve 6e-8, no longer determine the softmax.
    pub const MIN_TEMPERATURE: f64 = 1e-6;
    /// Largest temperature.
    pub const MAX_TEMPERATURE: f64 = 1e6;

    /// `loss` at the softmax temperature τ, from 1e-6 to 1e6; SamToNe uses 0.01. Logits are cosines divided by it. Row i's
    /// positive is passage i, and every other pair is a negative.
    pub fn new(loss: Loss, temperature: f64) -> Self {
        Self {
            loss,
            temperature,
            margin: None,
            zero_norm: ZeroNorm::Error,
            no_negative: NoNegative::Error,
            workspace_bytes: None,
            tile_skipping: None,
            positives: None,
            weights: None,
            query_ids: None,
            passage_ids: None,
            shared_ids: false,
            owners: None,
            prefixes: None,
            prefix_weights: None,
        }
    }

    /// Another loss, and its margin unless [`Call::with_margin`] was called.
    pub fn with_loss(mut self, loss: Loss) -> Self {
        self.loss = loss;
        self
    }

    /// Another temperature, as of a step of a training that learns it.
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Drops every negative whose cosine exceeds s⁺ᵢ + margin: a filter of false negatives. Of either sign;
    /// [`f64::INFINITY`] drops none. Default: that of the loss, [`Loss::margin`], which is 0.1 for Qwen3 and none for the others.
    pub fn with_margin(mut self, margin: f64) -> Self {
        self.margin = Some(margin);
        self
    }

    /// Policy for embeddings of norm zero.
    pub fn with_zero_norm(mut self, policy: ZeroNorm) -> Self {
        self.zero_norm = policy;
        self
    }

    /// Policy for rows of weight above 0 whose softmax has no term. It matters for groups without a copy of the positive alone,
    /// such as that of [`Loss::decoupled`]: a last batch of one row, or one of duplicates.
    pub fn with_no_negative(mut self, policy: NoNegative) -> Self {
        self.no_negative = policy;
        self
    }

    /// Bound on the memory a backend may take beyond O((M + N)·d). More lets it keep logits instead of computing them twice.
    /// Without one, a backend takes its own default: [`cpu::DEFAULT_WORKSPACE_BYTES`](crate::cpu::DEFAULT_WORKSPACE_BYTES).
    ///
    /// On the CPU it bounds tiles and panels. Outside it are some megabytes that do not grow with the batch: the sums of the
    /// tiles in flight, and the packing buffers that the matrix-product library keeps for each thread.
    ///
    /// The tighter the bound, the more pieces the work is cut into, and a plan lists the pieces on the host. So the least that works
    /// grows with the square of the batch, once there are more than 262,144 tiles on the CPU or 16,384 super-blocks on a GPU: a
    /// smaller bound is [`WorkspaceTooSmall`](crate::Error::WorkspaceTooSmall), which names the least.
    pub fn with_workspace_bytes(mut self, bytes: usize) -> Self {
        self.workspace_bytes = Some(bytes);
        self
    }

    /// Lets a backend leave out of the gradient what tiles of cosines with little softmax mass would add: for every row i at most
    /// the share η, `share`, of what its negatives get. Off by default; above 0 and below 1, such as 1e-3.
    ///
    /// Precisely: the derivatives ∂L/∂(β s_ij) that are left out, summed over all blocks and negatives j of row i, are at most
    /// η·Σ_j ∂L/∂(β s_ij) = η·|∂L/∂(β s⁺ᵢ)|. Loss, row losses, metrics and the derivative of the positive do not change, to the
    /// bit. What follows for the gradients of embeddings and temperature is derived in docs/skipping.md of the repository.
    ///
    /// It pays for batches that come in clusters at τ of 0.02 or less, ordered so that neighbouring rows belong together; batches
    /// of independent pairs lose nothing and gain nothing. Only the CUDA backend makes use of it; the others compute every tile,
    /// whose error of 0 is within any η. The CUDA backend refuses it together with prefixes.
    pub fn with_tile_skipping(mut self, share: f64) -> Self {
        self.tile_skipping = Some(share);
        self
    }

    /// π: for each of the M rows the passage of its positive, 0 ≤ π(i) < N. Several rows may share one. Default: 0, 1, 2, …
    pub fn with_positives(mut self, positives: impl Into<Vec<u32>>) -> Self {
        self.positives = Some(positives.into());
        self
    }

    /// w: a weight ≥ 0 for each of the M rows, with a sum above 0; the loss uses w / Σw. A row of weight 0 still is a negative of
    /// the others. Default: all equal.
    pub fn with_weights(mut self, weights: impl Into<Vec<f32>>) -> Self {
        self.weights = Some(weights.into());
        self
    }

    /// An identity for each of the M queries; queries of equal id are never negatives of each other, nor of each other's
    /// positives. Default: all different.
    pub fn with_query_ids(mut self, ids: impl Into<Vec<i64>>) -> Self {
        self.query_ids = Some(ids.into());
        self
    }

    /// An identity for each of the N passages; passages of equal id are never negatives of each other, nor of each other's
    /// queries. Default: all different.
    pub fn with_passage_ids(mut self, ids: impl Into<Vec<i64>>) -> Self {
        self.passage_ids = Some(ids.into());
        self
    }

    /// Whether query ids and passage ids name the same texts. If so, a passage with the id of row i's query, and a query with the
    /// id of its positive, are no negatives of row i either: pairs of sentences, or queries that are other rows' passages. Wants
    /// the ids of both. Default: no, a query and a passage may have one id and nothing in common.
    pub fn with_shared_ids(mut self, shared: bool) -> Self {
        self.shared_ids = shared;
        self
    }

    /// For each of the N passages the row whose hard negative it is, or −1 for everyone's; with [`Scope::Own`] the other rows
    /// drop it.
    pub fn with_hard_negative_owners(mut self, owners: impl Into<Vec<i32>>, scope: Scope) -> Self {
        self.owners = Some((owners.into(), scope));
        self
    }

    /// Matryoshka: ascending prefixes d₁ < … < d_K of the embeddings, none longer than they are. The loss becomes Σ_k v_k times the whole
    /// loss of the embeddings' first d_k entries, each with norms, cosines, margins and ranks of its own. Entries beyond d_K are not
    /// read, and their gradient is 0. Default: the whole embedding alone.
    pub fn with_prefixes(mut self, prefixes: impl Into<Vec<usize>>) -> Self {
        self.prefixes = Some(prefixes.into());
        self
    }

    /// v: a weight for each prefix, 0 or from 1e-30 to 1e30, not all 0. They are not normalised. A prefix of weight 0 is left out, from
    /// the work and from the results. Default: 1 each.
    pub fn with_prefix_weights(mut self, weights: impl Into<Vec<f64>>) -> Self {
        self.prefix_weights = Some(weights.into());
        self
    }

    /// The loss.
    pub fn loss(&self) -> &Loss {
        &self.loss
    }

    /// τ.
    pub fn temperature(&self) -> f64 {
        self.temperature
    }

    /// β = 1/τ.
    pub fn beta(&self) -> f64 {
        1.0 / self.temperature
    }

    /// m: what [`Call::with_margin`] was given, or else that of the loss; none if it is infinite.
    pub fn margin(&self) -> Option<f64> {
        self.margin.or(self.loss.margin()).filter(|m| m.is_finite())
    }

    /// Policy for embeddings of norm zero.
    pub fn zero_norm(&self) -> ZeroNorm {
        self.zero_norm
    }

    /// Policy for rows whose softmax has no term.
    pub fn no_negative(&self) -> NoNegative {
        self.no_negative
    }

    /// Bound on the workspace, in bytes, if set.
    pub fn workspace_bytes(&self) -> Option<usize> {
        self.workspace_bytes
    }

    /// η of [`Call::with_tile_skipping`], if set.
    pub fn tile_skipping(&self) -> Option<f64> {
        self.tile_skipping
    }

    /// Whether query ids and passage ids name the same texts.
    pub fn shared_ids(&self) -> bool {
        self.shared_ids
    }

    /// d₁ … d_K, if set.
    pub fn prefixes(&self) -> Option<&[usize]> {
        self.prefixes.as_deref()
    }

    /// v₁ … v_K, if set.
    pub fn prefix_weights(&self) -> Option<&[f64]> {
        self.prefix_weights.as_deref()
    }

    /// Checks what can be checked before M and N are known.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the argument, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        self.check_options()?;
        if let Some(weights) = &self.weights {
            check_weights(weights)?;
            if weights.iter().all(|&w| w == 0.0) {
                return Err(Error::invalid("weights", "0 in every row", "at least one weight above 0"));
            }
        }
        let missing = match (&self.query_ids, &self.passage_ids) {
            (Some(_), Some(_)) => None,
            (None, Some(_)) => Some("query ids"),
            (Some(_), None) => Some("passage ids"),
            (None, None) => Some("query ids and passage ids"),
        };
        if let Some(missing) = missing.filter(|_| self.shared_ids) {
            let allowed = "false, or query ids and passage ids with it";
            return Err(Error::invalid("shared_ids", format!("true without {missing}"), allowed));
        }
        Ok(())
    }

    /// What [`Call::check`] checks beside lists of rows and passages.
    pub(crate) fn check_options(&self) -> Result<()> {
        if !(Self::MIN_TEMPERATURE..=Self::MAX_TEMPERATURE).contains(&self.temperature) {
            let allowed = format!("a number from {:e} to {:e}", Self::MIN_TEMPERATURE, Self::MAX_TEMPERATURE);
            return Err(Error::invalid("temperature", self.temperature.to_string(), allowed));
        }
        if let Some(margin) = self.margin.filter(|&m| m.is_nan() || m == f64::NEG_INFINITY) {
            return Err(Error::invalid("margin", margin.to_string(), "a finite number, or infinity for no margin"));
        }
        if let Some(share) = self.tile_skipping.filter(|&share| !(share > 0.0 && share < 1.0)) {
            return Err(Error::invalid("tile_skipping", share.to_string(), "a number above 0 and below 1"));
        }
        crate::prefix::check(self.prefixes(), self.prefix_weights())
    }

    /// This call for M = `rows` queries against N = `passages` passages, 1 ≤ M ≤ N < 2³¹, all of it checked.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the argument, its value and what is allowed.
    pub fn pairs(&self, rows: usize, passages: usize) -> Result<Pairs<'_>> {
        const MOST: usize = i32::MAX as usize;
        if rows == 0 || rows > MOST {
            return Err(Error::invalid("rows", rows.to_string(), format!("1 to {MOST}")));
        }
        expect_as_many(rows, passages)?;
        if passages > MOST {
            return Err(Error::invalid("passages", passages.to_string(), format!("{rows} to {MOST}")));
        }
        self.check_lists(rows, passages)?;
        self.check()?;
        Ok(Pairs::of(self, rows, passages))
    }

    /// The lists alone, for that many queries and passages, of which there may be none.
    pub(crate) fn check_lists(&self, rows: usize, passages: usize) -> Result<()> {
        check_len("positives", self.positives.as_deref(), rows, "query")?;
        check_len("weights", self.weights.as_deref(), rows, "query")?;
        check_len("query_ids", self.query_ids.as_deref(), rows, "query")?;
        check_len("passage_ids", self.passage_ids.as_deref(), passages, "passage")?;
        let owners = self.owners.as_ref().map(|(owners, _)| owners.as_slice());
        check_len("owners", owners, passages, "passage")?;
        let positives = self.positives.as_deref().unwrap_or_default();
        if let Some(i) = positives.iter().position(|&n| n as usize >= passages) {
            let allowed = format!("0 to {}, the rows of the passages", passages - 1);
            return Err(Error::invalid("positives", format!("{} at row {i}", positives[i]), allowed));
        }
        let owners = owners.unwrap_or_default();
        if let Some(n) = owners.iter().position(|&o| o < -1 || i64::from(o) >= rows as i64) {
            let allowed = match rows {
                0 => "-1 (everyone's), for there is no row".into(),
                _ => format!("-1 (everyone's) or a row, 0 to {}", rows - 1),
            };
            return Err(Error::invalid("owners", format!("{} at passage {n}", owners[n]), allowed));
        }
        self.weights.as_deref().map_or(Ok(()), check_weights)
    }

    /// The same call without anything that has an entry for each row or passage.
    pub(crate) fn without_lists(&self) -> Self {
        Self { positives: None, weights: None, query_ids: None, passage_ids: None, owners: None, ..self.clone() }
    }
}

/// An error if there are fewer passages than queries.
pub(crate) fn expect_as_many(rows: usize, passages: usize) -> Result<()> {
    if rows > passages {
        let allowed = format!("at least as many rows as there are queries, {rows}");
        return Err(Error::invalid("passage", format!("{passages} rows"), allowed));
    }
    Ok(())
}

fn check_weights(weights: &[f32]) -> Result<()> {
    if let Some(i) = weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        let value = format!("{} at row {i}", weights[i]);
        return Err(Error::invalid("weights", value, "finite numbers of at least 0"));
    }
    Ok(())
}

fn check_len<T>(argument: &'static str, list: Option<&[T]>, wanted: usize, what: &str) -> Result<()> {
    match list {
        Some(list) if list.len() != wanted => {
            let allowed = format!("{wanted}, one for each {what}");
            Err(Error::invalid(argument, format!("a slice of {} elements", list.len()), allowed))
        }
        _ => Ok(()),
    }
}
