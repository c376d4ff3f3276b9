//! Allocation that gives an error if there is no memory.

use crate::error::{Error, Result};

/// Makes `buffer` hold `len` numbers of any value. If there is no memory for them, this is an error, while a plain allocation would abort.
pub(crate) fn reserve(buffer: &mut Vec<f32>, len: usize, purpose: &'static str) -> Result<()> {
    if buffer.len() < len {
        buffer.clear(); // so that growing does not copy the old content
        let bytes = len.saturating_mul(size_of::<f32>());
        buffer.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { bytes, purpose })?;
    }
    buffer.resize(len, 0.0);
    Ok(())
}
