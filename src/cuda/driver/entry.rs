//! The functions of the driver that we use. They are loaded by name when a device is first asked for.
//!
//! Bindings of another crate would not do. They end the process if the driver lacks a function, and they hold its error numbers in an
//! enum, which lacks the numbers of later drivers.

use super::codes;
use crate::error::{Error, Result};
use std::error::Error as _;
use std::ffi::{c_char, c_int, c_uint, c_void};

/// `CUcontext`, `CUmodule`, `CUfunction` or `CUstream`. Only the driver looks into it.
pub(super) type Handle = *mut c_void;

/// `cuLaunchKernelEx`.
type LaunchWithAttributes =
    unsafe extern "system" fn(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void) -> c_int;

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: Handle,
    pub attributes: *const LaunchAttribute,
    pub attribute_count: c_uint,
}

/// `CUlaunchAttribute`, with the one value that we use.
#[repr(C, align(8))]
pub(super) struct LaunchAttribute {
    kind: c_int,
    padding: [u8; 4],
    value: c_int,
    rest: [u8; 60],
}

impl LaunchAttribute {
    /// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the launch may begin before the previous one on the stream is complete.
    /// Its kernel waits for the previous launch by an instruction.
    pub(super) const OVERLAPPING: Self = Self { kind: 6, padding: [0; 4], value: 1, rest: [0; 60] };
}

/// Names of the driver's library. The first is the one that every installation has.
const LIBRARIES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

/// Makes a struct with a pointer to each function, and a method for it that turns its code into a [`Result`].
macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $kind:ty),*);)*) => {
        /// The driver's functions, by the names and with the parameters of `cuda.h`.
        #[allow(non_snake_case, reason = "the driver's names")]
        pub(super) struct Driver {
            $($name: unsafe extern "system" fn($($kind),*) -> c_int,)*
            launch_with_attributes: Option<LaunchWithAttributes>,
        }

        #[allow(non_snake_case, clippy::too_many_arguments, reason = "the driver's names and parameters")]
        impl Driver {
            /// # Safety
            /// `library` is the CUDA driver and stays loaded for as long as the process runs.
            unsafe fn from_library(library: &libloading::Library) -> std::result::Result<Self, &'static str> {
                $(
                    // SAFETY: the driver's function of this name has these parameters, in every version of it.
                    let $name = unsafe { library.get(stringify!($name)) };
                )*
                // SAFETY: this function has the parameters of `LaunchWithAttributes`.
                let launch_with_attributes = unsafe { library.get("cuLaunchKernelEx") }.ok().map(|function| *function);
                Ok(Self { $($name: *$name.map_err(|_| stringify!($name))?,)* launch_with_attributes })
            }

            $(
                /// # Safety
                /// The caller does what the description of the driver API demands: pointers are valid for what the function reads and
                /// writes, and handles are alive.
                pub(super) unsafe fn $name(&self, $($argument: $kind),*) -> Result<()> {
                    // SAFETY: the library stays loaded. The rest is the caller's promise.
                    codes::check(stringify!($name), unsafe { (self.$name)($($argument),*) })
                }
            )*
        }
    };
}

// `cuda.h` defines the bare names of some functions as their versions with the suffix _v2. Every driver since CUDA 11.4 has all of these.
functions! {
    fn cuInit(flags: c_uint);
    fn cuDriverGetVersion(version: *mut c_int);
    fn cuDeviceGetCount(count: *mut c_int);
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int);
    fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int);
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int);
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int);
    fn cuDevicePrimaryCtxRelease_v2(device: c_int);
    fn cuCtxGetCurrent(context: *mut Handle);
    fn cuCtxPushCurrent_v2(context: Handle);
    fn cuCtxPopCurrent_v2(context: *mut Handle);
    fn cuCtxSynchronize();
    fn cuModuleLoadDataEx(module: *mut Handle, image: *const c_void, count: c_uint, options: *mut c_int, values: *mut *mut c_void);
    fn cuModuleUnload(module: Handle);
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char);
    fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int);
    fn cuLaunchKernel(function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared_bytes: c_uint, stream: Handle, parameters: *mut *mut c_void, extra: *mut *mut c_void);
    fn cuMemAlloc_v2(pointer: *mut u64, bytes: usize);
    fn cuMemFree_v2(pointer: u64);
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle);
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle);
    fn cuMemsetD32Async(to: u64, value: c_uint, count: usize, stream: Handle);
    fn cuPointerGetAttribute(data: *mut c_void, attribute: c_int, pointer: u64);
    fn cuStreamCreate(stream: *mut Handle, flags: c_uint);
    fn cuStreamDestroy_v2(stream: Handle);
    fn cuStreamSynchronize(stream: Handle);
    fn cuStreamIsCapturing(stream: Handle, status: *mut c_int);
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_int);
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle);
    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64);
    fn cuGraphUpload(executable: Handle, stream: Handle);
    fn cuGraphLaunch(executable: Handle, stream: Handle);
    fn cuGraphDestroy(graph: Handle);
    fn cuGraphExecDestroy(executable: Handle);
}

impl Driver {
    /// Whether launches can have attributes: `cuLaunchKernelEx` came with CUDA 11.8.
    pub(super) fn has_attributes(&self) -> bool {
        self.launch_with_attributes.is_some()
    }

    /// `cuLaunchKernelEx`.
    ///
    /// # Safety
    /// As for the functions above.
    pub(super) unsafe fn launch_with_attributes(
        &self,
        config: &LaunchConfig,
        function: Handle,
        parameters: *mut *mut c_void,
    ) -> Result<()> {
        let Some(launch) = self.launch_with_attributes else {
            return Err(unavailable("the driver library has no function `cuLaunchKernelEx`".into()));
        };
        // SAFETY: the library stays loaded. The rest is the caller's promise.
        codes::check("cuLaunchKernelEx", unsafe { launch(config, function, parameters, std::ptr::null_mut()) })
    }

    /// Loads the driver's library, which then stays loaded. It does not start the driver; [`Driver::cuInit`] does.
    pub(super) fn load() -> Result<Self> {
        let mut refusals = Vec::new();
        for name in LIBRARIES {
            // SAFETY: loading runs the driver's own initialisation, as in every process that uses CUDA.
            match unsafe { libloading::Library::new(*name) } {
                Ok(library) => {
                    // It must stay loaded, because a static holds pointers into it. If others in the process use CUDA, it stays anyway.
                    let library = std::mem::ManuallyDrop::new(library);
                    // SAFETY: a library of this name is the CUDA driver. It is never dropped.
                    return unsafe { Self::from_library(&library) }.map_err(|function| {
                        unavailable(format!("the driver library `{name}` has no function `{function}`"))
                    });
                }
                // The source of the error has the loader's own words.
                Err(refusal) => {
                    refusals.push(refusal.source().map_or_else(|| refusal.to_string(), ToString::to_string))
                }
            }
        }
        let refusals = refusals.join("; ");
        Err(unavailable(format!("no driver library was found: {refusals}")))
    }
}

/// The error for a process in which CUDA does not start at all.
pub(super) fn unavailable(reason: String) -> Error {
    let (major, minor) = super::ptx::driver_for(super::ptx::oldest_version());
    let allowed = format!(
        "an NVIDIA driver for CUDA {major}.{minor} or later, and a device of compute capability 8.0 or later; without them, \
         the CPU backend"
    );
    Error::CudaUnavailable { reason, allowed }
}
