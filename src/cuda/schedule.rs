//! What a call does on a device, as data: arrays in a few slots of memory, and launches in order. A driver turns addresses into pointers
//! and enqueues the launches. The emulator of the tests gives each array a buffer of its own, so that it detects any access outside.

use super::abi::Shared;
use std::fmt;

/// Every array begins at a multiple of this, as allocations of CUDA do. Kernels copy 16 bytes at once, so a multiple of 16 would do.
pub(super) const ARRAY_ALIGNMENT: u64 = 256;

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
    /// Memory that nothing outlives a call in. But a backward call may read what its forward call left there. `workspace_bytes` of the call
    /// bounds it except for packed embeddings, sums of gradients and other O((M + N)·d) bytes, which WGSL has in slots of their own: its
    /// [`Slot::Scratch`](crate::wgpu::Slot::Scratch) is the bounded part alone.
    Workspace,
    /// ∂L/∂q.
    QueryGradient,
    /// ∂L/∂p.
    PassageGradient,
    /// One f32: the upstream gradient, where it is on the device.
    Upstream,
}

impl Slot {
    /// All slots.
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

/// A part of a slot that holds one thing. Arrays of the workspace may overlap if they are never in use at the same time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Its name in messages, and for [`Plan::array`](super::Plan::array).
    pub name: &'static str,
    /// The slot that it is in.
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
    /// The null pointer. The kernel has a default for an array that is not there.
    Null,
    /// An address that many bytes from the start of an array. It may lie before the array: kernels add an offset before they use it.
    In(ArrayId, i64),
}

impl Address {
    /// The address that many bytes further.
    pub(super) const fn after(self, bytes: i64) -> Self {
        match self {
            Self::Null => Self::Null,
            Self::In(array, start) => Self::In(array, start + bytes),
        }
    }
}

/// One parameter of a kernel: its bytes, in which pointers are zero until a driver fills them in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Argument {
    /// The bytes in memory, little-endian.
    pub bytes: Vec<u8>,
    /// Byte offset and value of every pointer in it.
    pub pointers: Vec<(usize, Address)>,
}

impl Argument {
    pub(super) fn of(value: &(impl Shared + ?Sized)) -> Self {
        let mut argument = Self::default();
        value.put(&mut argument);
        argument
    }
}

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Entry point in the PTX.
    pub kernel: String,
    /// The file of `kernels/` that has it, without `.cu`.
    pub module: &'static str,
    /// Thread blocks along x and y.
    pub grid: [u32; 2],
    /// Threads of a thread block.
    pub threads: u32,
    /// Dynamic shared memory of a thread block, in bytes.
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

    /// Appends parameters.
    pub(super) fn parameters(mut self, parameters: &impl Shared) -> Self {
        self.arguments.extend(parameters.parameters());
        self
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y] = self.grid;
        write!(f, "{} <<<{x} x {y}, {}, {} B>>>", self.kernel, self.threads, self.shared_bytes)
    }
}
