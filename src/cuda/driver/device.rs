//! One GPU: its primary context, the kernels loaded there, and launches on any stream.

use super::arguments::{Parameters, Pointers, Stream};
use super::entry::{Driver, Handle, LaunchAttribute, LaunchConfig};
use super::probe::{self, Candidate};
use super::{codes, ptx};
use crate::cuda::{Architecture, Launch, Plan};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Dynamic shared memory that every kernel may have without asking the driver.
const FREE_SHARED_BYTES: u32 = 48 << 10;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MAX_DYNAMIC_SHARED: c_int = 8;
/// `CU_JIT_INFO_LOG_BUFFER` and `…_SIZE_BYTES`, `CU_JIT_ERROR_LOG_BUFFER` and `…_SIZE_BYTES`.
const LOG_OPTIONS: [c_int; 4] = [3, 4, 5, 6];
/// Launches can overlap from this compute capability on, whose kernels can wait for earlier launches, and from this version of CUDA on,
/// which keeps the overlap when it captures launches into a graph.
const OVERLAPS: ((u32, u32), (u32, u32)) = ((9, 0), (12, 3));

/// A GPU whose kernels are compiled once, on first use, and can then be launched from any thread on any stream.
///
/// It works in the device's primary context. cudarc, candle, cubecl and PyTorch use that context, too, so their memory and streams can be
/// passed to it. Each call leaves the thread's current context as it was. Clones are the same device.
///
/// The driver compiles the PTX for the device when a kernel is first needed, and keeps the result on disk. That takes some seconds on a
/// machine's first run, and far less later. [`Device::load`] does it ahead of time.
///
/// Dropping the last clone waits for the whole context and unloads the kernels. So a graph of captured calls must not be launched after
/// that.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
    /// Whether a launch may begin before the previous one is complete.
    overlaps: bool,
}

struct Inner {
    driver: &'static Driver,
    ordinal: usize,
    handle: c_int,
    context: Handle,
    name: String,
    capability: (u32, u32),
    architecture: Architecture,
    can_overlap: bool,
    modules: Mutex<HashMap<&'static str, Module>>,
}

/// A module of PTX that the driver has compiled.
struct Module {
    handle: Handle,
    functions: HashMap<String, Function>,
}

#[derive(Clone)]
struct Function {
    handle: Handle,
    /// Bytes of each parameter.
    parameters: Arc<[usize]>,
    /// Dynamic shared memory that the driver has allowed it, in bytes.
    shared_bytes: u32,
}

// SAFETY: any thread may use handles of contexts, modules and functions. The driver locks what it must.
unsafe impl Send for Inner {}
// SAFETY: the same holds for several threads at once.
unsafe impl Sync for Inner {}

/// While it lives, the device's context is the thread's current one.
pub(super) struct Current<'a> {
    driver: &'a Driver,
    pushed: bool,
    /// A pointer makes this value stay on its thread, whose current context it changes.
    thread: PhantomData<*const ()>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: one handle is written. A failure leaves the context current. A destructor cannot report it.
            let _ = unsafe { self.driver.cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A failure means that the process is ending and the driver has already stopped, or that a fault has destroyed the context.
        let current = current(self.driver, self.context);
        let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Kernels may still be running or enqueued. The driver does not promise that unloading waits for them, so we wait.
        // SAFETY: the function has no parameters.
        if current.is_ok() && (modules.is_empty() || unsafe { self.driver.cuCtxSynchronize() }.is_ok()) {
            for module in modules.values() {
                // SAFETY: this is the only owner of the module. No call is launching from it, because each holds a clone of the device.
                // All launches are done.
                let _ = unsafe { self.driver.cuModuleUnload(module.handle) };
            }
        }
        drop(current);
        // SAFETY: the context was retained once, in `Device::from_candidate`.
        let _ = unsafe { self.driver.cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

/// Makes the context current if it is not, until the result is dropped.
fn current(driver: &Driver, context: Handle) -> Result<Current<'_>> {
    let mut before = std::ptr::null_mut();
    // SAFETY: one handle is written.
    unsafe { driver.cuCtxGetCurrent(&mut before) }?;
    let pushed = before != context;
    if pushed {
        // SAFETY: the primary context is retained for as long as the device lives.
        unsafe { driver.cuCtxPushCurrent_v2(context) }?;
    }
    Ok(Current { driver, pushed, thread: PhantomData })
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { ordinal, name, capability, .. } = &*self.inner;
        f.debug_struct("Device").field("ordinal", ordinal).field("name", name).field("capability", capability).finish()
    }
}

