//! The caller's buffers, one range for each slot of a plan.

use crate::error::{Error, Result};
use crate::wgpu::{Plan, Slot};

/// A range of a buffer.
#[derive(Debug, Clone, Copy)]
pub struct BufferRange<'a> {
    /// The buffer. It must have the usage `STORAGE`, or for the slot `Uniforms` the usage `UNIFORM`.
    pub buffer: &'a wgpu::Buffer,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl<'a> From<&'a wgpu::Buffer> for BufferRange<'a> {
    fn from(buffer: &'a wgpu::Buffer) -> Self {
        Self { buffer, offset: 0, bytes: buffer.size() }
    }
}

/// Where the slots of a plan are.
#[derive(Debug, Clone, Copy, Default)]
pub struct Buffers<'a> {
    ranges: [Option<BufferRange<'a>>; Slot::ALL.len()],
}

impl<'a> Buffers<'a> {
    /// No buffers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// These buffers, with `range` for `slot`.
    pub fn with(mut self, slot: Slot, range: impl Into<BufferRange<'a>>) -> Self {
        self.ranges[slot as usize] = Some(range.into());
        self
    }

    /// These buffers, and those of `other` for slots that have none here.
    pub fn or(mut self, other: &Self) -> Self {
        for (mine, theirs) in self.ranges.iter_mut().zip(&other.ranges) {
            *mine = mine.or(*theirs);
        }
        self
    }

    /// The range of a slot, or an error if the plan cannot use it.
    pub(super) fn get(&self, slot: Slot, plan: &Plan, alignment: u64) -> Result<BufferRange<'a>> {
        let needed = plan.slot_bytes(slot);
        let allowed = || format!("a range of at least {needed} bytes");
        let range = self.ranges[slot as usize].ok_or_else(|| Error::invalid(slot.name(), "no buffer", allowed()))?;
        if range.bytes < needed {
            return Err(Error::invalid(slot.name(), format!("a range of {} bytes", range.bytes), allowed()));
        }
        if range.offset.checked_add(range.bytes).is_none_or(|end| end > range.buffer.size()) {
            let value = format!("bytes {} … of a buffer of {}", range.offset, range.buffer.size());
            return Err(Error::invalid(slot.name(), value, format!("{} bytes within the buffer", range.bytes)));
        }
        if range.offset % alignment != 0 {
            return Err(Error::Misaligned { slot: slot.name(), address: range.offset, alignment });
        }
        let usage = if slot == Slot::Uniforms { wgpu::BufferUsages::UNIFORM } else { wgpu::BufferUsages::STORAGE };
        if !range.buffer.usage().contains(usage) {
            let value = format!("a buffer with the usage {:?}", range.buffer.usage());
            return Err(Error::invalid(slot.name(), value, format!("one with {usage:?}")));
        }
        Ok(range)
    }
}
