//! The compiled shaders of one device, and the calls that run them.

use super::buffers::Buffers;
use crate::error::{Error, Result};
use crate::wgpu::{Binding, Capabilities, Dispatch, Module, Plan, Products, Variant};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// The shaders of a device. Each is compiled once, when it is first used. Clones are cheap, and share what is compiled.
///
/// It has a device and a queue, which are the caller's or its own.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

type Entry = (Module, &'static str, Variant);

#[derive(Debug)]
struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    capabilities: Capabilities,
    alignment: u64,
    compiled: Mutex<Compiled>,
}

#[derive(Debug, Default)]
struct Compiled {
    modules: HashMap<(Module, Variant), wgpu::ShaderModule>,
    pipelines: HashMap<Entry, wgpu::ComputePipeline>,
}

impl Inner {
    fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        let (features, limits) = (device.features(), device.limits());
        let capabilities = Capabilities {
            max_binding_bytes: limits.max_storage_buffer_binding_size,
            max_buffer_bytes: limits.max_buffer_size,
            max_workgroups: limits.max_compute_workgroups_per_dimension,
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
            f16: features.contains(wgpu::Features::SHADER_F16),
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            products: Products::Fma,
            ..Capabilities::default()
        };
        Self {
            device: device.clone(),
            queue: queue.clone(),
            capabilities,
            alignment: u64::from(
                limits.min_storage_buffer_offset_alignment.max(limits.min_uniform_buffer_offset_alignment),
            ),
            compiled: Mutex::default(),
        }
    }
}

