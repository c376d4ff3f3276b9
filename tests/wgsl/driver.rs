//! The driver layer of the WGSL backend on this machine's device, even if that is software: the caller's buffers, calls in parts,
//! shards, what the device leaves for the caller's shaders, limits, and every way to be refused.
//!
//! Without a device the checks are reported as ignored. With `wgpu` in the variable `SAMTONE_REQUIRE` they fail instead.

mod call;
mod memory;
mod prefixes;
mod refused;
mod steps;

use crate::support::case::Expected;
use crate::support::compare::{against_definition, verdict};
use crate::support::data::{self, Kind};
use crate::support::problem::{Outputs, Problem};
use crate::support::report::{Listed, is_required};

/// A check by name; an error says what it found.
pub type Check = (&'static str, fn() -> Result<(), String>);

pub fn trials() -> Vec<Listed> {
    let absent = call::engine().err().filter(|_| !is_required("wgpu"));
    let checks = [steps::CHECKS, prefixes::CHECKS, memory::CHECKS, refused::CHECKS].concat();
    let listed = |(name, check): Check| Listed::new("wgpu", name, move || Ok(check()?)).ignored(absent.clone());
    checks.into_iter().map(listed).collect()
}

/// An error with this text, unless the condition holds.
pub fn demand(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(format!("not as demanded: {}", otherwise())) }
}

pub fn text(value: impl ToString) -> String {
    value.to_string()
}

/// A problem with hard negatives, of an odd dimension.
pub fn sample(loss: samtone::Loss, seed: u64) -> Result<Problem, String> {
    sized(loss, (70, 93, 37), seed)
}

pub fn sized(loss: samtone::Loss, shape: (usize, usize, usize), seed: u64) -> Result<Problem, String> {
    data::problem(loss, Kind::Random, shape, 0.05, seed, 0.0).map_err(text)
}

/// The problem with prefixes that end anywhere, and of which the last is shorter than the embeddings.
pub fn nested(problem: Problem) -> Problem {
    let last = problem.dim - 3;
    problem.with(|call| call.with_prefixes([5, 6, 18, last]).with_prefix_weights([0.5, 1.0, 3.0, 0.25]))
}

/// What the definition gives.
pub fn expected(problem: &Problem, upstream: f64) -> Result<Expected, String> {
    let reference = samtone::backend::by_name("reference").map_err(text)?;
    problem.run(reference, samtone::DType::F64, upstream).map(Expected::from).map_err(text)
}

/// Whether `got` is what the definition gives for embeddings that `dtype` holds exactly.
pub fn compare(got: &Outputs, problem: &Problem, dtype: samtone::DType, upstream: f64) -> Result<(), String> {
    verdict(&against_definition(got, &expected(problem, upstream)?, problem, dtype, upstream))
}
