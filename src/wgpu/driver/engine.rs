//! Compiled shaders of one device, and what runs them.

use super::buffers::Buffers;
use crate::error::{Error, Result};
use crate::wgpu::{Binding, Capabilities, Dispatch, Module, Plan, Products, Variant};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// The shaders of a device: compiled when first used, once. Cheap to clone; clones share what is compiled.
///
/// It owns nothing but handles of a device and a queue, the caller's or its own.
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
    /// On a device and queue of the caller. Whatever features and limits the device was asked for are used; cooperative matrices
    /// after [`Engine::with_cooperative_matrices`], because only the adapter knows which ones there are.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        Self { inner: Arc::new(Inner::new(device, queue)) }
    }

    /// On the first device found, discrete GPUs before integrated ones before software; with every feature and the highest limits
    /// that help.
    ///
    /// # Errors
    /// [`Error::WgpuUnavailable`] where there is no adapter, or none that gives a device.
    pub fn first() -> Result<Self> {
        let unavailable = |reason: String| Error::WgpuUnavailable { reason };
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::PRIMARY;
        let instance = wgpu::Instance::new(descriptor.with_env());
        let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
        let rank = |kind| match kind {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        adapters.sort_by_key(|adapter| rank(adapter.get_info().device_type));
        let mut reasons = Vec::new();
        for adapter in &adapters {
            match Self::on(adapter) {
                Ok(engine) => return Ok(engine),
                Err(error) => reasons.push(format!("{}: {error}", adapter.get_info().name)),
            }
        }
        Err(unavailable(if reasons.is_empty() { "no adapter was found".into() } else { reasons.join("; ") }))
    }

    /// On a device of its own of an adapter, with every feature and the highest limits that help. Cooperative matrices are used
    /// where the adapter has them and they give, on a small batch, what plain arithmetic gives.
    ///
    /// # Errors
    /// [`Error::WgpuUnavailable`] if the adapter gives no device.
    pub fn on(adapter: &wgpu::Adapter) -> Result<Self> {
        if has_cooperative_matrices(adapter)
            && let Ok(engine) = Self::request(adapter, wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
        {
            return Ok(engine.with_cooperative_matrices(adapter));
        }
        Self::request(adapter, wgpu::Features::empty())
    }

    /// With cooperative matrices, if the device was asked for the feature, its adapter multiplies the fragments that the shaders
    /// need, and they give on a small batch what plain arithmetic gives; else as it was. For clones made earlier, nothing changes.
    pub fn with_cooperative_matrices(self, adapter: &wgpu::Adapter) -> Self {
        let Inner { device, queue, .. } = &*self.inner;
        let asked = device.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        if !asked || !has_cooperative_matrices(adapter) || !self.agrees(Products::Cooperative) {
            return self;
        }
        let mut inner = Inner::new(device, queue);
        inner.capabilities.products = Products::Cooperative;
        Self { inner: Arc::new(inner) }
    }

    /// Whether `products` give, on a small batch, what plain arithmetic gives on this device; not if either fails,
    /// or if the device lacks what they need.
    pub fn agrees(&self, products: Products) -> bool {
        super::check::agrees(self, products)
    }

    fn request(adapter: &wgpu::Adapter, experimental: wgpu::Features) -> Result<Self> {
        let wanted = wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP | wgpu::Features::TIMESTAMP_QUERY;
        let experimental_features = if experimental.is_empty() {
            wgpu::ExperimentalFeatures::disabled()
        } else {
            // SAFETY: what may go wrong with the experimental feature that is asked for, cooperative matrices, is that a
            // driver's are wrong or that it does not check their bounds. The first is checked before they are used; and shaders
            // load and store whole fragments within what plans bind (`Tower::padded`, whole tiles of scratch).
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("samtone"),
            required_features: (adapter.features() & wanted) | experimental,
            required_limits: adapter.limits(),
            experimental_features,
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|error| Error::WgpuUnavailable { reason: error.to_string() })?;
        Ok(Self::new(&device, &queue))
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

    /// Runs `action`; what wgpu reports meanwhile becomes the error.
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

    /// Compiles every shader of `plan` that is not compiled yet; otherwise the first call that needs one does.
    ///
    /// # Errors
    /// [`Error::Wgpu`] with the words of the compiler.
    pub fn compile(&self, plan: &Plan) -> Result<()> {
        let variant = plan.variant();
        plan.forward().chain(plan.backward()).try_for_each(|d| self.pipeline((d.module, d.entry, variant)).map(drop))
    }

    /// Compiles like [`Engine::compile`], then runs every shader of `plan` once on nothing, and waits: what a driver keeps of the
    /// compilation for the first run is done then, and delays no step.
    ///
    /// # Errors
    /// As [`Engine::compile`]; [`Error::OutOfMemory`] for a few KiB.
    pub fn warm_up(&self, plan: &Plan) -> Result<()> {
        use wgpu::BufferUsages;
        const BYTES: u64 = 1024; // more than any `Params` has, and the results at the start of the state
        self.compile(plan)?;
        let Inner { device, queue, .. } = &*self.inner;
        // One buffer for each number, since none may be read and written in one dispatch. New buffers are zero: every count of work
        // is, so shaders return at once or after loops over nothing, and what they write lies at the start.
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
            // Every word of workgroup memory is written before it is read.
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
        // Counters that end every loop keep compilers from unrolling. Accesses stay checked.
        let checks = wgpu::ShaderRuntimeChecks { force_loop_bounding: false, ..wgpu::ShaderRuntimeChecks::checked() };
        // SAFETY: every loop of the shaders ends: its bound is a constant, or a member of `Params` or the lengths of the lists in
        // `side`, which hold what plans say (`encode`), and its counter only grows towards it.
        unsafe { self.inner.device.create_shader_module_trusted(descriptor, checks) }
    }

    /// Records dispatches of a plan, with timestamps around them if wanted. Allocates no memory of the device. [`Step`] does it on
    /// buffers of its own, and is safe.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] and [`Error::Misaligned`] for a buffer that is missing, too small, misplaced or of the wrong
    /// usage; [`Error::Wgpu`] with the words of wgpu. Nothing is recorded then.
    ///
    /// # Safety
    /// When the dispatches run, the slots `Uniforms` and `Side` hold [`Plan::uniforms`] and [`Plan::side_data`] of this plan, and
    /// the plan's other own slots what only its earlier dispatches have written: the shaders' loops end, and their fragments lie
    /// within what is bound, because of what is there.
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
        // First, because a recording that has failed spoils the caller's encoder.
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

    /// A buffer of so many bytes, at least 4.
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

    /// Waits for everything submitted, and gives the content of a buffer with the usage `COPY_SRC`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond the buffer; [`Error::OutOfMemory`]; [`Error::Wgpu`] if the device was lost.
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
        // Of a lost device the buffer is invalid, which wgpu would panic about.
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

/// Whether the adapter multiplies fragments of 16 x 16 f16 into f32, as shaders/common/cooperative.wgsl does.
fn has_cooperative_matrices(adapter: &wgpu::Adapter) -> bool {
    use wgpu::CooperativeScalarType::{F16, F32};
    adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
        && adapter
            .cooperative_matrix_properties()
            .iter()
            .any(|p| (p.m_size, p.n_size, p.k_size) == (16, 16, 16) && (p.ab_type, p.cr_type) == (F16, F32))
}
