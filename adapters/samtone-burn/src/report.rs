//! What a call found, beside its loss.

use crate::{Evaluation, Result};

/// Loss, row losses, P@1 and MRR of a call.
#[derive(Debug, Clone)]
pub struct Report {
    evaluation: Evaluation,
}

impl Report {
    pub(crate) fn known(evaluation: Evaluation) -> Self {
        Self { evaluation }
    }

    /// The loss in f64, that of every row, P@1 and MRR.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn evaluation(&self) -> Result<Evaluation> {
        Ok(self.evaluation.clone())
    }
}
