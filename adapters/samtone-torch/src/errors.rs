//! Errors of the crate as exceptions.

use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use samtone::Error;

pyo3::create_exception!(
    samtone,
    SamtoneError,
    PyValueError,
    "A call was refused; the sentence names the argument, its value and what is allowed."
);

/// Why a call was refused, on its way to an exception.
#[derive(Debug)]
pub struct Refusal(pub Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<Refusal> for PyErr {
    fn from(Refusal(error): Refusal) -> Self {
        let sentence = in_python(&error);
        match error {
            Error::OutOfMemory { .. } => PyMemoryError::new_err(sentence),
            // Not about what the caller passed.
            Error::Cuda { .. } | Error::CudaUnavailable { .. } | Error::DriverTooOld { .. } | Error::Engine { .. } => {
                PyRuntimeError::new_err(sentence)
            }
            _ => SamtoneError::new_err(sentence),
        }
    }
}

/// The sentence, with the names that things have in Python.
fn in_python(error: &Error) -> String {
    let sentence = error.to_string();
    match error {
        Error::ZeroNorm { .. } | Error::NoNegative { .. } => policies_in_python(&sentence),
        Error::InvalidArgument { argument: "owners", .. } => sentence.replacen("`owners`", "`hard_negative_owners`", 1),
        Error::InvalidArgument { argument: "query_ids" | "passage_ids" | "weights" | "positives", .. } => {
            sentence.replacen("a slice of", "a tensor of", 1)
        }
        Error::Unsupported { backend: "cuda, wgpu", .. } => sentence.replacen("`cuda, wgpu`", "`cuda`", 1),
        Error::Unsupported { backend: "cuda", .. } => {
            sentence.replace("; the backends `cpu`, `wgpu` and `reference` take them", ", or embeddings on the CPU")
        }
        Error::InvalidArgument { argument: "prefix_weights", .. } => sentence.replacen("a slice of", "a list of", 1),
        Error::InvalidArgument { argument: "call", .. } => sentence.replacen("argument `call`", "the call", 1),
        // The sentence of the rank that failed, of whatever kind of error.
        Error::Rank { .. } => policies_in_python(&sentence)
            .replace("argument `owners`", "argument `hard_negative_owners`")
            .replace("a slice of", "a list of"),
        _ => sentence,
    }
}

fn policies_in_python(sentence: &str) -> String {
    sentence
        .replace("`ZeroNorm::ZeroGradient` in the call", "`zero_norm=\"zero_gradient\"`")
        .replace("`NoNegative::Zero` in the call", "`no_negative=\"zero\"`")
}

/// The sentence for an argument outside its domain.
pub fn invalid(argument: &'static str, value: impl Into<String>, allowed: impl Into<String>) -> Refusal {
    Refusal(Error::InvalidArgument { argument, value: value.into(), allowed: allowed.into() })
}
