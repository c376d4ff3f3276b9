//! A plan, together with the buffers that it needs beside the caller's.

use super::buffers::{BufferRange, Buffers};
use super::engine::Engine;
use crate::error::{Error, Result};
use crate::output::{Evaluation, TemperatureGradient};
use crate::partials::Partials;
use crate::tower::Tower;
use crate::wgpu::{Dispatch, Plan, Slot};

/// A plan and its own buffers, which are allocated once and used by all calls. The caller brings embeddings and gradients.
///
/// Recording neither allocates nor waits. Results stay on the device, in [`Step::state`], until they are asked for.
///
/// Embeddings may change between a forward call and its backward call: see [`Step::backward`]. CUDA's `cuda::Step` differs there. It reads
/// the embeddings again and refuses those that have another norm.
#[derive(Debug)]
pub struct Step {
    engine: Engine,
    plan: Plan,
    own: Vec<(Slot, wgpu::Buffer)>,
}

impl Step {
    /// Allocates the buffers, compiles the shaders, and writes what is the same in all calls.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]. [`Error::Wgpu`], with the words of the compiler.
    pub fn new(engine: &Engine, plan: Plan) -> Result<Self> {
        use wgpu::BufferUsages;
        engine.compile(&plan)?;
        let mut own = Vec::new();
        for slot in Slot::ALL.into_iter().filter(|slot| !slot.is_callers() && plan.slot_bytes(*slot) > 0) {
            let usage = match slot {
                Slot::Uniforms => BufferUsages::UNIFORM | BufferUsages::COPY_DST,
                _ => BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC,
            };
            own.push((slot, engine.allocate(slot.name(), plan.slot_bytes(slot), usage)?));
        }
        for (slot, buffer) in &own {
            let content = match slot {
                Slot::Uniforms => plan.uniforms(),
                Slot::Side => plan.side_data(),
                _ => continue,
            };
            engine.guarded("write_buffer", None, || engine.queue().write_buffer(buffer, 0, content))?;
        }
        Ok(Self { engine: engine.clone(), plan, own })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    fn buffers(&self) -> Buffers<'_> {
        self.own.iter().fold(Buffers::new(), |buffers, (slot, buffer)| buffers.with(*slot, buffer))
    }

    /// The buffer with the results, for shaders of the caller. From byte 256 on it has these f32: the loss, P@1 and MRR of queries →
    /// passages, P@1 and MRR of passages → queries, ∂L/∂τ, ∂L/∂log β.
    pub fn state(&self) -> Option<&wgpu::Buffer> {
        self.own.iter().find(|(slot, _)| *slot == Slot::State).map(|(_, buffer)| buffer)
    }

    fn encode<'d>(
        &self,
        dispatches: impl IntoIterator<Item = &'d Dispatch>,
        callers: &Buffers<'_>,
        encoder: &mut wgpu::CommandEncoder,
        timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Result<()> {
        let buffers = self.buffers().or(callers);
        // SAFETY: the plan's own slots are this step's buffers, even if the caller gives others for them. `new` has written `Uniforms`
        // and `Side`, which nothing else can reach. The caller can get only one of the other buffers, the state. Its numbers decide no
        // loop and no address.
        unsafe { self.engine.encode(&self.plan, dispatches, &buffers, encoder, timestamp_writes) }
    }

