//! The native part of the Python package `samtone`: the contrastive losses of [`samtone`] on tensors of PyTorch.
//!
//! ```text
//! Python (python/samtone)             │ here
//! ops.py: custom operations           │ settings.rs     strings and numbers → loss, options
//!   capsules of tensors ──────────────┼─► dlpack.rs     capsules → slices, or addresses on a device; owns and gives back
//!   capsules of fresh gradients ──────┼─► annotations.rs ids, positives, owners, weights → pairs
//!                                     │   cpu.rs        one call on PyTorch's number of threads, without the interpreter's lock
//!                                     │   ranks.rs      one call of many processes, connected by a function of Python
//!                                     │   cuda.rs       plans and launches on PyTorch's memory and stream
//!                                     │   errors.rs     sentences → SamtoneError (ValueError), MemoryError, RuntimeError
//! ```

#![warn(missing_docs, clippy::undocumented_unsafe_blocks, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod annotations;
mod cpu;
mod cuda;
mod dlpack;
mod errors;
mod ranks;
mod settings;

use pyo3::prelude::*;

/// The module `samtone._native`.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("SamtoneError", module.py().get_type::<errors::SamtoneError>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<settings::Settings>()?;
    module.add_class::<cuda::CudaPlan>()?;
    module.add_class::<ranks::Ranks>()?;
    module.add_function(wrap_pyfunction!(settings::describe_loss, module)?)?;
    module.add_function(wrap_pyfunction!(settings::presets, module)?)?;
    module.add_function(wrap_pyfunction!(cpu::cpu_step, module)?)?;
    module.add_function(wrap_pyfunction!(cpu::addresses, module)?)?;
    module.add_function(wrap_pyfunction!(cpu::release_memory, module)?)?;
    Ok(())
}
