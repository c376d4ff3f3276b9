//! One device for all of a process.

use super::device::Device;
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

impl Device {
    /// The device of that ordinal. Every call in the process gives the same one, so that its kernels are loaded once. The first call makes
    /// it. It is never dropped, because that would wait for the device and unload kernels that may still be launched.
    ///
    /// # Errors
    /// As [`Device::new`]. After an error, the next call tries again.
    pub fn shared(ordinal: usize) -> Result<Self> {
        static DEVICES: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.get(&ordinal) {
            return Ok(device.clone());
        }
        let device = Self::new(ordinal)?;
        devices.insert(ordinal, device.clone());
        Ok(device)
    }
}
