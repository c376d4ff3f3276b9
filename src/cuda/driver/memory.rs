//! What the driver knows about addresses that come from elsewhere.

use super::arguments::{Pointers, check_slot_bytes};
use super::device::Device;
use crate::cuda::{Plan, Slot};
use crate::error::{Error, Result};
use std::ffi::c_int;

/// `CU_POINTER_ATTRIBUTE_…`.
const MEMORY_TYPE: c_int = 2;
const IS_MANAGED: c_int = 8;
const DEVICE_ORDINAL: c_int = 9;
const RANGE_START_ADDR: c_int = 11;
const RANGE_SIZE: c_int = 12;
/// `CU_MEMORYTYPE_HOST`.
const HOST: c_int = 1;

impl Device {
    /// Asks the driver about every pointer that is not null. It must be memory of this device that is long enough for the plan and does
    /// not overlap with the others. This is for callers that get addresses from elsewhere. It must not be called while a stream is being
    /// captured.
    ///
    /// Memory of another device, memory of the host, and memory that the driver does not know are refused, although kernels could reach
    /// some of it on some systems.
    ///
    /// # Errors
    /// [`Error::WrongDevice`], [`Error::InvalidArgument`] for memory that is unknown, too short or used twice,
    /// [`Error::Misaligned`].
    pub fn check_pointers(&self, plan: &Plan, pointers: &Pointers) -> Result<()> {
        let _current = self.current()?;
        let used = || Slot::ALL.into_iter().filter(|&slot| pointers.get(slot) != 0);
        for slot in used() {
            pointers.check_slot(plan, slot)?;
            let address = pointers.get(slot);
            let wrong = |found: String| {
                let expected = format!("device {}", self.ordinal());
                Err(Error::WrongDevice { argument: slot.name(), found, expected })
            };
            if self.pointer_attribute::<c_int>(slot, IS_MANAGED, address)? == 0 {
                // Page-locked memory of the host has an ordinal, too, that of the device that it was registered with. So the ordinal alone
                // does not tell.
                if self.pointer_attribute::<c_int>(slot, MEMORY_TYPE, address)? == HOST {
                    return wrong("the host".into());
                }
                let ordinal = self.pointer_attribute::<c_int>(slot, DEVICE_ORDINAL, address)?;
                if usize::try_from(ordinal) != Ok(self.ordinal()) {
                    return wrong(format!("device {ordinal}"));
                }
            }
            let start = self.pointer_attribute::<u64>(slot, RANGE_START_ADDR, address)?;
            let length = self.pointer_attribute::<usize>(slot, RANGE_SIZE, address)? as u64;
            check_slot_bytes(plan, slot, start.saturating_add(length).saturating_sub(address))?;
        }
        let range = |slot| pointers.get(slot)..pointers.get(slot).saturating_add(plan.slot_bytes(slot));
        for (k, slot) in used().enumerate() {
            for other in used().take(k).filter(|&other| (other, slot) != (Slot::Query, Slot::Passage)) {
                let (a, b) = (range(slot), range(other));
                if a.start.max(b.start) < a.end.min(b.end) {
                    let value = format!("{:#x} to {:#x}, part of which is `{}`", a.start, a.end, other.name());
                    return Err(Error::invalid(
                        slot.name(),
                        value,
                        "memory of its own; only query and passage may overlap",
                    ));
                }
            }
        }
        Ok(())
    }

    /// An attribute of a pointer. `T` must be the type that the driver writes for this attribute.
    fn pointer_attribute<T: Default>(&self, slot: Slot, attribute: c_int, address: u64) -> Result<T> {
        let mut value = T::default();
        // SAFETY: the driver writes the attributes above as these types. It looks the address up, and does not touch the memory there.
        let result = unsafe { self.driver().cuPointerGetAttribute((&raw mut value).cast(), attribute, address) };
        result.map(|()| value).map_err(|error| match error {
            Error::Cuda { code: 1, .. } => {
                let allowed = format!("memory of device {}", self.ordinal());
                Error::invalid(slot.name(), format!("{address:#x}, which the driver does not know as memory"), allowed)
            }
            error => error,
        })
    }
}
