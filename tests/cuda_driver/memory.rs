//! Memory, streams and graphs straight from the driver, as an application has them that uses no Rust library for CUDA.

use super::text;
use libloading::Library;
use samtone::cuda::{Device, Stream};
use std::ffi::{c_int, c_uint, c_void};

type Handle = *mut c_void;

/// The driver's library, for what the crate leaves to its callers.
pub struct Driver(Library);

macro_rules! call {
    ($driver:expr, $name:ident($($argument:expr => $kind:ty),*)) => {{
        // SAFETY: the driver's function of this name has these parameters, and what they point to is alive.
        let code = unsafe {
            let function = $driver.0.get::<unsafe extern "C" fn($($kind),*) -> c_int>(stringify!($name)).map_err(text)?;
            function($($argument),*)
        };
        if code == 0 { Ok(()) } else { Err(format!("{}: {code}", stringify!($name))) }
    }};
}

impl Driver {
    /// The driver, with the device's context current in this thread.
    pub fn new(device: &Device) -> Result<Self, String> {
        let name = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
        // SAFETY: the driver is loaded already, by the device.
        let this = Self(unsafe { Library::new(name) }.map_err(text)?);
        this.set_current(device.context())?;
        Ok(this)
    }

    pub fn set_current(&self, context: u64) -> Result<(), String> {
        call!(self, cuCtxSetCurrent(context => u64))
    }

    pub fn current(&self) -> Result<u64, String> {
        let mut context = 0;
        call!(self, cuCtxGetCurrent(&mut context => *mut u64)).map(|()| context)
    }

    /// Whether anybody has the primary context of that device.
    pub fn is_retained(&self, device: c_int) -> Result<bool, String> {
        let (mut flags, mut active) = (0, 0);
        call!(self, cuDevicePrimaryCtxGetState(device => c_int, &mut flags => *mut c_uint, &mut active => *mut c_int))?;
        Ok(active != 0)
    }

    /// Page-locked memory of the host, which the driver keeps until the process ends.
    pub fn pinned(&self, bytes: u64) -> Result<u64, String> {
        let mut address = 0;
        call!(self, cuMemHostAlloc(&mut address => *mut u64, bytes as usize => usize, 0 => c_uint))?;
        Ok(address)
    }

    /// Uninitialised memory.
    pub fn allocate(&self, bytes: u64) -> Result<Memory<'_>, String> {
        let mut address = 0;
        call!(self, cuMemAlloc_v2(&mut address => *mut u64, bytes.max(1) as usize => usize))?;
        Ok(Memory { driver: self, address, bytes: bytes as usize })
    }

    pub fn stream(&self) -> Result<Stream, String> {
        let mut stream = 0;
        call!(self, cuStreamCreate(&mut stream => *mut u64, 1 => c_uint))?; // does not wait for the default stream
        Ok(Stream::from_raw(stream))
    }

    pub fn begin_capture(&self, stream: Stream) -> Result<(), String> {
        call!(self, cuStreamBeginCapture_v2(stream.as_raw() => u64, 1 => c_uint)) // of this thread
    }

    pub fn end_capture(&self, stream: Stream) -> Result<Graph<'_>, String> {
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        call!(self, cuStreamEndCapture(stream.as_raw() => u64, &mut graph => *mut Handle))?;
        call!(self, cuGraphInstantiateWithFlags(&mut executable => *mut Handle, graph => Handle, 0 => u64))?;
        Ok(Graph { driver: self, executable })
    }
}

/// A graph to be replayed; the driver keeps it until the process ends.
pub struct Graph<'a> {
    driver: &'a Driver,
    executable: Handle,
}

impl Graph<'_> {
    pub fn launch(&self, stream: Stream) -> Result<(), String> {
        call!(self.driver, cuGraphLaunch(self.executable => Handle, stream.as_raw() => u64))
    }
}

pub struct Memory<'a> {
    driver: &'a Driver,
    pub address: u64,
    bytes: usize,
}

impl Memory<'_> {
    pub fn write(&self, bytes: &[u8]) -> Result<(), String> {
        let from = bytes.as_ptr();
        call!(self.driver, cuMemcpyHtoDAsync_v2(self.address => u64, from => *const u8, bytes.len() => usize, 0 => u64))?;
        call!(self.driver, cuStreamSynchronize(0 => u64))
    }

    /// All of it, after what the stream has to do.
    pub fn read(&self, stream: Stream) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0_u8; self.bytes];
        let (to, stream) = (bytes.as_mut_ptr(), stream.as_raw());
        call!(self.driver, cuMemcpyDtoHAsync_v2(to => *mut u8, self.address => u64, self.bytes => usize, stream => u64))?;
        call!(self.driver, cuStreamSynchronize(stream => u64))?;
        Ok(bytes)
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        let _: Result<(), String> = (|| call!(self.driver, cuMemFree_v2(self.address => u64)))();
    }
}
