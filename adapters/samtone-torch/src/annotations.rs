//! Who belongs to whom, from vectors of Python.

use crate::dlpack::Tensor;
use crate::errors::{Refusal, invalid};
use crate::settings::Settings;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use samtone::{Batch, Pairs};

/// Capsules of the vectors that a batch may come with.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Capsules<'py> {
    query_ids: Option<Bound<'py, PyCapsule>>,
    passage_ids: Option<Bound<'py, PyCapsule>>,
    positives: Option<Bound<'py, PyCapsule>>,
    weights: Option<Bound<'py, PyCapsule>>,
    owners: Option<Bound<'py, PyCapsule>>,
}

/// The vectors, borrowed; those of other integers than the crate's are copied.
pub struct Annotations {
    query_ids: Option<Tensor>,
    passage_ids: Option<Tensor>,
    weights: Option<Tensor>,
    positives: Option<Vec<u32>>,
    owners: Option<Vec<i32>>,
}

fn import(argument: &'static str, capsule: &Option<Bound<'_, PyCapsule>>) -> PyResult<Option<Tensor>> {
    capsule.as_ref().map(|capsule| Tensor::import(argument, capsule)).transpose()
}

/// Indices in the crate's type; what does not fit is outside of its domain.
fn narrow<T: TryFrom<i64>>(argument: &'static str, values: &[i64], allowed: &str) -> Result<Vec<T>, Refusal> {
    let number = |(row, value): (usize, &i64)| {
        T::try_from(*value).map_err(|_| invalid(argument, format!("{value} at index {row}"), allowed))
    };
    values.iter().enumerate().map(number).collect()
}

/// `$target` with every vector there is; pairs and batches have the same methods for it.
macro_rules! described {
    ($self:ident, $target:ident, $settings:ident) => {{
        let mut target = $target;
        if let Some(positives) = &$self.positives {
            target = target.with_positives(positives)?;
        }
        if let Some(weights) = &$self.weights {
            target = target.with_weights(weights.vector()?)?;
        }
        if let Some(ids) = &$self.query_ids {
            target = target.with_query_ids(ids.vector()?)?;
        }
        if let Some(ids) = &$self.passage_ids {
            target = target.with_passage_ids(ids.vector()?)?;
        }
        target = target.with_shared_ids($settings.shared_ids)?;
        if let Some(owners) = &$self.owners {
            target = target.with_hard_negative_owners(owners, $settings.scope)?;
        }
        Ok(target)
    }};
}

impl Annotations {
    /// Takes what the capsules hold.
    pub fn import(capsules: &Capsules<'_>) -> PyResult<Self> {
        let positives = import("positives", &capsules.positives)?;
        let positives = positives.map(|t| narrow("positives", t.vector()?, "rows of the passages")).transpose()?;
        let owners = import("owners", &capsules.owners)?;
        let allowed = "-1 (everyone's) or a row of the queries";
        let owners = owners.map(|t| narrow("owners", t.vector()?, allowed)).transpose()?;
        Ok(Self {
            query_ids: import("query_ids", &capsules.query_ids)?,
            passage_ids: import("passage_ids", &capsules.passage_ids)?,
            weights: import("weights", &capsules.weights)?,
            positives,
            owners,
        })
    }

    /// The pairs they describe.
    pub fn pairs<'a>(&'a self, pairs: Pairs<'a>, settings: &Settings) -> Result<Pairs<'a>, Refusal> {
        described!(self, pairs, settings)
    }

    /// The batch they describe.
    pub fn batch<'a>(&'a self, batch: Batch<'a>, settings: &Settings) -> Result<Batch<'a>, Refusal> {
        described!(self, batch, settings)
    }
}
