//! DLPack: memory of other libraries, borrowed from the capsules they hand out. By hand rather than by the crate dlpark: of its structures
//! only those are needed that import, and every refusal here names the argument, as PyTorch's users see it.
//!
//! ```text
//! capsule "dltensor" or "dltensor_versioned" ── Tensor::import ──► renamed "used_…", so that nobody takes it twice
//!                                                  │ owns the managed tensor: the memory stays for as long as it lives
//!                                                  ▼ drop
//!                                               deleter, once
//! ```

use crate::errors::{Refusal, invalid};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use samtone::{DType, Data, DataMut, Embeddings, EmbeddingsMut};
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

/// `DLDeviceType` of the memory that is understood here.
const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_MANAGED: i32 = 13;
/// `DLDataTypeCode`.
const INT: u8 = 0;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;
/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
const READ_ONLY: u64 = 1;
/// The major version whose structures are written down here; a managed tensor of a later one may only be deleted.
const MAJOR: u32 = 1;

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DLDevice {
    device_type: i32,
    device_id: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DLDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DLTensor {
    data: *mut c_void,
    device: DLDevice,
    ndim: i32,
    dtype: DLDataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct DLManagedTensor {
    tensor: DLTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
}

#[repr(C)]
struct DLManagedTensorVersioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    flags: u64,
    tensor: DLTensor,
}

/// A managed tensor that is ours to delete.
enum Managed {
    Plain(NonNull<DLManagedTensor>),
    Versioned(NonNull<DLManagedTensorVersioned>),
}

impl Drop for Managed {
    fn drop(&mut self) {
        match *self {
            // SAFETY: taken from a capsule that has been renamed since, so this is the only deletion; nobody reads it afterwards.
            Self::Plain(managed) => unsafe {
                if let Some(delete) = managed.as_ref().deleter {
                    delete(managed.as_ptr());
                }
            },
            // SAFETY: likewise.
            Self::Versioned(managed) => unsafe {
                if let Some(delete) = managed.as_ref().deleter {
                    delete(managed.as_ptr());
                }
            },
        }
    }
}

/// Where the memory of a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Memory of the host.
    Cpu,
    /// Memory of the CUDA device of that ordinal.
    Cuda(usize),
}

/// Memory of another library, kept there until this is dropped, with the name of the argument it came as.
///
/// Whoever hands out a capsule promises that its shape, strides and memory are as described for as long as the managed tensor
/// is there. As with every operation of PyTorch, the caller keeps other threads from writing to inputs, and from touching
/// outputs, while a call runs.
pub struct Tensor {
    managed: Managed,
    argument: &'static str,
}

/// Shape and strides of a matrix, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub dtype: DType,
    pub rows: usize,
    pub dim: usize,
    pub row_stride: usize,
}

impl Layout {
    /// Elements from the first to the last one, gaps between rows included.
    pub fn span(&self) -> usize {
        (self.rows - 1) * self.row_stride + self.dim
    }
}

/// Elements of vectors.
pub trait Number: Copy {
    const CODE: u8;
    const BITS: u8;
    const NAME: &'static str;
}

macro_rules! numbers {
    ($($t:ty, $code:ident, $bits:literal, $name:literal;)*) => {$(
        impl Number for $t {
            const CODE: u8 = $code;
            const BITS: u8 = $bits;
            const NAME: &'static str = $name;
        }
    )*};
}
numbers! { i64, INT, 64, "int64"; f32, FLOAT, 32, "float32"; f64, FLOAT, 64, "float64"; }