impl Device {
    /// The device of that ordinal among those that the process sees. It retains the primary context, and makes it if there is none yet.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an ordinal beyond the last device, [`Error::DeviceUnsupported`] for one of compute
    /// capability below 8.0, [`Error::Cuda`] if it cannot be used now; otherwise as [`available`](super::available).
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::from_candidate(Candidate::new(ordinal)?.supported()?)
    }

    /// The first device that the kernels run on.
    ///
    /// # Errors
    /// As [`available`](super::available), and [`Error::Cuda`] if it cannot be used now.
    pub fn first() -> Result<Self> {
        Self::from_candidate(probe::first_supported()?)
    }

    fn from_candidate(candidate: Candidate) -> Result<Self> {
        let Candidate { driver, ordinal, handle, name, capability, multiprocessors } = candidate;
        let version = probe::supported_version(driver)?;
        let architecture = match capability {
            (9, 0) if ptx::reads_hopper(version) => Architecture::Sm90a { multiprocessors },
            _ => Architecture::Sm80,
        };
        let mut context = std::ptr::null_mut();
        // SAFETY: one handle is written. It is released when the last clone is dropped.
        unsafe { driver.cuDevicePrimaryCtxRetain(&mut context, handle) }?;
        let modules = Mutex::default();
        let can_overlap = capability >= OVERLAPS.0 && version >= OVERLAPS.1 && driver.has_attributes();
        Ok(Self {
            overlaps: can_overlap,
            inner: Arc::new(Inner {
                driver,
                ordinal,
                handle,
                context,
                name,
                capability,
                architecture,
                can_overlap,
                modules,
            }),
        })
    }

    /// Switches overlapping launches on or off, for this clone and for those made of it. A launch of a call may then begin before the
    /// previous one is complete (programmatic dependent launch). Its kernel waits before it touches memory, so results are the same. The
    /// time from one launch to the next should be shorter, but this has not been measured.
    ///
    /// Launches overlap by default on devices of compute capability 9.0 and later with a driver for CUDA 12.3 and later. On others this
    /// changes nothing.
    #[must_use]
    pub fn with_overlapping_launches(mut self, overlaps: bool) -> Self {
        self.overlaps = overlaps && self.inner.can_overlap;
        self
    }

    /// Whether launches may overlap: see [`Device::with_overlapping_launches`].
    pub fn overlaps_launches(&self) -> bool {
        self.overlaps
    }

    /// Its index among the devices that the process sees.
    pub fn ordinal(&self) -> usize {
        self.inner.ordinal
    }

    /// Its name, as the driver gives it.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its compute capability, major and minor.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.inner.capability
    }

    /// The kernels that plans for this device take by default: those of 9.0 if it has compute capability 9.0 and its driver reads their
    /// PTX, which is of a later version than that of the others.
    pub fn architecture(&self) -> Architecture {
        self.inner.architecture
    }

    /// The primary context, a `CUcontext` as a number, to compare with another library's.
    pub fn context(&self) -> u64 {
        self.inner.context.addr() as u64
    }

    pub(super) fn driver(&self) -> &'static Driver {
        self.inner.driver
    }

    pub(super) fn current(&self) -> Result<Current<'_>> {
        current(self.inner.driver, self.inner.context)
    }

    /// Compiles and loads every kernel of a plan, so that no later call has to. A capture does not allow loading. Otherwise it only spares
    /// the first call the time.
    ///
    /// # Errors
    /// [`Error::Cuda`] with the log of the driver's compiler, and [`Error::DriverTooOld`].
    pub fn load(&self, plan: &Plan) -> Result<()> {
        let _current = self.current()?;
        let launches = plan.forward().iter().chain(plan.backward()).chain(plan.backward_alone());
        launches.into_iter().try_for_each(|launch| self.function(launch).map(drop))
    }

    /// The function of a launch, if it is loaded and the driver has allowed it the launch's shared memory.
    fn loaded(modules: &HashMap<&'static str, Module>, launch: &Launch) -> Option<Function> {
        let function = modules.get(launch.module)?.functions.get(&launch.kernel)?;
        (launch.shared_bytes <= FREE_SHARED_BYTES.max(function.shared_bytes)).then(|| function.clone())
    }

    /// The functions of these launches, which are loaded if they are not yet. The context must be current.
    fn functions<'l>(
        &self,
        launches: impl Iterator<Item = &'l Launch> + Clone,
        stream: Stream,
    ) -> Result<Vec<Function>> {
        let loaded = {
            let modules = self.inner.modules.lock().unwrap_or_else(PoisonError::into_inner);
            launches.clone().map(|launch| Self::loaded(&modules, launch)).collect()
        };
        if let Some(functions) = loaded {
            return Ok(functions);
        }
        // During a capture, loading would fail and invalidate the capture.
        self.expect_no_capture(stream, "`Device::load` loads the kernels beforehand")?;
        launches.map(|launch| self.function(launch)).collect()
    }

    /// The function of a launch. Loads it, and asks the driver to allow it the launch's shared memory, if that was not done yet. The
    /// context must be current.
    fn function(&self, launch: &Launch) -> Result<Function> {
        let mut modules: MutexGuard<'_, _> = self.inner.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let source =
            ptx::module(launch.module).ok_or_else(|| self.mismatch(launch, "a kernel file that is built in"))?;
        if !modules.contains_key(source.name) {
            let module = Module { handle: self.load_module(source)?, functions: HashMap::new() };
            modules.insert(source.name, module);
        }
        let Some(module) = modules.get_mut(source.name) else {
            return Err(self.mismatch(launch, "a kernel file that is built in"));
        };
        if !module.functions.contains_key(&launch.kernel) {
            let function = self.load_function(launch, source, module.handle)?;
            module.functions.insert(launch.kernel.clone(), function);
        }
        let Some(function) = module.functions.get_mut(&launch.kernel) else {
            return Err(self.mismatch(launch, "a kernel of its file"));
        };
        if launch.shared_bytes > FREE_SHARED_BYTES.max(function.shared_bytes) {
            // SAFETY: the function belongs to the current context. The size fits a C int, because it is far below 2³¹.
            unsafe {
                self.driver().cuFuncSetAttribute(function.handle, MAX_DYNAMIC_SHARED, launch.shared_bytes as c_int)
            }?;
            function.shared_bytes = launch.shared_bytes;
        }
        Ok(function.clone())
    }

    fn load_module(&self, source: &ptx::Module) -> Result<Handle> {
        source.expect_driver(probe::supported_version(self.driver())?)?;
        let mut logs = [[0_u8; 8 << 10]; 2];
        let size = std::ptr::without_provenance_mut(logs[0].len());
        let [info, error] = logs.each_mut().map(|log| log.as_mut_ptr().cast::<c_void>());
        let (mut options, mut values, mut module) = (LOG_OPTIONS, [info, size, error, size], std::ptr::null_mut());
        let image = source.image(self.inner.capability);
        // SAFETY: the image ends with a 0. There are as many options as values. Sizes are passed in place of pointers, and the buffers
        // have these sizes.
        let result = unsafe {
            self.driver().cuModuleLoadDataEx(
                &mut module,
                image.as_ptr().cast(),
                4,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        match result {
            Ok(()) => Ok(module),
            Err(Error::Cuda { call, code, name, hint }) => {
                let text = |log: &[u8]| {
                    String::from_utf8_lossy(log.split(|&c| c == 0).next().unwrap_or_default()).into_owned()
                };
                let log = logs.iter().rev().map(|log| text(log)).find(|log| !log.trim().is_empty());
                let log = log.map(|log| format!("; its log: {}", log.trim())).unwrap_or_default();
                let hint = format!("{hint}; loading {}.ptx on {}{log}", source.name, self.inner.name);
                Err(Error::Cuda { call, code, name, hint })
            }
            Err(error) => Err(error),
        }
    }

    fn load_function(&self, launch: &Launch, source: &ptx::Module, module: Handle) -> Result<Function> {
        let parameters =
            source.parameters(&launch.kernel).ok_or_else(|| self.mismatch(launch, "a kernel of its file"))?;
        let name =
            CString::new(launch.kernel.as_str()).map_err(|_| self.mismatch(launch, "a name without a zero byte"))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: one handle is written. The module is loaded, and the name ends with a 0.
        unsafe { self.driver().cuModuleGetFunction(&mut handle, module, name.as_ptr()) }?;
        Ok(Function { handle, parameters: parameters.into(), shared_bytes: 0 })
    }

    fn mismatch(&self, launch: &Launch, allowed: &str) -> Error {
        let what = format!("the launch {launch} of `{}`", launch.module);
        Error::Unsupported { backend: "cuda", what, allowed: allowed.into() }
    }

    /// Enqueues launches of a plan. All that can be checked is checked before the first one is enqueued.
    ///
    /// # Safety
    /// As [`Device::forward`].
    unsafe fn enqueue(&self, plan: &Plan, parts: [&[Launch]; 2], pointers: &Pointers, stream: Stream) -> Result<()> {
        let launches = parts.into_iter().flatten();
        pointers.check(plan, launches.clone())?;
        let _current = self.current()?;
        let functions = self.functions(launches.clone(), stream)?;
        for (launch, function) in launches.clone().zip(&functions) {
            // The driver copies as many bytes as the PTX declares. It does not know how many the plan has.
            if !launch.arguments.iter().map(|a| a.bytes.len()).eq(function.parameters.iter().copied()) {
                return Err(self.mismatch(launch, &format!("parameters of {:?} bytes", function.parameters)));
            }
        }
        let mut parameters = Parameters::default();
        for (k, (launch, function)) in launches.zip(&functions).enumerate() {
            let values = parameters.fill(launch, plan.arrays(), pointers).as_mut_ptr();
            let ([x, y], threads, shared_bytes) = (launch.grid, launch.threads, launch.shared_bytes);
            // The first launch does not overlap: what runs before it on the stream is not ours, and may not be made for it.
            let overlaps = self.overlaps && k > 0;
            // SAFETY: the function is of this context. There is a pointer to each of its parameters, which have the sizes that it
            // declares. The driver copies them, and the configuration with its one attribute, before the call returns. The caller
            // promises that memory is there. The plan's kernels stay within it, and touch none before they have waited: tests run them on
            // an emulator that checks every access.
            unsafe {
                if overlaps {
                    let config = LaunchConfig {
                        grid: [x, y, 1],
                        block: [threads, 1, 1],
                        shared_bytes,
                        stream: stream.handle(),
                        attributes: &LaunchAttribute::OVERLAPPING,
                        attribute_count: 1,
                    };
                    self.driver().launch_with_attributes(&config, function.handle, values)
                } else {
                    let (function, stream, extra) = (function.handle, stream.handle(), std::ptr::null_mut());
                    self.driver().cuLaunchKernel(function, x, y, 1, threads, 1, 1, shared_bytes, stream, values, extra)
                }
            }?;
        }
        Ok(())
    }

    /// Enqueues [`Plan::forward`]: loss, metrics and coefficients into the state.
    ///
    /// It neither allocates device memory nor waits. So it can be captured into a CUDA graph after [`Device::load`] has loaded the
    /// kernels. The graph needs the kernels, and so a clone of this device, for as long as it is launched. What the kernels find wrong
    /// with the embeddings is in the state: see [`Device::evaluation`].
    ///
    /// # Errors
    /// Before anything is enqueued: [`Error::InvalidArgument`] for a null pointer, [`Error::Misaligned`], and the errors of
    /// [`Device::load`], or [`Error::InvalidArgument`] if it would have to load during a capture. [`Error::Cuda`] if the driver refuses a
    /// launch. Earlier launches of the call are enqueued then.
    ///
    /// # Safety
    /// - Each pointer that the launches use is memory that the device can access, of at least [`Plan::slot_bytes`] bytes, until the stream
    ///   has done what is enqueued. No two of them overlap, but query and passage may.
    /// - `side` holds [`Plan::side_data`] of this plan when the stream gets there.
    /// - Nothing else writes to any of this memory until the stream has done what is enqueued.
    /// - `stream` is alive and of the device's primary context, or one of the two default streams.
    pub unsafe fn forward(&self, plan: &Plan, pointers: &Pointers, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(plan, [plan.forward(), &[]], pointers, stream) }
    }

    /// Enqueues [`Plan::backward`], the gradients, after [`Device::forward`] with the same pointers.
    ///
    /// The embeddings must be those of the forward call. The call compares the norm of each embedding whose gradient is asked for. If the
    /// norm is another one, or not finite, the embedding's gradient is NaN, and reading results is an error until the next forward call.
    /// Gradients of embeddings that are in no pair with it are right for the forward call. The call does not notice an embedding that
    /// changed but has the same norm to the last bit of f64, nor any change in a tower whose gradients are not asked for.
    ///
    /// # Errors
    /// As [`Device::forward`].
    ///
    /// # Safety
    /// As [`Device::forward`]. State and workspace must be as a forward call of the same plan left them.
    pub unsafe fn backward(&self, plan: &Plan, pointers: &Pointers, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(plan, [plan.backward(), &[]], pointers, stream) }
    }

    /// Enqueues [`Plan::backward_alone`], the gradients, after [`Device::forward`] with the same state and embeddings. The workspace may
    /// hold anything.
    ///
    /// The call compares the norms of all embeddings of both towers, as [`Device::backward`] does for some. If one differs, all gradients
    /// are NaN.
    ///
    /// # Errors
    /// As [`Device::forward`].
    ///
    /// # Safety
    /// As [`Device::forward`]. The state must be as a forward call of the same plan left it.
    pub unsafe fn backward_alone(&self, plan: &Plan, pointers: &Pointers, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(plan, [plan.backward_alone(), &[]], pointers, stream) }
    }

    /// [`Device::forward`], then [`Device::backward`].
    ///
    /// # Errors
    /// As [`Device::forward`].
    ///
    /// # Safety
    /// As [`Device::forward`].
    pub unsafe fn loss_and_gradients(&self, plan: &Plan, pointers: &Pointers, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise. Backward follows on the same stream.
        unsafe { self.enqueue(plan, [plan.forward(), plan.backward()], pointers, stream) }
    }

    /// Enqueues [`Plan::partials`]: the sums of a shard. They must be merged with those of the other shards before [`Device::combine`].
    ///
    /// # Errors
    /// As [`Device::forward`].
    ///
    /// # Safety
    /// As [`Device::forward`].
    pub unsafe fn partials(&self, plan: &Plan, pointers: &Pointers, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(plan, [plan.partials(), &[]], pointers, stream) }
    }

    /// Enqueues [`Plan::combine`]: loss, metrics and coefficients from the sums in the state.
    ///
    /// # Errors
    /// As [`Device::forward`].
    ///
    /// # Safety
    /// As [`Device::forward`]. The state must be as [`Device::partials`] left it, or hold the merged sums of all shards besides.
    pub unsafe fn combine(&self, plan: &Plan, pointers: &Pointers, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(plan, [plan.combine(), &[]], pointers, stream) }
    }

    /// Waits until the stream has done everything enqueued so far.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for whatever failed on the device meanwhile. [`Error::InvalidArgument`] while the stream is being captured.
    ///
    /// # Safety
    /// `stream` is alive and of the device's primary context, or one of the two default streams.
    pub unsafe fn synchronize(&self, stream: Stream) -> Result<()> {
        let _current = self.current()?;
        self.expect_no_capture(stream, "a graph is waited for after its launch")?;
        // SAFETY: the caller's promise.
        unsafe { self.driver().cuStreamSynchronize(stream.handle()) }
    }
}

/// The error of an allocation. If memory is lacking, it says how much was asked for, and what for.
pub(super) fn allocation_error(error: Error, bytes: usize, purpose: &'static str) -> Error {
    match error {
        Error::Cuda { code: codes::OUT_OF_MEMORY, .. } => Error::OutOfMemory { bytes, purpose },
        error => error,
    }
}
