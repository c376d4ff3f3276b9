//! The backend `cuda` for batches in host memory. It copies them to the first device, and the results back.

use super::arguments::{Pointers, Stream};
use super::buffer::Buffer;
use super::device::Device;
use super::probe;
use super::readout::Readout;
use crate::backend::Backend;
use crate::batch::{Batch, DataMut, Embeddings, EmbeddingsMut, copy_rows, for_each_dtype};
use crate::cuda::{Architecture, Cosines, GradientOutput, Plan, Problem, Slot, Tile};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::output::{Evaluation, GradientBuffers, TemperatureGradient, check_upstream};
use std::sync::OnceLock;

/// Computes on the first device that the kernels run on. Each call waits for its results.
#[derive(Debug)]
pub struct Cuda {
    clusters: bool,
    kept: bool,
}

impl Cuda {
    /// `cuda`: whatever plan suits the batch.
    pub const PLANNED: Self = Self { clusters: false, kept: false };
    #[doc(hidden)] // this one and the next two are for tests
    /// `cuda-kept`: the same, but cosines are stored for the gradient in any dimension.
    pub const KEPT: Self = Self { clusters: false, kept: true };
    #[doc(hidden)]
    /// `cuda-clusters`: the kernels of compute capability 9.0 for batches of any size. It is unavailable where these do not run.
    pub const CLUSTERS: Self = Self { clusters: true, kept: false };
    #[doc(hidden)]
    /// `cuda-clusters-kept`: both of these.
    pub const KEPT_CLUSTERS: Self = Self { clusters: true, kept: true };
}

/// The first device that the kernels run on. The whole process shares it. Once it was found, no call looks for it again.
fn device() -> Result<Device> {
    static ORDINAL: OnceLock<usize> = OnceLock::new();
    let ordinal = match ORDINAL.get() {
        Some(ordinal) => *ordinal,
        None => {
            let found = probe::first_supported()?.ordinal;
            *ORDINAL.get_or_init(|| found)
        }
    };
    Device::shared(ordinal)
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        match (self.clusters, self.kept) {
            (false, false) => "cuda",
            (false, true) => "cuda-kept",
            (true, false) => "cuda-clusters",
            (true, true) => "cuda-clusters-kept",
        }
    }

    fn dtypes(&self) -> &'static [DType] {
        &[DType::F32, DType::F16, DType::BF16]
    }

    fn available(&self) -> Result<()> {
        probe::available()?;
        if self.clusters && device()?.architecture() == Architecture::Sm80 {
            let (what, allowed) =
                ("kernels of 9.0 on this device".into(), "compute capability 9.0, and a driver for CUDA 12.8".into());
            return Err(Error::Unsupported { backend: self.name(), what, allowed });
        }
        Ok(())
    }

    fn loss_and_gradients_into(
        &self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        check_upstream(upstream)?;
        buffers.expect_shapes(batch.rows(), batch)?;
        let GradientBuffers { query, passage } = buffers;
        let problem = Problem::new(*batch.pairs(), batch.dtype(), batch.dim())?
            .with_row_strides(batch.query().row_stride(), batch.passage().row_stride())?
            .with_gradients(output(&query), output(&passage))?
            .with_upstream(upstream)?;
        let device = &device()?;
        let problem = problem.on(device.architecture());
        let problem =
            if self.clusters { problem.with_tile(Tile::Cluster).with_room_for(Tile::Cluster) } else { problem };
        let problem = if self.kept { problem.with_cosines(Cosines::Kept) } else { problem };
        let plan = Plan::new(&problem)?;
        let readout = Readout::new(&problem, &plan)?;

        let memory = |slot, purpose| Buffer::new(device, plan.slot_bytes(slot) as usize, purpose);
        let embeddings = [memory(Slot::Query, "the queries")?, memory(Slot::Passage, "the passages")?];
        let side = memory(Slot::Side, "keys and weights")?;
        let (state, workspace) = (memory(Slot::State, "the state")?, memory(Slot::Workspace, "the workspace")?);
        let gradients =
            [memory(Slot::QueryGradient, "the gradients")?, memory(Slot::PassageGradient, "the gradients")?];
        upload(&embeddings[0], batch.query())?;
        upload(&embeddings[1], batch.passage())?;
        side.upload(plan.side_data())?;
        let pointers = Pointers {
            query: embeddings[0].pointer(),
            passage: embeddings[1].pointer(),
            side: side.pointer(),
            state: state.pointer(),
            workspace: workspace.pointer(),
            query_gradient: gradients[0].pointer(),
            passage_gradient: gradients[1].pointer(),
            upstream: 0,
        };
        // SAFETY: every buffer has as many bytes as the plan says. It is freed after the results were waited for. If reading them fails,
        // freeing waits. The copies above are done. The stream always exists.
        let results = unsafe {
            device.loss_and_gradients(&plan, &pointers, Stream::PER_THREAD)?;
            device.results(&readout, &pointers, Stream::PER_THREAD)
        }?;
        // Both gradients must be on the host before one is written to the caller's buffer, so that an error changes neither.
        let downloaded =
            [query.is_some().then(|| gradients[0].download()), passage.is_some().then(|| gradients[1].download())];
        let [of_query, of_passage] = downloaded;
        let (of_query, of_passage) = (of_query.transpose()?, of_passage.transpose()?);
        for (buffer, bytes) in [(query, of_query), (passage, of_passage)] {
            if let (Some(buffer), Some(bytes)) = (buffer, bytes) {
                scatter(&bytes, buffer);
            }
        }
        Ok(results)
    }
}

/// How the device writes a gradient: contiguous, in the type of the buffer, or as f32 if kernels do not write that type.
fn output(buffer: &Option<EmbeddingsMut<'_>>) -> Option<GradientOutput> {
    buffer.as_ref().map(|x| GradientOutput { dtype: device_dtype(x.dtype()), row_stride: x.dim() })
}

fn device_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F32 } else { dtype }
}

/// Copies rows as they lie in memory, together with what lies between them.
fn upload(buffer: &Buffer<'_>, x: Embeddings<'_>) -> Result<()> {
    for_each_dtype!(Data, x.data(), data => buffer.upload(bytemuck::cast_slice(data)))
}

/// Copies contiguous rows into a buffer of any row stride.
fn scatter(bytes: &[u8], mut buffer: EmbeddingsMut<'_>) {
    fn values<T: Element>(bytes: &[u8]) -> impl Iterator<Item = T> {
        bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned)
    }
    let (dim, stride) = (buffer.dim(), buffer.row_stride());
    match buffer.data_mut() {
        DataMut::F64(to) => copy_rows(values::<f32>(bytes).map(f64::from), to, dim, stride),
        DataMut::F32(to) => copy_rows(values(bytes), to, dim, stride),
        DataMut::F16(to) => copy_rows(values(bytes), to, dim, stride),
        DataMut::BF16(to) => copy_rows(values(bytes), to, dim, stride),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_reach_their_rows_and_leave_what_is_between_them() -> Result<()> {
        let bytes: Vec<u8> = [1_f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let (mut narrow, mut wide) = ([-1_f32; 5], [-1_f64; 5]);
        scatter(&bytes, EmbeddingsMut::with_row_stride(&mut narrow[..], 2, 2, 3)?);
        scatter(&bytes, EmbeddingsMut::with_row_stride(&mut wide[..], 2, 2, 3)?);
        assert_eq!(narrow, [1.0, 2.0, -1.0, 3.0, 4.0]);
        assert_eq!(wide, [1.0, 2.0, -1.0, 3.0, 4.0]);
        Ok(())
    }
}
