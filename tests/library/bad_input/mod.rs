//! Bad input is an error that says which argument is wrong, what its value is and what is allowed. Outputs stay as they were, and the crate
//! works afterwards.

mod annotations;
mod calls;
mod inputs;

use crate::support::compare::{against_definition, verdict};
use crate::support::data::{Kind, problem};
use samtone::backend::{self, Backend};
use samtone::{Batch, Call, DType, Embeddings, EmbeddingsMut, Error, GradientBuffers, Loss, cpu};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const M: usize = 4;
const N: usize = 6;
const D: usize = 3;
/// What outputs hold before a call that must not touch them.
const PATTERN: f32 = -1234.5;

/// Embeddings without anything wrong.
fn towers() -> (Vec<f32>, Vec<f32>) {
    let wave = |len: usize, phase: f32| (0..len).map(|k| (k as f32 * 1.7 + phase).sin()).collect();
    (wave(M * D, 0.3), wave(N * D, 1.1))
}

/// SamToNe without anything wrong.
fn good() -> Call {
    Call::new(Loss::samtone_query(), 0.05)
}

fn batch<'a>(call: &'a Call, q: &'a [f32], p: &'a [f32]) -> samtone::Result<Batch<'a>> {
    Batch::new(call, Embeddings::new(q, M, D)?, Embeddings::new(p, N, D)?)
}

/// The sentence names the argument, its value and the domain.
#[track_caller]
fn expect_invalid<T>(result: samtone::Result<T>, argument: &str, value: &str, allowed: &str) {
    let Some(error) = result.err() else { panic!("{argument} = {value} was accepted") };
    match &error {
        Error::InvalidArgument { argument: a, value: v, allowed: l } => {
            assert_eq!(*a, argument, "{error}");
            assert!(v.contains(value), "no value {value:?} in: {error}");
            assert!(l.contains(allowed), "no domain {allowed:?} in: {error}");
        }
        other => panic!("{argument} = {value} gave another error: {other}"),
    }
    let sentence = error.to_string();
    assert!([argument, value, allowed].iter().all(|part| sentence.contains(part)), "{sentence}");
    still_works();
}

/// A correct call after the bad one gives correct numbers.
#[track_caller]
fn still_works() {
    let good = problem(Loss::samtone_query(), Kind::Random, (5, 7, 3), 0.05, 1, 0.0).unwrap();
    let [got, want] =
        ["cpu", "reference"].map(|name| good.run(backend::by_name(name).unwrap(), DType::F32, 1.0).unwrap());
    verdict(&against_definition(&got, &want.into(), &good.rounded(DType::F32), DType::F32, 1.0)).unwrap();
}

/// The error of a whole call; panics unless there is one and both outputs are untouched.
#[track_caller]
fn refused(backend: &dyn Backend, batch: &Batch<'_>, upstream: f64) -> Error {
    let mut dq = vec![PATTERN; batch.rows() * batch.dim()];
    let mut dp = vec![PATTERN; batch.passages() * batch.dim()];
    let buffers = GradientBuffers {
        query: Some(EmbeddingsMut::new(&mut dq, batch.rows(), batch.dim()).unwrap()),
        passage: Some(EmbeddingsMut::new(&mut dp, batch.passages(), batch.dim()).unwrap()),
    };
    let result = backend.loss_and_gradients_into(batch, upstream, buffers);
    let Some(error) = result.err() else { panic!("{} accepted it", backend.name()) };
    assert!(dq.iter().chain(&dp).all(|v| *v == PATTERN), "{} wrote before it refused: {error}", backend.name());
    still_works();
    error
}

/// The backends that run on this machine; the others refuse everything with the same sentence.
fn present() -> Vec<&'static dyn backend::Backend> {
    backend::all().iter().copied().filter(|b| b.available().is_ok()).collect()
}

/// The errors of every way to start a call.
#[track_caller]
fn refused_everywhere(batch: &Batch<'_>) -> Vec<Error> {
    let mut errors: Vec<_> = present().into_iter().map(|b| refused(b, batch, 1.0)).collect();
    errors.extend(cpu::forward(batch).err());
    errors.extend(samtone::loss_and_gradients(batch, 1.0).err());
    assert_eq!(errors.len(), present().len() + 2, "forward or loss_and_gradients accepted it");
    errors
}
