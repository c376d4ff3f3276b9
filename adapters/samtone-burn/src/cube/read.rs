//! What is read from the device: results when they are asked for, and a temperature that is a tensor.

use super::launch;
use crate::{Error, Evaluation, Result, invalid};
use burn::backend::{DType, TensorMetadata};
use burn::cubecl::prelude::Client;
use burn::cubecl::server::Handle;
use burn_cubecl::tensor::CubeTensor;
use samtone::Tower;
use samtone::half::{bf16, f16};
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
            Some(refusal) => Err(self.plan.error_of(refusal, |tower, row| self.find(tower, row))),
        }
    }

    /// Column and value of the first element of a row that is not finite.
    fn find(&self, tower: Tower, row: usize) -> Result<(usize, f64)> {
        let tensor = &self.towers[usize::from(tower == Tower::Passage)];
        let [_, dim] = launch::dims(tensor);
        let bytes = read(&self.client, tensor.handle.clone())?;
        let start = row * launch::row_stride(tensor);
        let values = (start..start + dim).map(|at| element(&bytes, tensor.dtype, at).unwrap_or(f64::NAN));
        Ok(values.enumerate().find(|(_, value)| !value.is_finite()).unwrap_or((0, f64::NAN)))
    }
}

fn read(client: &Client, handle: Handle) -> Result<Vec<u8>> {
    let bytes = client.read_one(handle);
    bytes.map(|bytes| bytes.to_vec()).map_err(|error| Error::Wgpu { call: "read", reason: error.to_string() })
}

fn element(bytes: &[u8], dtype: DType, at: usize) -> Option<f64> {
    let bytes = bytes.get(at * dtype.size()..)?.get(..dtype.size())?;
    match dtype {
        DType::F64 => bytes.try_into().ok().map(f64::from_le_bytes),
        DType::F32 => bytes.try_into().ok().map(|x| f32::from_le_bytes(x).into()),
        DType::F16 => bytes.try_into().ok().map(|x| f16::from_le_bytes(x).into()),
        DType::BF16 => bytes.try_into().ok().map(|x| bf16::from_le_bytes(x).into()),
        _ => None,
    }
}

/// The number that a tensor of one element holds: waits for what the device still has to do.
pub(super) fn scalar(tensor: &CubeTensor) -> Result<f64> {
    const ARGUMENT: &str = "temperature";
    let (shape, dtype) = (tensor.shape(), tensor.dtype);
    let is_float = matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16);
    if shape.num_elements() != 1 || !is_float {
        let value = format!("a tensor of shape {:?} and type {}", shape.as_slice(), dtype.name());
        return Err(invalid(ARGUMENT, value, "one number, f64, f32, f16 or bf16"));
    }
    let bytes = read(&tensor.client, tensor.handle.clone())?;
    element(&bytes, dtype, 0).ok_or_else(|| invalid(ARGUMENT, format!("{} bytes", bytes.len()), "one number"))
}