impl Tensor {
    /// Takes what a capsule holds.
    ///
    /// # Errors
    /// For a capsule that has been used, is none of DLPack's, or is of a later major version.
    pub fn import(argument: &'static str, capsule: &Bound<'_, PyCapsule>) -> PyResult<Self> {
        const NAMES: [(&CStr, &CStr); 2] =
            [(c"dltensor", c"used_dltensor"), (c"dltensor_versioned", c"used_dltensor_versioned")];
        let refused = |value: &str| {
            let sentence = format!("argument `{argument}` is {value}; allowed: an unused DLPack capsule of version 1");
            PyValueError::new_err(sentence)
        };
        let object = capsule.as_ptr();
        // SAFETY: `object` is a capsule and we are attached to the interpreter; the names are static.
        let found =
            NAMES.iter().position(|(name, _)| unsafe { pyo3::ffi::PyCapsule_IsValid(object, name.as_ptr()) } == 1);
        let Some(kind) = found else { return Err(refused("a capsule that is used up or not of DLPack")) };
        let (name, used) = NAMES[kind];
        // SAFETY: valid under this name, as has just been asked. Renaming it makes its destructor leave the managed tensor to us,
        // and keeps any other consumer from taking it; nothing else runs between the two calls.
        let pointer = unsafe {
            let pointer = pyo3::ffi::PyCapsule_GetPointer(object, name.as_ptr());
            if pyo3::ffi::PyCapsule_SetName(object, used.as_ptr()) != 0 {
                return Err(PyErr::fetch(capsule.py()));
            }
            pointer
        };
        let managed = match (kind, NonNull::new(pointer)) {
            (0, Some(pointer)) => Managed::Plain(pointer.cast()),
            (_, Some(pointer)) => Managed::Versioned(pointer.cast()),
            (_, None) => return Err(refused("an empty capsule")),
        };
        if let Managed::Versioned(versioned) = &managed {
            // SAFETY: the version comes first in every major version.
            let major = unsafe { (&raw const (*versioned.as_ptr()).major).read() };
            if major != MAJOR {
                // Dropping `managed` calls its deleter, whose place is the same in every major version.
                return Err(refused(&format!("a capsule of DLPack {major}")));
            }
        }
        Ok(Self { managed, argument })
    }

    fn raw(&self) -> &DLTensor {
        match &self.managed {
            // SAFETY: the managed tensor lives as long as we do, and its producer does not change it.
            Managed::Plain(managed) => unsafe { &managed.as_ref().tensor },
            // SAFETY: likewise.
            Managed::Versioned(managed) => unsafe { &managed.as_ref().tensor },
        }
    }

    fn is_read_only(&self) -> bool {
        match &self.managed {
            Managed::Plain(_) => false,
            // SAFETY: as in `raw`.
            Managed::Versioned(managed) => unsafe { managed.as_ref().flags & READ_ONLY != 0 },
        }
    }

    /// Address of the first element.
    pub fn address(&self) -> usize {
        let raw = self.raw();
        raw.data.addr().wrapping_add(raw.byte_offset as usize)
    }

    /// Where it is.
    ///
    /// # Errors
    /// For devices other than CPU and CUDA.
    pub fn device(&self) -> Result<Device, Refusal> {
        let DLDevice { device_type, device_id } = self.raw().device;
        match (device_type, usize::try_from(device_id)) {
            (CPU, _) => Ok(Device::Cpu),
            (CUDA | CUDA_MANAGED, Ok(ordinal)) => Ok(Device::Cuda(ordinal)),
            _ => {
                let value = format!("on DLPack device type {device_type}, index {device_id}");
                Err(invalid(self.argument, value, "tensors on the CPU or a CUDA device"))
            }
        }
    }

    fn expect_cpu(&self) -> Result<(), Refusal> {
        match self.device()? {
            Device::Cpu => Ok(()),
            Device::Cuda(ordinal) => {
                Err(invalid(self.argument, format!("on CUDA device {ordinal}"), "memory of the host, for this call"))
            }
        }
    }

