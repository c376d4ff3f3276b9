//! What a call does on a device, as data: arrays in a few slots of memory, and launches in order. A driver resolves addresses
//! and enqueues; the emulator of the tests gives each array a buffer of its own, so that an access outside of it is seen.

use std::fmt;

/// A piece of device memory that the caller provides, at least [`Plan::slot_bytes`](super::Plan::slot_bytes) of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// q, the raw query embeddings.
    Query,
    /// p, the raw passage embeddings.
    Passage,
    /// Keys, weights and the order of the passages: [`Plan::side_data`](super::Plan::side_data), copied once. Read only.
    Side,
    /// What a forward call leaves for the backward call, and the results: O(M) numbers.
    State,
    /// Scratch of one call.
    Workspace,
    /// ∂L/∂q.
    QueryGradient,
    /// ∂L/∂p.
    PassageGradient,
    /// One f32: the upstream gradient, where it is on the device.
    Upstream,
}

impl Slot {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Query,
        Self::Passage,
        Self::Side,
        Self::State,
        Self::Workspace,
        Self::QueryGradient,
        Self::PassageGradient,
        Self::Upstream,
    ];

    /// Lower-case name, as in error messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Passage => "passage",
            Self::Side => "side",
            Self::State => "state",
            Self::Workspace => "workspace",
            Self::QueryGradient => "query_gradient",
            Self::PassageGradient => "passage_gradient",
            Self::Upstream => "upstream",
        }
    }
}

/// A part of a slot that holds one thing. Arrays of the workspace overlap where their lifetimes do not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// For messages and for whoever looks for it.
    pub name: &'static str,
    /// Where it is.
    pub slot: Slot,
    /// First byte in the slot.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Index into [`Plan::arrays`](super::Plan::arrays).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ArrayId(pub usize);

/// A pointer that a kernel gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// The null pointer: the kernel has a default for what is not there.
    Null,
    /// So many bytes from the start of an array; before it, if a kernel only ever adds to the pointer.
    In(ArrayId, i64),
}

/// One parameter of a kernel: its bytes, in which pointers are still zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Argument {
    /// As in memory, little-endian, with the padding of C.
    pub bytes: Vec<u8>,
    /// Byte offset and value of every pointer in it.
    pub pointers: Vec<(usize, Address)>,
    alignment: usize,
}

impl Argument {
    /// An empty struct.
    pub(super) fn new() -> Self {
        Self::default()
    }

    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
        self.alignment = self.alignment.max(to);
    }

    pub(super) fn u32(mut self, value: impl TryInto<u32>) -> Self {
        self.align(4);
        // Plans check that every count fits; a saturated one would be refused by the kernel's own bounds.
        self.bytes.extend(value.try_into().unwrap_or(u32::MAX).to_le_bytes());
        self
    }

    pub(super) fn flag(self, value: bool) -> Self {
        self.u32(u32::from(value))
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.align(8);
        self.bytes.extend(value.to_le_bytes());
        self
    }

    pub(super) fn f32(mut self, value: f32) -> Self {
        self.align(4);
        self.bytes.extend(value.to_le_bytes());
        self
    }

    pub(super) fn f64(mut self, value: f64) -> Self {
        self.align(8);
        self.bytes.extend(value.to_le_bytes());
        self
    }

    pub(super) fn pointer(mut self, address: Address) -> Self {
        self.align(8);
        self.pointers.push((self.bytes.len(), address));
        self.u64(0)
    }

    /// A struct inside this one.
    pub(super) fn nested(mut self, inner: &Self) -> Self {
        self.align(inner.alignment.max(1));
        let start = self.bytes.len();
        self.bytes.extend(&inner.bytes);
        self.pointers.extend(inner.pointers.iter().map(|(at, address)| (start + at, *address)));
        self
    }

    /// Zeros up to so many bytes: the unused rest of an array.
    pub(super) fn padded_to(mut self, bytes: usize) -> Self {
        self.bytes.resize(bytes, 0);
        self
    }

    /// Pads the end as C does.
    pub(super) fn end(mut self) -> Self {
        self.align(self.alignment.max(1));
        self
    }
}

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Entry point in the PTX.
    pub kernel: String,
    /// File of `kernels/` it is in, without `.cu`.
    pub module: &'static str,
    /// Blocks along x and y.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Parameters in order.
    pub arguments: Vec<Argument>,
}

impl Launch {
    pub(super) fn new(module: &'static str, kernel: impl Into<String>, grid: [u32; 2], threads: u32) -> Self {
        Self { kernel: kernel.into(), module, grid, threads, shared_bytes: 0, arguments: Vec::new() }
    }

    pub(super) fn shared(mut self, bytes: u32) -> Self {
        self.shared_bytes = bytes;
        self
    }

    pub(super) fn argument(mut self, argument: Argument) -> Self {
        self.arguments.push(argument.end());
        self
    }

    pub(super) fn pointer(self, address: Address) -> Self {
        self.argument(Argument::new().pointer(address))
    }

    pub(super) fn u32(self, value: impl TryInto<u32>) -> Self {
        self.argument(Argument::new().u32(value))
    }

    pub(super) fn flag(self, value: bool) -> Self {
        self.u32(u32::from(value))
    }

    pub(super) fn u64(self, value: u64) -> Self {
        self.argument(Argument::new().u64(value))
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y] = self.grid;
        write!(f, "{} <<<{x} x {y}, {}, {} B>>>", self.kernel, self.threads, self.shared_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_layout_of_c() {
        let inner = Argument::new().u32(1_u32).u64(2).u32(3_u32).end(); // 4 + 4 padding + 8 + 4 + 4 padding
        assert_eq!(inner.bytes.len(), 24);
        let outer = Argument::new().u32(7_u32).nested(&inner).pointer(Address::Null).f32(1.0).end();
        assert_eq!((outer.bytes.len(), outer.pointers[0].0), (48, 32));
        assert_eq!(outer.bytes[8..16], [1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
