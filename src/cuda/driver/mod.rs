//! Runs plans on a GPU. The driver is loaded by name. It compiles the kernels from PTX, and launches them on the caller's memory and
//! stream.
//!
//! ```text
//! probe.rs      is there a driver, a device, and are both new enough?        never panics
//! entry.rs      the driver's functions; codes.rs their errors as sentences
//! ptx.rs        the kernels, and what their text says
//! arguments.rs  pointers and streams as numbers → parameters of a launch     needs no driver
//! device.rs     primary context, kernels, launches                           the raw interface
//! shared.rs     one device for all of a process
//! graph.rs      a call as a CUDA graph
//! memory.rs     whose memory is it, and is it enough?
//! readout.rs    state → results, errors, partials of a shard; readout/reading.rs copies
//! skipped.rs    what tile skipping left out
//! backend.rs    batches in host memory
//! slices/       batches in memory of cudarc                                  feature `cudarc`
//! ```

mod arguments;
mod backend;
mod buffer;
mod codes;
mod device;
mod entry;
mod graph;
mod memory;
mod probe;
mod ptx;
mod readout;
mod shared;
mod skipped;
#[cfg(feature = "cudarc")]
mod slices;

pub use arguments::{Pointers, Stream, check_slot_bytes};
pub use backend::Cuda;
pub use device::Device;
pub use graph::Graph;
pub use probe::{available, device_count, is_available};
pub use readout::Readout;
pub use skipped::SkippedSquares;
#[cfg(feature = "cudarc")]
pub use slices::{
    DeviceBatch, DeviceGradients, DeviceLossAndGradients, Forward, GradientSlices, GraphBuffers, Shard, Step,
    StepGraph, Upstream, cudarc, forward, loss_and_gradients,
};