    /// Sizes and strides, the latter of a compact tensor if the producer leaves them out.
    fn shape<const N: usize>(&self) -> Result<[(usize, i64); N], Refusal> {
        let raw = self.raw();
        let wanted = if N == 1 { "a vector" } else { "a matrix, rows x dim" };
        if usize::try_from(raw.ndim) != Ok(N) || raw.shape.is_null() {
            return Err(invalid(self.argument, format!("a tensor of {} dimensions", raw.ndim), wanted));
        }
        let mut shape = [(0, 1); N];
        let mut compact = 1_i64;
        for k in (0..N).rev() {
            // SAFETY: there are `ndim` = N sizes, and as many strides if there are any.
            let (size, stride) = unsafe {
                let stride = if raw.strides.is_null() { compact } else { raw.strides.add(k).read() };
                (raw.shape.add(k).read(), stride)
            };
            let Ok(positive) = usize::try_from(size) else {
                return Err(invalid(self.argument, format!("a tensor with a size of {size}"), wanted));
            };
            shape[k] = (positive, stride);
            compact = compact.saturating_mul(size);
        }
        Ok(shape)
    }

    /// The matrix of embeddings that it is, on any device.
    ///
    /// # Errors
    /// For other ranks and types, no element, elements of a row that are not next to each other, and rows that overlap.
    pub fn layout(&self) -> Result<Layout, Refusal> {
        let [(rows, row), (dim, column)] = self.shape::<2>()?;
        let DLDataType { code, bits, lanes } = self.raw().dtype;
        let dtype = match (code, bits, lanes) {
            (FLOAT, 32, 1) => DType::F32,
            (FLOAT, 16, 1) => DType::F16,
            (BFLOAT, 16, 1) => DType::BF16,
            _ => {
                let value = format!("of DLPack type {code} with {bits} bits and {lanes} lanes");
                return Err(invalid(self.argument, value, "float32, float16 or bfloat16"));
            }
        };
        if rows == 0 || dim == 0 {
            return Err(invalid(
                self.argument,
                format!("a matrix of shape {rows} x {dim}"),
                "at least one row and column",
            ));
        }
        let row_stride = if rows == 1 { Ok(dim) } else { usize::try_from(row) };
        let fits = |stride: &usize| {
            let span = (rows - 1).checked_mul(*stride).and_then(|span| span.checked_add(dim));
            *stride >= dim && span.is_some_and(|span| span <= isize::MAX as usize / 8)
        };
        match row_stride.ok().filter(fits) {
            Some(row_stride) if dim == 1 || column == 1 => Ok(Layout { dtype, rows, dim, row_stride }),
            _ => {
                let value = format!("a matrix of strides {row} and {column}");
                Err(invalid(self.argument, value, format!("a column stride of 1 and a row stride of {dim} or more")))
            }
        }
    }

    /// The first element, of `T`; an error unless the memory may be read as such here.
    fn start<T>(&self) -> Result<*mut T, Refusal> {
        self.expect_cpu()?;
        let start = self.raw().data.wrapping_byte_add(self.raw().byte_offset as usize).cast::<T>();
        if start.is_null() || !start.is_aligned() {
            let allowed = format!("multiples of {} bytes", align_of::<T>());
            return Err(invalid(self.argument, format!("at address {:#x}", start.addr()), allowed));
        }
        Ok(start)
    }

    fn elements<T>(&self, span: usize) -> Result<&[T], Refusal> {
        // SAFETY: aligned and not null; the producer promises elements of this type, all bit patterns of which are valid, over
        // the span of the shape and strides it gives, which is below isize::MAX bytes. They stay while `self` is borrowed, and
        // nobody writes to them, as the description of `Tensor` demands.
        Ok(unsafe { std::slice::from_raw_parts(self.start::<T>()?, span) })
    }

    fn elements_mut<T>(&mut self, span: usize) -> Result<&mut [T], Refusal> {
        if self.is_read_only() {
            return Err(invalid(self.argument, "read-only memory", "memory that may be written"));
        }
        // SAFETY: as in `elements`; not read-only, and borrowed by nobody else: `expect_apart` has compared it with every other
        // tensor of the call, and callers pass memory that no one else knows yet.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start::<T>()?, span) })
    }

