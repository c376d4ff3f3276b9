//! Every backend of the library, and those that only tests have.

use super::cuda_emulated::CudaEmulated;
use samtone::backend::{self, Backend};
use samtone::{Error, Result};

/// The reference first.
pub fn all() -> Vec<&'static dyn Backend> {
    backend::all().iter().copied().chain([&CudaEmulated as &dyn Backend]).collect()
}

/// The backend of that name; an error that lists all names otherwise.
pub fn by_name(name: &str) -> Result<&'static dyn Backend> {
    all().into_iter().find(|b| b.name() == name).ok_or_else(|| {
        let names: Vec<_> = all().iter().map(|b| b.name()).collect();
        let (argument, value, allowed) = ("backend", format!("{name:?}"), names.join(", "));
        Error::InvalidArgument { argument, value, allowed }
    })
}
