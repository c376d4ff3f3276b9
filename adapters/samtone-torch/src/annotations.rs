//! A call with what is known about its batch, from vectors of Python.

use crate::dlpack::Tensor;
use crate::errors::{Refusal, invalid};
use crate::settings::Settings;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use samtone::Call;

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

/// Indices in the crate's type; what does not fit is outside of its domain.
fn narrow<T: TryFrom<i64>>(argument: &'static str, values: &[i64], allowed: &str) -> Result<Vec<T>, Refusal> {
    let number = |(row, value): (usize, &i64)| {
        T::try_from(*value).map_err(|_| invalid(argument, format!("{value} at index {row}"), allowed))
    };
    values.iter().enumerate().map(number).collect()
}

impl Capsules<'_> {
    /// The call of `settings` with a copy of what the capsules hold.
    pub fn call(&self, settings: &Settings) -> PyResult<Call> {
        let mut call = settings.call.clone();
        if let Some(capsule) = &self.positives {
            let tensor = Tensor::import("positives", capsule)?;
            call = call.with_positives(narrow::<u32>("positives", tensor.vector()?, "rows of the passages")?);
        }
        if let Some(capsule) = &self.weights {
            call = call.with_weights(Tensor::import("weights", capsule)?.vector()?);
        }
        if let Some(capsule) = &self.query_ids {
            call = call.with_query_ids(Tensor::import("query_ids", capsule)?.vector()?);
        }
        if let Some(capsule) = &self.passage_ids {
            call = call.with_passage_ids(Tensor::import("passage_ids", capsule)?.vector()?);
        }
        if let Some(capsule) = &self.owners {
            let tensor = Tensor::import("owners", capsule)?;
            let owners = narrow::<i32>("owners", tensor.vector()?, "-1 (everyone's) or a row of the queries")?;
            call = call.with_hard_negative_owners(owners, settings.scope);
        }
        Ok(call)
    }
}
