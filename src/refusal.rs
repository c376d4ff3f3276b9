//! Why a device refuses a call: what is wrong with its inputs, and the error that says so.

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::prefix::Prefix;
use crate::tower::Tower;
use half::{bf16, f16};

/// Why a call is refused, and the lowest row that is wrong. The call's results on the device are NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// An embedding with a NaN or an infinity.
    NonFinite(Tower, usize),
    /// An embedding of norm zero, if the call says that this is an error.
    ZeroNorm(Tower, usize),
    /// A row of weight above 0 whose softmax is empty: row, group, and number of the prefix among those of weight above 0.
    NoNegative(usize, usize, usize),
}

impl Refusal {
    /// The first of what is wrong, in the order in which all backends look. `non_finite` and `zero_norm` are the lowest such rows of the
    /// queries and of the passages.
    pub(crate) fn first(
        non_finite: [Option<usize>; 2],
        zero_norm: [Option<usize>; 2],
        no_negative: Option<(usize, usize, usize)>,
    ) -> Option<Self> {
        let of_tower = |k: usize, tower| {
            let non_finite = non_finite[k].map(|row| Self::NonFinite(tower, row));
            non_finite.or(zero_norm[k].map(|row| Self::ZeroNorm(tower, row)))
        };
        let no_negative = no_negative.map(|(row, group, prefix)| Self::NoNegative(row, group, prefix));
        of_tower(0, Tower::Query).or(of_tower(1, Tower::Passage)).or(no_negative)
    }

    /// The error for a call of this loss on embeddings of this type. `prefixes` are those of weight above 0, if the call names any. Where a
    /// prefix has norm zero, the shortest has. `row_bytes` must give a row that is not finite.
    pub(crate) fn error(
        self,
        loss: &str,
        dtype: DType,
        prefixes: Option<&[Prefix]>,
        row_bytes: impl FnOnce(Tower, usize) -> Result<Vec<u8>>,
    ) -> Error {
        let dim = |k: usize| prefixes.and_then(|all| Some(all.get(k)?.dim));
        match self {
            Self::NonFinite(tower, row) => match row_bytes(tower, row) {
                Ok(bytes) => non_finite(tower, row, &values(&bytes, dtype)),
                Err(error) => error,
            },
            Self::ZeroNorm(tower, row) => Error::ZeroNorm { tower, row, prefix: dim(0) },
            Self::NoNegative(row, group, k) => Error::NoNegative { loss: loss.into(), group, row, prefix: dim(k) },
        }
    }
}

/// The elements of a row.
pub(crate) fn values(bytes: &[u8], dtype: DType) -> Vec<f64> {
    fn read<T: Element + bytemuck::AnyBitPattern>(bytes: &[u8]) -> Vec<f64> {
        bytes.chunks_exact(size_of::<T>()).map(|chunk| bytemuck::pod_read_unaligned::<T>(chunk).to_f64()).collect()
    }
    match dtype {
        DType::F64 => read::<f64>(bytes),
        DType::F32 => read::<f32>(bytes),
        DType::F16 => read::<f16>(bytes),
        DType::BF16 => read::<bf16>(bytes),
    }
}

/// The error for a row that is not finite. It names the first such element.
pub(crate) fn non_finite(tower: Tower, row: usize, values: &[f64]) -> Error {
    match values.iter().position(|value| !value.is_finite()) {
        Some(column) => Error::NonFinite { tower, row, column, value: values[column] },
        None => Error::StateMismatch {
            saved: format!("{tower} embeddings whose row {row} is not finite"),
            given: "embeddings in which it is: they were overwritten before the results were read".into(),
        },
    }
}
