//! Collects what dispatches need: bindings, which are windows of slots; parameters as bytes; and the size of each slot.

use super::layout::STATUS_BYTES;
use super::parts::Parts;
use super::schedule::{ALIGNMENT, Binding, Dispatch, Slot};
use super::shaders::Module;
use crate::error::{Error, Result};
use bytemuck::Pod;
use std::ops::Range;

/// A range of a slot that is bound, and where in it lies what was asked for. A binding must begin at a multiple of [`ALIGNMENT`], so it
/// may begin earlier than that.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub binding: Binding,
    /// Distance from the start of the binding to what was asked for, in the units that the shader counts in.
    pub base: u32,
}

pub(super) struct Recorder {
    pub uniforms: Vec<u8>,
    pub slot_bytes: [u64; Slot::ALL.len()],
    max_binding_bytes: u64,
    max_buffer_bytes: u64,
    max_workgroups: u32,
}

impl Recorder {
    pub(super) fn new(parts: &Parts<'_>) -> Self {
        Self {
            uniforms: Vec::new(),
            slot_bytes: [0; Slot::ALL.len()],
            max_binding_bytes: parts.capabilities.max_binding_bytes,
            max_buffer_bytes: parts.capabilities.max_buffer_bytes,
            max_workgroups: parts.capabilities.max_workgroups,
        }
    }

    /// Makes the slot at least that many bytes. An error if the device cannot allocate them.
    pub(super) fn reserve(&mut self, slot: Slot, bytes: u64) -> Result<()> {
        let bytes = bytes.next_multiple_of(4);
        if bytes > self.max_buffer_bytes {
            return Err(beyond(slot, bytes, "buffers", self.max_buffer_bytes));
        }
        let held = &mut self.slot_bytes[slot as usize];
        *held = bytes.max(*held);
        Ok(())
    }

    /// Binds bytes `range` of a slot as binding `index`. The shader counts in units of `unit` bytes.
    pub(super) fn window(&mut self, index: u32, slot: Slot, range: Range<u64>, unit: u64) -> Result<Window> {
        let offset = range.start / ALIGNMENT * ALIGNMENT;
        let bytes = (range.end - offset).next_multiple_of(4).max(if unit > 4 { 16 } else { 4 }); // at least one vector
        if bytes > self.max_binding_bytes {
            return Err(beyond(slot, bytes, "bindings", self.max_binding_bytes));
        }
        self.reserve(slot, offset + bytes)?;
        Ok(Window { binding: Binding { index, slot, offset, bytes }, base: ((range.start - offset) / unit) as u32 })
    }

    /// Binds a whole slot, of that many bytes.
    pub(super) fn whole(&mut self, index: u32, slot: Slot, bytes: u64) -> Result<Binding> {
        Ok(self.window(index, slot, 0..bytes, 4)?.binding)
    }

    /// Binds what the shaders call `state`.
    pub(super) fn state(&mut self, index: u32, words: usize) -> Result<Binding> {
        Ok(self.window(index, Slot::State, STATUS_BYTES..STATUS_BYTES + 4 * words as u64, 4)?.binding)
    }

    /// Binds what the shaders call `status`.
    pub(super) fn status(&mut self, index: u32) -> Result<Binding> {
        self.whole(index, Slot::State, 32)
    }

    /// Workgroups for `count` pieces of work. They have a second dimension if the device does not allow as many in one.
    pub(super) fn grid(&self, count: usize) -> [u32; 2] {
        let count = count.max(1);
        let rows = count.div_ceil(self.max_workgroups as usize);
        [count.div_ceil(rows) as u32, rows as u32]
    }

    /// How many rows of that many bytes a window holds at most.
    pub(super) fn rows_of(&self, row_bytes: u64) -> usize {
        (self.max_binding_bytes.saturating_sub(ALIGNMENT + 16) / row_bytes.max(1)).max(1) as usize
    }

    /// A dispatch. Its parameters are appended to the uniforms.
    pub(super) fn dispatch<P: Pod>(
        &mut self,
        module: Module,
        entry: &'static str,
        params: P,
        bindings: impl IntoIterator<Item = Binding>,
        workgroups: [u32; 2],
    ) -> Dispatch {
        let offset = self.uniforms.len().next_multiple_of(ALIGNMENT as usize);
        self.uniforms.resize(offset, 0);
        self.uniforms.extend(bytemuck::bytes_of(&params));
        // Some compilers round uniform structs up to 16 bytes.
        let bytes = size_of::<P>().next_multiple_of(16);
        self.uniforms.resize(offset + bytes, 0);
        let uniform = Binding { index: 0, slot: Slot::Uniforms, offset: offset as u64, bytes: bytes as u64 };
        let bindings = [uniform].into_iter().chain(bindings).collect();
        Dispatch { module, entry, bindings, workgroups }
    }
}

/// The error for a part of a slot that is larger than the device allows.
pub(super) fn beyond(slot: Slot, bytes: u64, what: &str, limit: u64) -> Error {
    Error::Unsupported {
        backend: "wgpu",
        what: format!("a part of {bytes} bytes of the buffer `{}`", slot.name()),
        allowed: format!(
            "{what} of {limit} bytes, the limit of this device; smaller batches, fewer prefixes, or a device with higher limits"
        ),
    }
}
