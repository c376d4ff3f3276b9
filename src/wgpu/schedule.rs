//! What a call does on a device, as data: buffers, and dispatches in order. A driver, or a page in a browser, binds the buffers and
//! enqueues the dispatches.

use super::shaders::Module;
use std::fmt;

/// A buffer that a call reads or writes, at least [`Plan::slot_bytes`](super::Plan::slot_bytes) of it.
///
/// WebGPU demands that no dispatch binds a buffer for reading and for writing at once. That holds if every slot is a buffer of its own. It
/// still holds if query, passage, upstream and the two gradients share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slot {
    /// q, the raw query embeddings, M × d of the problem's type and row stride.
    Query,
    /// p, the raw passage embeddings, N × d of the problem's type and row stride.
    Passage,
    /// Parameters of the dispatches: [`Plan::uniforms`](super::Plan::uniforms), written once for each plan. It is the only uniform buffer.
    Uniforms,
    /// Keys, weights and the order of the passages: [`Plan::side_data`](super::Plan::side_data), written once. Read only.
    Side,
    /// What a forward call leaves for the backward call, and the results: O(M + N) numbers.
    State,
    /// Packed queries. They must stay from a forward call to its backward call.
    PackedQuery,
    /// Packed passages. They must stay from a forward call to its backward call.
    PackedPassage,
    /// What `workspace_bytes` of the call bounds: partial sums and gradients of logits. CUDA's
    /// [`Slot::Workspace`](crate::cuda::Slot::Workspace) holds packed embeddings and sums of gradients besides.
    Scratch,
    /// Sums of the queries' gradients, if they cannot lie in the output.
    QuerySums,
    /// Sums of the passages' gradients, if they cannot lie in the output.
    PassageSums,
    /// ∂L/∂q, the shard's rows × d, of the type and row stride that the problem asks for.
    QueryGradient,
    /// ∂L/∂p, N × d, of the type and row stride that the problem asks for.
    PassageGradient,
    /// One f32: the upstream gradient, if it is on the device. If it is not finite, all gradients are NaN.
    Upstream,
}

impl Slot {
    /// All slots.
    pub const ALL: [Self; 13] = [
        Self::Query,
        Self::Passage,
        Self::Uniforms,
        Self::Side,
        Self::State,
        Self::PackedQuery,
        Self::PackedPassage,
        Self::Scratch,
        Self::QuerySums,
        Self::PassageSums,
        Self::QueryGradient,
        Self::PassageGradient,
        Self::Upstream,
    ];

    /// Lower-case name, as in error messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Passage => "passage",
            Self::Uniforms => "uniforms",
            Self::Side => "side",
            Self::State => "state",
            Self::PackedQuery => "packed_query",
            Self::PackedPassage => "packed_passage",
            Self::Scratch => "scratch",
            Self::QuerySums => "query_sums",
            Self::PassageSums => "passage_sums",
            Self::QueryGradient => "query_gradient",
            Self::PassageGradient => "passage_gradient",
            Self::Upstream => "upstream",
        }
    }

    /// Whether it is the caller's: embeddings, gradients, or the upstream gradient. All others are the plan's own.
    pub const fn is_callers(self) -> bool {
        matches!(self, Self::Query | Self::Passage | Self::QueryGradient | Self::PassageGradient | Self::Upstream)
    }
}

/// A part of a slot, bound to a shader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// `@binding` in the shader.
    pub index: u32,
    /// The buffer.
    pub slot: Slot,
    /// First byte in it, a multiple of [`ALIGNMENT`].
    pub offset: u64,
    /// Length in bytes, a multiple of 4.
    pub bytes: u64,
}

/// Every binding begins at a multiple of this. No device demands more.
pub const ALIGNMENT: u64 = 256;

/// One dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispatch {
    /// Shader module.
    pub module: Module,
    /// Entry point in it.
    pub entry: &'static str,
    /// Everything that the entry point reads and writes, in the order of `index`. The first, with index 0, has the parameters.
    pub bindings: Vec<Binding>,
    /// Workgroups along x and y.
    pub workgroups: [u32; 2],
}

impl fmt::Display for Dispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y] = self.workgroups;
        write!(f, "{} <{x} x {y}>", self.entry)?;
        self.bindings.iter().skip(1).try_for_each(|b| write!(f, " {}", b.slot.name()))
    }
}