    /// As samtone reads it, in place.
    ///
    /// # Errors
    /// As [`Tensor::layout`], and for memory of another device.
    pub fn embeddings(&self) -> Result<Embeddings<'_>, Refusal> {
        let layout = self.layout()?;
        let data = match layout.dtype {
            DType::F16 => Data::F16(self.elements::<f16>(layout.span())?),
            DType::BF16 => Data::BF16(self.elements::<bf16>(layout.span())?),
            DType::F32 => Data::F32(self.elements::<f32>(layout.span())?),
            DType::F64 => return Err(invalid("dtype", "f64", "f32, f16 and bf16")), // no layout has it
        };
        Ok(Embeddings::with_row_stride(data, layout.rows, layout.dim, layout.row_stride)?)
    }

    /// As samtone writes gradients to it, in place.
    ///
    /// # Errors
    /// As [`Tensor::embeddings`], and for read-only memory.
    pub fn embeddings_mut(&mut self) -> Result<EmbeddingsMut<'_>, Refusal> {
        let layout = self.layout()?;
        let data = match layout.dtype {
            DType::F16 => DataMut::F16(self.elements_mut::<f16>(layout.span())?),
            DType::BF16 => DataMut::BF16(self.elements_mut::<bf16>(layout.span())?),
            DType::F32 => DataMut::F32(self.elements_mut::<f32>(layout.span())?),
            DType::F64 => return Err(invalid("dtype", "f64", "f32, f16 and bf16")),
        };
        Ok(EmbeddingsMut::with_row_stride(data, layout.rows, layout.dim, layout.row_stride)?)
    }

    fn vector_len<T: Number>(&self) -> Result<usize, Refusal> {
        let [(len, stride)] = self.shape::<1>()?;
        let DLDataType { code, bits, lanes } = self.raw().dtype;
        if (code, bits, lanes) != (T::CODE, T::BITS, 1) {
            let value = format!("of DLPack type {code} with {bits} bits and {lanes} lanes");
            return Err(invalid(self.argument, value, T::NAME));
        }
        if len > isize::MAX as usize / 8 || (len > 1 && stride != 1) {
            return Err(invalid(
                self.argument,
                format!("a vector of {len} with a stride of {stride}"),
                "a stride of 1",
            ));
        }
        Ok(len)
    }

    /// A contiguous vector on the CPU.
    ///
    /// # Errors
    /// For anything else.
    pub fn vector<T: Number>(&self) -> Result<&[T], Refusal> {
        match self.vector_len::<T>()? {
            0 => Ok(&[]),
            len => self.elements(len),
        }
    }

    /// A contiguous vector on the CPU, to be written.
    ///
    /// # Errors
    /// For anything else, and for read-only memory.
    pub fn vector_mut<T: Number>(&mut self) -> Result<&mut [T], Refusal> {
        match self.vector_len::<T>()? {
            0 => Ok(&mut []),
            len => self.elements_mut(len),
        }
    }

    /// Bytes from the first element to behind the last one.
    ///
    /// # Errors
    /// For a vector that is not contiguous, and as [`Tensor::layout`].
    pub fn bytes(&self) -> Result<usize, Refusal> {
        self.range().map(|range| range.len())
    }

    /// Addresses from the first element to behind the last one.
    fn range(&self) -> Result<std::ops::Range<usize>, Refusal> {
        let raw = self.raw();
        let elements = match raw.ndim {
            1 => match self.shape::<1>()? {
                [(len, stride)] if len <= 1 || stride == 1 => len,
                [(len, stride)] => {
                    let value = format!("a vector of {len} with a stride of {stride}");
                    return Err(invalid(self.argument, value, "a stride of 1"));
                }
            },
            _ => self.layout()?.span(),
        };
        let start = self.address();
        Ok(start..start.saturating_add(elements.saturating_mul(usize::from(raw.dtype.bits) / 8)))
    }
}

/// An error if an output shares memory with an input or another output.
pub fn expect_apart(inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<(), Refusal> {
    for (k, output) in outputs.iter().enumerate() {
        let own = output.range()?;
        for other in inputs.iter().chain(&outputs[..k]) {
            let range = other.range()?;
            if own.start.max(range.start) < own.end.min(range.end) {
                let value = format!("memory that `{}` is in, too", other.argument);
                return Err(invalid(output.argument, value, "memory of its own"));
            }
        }
    }
    Ok(())
}
