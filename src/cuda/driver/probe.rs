//! Whether this process can run CUDA kernels. Finding out never ends the process.

use super::codes;
use super::entry::{Driver, unavailable};
use super::ptx;
use crate::error::{Error, Result};
use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `…_MINOR`.
const COMPUTE_CAPABILITY: [c_int; 2] = [75, 76];
/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`.
const MULTIPROCESSORS: c_int = 16;
/// The least compute capability that the kernels run on.
const LEAST_CAPABILITY: (u32, u32) = (8, 0);

/// Whether kernels run here. They need an NVIDIA driver that is new enough, and a device of compute capability 8.0 or later.
///
/// This never panics, loads nothing but the driver's library, and makes no context on any device. It does not remember a failure, so a
/// later call may succeed.
///
/// If cudarc's feature `dynamic-linking` is on anywhere in the build, the executable does not even start on a machine without the driver's
/// library, so this function cannot answer. By default cudarc loads the library at run time, and the executable starts everywhere.
///
/// # Errors
/// [`Error::CudaUnavailable`] without a driver, if it does not start, or without a device; [`Error::DriverTooOld`];
/// [`Error::DeviceUnsupported`], about the first device, if all are too old.
pub fn available() -> Result<()> {
    first_supported().map(drop)
}

/// [`available`] without the reason.
pub fn is_available() -> bool {
    available().is_ok()
}

/// Number of devices that the process sees, 1 or more, whatever their compute capability.
///
/// # Errors
/// [`Error::CudaUnavailable`] and [`Error::DriverTooOld`].
pub fn device_count() -> Result<usize> {
    let driver = driver()?;
    let mut count = 0;
    // SAFETY: one number is written.
    unsafe { driver.cuDeviceGetCount(&mut count) }?;
    match usize::try_from(count) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(unavailable(codes::hint(codes::NO_DEVICE).into())),
    }
}

/// The driver, loaded, started and new enough.
pub(super) fn driver() -> Result<&'static Driver> {
    // Only a success is remembered, because a driver that does not start now may start later.
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    let driver = Driver::load()?;
    // SAFETY: the flags must be 0.
    unsafe { driver.cuInit(0) }.map_err(|error| match error {
        Error::Cuda { code: codes::NO_DEVICE, .. } => unavailable(codes::hint(codes::NO_DEVICE).into()),
        error => unavailable(error.to_string()),
    })?;
    ptx::expect_driver(ptx::oldest_version(), supported_version(&driver)?)?;
    Ok(DRIVER.get_or_init(|| driver))
}

/// The latest version of CUDA that the driver supports.
pub(super) fn supported_version(driver: &Driver) -> Result<(u32, u32)> {
    let mut version = 0;
    // SAFETY: one number is written.
    unsafe { driver.cuDriverGetVersion(&mut version) }?;
    let version = u32::try_from(version).unwrap_or(0); // 1000·major + 10·minor
    Ok((version / 1000, version % 1000 / 10))
}

/// What the driver says of a device, before it is used.
pub(super) struct Candidate {
    pub driver: &'static Driver,
    pub ordinal: usize,
    /// `CUdevice`.
    pub handle: c_int,
    pub name: String,
    pub capability: (u32, u32),
    pub multiprocessors: u32,
}

impl Candidate {
    /// The device of that ordinal.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is none; otherwise as [`device_count`].
    pub(super) fn new(ordinal: usize) -> Result<Self> {
        let (driver, count) = (driver()?, device_count()?);
        if ordinal >= count {
            return Err(Error::invalid(
                "ordinal",
                ordinal.to_string(),
                format!("0 to {}, the visible devices", count - 1),
            ));
        }
        let mut handle = 0;
        // SAFETY: one number is written. The ordinal is below the count, so it fits a C int.
        unsafe { driver.cuDeviceGet(&mut handle, ordinal as c_int) }?;
        let mut name = [0 as c_char; 256];
        // SAFETY: at most that many bytes are written. The last one is 0.
        unsafe { driver.cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, handle) }?;
        let name: Vec<u8> = name.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
        let mut capability = [0; 2];
        for (value, attribute) in capability.iter_mut().zip(COMPUTE_CAPABILITY) {
            // SAFETY: one number is written. The driver gave the handle.
            unsafe { driver.cuDeviceGetAttribute(value, attribute, handle) }?;
        }
        let [major, minor] = capability.map(|n| u32::try_from(n).unwrap_or(0));
        let mut multiprocessors = 0;
        // SAFETY: as above.
        unsafe { driver.cuDeviceGetAttribute(&mut multiprocessors, MULTIPROCESSORS, handle) }?;
        let name = String::from_utf8_lossy(&name).into_owned();
        let multiprocessors = u32::try_from(multiprocessors).unwrap_or(0);
        Ok(Self { driver, ordinal, handle, name, capability: (major, minor), multiprocessors })
    }

    /// An error unless the kernels run on it.
    pub(super) fn supported(self) -> Result<Self> {
        if self.capability < LEAST_CAPABILITY {
            let Self { ordinal, name, capability, .. } = self;
            return Err(Error::DeviceUnsupported { ordinal, name, capability });
        }
        Ok(self)
    }
}

/// The first device that the kernels run on.
pub(super) fn first_supported() -> Result<Candidate> {
    let mut first_refusal = None;
    for ordinal in 0..device_count()? {
        match Candidate::new(ordinal).and_then(Candidate::supported) {
            Ok(candidate) => return Ok(candidate),
            Err(refusal) => first_refusal = first_refusal.or(Some(refusal)),
        }
    }
    Err(first_refusal.unwrap_or_else(|| unavailable(codes::hint(codes::NO_DEVICE).into())))
}
