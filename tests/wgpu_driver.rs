//! The driver layer of the WGSL backend on this machine's device, even if that is software: the caller's buffers, calls in parts,
//! shards, what the device leaves for the caller's shaders, limits, and every way to be refused.
//!
//! Without a device the checks are reported as ignored. With `wgpu` in the variable `SAMTONE_REQUIRE` they fail instead.

mod support;

#[path = "wgpu_driver/call.rs"]
mod call;
#[path = "wgpu_driver/memory.rs"]
mod memory;
#[path = "wgpu_driver/refused.rs"]
mod refused;
#[path = "wgpu_driver/steps.rs"]
mod steps;

use libtest_mimic::Arguments;
use std::process::ExitCode;
use support::case::Expected;
use support::compare::{against_definition, verdict};
use support::data::{self, Kind};
use support::problem::{Outputs, Problem};
use support::report::{self, Listed, is_required};

/// A check by name; an error says what it found.
pub type Check = (&'static str, fn() -> Result<(), String>);

fn main() -> ExitCode {
    let absent = call::engine().err().filter(|_| !is_required("wgpu"));
    let checks = [steps::CHECKS, memory::CHECKS, refused::CHECKS].concat();
    let listed =
        checks.into_iter().map(|(name, check)| Listed::new("wgpu", name, move || Ok(check()?)).ignored(absent.clone()));
    report::run(&Arguments::from_args(), listed.collect())
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

/// What the definition gives.
pub fn expected(problem: &Problem, upstream: f64) -> Result<Expected, String> {
    let reference = samtone::backend::by_name("reference").map_err(text)?;
    problem.run(reference, samtone::DType::F64, upstream).map(Expected::from).map_err(text)
}

/// Whether `got` is what the definition gives for embeddings that `dtype` holds exactly.
pub fn compare(got: &Outputs, problem: &Problem, dtype: samtone::DType, upstream: f64) -> Result<(), String> {
    verdict(&against_definition(got, &expected(problem, upstream)?, problem, dtype, upstream))
}
