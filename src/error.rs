//! Every way a call can fail, as a sentence that names the argument, its value and what is allowed.

use crate::dtype::DType;
use crate::tower::Tower;

/// Result of every fallible function of the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused. Nothing has been written to any output when one of these is returned, unless the output is in the
/// memory of a device: there, a call that is refused for its embeddings leaves NaN.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An argument has a value outside its domain.
    #[error("argument `{argument}` is {value}; allowed: {allowed}")]
    InvalidArgument {
        /// Name of the argument, as in the signature.
        argument: &'static str,
        /// The offending value, with its index where there is one.
        value: String,
        /// The domain.
        allowed: String,
    },
    /// An embedding has no direction.
    #[error(
        "the {tower} embedding in row {row} has norm zero{}, so its cosine is undefined; allowed: non-zero rows, \
         or `ZeroNorm::ZeroGradient` in the call",
        of_prefix("in its", .prefix)
    )]
    ZeroNorm {
        /// Which input.
        tower: Tower,
        /// Its row.
        row: usize,
        /// How many leading entries are all zero, if the call has prefixes.
        prefix: Option<usize>,
    },
    /// An embedding contains NaN or an infinity.
    #[error("the {tower} embedding in row {row} contains {value} at column {column}; allowed: finite numbers")]
    NonFinite {
        /// Which input.
        tower: Tower,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// A softmax without any term: every negative is masked and the group holds no copy of the positive.
    #[error(
        "row {row} has no negative left{} in group {group} of loss `{loss}`, which holds no copy of the positive, so its \
         logarithm is undefined; allowed: at least one negative, `positive_copies` of 1 or more, weight 0 for the row, or \
         `NoNegative::Zero` in the call",
        of_prefix("for the", .prefix)
    )]
    NoNegative {
        /// Name of the loss.
        loss: String,
        /// Index of its group.
        group: usize,
        /// Row of the queries.
        row: usize,
        /// Length of the prefix, if the call has prefixes.
        prefix: Option<usize>,
    },
    /// The backend does not take this input; another one does.
    #[error("backend `{backend}` does not support {what}; allowed: {allowed}")]
    Unsupported {
        /// Name of the backend.
        backend: &'static str,
        /// What it cannot do.
        what: String,
        /// What it can do instead.
        allowed: String,
    },
    /// The bound on the workspace is below the smallest plan.
    #[error(
        "option `workspace_bytes` is {given}, but the smallest plan for {rows} queries, {passages} passages of dimension {dim} \
         needs {needed}; allowed: {needed} or more"
    )]
    WorkspaceTooSmall {
        /// The bound the caller set, in bytes.
        given: usize,
        /// The least that works, in bytes.
        needed: usize,
        /// M.
        rows: usize,
        /// N.
        passages: usize,
        /// d.
        dim: usize,
    },
    /// The allocator refused.
    #[error(
        "out of memory: {bytes} bytes for {purpose} could not be allocated; a smaller `workspace_bytes` or batch may fit"
    )]
    OutOfMemory {
        /// Size of the refused allocation.
        bytes: usize,
        /// What it was for.
        purpose: &'static str,
    },
    /// A saved state is used with inputs it was not made from.
    #[error("the saved state was made from {saved}, but is used with {given}; allowed: the inputs of the forward call")]
    StateMismatch {
        /// Description of the inputs that made the state.
        saved: String,
        /// Description of the inputs given now.
        given: String,
    },
    /// No CUDA kernel can run in this process: no driver, one that does not start, or no device.
    #[error("CUDA is not available: {reason}; allowed: {allowed}")]
    CudaUnavailable {
        /// What is missing.
        reason: String,
        /// What would do.
        allowed: String,
    },
    /// The driver does not know the PTX version of the kernels.
    #[error(
        "the NVIDIA driver supports CUDA {}.{}, but the kernels are PTX {}.{}; allowed: a driver for CUDA {}.{} or later",
        .supported.0, .supported.1, .ptx.0, .ptx.1, .needed.0, .needed.1
    )]
    DriverTooOld {
        /// Latest version of CUDA that the driver supports, major and minor.
        supported: (u32, u32),
        /// Version of the kernels' PTX.
        ptx: (u32, u32),
        /// The version of CUDA that brought it.
        needed: (u32, u32),
    },
    /// The device lacks instructions of the kernels.
    #[error(
        "CUDA device {ordinal} ({name}) has compute capability {}.{}; allowed: 8.0 or later (Ampere, Ada, Hopper, Blackwell)",
        .capability.0, .capability.1
    )]
    DeviceUnsupported {
        /// Index of the device among those visible.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Its compute capability, major and minor.
        capability: (u32, u32),
    },
    /// A call of the CUDA driver failed, or reports that something enqueued earlier did.
    #[error("the CUDA driver's `{call}` gave error {code} ({name}): {hint}")]
    Cuda {
        /// The function of the driver.
        call: &'static str,
        /// Its `CUresult`.
        code: i32,
        /// Name of the code.
        name: &'static str,
        /// What it means here and what to do, with the log of the driver's compiler where there is one.
        hint: String,
    },
    /// No WGSL shader can run in this process: no adapter, or one that gives no device.
    #[error(
        "wgpu is not available: {reason}; allowed: a Vulkan, Metal or DX12 driver, be it a software one like Mesa's llvmpipe"
    )]
    WgpuUnavailable {
        /// What is missing.
        reason: String,
    },
    /// wgpu refused a call, or the device was lost.
    #[error("wgpu's `{call}` failed: {reason}")]
    Wgpu {
        /// What was asked of wgpu.
        call: &'static str,
        /// Its own words.
        reason: String,
    },
    /// The framework whose tensors a call is given failed at something that the call asked of it.
    #[error("{framework}'s `{call}` failed: {reason}")]
    Framework {
        /// Its name.
        framework: &'static str,
        /// What was asked of it.
        call: &'static str,
        /// Its own words.
        reason: String,
    },
    /// One of the ranks that compute a loss together has failed. All of them get this error.
    #[error("rank {rank} has failed: {reason}")]
    Rank {
        /// Which one. If several have failed, it is one of them, the same on every rank.
        rank: usize,
        /// Its error, in words. Rows are those of its part of the batch.
        reason: String,
    },
    /// Ranks that compute a loss together do not reach each other.
    #[error("{engine} failed: {reason}; the ranks no longer agree, so the group cannot be used any more")]
    Engine {
        /// What connects them.
        engine: &'static str,
        /// Its own words.
        reason: String,
    },
    /// A device pointer of the caller has an address the kernels cannot work with.
    #[error("argument `{slot}` is at address {address:#x}; allowed: multiples of {alignment} bytes")]
    Misaligned {
        /// Name of the pointer.
        slot: &'static str,
        /// Its value.
        address: u64,
        /// What it must be a multiple of.
        alignment: u64,
    },
    /// Memory, stream and device do not belong together.
    #[error("argument `{argument}` belongs to {found}; allowed: {expected}")]
    WrongDevice {
        /// Name of the argument.
        argument: &'static str,
        /// The device or context it belongs to.
        found: String,
        /// The one it is used with.
        expected: String,
    },
}

/// ` in its first 64 entries`; nothing without a prefix.
fn of_prefix(words: &str, prefix: &Option<usize>) -> String {
    prefix.map_or_else(String::new, |dim| format!(" {words} first {dim} entries"))
}

impl Error {
    pub(crate) fn invalid(argument: &'static str, value: impl Into<String>, allowed: impl Into<String>) -> Self {
        Self::InvalidArgument { argument, value: value.into(), allowed: allowed.into() }
    }

    pub(crate) fn dtype(backend: &'static str, dtype: DType, allowed: &str) -> Self {
        Self::Unsupported { backend, what: format!("embeddings of type {dtype}"), allowed: allowed.into() }
    }
}
