//! Results of a call, read when they are asked for.

use crate::cube::tensors::{dims, read, row_stride};
use crate::{Evaluation, Result};
use burn::cubecl::prelude::Client;
use burn::cubecl::server::Handle;
use burn_cubecl::tensor::CubeTensor;
use samtone::Tower;
use samtone::wgpu::Plan;

/// Where the results of a call are.
pub(crate) struct OnDevice {
    client: Client,
    plan: Plan,
    state: Handle,
    towers: [CubeTensor; 2],
}

impl std::fmt::Debug for OnDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnDevice").field("state", &self.state).finish_non_exhaustive()
    }
}

impl OnDevice {
    pub(super) fn new(client: Client, plan: Plan, state: Handle, towers: [CubeTensor; 2]) -> Self {
        Self { client, plan, state, towers }
    }

    /// Waits for the call, and reads what it left.
    pub(crate) fn evaluation(&self) -> Result<Evaluation> {
        let state = read(&self.client, self.state.clone())?;
        match self.plan.refusal(&state)? {
            None => self.plan.evaluation(&state),
            Some(refusal) => Err(self.plan.error_of(refusal, |tower, row| self.row_bytes(tower, row))),
        }
    }

    /// The bytes of an embedding.
    fn row_bytes(&self, tower: Tower, row: usize) -> Result<Vec<u8>> {
        let tensor = &self.towers[usize::from(tower == Tower::Passage)];
        let ([_, dim], bytes) = (dims(tensor), read(&self.client, tensor.handle.clone())?);
        let (start, size) = (row * row_stride(tensor), tensor.dtype.size());
        Ok(bytes[start * size..(start + dim) * size].to_vec())
    }
}
