//! The loss on slices and streams of cudarc, in memory that is allocated on the stream.
//!
//! cudarc orders streams. A call waits for the slices that it reads or writes, and records that it uses them, as cudarc's own calls do.
//! This orders slices and streams of one `CudaContext` object. Launches of a graph of [`Step::capture`] do the same. If the caller
//! captures calls into a graph of their own, cudarc's event tracking must be off, as its documentation says.

mod calls;
mod shard;
mod step;

pub use ::cudarc;
pub use calls::{DeviceGradients, DeviceLossAndGradients, Forward, forward, loss_and_gradients};
pub use shard::Shard;
pub use step::{GradientSlices, GraphBuffers, Step, StepGraph};

use super::arguments::Stream;
use super::codes;
use super::device::{Device, allocation_error};
use crate::cuda::Problem;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::pairs::Pairs;
use cudarc::driver::{CudaSlice, CudaStream, CudaView, DeviceRepr, DriverError};
use std::fmt;
use std::sync::Arc;

/// A batch whose embeddings are on a device: q (M × d), p (N × d), row-major, and what is to be computed of them.
#[derive(Debug)]
pub struct DeviceBatch<'a, T> {
    query: CudaView<'a, T>,
    passage: CudaView<'a, T>,
    dim: usize,
    row_strides: [usize; 2],
    pairs: Pairs<'a>,
}

impl<'a, T: Element> DeviceBatch<'a, T> {
    /// Contiguous embeddings: exactly M·dim and N·dim elements, with the M and N of `pairs`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of elements.
    pub fn new(query: CudaView<'a, T>, passage: CudaView<'a, T>, dim: usize, pairs: Pairs<'a>) -> Result<Self> {
        for (argument, view, rows) in [("query", &query, pairs.rows()), ("passage", &passage, pairs.passages())] {
            if rows.checked_mul(dim) != Some(view.len()) {
                let allowed = format!("{rows} rows of {dim}");
                return Err(Error::invalid(argument, format!("a slice of {} elements", view.len()), allowed));
            }
        }
        Ok(Self { query, passage, dim, row_strides: [dim; 2], pairs })
    }

    /// Embeddings whose rows start `row_strides` elements apart, for q and for p. Each slice reaches at least to the end of its last row.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stride below `dim`, or for a slice that is too short.
    pub fn with_row_strides(
        query: CudaView<'a, T>,
        passage: CudaView<'a, T>,
        dim: usize,
        row_strides: [usize; 2],
        pairs: Pairs<'a>,
    ) -> Result<Self> {
        let towers = [("query", &query, pairs.rows()), ("passage", &passage, pairs.passages())];
        for ((argument, view, rows), stride) in towers.into_iter().zip(row_strides) {
            if stride < dim {
                return Err(Error::invalid(
                    "row_strides",
                    stride.to_string(),
                    format!("at least dim = {dim} elements"),
                ));
            }
            let needed = (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(dim));
            if needed.is_none_or(|needed| view.len() < needed) {
                let allowed = format!("{rows} rows of {dim}, {stride} apart");
                return Err(Error::invalid(argument, format!("a slice of {} elements", view.len()), allowed));
            }
        }
        Ok(Self { query, passage, dim, row_strides, pairs })
    }

    /// q.
    pub fn query(&self) -> &CudaView<'a, T> {
        &self.query
    }

    /// p.
    pub fn passage(&self) -> &CudaView<'a, T> {
        &self.passage
    }

    /// d.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Who belongs to whom.
    pub fn pairs(&self) -> &Pairs<'a> {
        &self.pairs
    }

    fn shape(&self) -> Shape {
        let Self { dim, row_strides, pairs, .. } = self;
        let (rows, passages, dtype) = (pairs.rows(), pairs.passages(), T::DTYPE);
        Shape { rows, passages, dim: *dim, row_strides: *row_strides, dtype }
    }

    /// The problem of this batch, with gradients of both towers as contiguous f32.
    ///
    /// # Errors
    /// As [`Problem::new`] and [`Problem::with_row_strides`].
    pub fn problem(&self) -> Result<Problem<'a>> {
        let [query, passage] = self.row_strides;
        Problem::new(self.pairs, T::DTYPE, self.dim)?.with_row_strides(query, passage)
    }
}

/// What the batches of a forward call and of its later calls must have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shape {
    rows: usize,
    passages: usize,
    dim: usize,
    row_strides: [usize; 2],
    dtype: DType,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, passages, dim, row_strides: [query, passage], dtype } = self;
        write!(
            f,
            "{rows} queries x {passages} passages of dimension {dim}, {dtype}, {query} and {passage} elements apart"
        )
    }
}

impl Shape {
    fn expect<T: Element>(&self, batch: &DeviceBatch<'_, T>) -> Result<()> {
        let given = batch.shape();
        if *self == given {
            Ok(())
        } else {
            Err(Error::StateMismatch { saved: self.to_string(), given: given.to_string() })
        }
    }
}

/// The upstream gradient, a factor of all gradients.
#[derive(Debug)]
pub enum Upstream<'a> {
    /// A number, rounded to f32.
    Host(f64),
    /// One f32 on the device. The backward call reads it when it runs, so it may still be computed when the call is enqueued, and the host
    /// does not wait for it.
    Device(CudaView<'a, f32>),
}

impl From<f64> for Upstream<'_> {
    fn from(value: f64) -> Self {
        Self::Host(value)
    }
}

impl<'a> From<&'a CudaSlice<f32>> for Upstream<'a> {
    fn from(slice: &'a CudaSlice<f32>) -> Self {
        Self::Device(slice.as_view())
    }
}

impl Upstream<'_> {
    fn check(&self) -> Result<()> {
        match self {
            Self::Host(value) if !(*value as f32).is_finite() => {
                Err(Error::invalid("upstream", value.to_string(), "a finite number in the range of f32"))
            }
            Self::Device(view) if view.len() != 1 => {
                Err(Error::invalid("upstream", format!("a slice of {} elements", view.len()), "one f32"))
            }
            _ => Ok(()),
        }
    }
}

/// Our error for cudarc's. cudarc asks the driver for the text of its own, which needs a driver that works.
fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| codes::error(call, error.0 as i32)
}

/// A stream as a number.
fn raw(stream: &CudaStream) -> Stream {
    Stream::from_raw(stream.cu_stream().addr() as u64)
}

/// An error unless the stream is of the device's primary context.
fn expect_context(device: &Device, stream: &CudaStream) -> Result<()> {
    let context = stream.context();
    if context.cu_ctx().addr() as u64 == device.context() {
        return Ok(());
    }
    let kind = match context.is_primary() {
        true if context.ordinal() == device.ordinal() => "another driver library's context",
        true => "the primary context",
        false => "a context other than the primary one",
    };
    Err(Error::WrongDevice {
        argument: "stream",
        found: format!("{kind} of device {}", context.ordinal()),
        expected: format!("the primary context of device {}", device.ordinal()),
    })
}

/// Uninitialised memory of at least one element.
///
/// # Safety
/// It must be written before it is read.
unsafe fn allocate<T: DeviceRepr>(stream: &Arc<CudaStream>, len: usize, purpose: &'static str) -> Result<CudaSlice<T>> {
    // SAFETY: the caller's promise.
    let memory = unsafe { stream.alloc(len.max(1)) };
    memory.map_err(failed("cuMemAllocAsync")).map_err(|e| allocation_error(e, len * size_of::<T>(), purpose))
}
