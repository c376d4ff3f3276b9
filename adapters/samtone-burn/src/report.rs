//! What a call found, beside its loss.

#[cfg(feature = "wgpu")]
use crate::cube::OnDevice;
use crate::{Evaluation, Result};
#[cfg(feature = "wgpu")]
use std::sync::Arc;

/// Loss, row losses, P@1 and MRR of a call, wherever they are.
#[derive(Debug, Clone)]
pub struct Report(Found);

#[derive(Debug, Clone)]
enum Found {
    Here(Evaluation),
    #[cfg(feature = "wgpu")]
    OnDevice(Arc<OnDevice>),
}

impl Report {
    pub(crate) fn known(evaluation: Evaluation) -> Self {
        Self(Found::Here(evaluation))
    }

    #[cfg(feature = "wgpu")]
    pub(crate) fn on_device(results: OnDevice) -> Self {
        Self(Found::OnDevice(Arc::new(results)))
    }

    /// The loss in f64, that of every row, P@1 and MRR. On a wgpu device, this waits for the call and reads them back; until then the
    /// report keeps the call's embeddings and O(M + N) numbers there.
    ///
    /// # Errors
    /// On a wgpu device, what the CPU and CUDA refuse in `forward` is found here: embeddings that are not finite or, by default, of norm zero,
    /// by row, and a row without any negative if the loss needs one. Until then, the loss and the gradients of such a call are
    /// NaN.
    pub fn evaluation(&self) -> Result<Evaluation> {
        match &self.0 {
            Found::Here(evaluation) => Ok(evaluation.clone()),
            #[cfg(feature = "wgpu")]
            Found::OnDevice(results) => results.evaluation(),
        }
    }
}

#[cfg(test)]
mod tests {
    /// Training programs hand losses and reports to other threads.
    #[test]
    fn builder_and_report_go_to_other_threads() {
        fn goes<T: Send + Sync + 'static>() {}
        goes::<crate::SamToNe>();
        goes::<crate::Report>();
        goes::<crate::Temperature>();
    }
}
