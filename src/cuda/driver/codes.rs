//! What the driver's error numbers mean, as sentences.
//!
//! The names stand in a table here, because only a driver that works can be asked for them.

use crate::error::{Error, Result};

/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(super) const OUT_OF_MEMORY: i32 = 2;
/// `CUDA_ERROR_NO_DEVICE`.
pub(super) const NO_DEVICE: i32 = 100;

/// Numbers and names of the errors that calls of this crate can meet.
const NAMES: &[(i32, &str)] = &[
    (1, "CUDA_ERROR_INVALID_VALUE"),
    (OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"),
    (3, "CUDA_ERROR_NOT_INITIALIZED"),
    (4, "CUDA_ERROR_DEINITIALIZED"),
    (34, "CUDA_ERROR_STUB_LIBRARY"),
    (46, "CUDA_ERROR_DEVICE_UNAVAILABLE"),
    (NO_DEVICE, "CUDA_ERROR_NO_DEVICE"),
    (101, "CUDA_ERROR_INVALID_DEVICE"),
    (102, "CUDA_ERROR_DEVICE_NOT_LICENSED"),
    (200, "CUDA_ERROR_INVALID_IMAGE"),
    (201, "CUDA_ERROR_INVALID_CONTEXT"),
    (209, "CUDA_ERROR_NO_BINARY_FOR_GPU"),
    (214, "CUDA_ERROR_ECC_UNCORRECTABLE"),
    (218, "CUDA_ERROR_INVALID_PTX"),
    (220, "CUDA_ERROR_NVLINK_UNCORRECTABLE"),
    (221, "CUDA_ERROR_JIT_COMPILER_NOT_FOUND"),
    (222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
    (223, "CUDA_ERROR_JIT_COMPILATION_DISABLED"),
    (300, "CUDA_ERROR_INVALID_SOURCE"),
    (302, "CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND"),
    (303, "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED"),
    (304, "CUDA_ERROR_OPERATING_SYSTEM"),
    (400, "CUDA_ERROR_INVALID_HANDLE"),
    (401, "CUDA_ERROR_ILLEGAL_STATE"),
    (500, "CUDA_ERROR_NOT_FOUND"),
    (600, "CUDA_ERROR_NOT_READY"),
    (700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
    (701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
    (702, "CUDA_ERROR_LAUNCH_TIMEOUT"),
    (709, "CUDA_ERROR_CONTEXT_IS_DESTROYED"),
    (710, "CUDA_ERROR_ASSERT"),
    (714, "CUDA_ERROR_HARDWARE_STACK_ERROR"),
    (715, "CUDA_ERROR_ILLEGAL_INSTRUCTION"),
    (716, "CUDA_ERROR_MISALIGNED_ADDRESS"),
    (717, "CUDA_ERROR_INVALID_ADDRESS_SPACE"),
    (718, "CUDA_ERROR_INVALID_PC"),
    (719, "CUDA_ERROR_LAUNCH_FAILED"),
    (800, "CUDA_ERROR_NOT_PERMITTED"),
    (801, "CUDA_ERROR_NOT_SUPPORTED"),
    (802, "CUDA_ERROR_SYSTEM_NOT_READY"),
    (803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
    (804, "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE"),
    (900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"),
    (901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
    (902, "CUDA_ERROR_STREAM_CAPTURE_MERGE"),
    (903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"),
    (904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"),
    (905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"),
    (906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"),
    (907, "CUDA_ERROR_CAPTURED_EVENT"),
    (908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"),
    (912, "CUDA_ERROR_INVALID_CLUSTER_SIZE"),
    (999, "CUDA_ERROR_UNKNOWN"),
];

/// Name of a code, as in the driver's header.
pub(super) fn name(code: i32) -> &'static str {
    NAMES.iter().find(|(number, _)| *number == code).map_or("a code that samtone does not know", |(_, name)| name)
}

/// What a code means to a caller of this crate, and what to do.
pub(super) fn hint(code: i32) -> &'static str {
    match code {
        1 => "the driver refuses an argument; a pointer may be no device memory of this context",
        OUT_OF_MEMORY => "the device has no memory left; a smaller `workspace_bytes` or batch may fit",
        3 => "a process that was forked after CUDA had started cannot use it; allowed: processes that are spawned",
        4 => "the driver is shutting down with the process",
        34 => "the library found is a toolkit's stub; allowed: the driver's own, first on the loader's path",
        46 => "the device is used exclusively by another process, or is being reset",
        NO_DEVICE => "no device is visible; look at `nvidia-smi` and at the variable CUDA_VISIBLE_DEVICES",
        101 => "no visible device has this ordinal",
        201 | 400 | 709 => "the context, stream or memory is none of this device, or is gone",
        209 => "the kernels are for compute capability 8.0 and later",
        200 | 218 | 300 => "the driver's compiler refuses the kernels' PTX",
        221 => "the driver is installed without its PTX compiler; install it completely",
        222 => "the driver is older than the kernels' PTX; install a later one",
        223 => "the variable CUDA_DISABLE_PTX_JIT forbids to compile the kernels; unset it",
        214 | 220 => "the hardware reports an error that it cannot correct",
        302..=304 => "the driver is installed incompletely, or not allowed to reach the device",
        700 | 710 | 714..=719 => {
            "a kernel, of whichever library, has faulted, and no later call on this device can succeed in this process; \
             start it again; compute-sanitizer names the kernel"
        }
        701 => "a block of threads needs more registers or shared memory than the device has",
        702 => "the display's watchdog ended a kernel, and with it the context; start the process again",
        800 | 801 => "the system does not permit or support this call",
        802 => "the system is still starting; on machines with NVSwitch, is the fabric manager running?",
        803 => "the driver's library and kernel module differ; a reboot brings them together",
        804 => "this device does not support the compatibility package of CUDA that is installed",
        905 => {
            "a stream that is being captured would wait for what was enqueued before the capture; with slices of cudarc, turn its \
             event tracking off before they are allocated"
        }
        900..=904 | 906..=908 => {
            "a stream is being captured into a graph, and this call cannot be part of one; load kernels and allocate before \
             the capture, read results after a replay"
        }
        912 => {
            "the device, or the part of it that this process has, runs no two blocks of threads as a cluster; the kernels of \
             `Architecture::Sm80` need none"
        }
        999 => "the driver cannot say what failed; reloading it or a reboot may help",
        _ => "see CUresult in NVIDIA's description of the driver API",
    }
}

/// The error for a code other than 0.
pub(super) fn error(call: &'static str, code: i32) -> Error {
    Error::Cuda { call, code, name: name(code), hint: hint(code).into() }
}

/// An error if the code is not 0.
pub(super) fn check(call: &'static str, code: i32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(error(call, code)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_becomes_a_sentence() {
        assert_eq!(check("cuInit", 0), Ok(()));
        let sentence = error("cuStreamSynchronize", 700).to_string();
        assert!(sentence.contains("`cuStreamSynchronize`") && sentence.contains("700 (CUDA_ERROR_ILLEGAL_ADDRESS)"));
        assert!(sentence.contains("compute-sanitizer"), "{sentence}");
        assert!(error("cuInit", 123_456).to_string().contains("123456"));
    }

    #[test]
    fn codes_are_sorted_and_named_once() {
        assert!(NAMES.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (code, name) in NAMES.iter().filter(|(code, _)| ![401, 500, 600, 102].contains(code)) {
            assert_ne!(hint(*code), hint(-1), "{name} has no hint");
        }
    }
}