impl Engine {
    /// An engine on a device and queue of the caller. It uses all features and limits that the device was asked for, but for cooperative
    /// matrices. [`Engine::with_cooperative_matrices`] adds these, because only the adapter knows which ones there are.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        Self { inner: Arc::new(Inner::new(device, queue)) }
    }

    /// An engine on the same device and queue whose plans multiply in this way. It shares no compiled shaders with this one.
    pub(super) fn with_products(&self, products: Products) -> Self {
        let mut inner = Inner::new(&self.inner.device, &self.inner.queue);
        inner.capabilities.products = products;
        Self { inner: Arc::new(inner) }
    }

    /// The device.
    pub fn device(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// Its queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.inner.queue
    }

    /// What the device allows, for [`Plan::new`].
    pub fn capabilities(&self) -> &Capabilities {
        &self.inner.capabilities
    }

    /// Runs `action`. If wgpu reports an error meanwhile, that is the result.
    pub(super) fn guarded<T>(
        &self,
        call: &'static str,
        out_of_memory: Option<(u64, &'static str)>,
        action: impl FnOnce() -> T,
    ) -> Result<T> {
        let device = &self.inner.device;
        let scopes = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Validation]
            .map(|filter| device.push_error_scope(filter));
        let value = action();
        let errors = scopes.into_iter().rev().map(|scope| pollster::block_on(scope.pop())).collect::<Vec<_>>();
        match errors.into_iter().flatten().next() {
            None => Ok(value),
            Some(wgpu::Error::OutOfMemory { .. }) if out_of_memory.is_some() => {
                let (bytes, purpose) = out_of_memory.unwrap_or_default();
                Err(Error::OutOfMemory { bytes: bytes as usize, purpose })
            }
            Some(error) => Err(Error::Wgpu { call, reason: error.to_string() }),
        }
    }

    /// Compiles every shader of `plan` that is not compiled yet. Without this, the first call that needs a shader compiles it.
    ///
    /// # Errors
    /// [`Error::Wgpu`], with the words of the compiler.
    pub fn compile(&self, plan: &Plan) -> Result<()> {
        let variant = plan.variant();
        plan.forward().chain(plan.backward()).try_for_each(|d| self.pipeline((d.module, d.entry, variant)).map(drop))
    }

    /// Compiles like [`Engine::compile`], then runs every shader of `plan` once on no data, and waits. Some drivers put off a part of the
    /// compilation until the first run. After this call it is done, and delays no step.
    ///
    /// # Errors
    /// As [`Engine::compile`]. [`Error::OutOfMemory`] if there are not even a few KiB.
    pub fn warm_up(&self, plan: &Plan) -> Result<()> {
        use wgpu::BufferUsages;
        const BYTES: u64 = 1024; // more than any `Params`, or the results at the start of the state, take
        self.compile(plan)?;
        let Inner { device, queue, .. } = &*self.inner;
        // There is a buffer for each binding number, because no dispatch may read and write the same buffer. New buffers are zero, so
        // every count of work is 0. Shaders return at once or after loops over nothing, and what they write lies at the start.
        let numbers = plan.forward().chain(plan.backward()).flat_map(|d| &d.bindings).map(|b| b.index);
        let usage = |index| if index == 0 { BufferUsages::UNIFORM } else { BufferUsages::STORAGE };
        let memory = |index| self.allocate("warming up", BYTES, usage(index));
        let memory = (0..=numbers.max().unwrap_or(0)).map(memory).collect::<Result<Vec<_>>>()?;
        let mut seen = HashSet::new();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for dispatch in plan.forward().chain(plan.backward()).filter(|d| seen.insert((d.module, d.entry))) {
            let pipeline = self.pipeline((dispatch.module, dispatch.entry, plan.variant()))?;
            let resource = |b: &Binding| memory[b.index as usize].as_entire_binding();
            let entry = |b: &Binding| wgpu::BindGroupEntry { binding: b.index, resource: resource(b) };
            let entries: Vec<_> = dispatch.bindings.iter().map(entry).collect();
            self.guarded("warm_up", None, || {
                let layout = &pipeline.get_bind_group_layout(0);
                let descriptor = wgpu::BindGroupDescriptor { label: Some(dispatch.entry), layout, entries: &entries };
                let group = device.create_bind_group(&descriptor);
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                pass.set_pipeline(&pipeline);
                pass.set_bind_group(0, &group, &[]);
                pass.dispatch_workgroups(1, 1, 1);
            })?;
        }
        self.guarded("submit", None, || queue.submit([encoder.finish()]))?;
        let waited = device.poll(wgpu::PollType::wait_indefinitely());
        waited.map(drop).map_err(|error| Error::Wgpu { call: "poll", reason: error.to_string() })
    }

    fn pipeline(&self, entry: Entry) -> Result<wgpu::ComputePipeline> {
        let mut compiled = self.inner.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = compiled.pipelines.get(&entry) {
            return Ok(pipeline.clone());
        }
        let (module, name, variant) = entry;
        let shader = match compiled.modules.get(&(module, variant)) {
            Some(shader) => shader.clone(),
            None => self.guarded("create_shader_module", None, || self.shader(module, variant))?,
        };
        compiled.modules.insert((module, variant), shader.clone());
        let descriptor = wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: None,
            module: &shader,
            entry_point: Some(name),
            // No shader reads a word of workgroup memory before it was written.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        };
        let pipeline =
            self.guarded("create_compute_pipeline", None, || self.inner.device.create_compute_pipeline(&descriptor))?;
        compiled.pipelines.insert(entry, pipeline.clone());
        Ok(pipeline)
    }

    fn shader(&self, module: Module, variant: Variant) -> wgpu::ShaderModule {
        let source = module.source(variant, false);
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(module.name()),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        };
        // naga would add a counter that ends every loop, which keeps compilers from unrolling. Checks of accesses stay on.
        let checks = wgpu::ShaderRuntimeChecks { force_loop_bounding: false, ..wgpu::ShaderRuntimeChecks::checked() };
        // SAFETY: every loop of the shaders ends, because its counter only grows towards its bound. The bound is a constant, a member of
        // `Params`, or the length of a list in `side`. The last two are what plans say: `encode` demands it.
        unsafe { self.inner.device.create_shader_module_trusted(descriptor, checks) }
    }

    /// Records dispatches of a plan, with timestamps around them if wanted. It allocates no memory of the device. [`Step`] does the same
    /// with buffers of its own, and is safe.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] and [`Error::Misaligned`] for a buffer that is missing, too small, misplaced or of the wrong usage.
    /// [`Error::Wgpu`], with the words of wgpu. After an error, nothing is recorded.
    ///
    /// # Safety
    /// When the dispatches run, the slots `Uniforms` and `Side` must hold [`Plan::uniforms`] and [`Plan::side_data`] of this plan. In the
    /// other slots that are the plan's own, only its earlier dispatches may have written. Because of these contents the shaders' loops
    /// end, and their fragments lie within what is bound.
    ///
    /// [`Step`]: crate::wgpu::Step
    pub unsafe fn encode<'d>(
        &self,
        plan: &Plan,
        dispatches: impl IntoIterator<Item = &'d Dispatch>,
        buffers: &Buffers<'_>,
        encoder: &mut wgpu::CommandEncoder,
        timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Result<()> {
        let mut bound = Vec::new();
        for dispatch in dispatches {
            let pipeline = self.pipeline((dispatch.module, dispatch.entry, plan.variant()))?;
            let mut entries = Vec::with_capacity(dispatch.bindings.len());
            for binding in &dispatch.bindings {
                let range = buffers.get(binding.slot, plan, self.inner.alignment)?;
                let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: range.buffer,
                    offset: range.offset + binding.offset,
                    size: std::num::NonZeroU64::new(binding.bytes),
                });
                entries.push(wgpu::BindGroupEntry { binding: binding.index, resource });
            }
            bound.push((dispatch, pipeline, entries));
        }
        // All groups are made before anything is recorded, because a recording that fails would make the caller's encoder useless.
        let groups: Vec<_> = self.guarded("create_bind_group", None, || {
            let group = |(dispatch, pipeline, entries): &(&Dispatch, wgpu::ComputePipeline, Vec<_>)| {
                self.inner.device.create_bind_group(&wgpu::BindGroupDescriptor {
                    label: Some(dispatch.entry),
                    layout: &pipeline.get_bind_group_layout(0),
                    entries,
                })
            };
            bound.iter().map(group).collect()
        })?;
        self.guarded("encode", None, || {
            let mut pass =
                encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("samtone"), timestamp_writes });
            for ((dispatch, pipeline, _), group) in bound.iter().zip(&groups) {
                pass.set_pipeline(pipeline);
                pass.set_bind_group(0, group, &[]);
                pass.dispatch_workgroups(dispatch.workgroups[0], dispatch.workgroups[1], 1);
            }
        })
    }

    /// A buffer of that many bytes, but at least 4.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(super) fn allocate(
        &self,
        purpose: &'static str,
        bytes: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let size = bytes.next_multiple_of(4).max(4);
        let descriptor = wgpu::BufferDescriptor { label: Some(purpose), size, usage, mapped_at_creation: false };
        self.guarded("create_buffer", Some((size, purpose)), || self.inner.device.create_buffer(&descriptor))
    }

    /// Waits for everything that was submitted, then gives bytes of a buffer, which must have the usage `COPY_SRC`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond the buffer. [`Error::OutOfMemory`]. [`Error::Wgpu`] if the device was lost.
    pub fn read(&self, buffer: &wgpu::Buffer, bytes: std::ops::Range<u64>) -> Result<Vec<u8>> {
        use wgpu::BufferUsages;
        let Inner { device, queue, .. } = &*self.inner;
        if bytes.start > bytes.end || bytes.end > buffer.size() {
            return Err(Error::invalid("bytes", format!("{bytes:?}"), format!("a range within 0..{}", buffer.size())));
        }
        let start = bytes.start / 4 * 4;
        let len = (bytes.end - start).next_multiple_of(4);
        let usage = BufferUsages::COPY_DST | BufferUsages::MAP_READ;
        let staging = self.allocate("results on their way to the host", len, usage)?;
        self.guarded("copy_buffer_to_buffer", None, || {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(buffer, start, &staging, 0, len);
            queue.submit([encoder.finish()]);
        })?;
        let (send, receive) = std::sync::mpsc::channel();
        // If the device was lost, the buffer is invalid. Without the guard, wgpu would panic.
        self.guarded("map_async", None, || {
            staging.map_async(wgpu::MapMode::Read, .., move |result| drop(send.send(result)));
        })?;
        let failed = |reason: String| Error::Wgpu { call: "map_async", reason };
        device.poll(wgpu::PollType::wait_indefinitely()).map_err(|error| failed(error.to_string()))?;
        receive.recv().map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))?;
        let mapped = staging.get_mapped_range(..);
        let (first, last) = ((bytes.start - start) as usize, (bytes.end - start) as usize);
        Ok(mapped.map_err(|error| failed(error.to_string()))?[first..last].to_vec())
    }
}