    /// Records [`Step::forward`] and [`Step::backward`] at once, with timestamps around them if wanted. They give L, its metrics, ∂L/∂q
    /// (M × d), ∂L/∂p (N × d) and ∂L/∂τ. [`mod@crate::reference`] has the formulas.
    ///
    /// # Errors
    /// As [`Engine::encode`].
    pub fn loss_and_gradients(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        callers: &Buffers<'_>,
        timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Result<()> {
        let dispatches = self.plan.forward().chain(self.plan.backward());
        self.encode(dispatches, callers, encoder, timestamp_writes)
    }

    /// Records loss, metrics and coefficients of the embeddings in the slots `Query` and `Passage`.
    ///
    /// # Errors
    /// As [`Engine::encode`].
    pub fn forward(&self, encoder: &mut wgpu::CommandEncoder, callers: &Buffers<'_>) -> Result<()> {
        self.encode(self.plan.forward(), callers, encoder, None)
    }

    /// Records the first part of [`Step::forward`]: the sums of a shard. Until [`Step::combine`] has run, there are no results, and a
    /// backward call gives NaN.
    ///
    /// # Errors
    /// As [`Engine::encode`].
    pub fn partials(&self, encoder: &mut wgpu::CommandEncoder, callers: &Buffers<'_>) -> Result<()> {
        self.encode(self.plan.partials(), callers, encoder, None)
    }

    /// Records the second part of [`Step::forward`]: loss, metrics and coefficients from the sums of all shards. [`Step::write_partials`]
    /// must have written these, unless this step has all rows.
    ///
    /// # Errors
    /// As [`Engine::encode`].
    pub fn combine(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        self.encode(self.plan.combine(), &Buffers::new(), encoder, None)
    }

    /// Records gradients into the slots `QueryGradient` and `PassageGradient`, after [`Step::forward`].
    ///
    /// They belong to the embeddings that the forward call was given, because the step has a packed copy of these. The slots `Query` and
    /// `Passage` are not read. They may be left out, or hold anything by now, such as NaN or the next batch. Gradients are NaN if the
    /// forward call was refused ([`Step::results`] says why), or if none has run.
    ///
    /// # Errors
    /// As [`Engine::encode`].
    pub fn backward(&self, encoder: &mut wgpu::CommandEncoder, callers: &Buffers<'_>) -> Result<()> {
        self.encode(self.plan.backward(), callers, encoder, None)
    }

    fn read_state(&self) -> Result<Vec<u8>> {
        match self.state() {
            Some(state) => self.engine.read(state, 0..self.plan.state_bytes()),
            None => Err(Error::invalid("state", "no buffer", "a step with a state")),
        }
    }

    /// Waits, then gives loss and metrics of the last forward call, and the temperature's gradient of the last backward call.
    /// `embeddings` must be those of the call. The error for an element that is not finite looks its value up there, which needs the
    /// usage `COPY_SRC`.
    ///
    /// # Errors
    /// What was wrong with the embeddings: [`Error::NonFinite`], [`Error::ZeroNorm`], [`Error::NoNegative`]. [`Error::StateMismatch`] if
    /// no forward call has run yet, or only its first part. [`Error::Wgpu`] if the device was lost.
    pub fn results(&self, embeddings: &Buffers<'_>) -> Result<(Evaluation, TemperatureGradient)> {
        let state = self.read_state()?;
        if let Some(refusal) = self.plan.refusal(&state)? {
            return Err(self.plan.error_of(refusal, |tower, row| self.row_bytes(tower, row, embeddings)));
        }
        Ok((self.plan.evaluation(&state)?, self.plan.temperature(&state)?))
    }

    /// A row that is not finite, as the call read it.
    fn row_bytes(&self, tower: Tower, row: usize, embeddings: &Buffers<'_>) -> Result<Vec<u8>> {
        let slot = if tower == Tower::Query { Slot::Query } else { Slot::Passage };
        let BufferRange { buffer, offset, .. } = embeddings.get(slot, &self.plan, 1)?;
        if !buffer.usage().contains(wgpu::BufferUsages::COPY_SRC) {
            let value = format!("a buffer that cannot be read, with a value that is not finite in row {row}");
            return Err(Error::invalid(
                slot.name(),
                value,
                "finite numbers; the usage COPY_SRC, to learn which one is not",
            ));
        }
        let (dtype, stride, dim) = self.plan.raw(tower);
        let start = offset + (row * stride * dtype.bytes()) as u64;
        self.engine.read(buffer, start..start + (dim * dtype.bytes()) as u64)
    }

    /// Waits, then gives the sums of this shard.
    ///
    /// # Errors
    /// As [`Step::results`].
    pub fn read_partials(&self, embeddings: &Buffers<'_>) -> Result<Partials> {
        let state = self.read_state()?;
        match self.plan.refusal(&state)? {
            Some(refusal) => Err(self.plan.error_of(refusal, |tower, row| self.row_bytes(tower, row, embeddings))),
            None => self.plan.read_partials(&state),
        }
    }

    /// Writes the merged sums of all shards, for [`Step::combine`]. Waits for [`Step::partials`], which must have had the same embeddings.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for partial sums that do not cover all rows. [`Error::StateMismatch`] for those of another problem or
    /// of other embeddings, which have other cosines of positives, and if [`Step::partials`] has not run. [`Error::Wgpu`] if the device
    /// was lost.
    pub fn write_partials(&self, partials: &Partials) -> Result<()> {
        let (range, bytes) = self.plan.write_partials(partials)?;
        self.plan.check_embeddings(partials, &self.read_state()?)?;
        let Some(state) = self.state() else { return Ok(()) };
        self.engine.guarded("write_buffer", None, || self.engine.queue().write_buffer(state, range.start, &bytes))
    }
}
