//! The only place that calls the matrix-product library. It checks slices, and multiplies on one thread.

/// A strided matrix inside a slice.
#[derive(Clone, Copy)]
pub(super) struct MatRef<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix.
    pub(super) fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    pub(super) fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn fits(&self) -> bool {
        last(self.rows, self.cols, self.row_stride, self.col_stride).is_some_and(|last| last < self.data.len())
    }
}

/// Index of the last element; `None` for an empty matrix, or if the index does not fit usize.
fn last(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Option<usize> {
    let r = rows.checked_sub(1)?.checked_mul(row_stride)?;
    let c = cols.checked_sub(1)?.checked_mul(col_stride)?;
    r.checked_add(c)
}

/// dst = lhs·rhs, or dst += lhs·rhs to `accumulate`, with a row-major dst, in f32. It runs on the calling thread alone, because the order
/// of additions must not depend on the number of threads.
pub(super) fn multiply(dst: &mut [f32], dst_stride: usize, accumulate: bool, lhs: MatRef<'_>, rhs: MatRef<'_>) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    let dst_fits = dst_stride >= n && last(m, n, dst_stride, 1).is_some_and(|last| last < dst.len());
    assert!(dst_fits && lhs.fits() && rhs.fits() && rhs.rows == k, "matrix product outside its slices");
    // SAFETY: the library addresses base + i·row_stride + j·col_stride for i, j inside the shapes. The assertion above proves that all of
    // these lie in their slices. `dst` is borrowed mutably, so it overlaps neither operand. Its rows do not overlap each other, because
    // dst_stride >= n. Strides fit isize, because they lie within slices.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_and_accumulation() {
        let a = [1.0, 2.0, 9.0, 3.0, 4.0, 9.0];
        let b = [1.0, 0.0, 2.0, 1.0];
        let mut c = [10.0; 5];
        let (a, b) = (MatRef::new(&a, 2, 2, 3), MatRef::new(&b, 2, 2, 2));
        multiply(&mut c, 3, true, a, b.transposed());
        assert_eq!(c, [11.0, 14.0, 10.0, 13.0, 20.0]);
        multiply(&mut c, 3, false, a.transposed(), b);
        assert_eq!(c, [7.0, 3.0, 10.0, 10.0, 4.0]);
    }

    #[test]
    #[should_panic(expected = "outside its slices")]
    fn short_slices_are_refused() {
        let a = [1.0; 3];
        multiply(&mut [0.0; 4], 2, false, MatRef::new(&a, 2, 2, 2), MatRef::new(&a, 1, 1, 1));
    }
}
