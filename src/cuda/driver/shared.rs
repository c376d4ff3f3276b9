//! One device for all of a process.

use super::device::Device;
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

impl Device {
    /// The device of that ordinal that everybody in the process gets from here, so that its kernels are loaded once. Made by the first
    /// call, and never dropped, since that would wait for it and unload kernels that are still to run.
    ///
    /// # Errors
    /// As [`Device::new`]; the next call tries again.
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
