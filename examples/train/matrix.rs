//! Row-major matrix products over the gemm crate, with the bounds checked. Each runs on the calling thread: the callers
//! split their rows into blocks of fixed size, so results do not depend on the number of threads.

// The library's own wrapper of that crate, with its proof that no product leaves its slices.
#[path = "../../src/cpu/matmul.rs"]
mod matmul;

use matmul::MatRef;

/// A row-major matrix, or its transpose.
#[derive(Clone, Copy)]
pub struct Matrix<'a>(MatRef<'a>);

impl<'a> Matrix<'a> {
    /// Panics unless `data` holds whole rows of `cols` elements.
    pub fn new(data: &'a [f32], cols: usize) -> Self {
        assert!(cols > 0 && data.len().is_multiple_of(cols), "{} elements are no rows of {cols}", data.len());
        Self(MatRef::new(data, data.len() / cols, cols, cols))
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self(self.0.transposed())
    }
}

/// out = a·b, or out += a·b with `accumulate`; `out` is row-major.
pub fn multiply(out: &mut [f32], Matrix(a): Matrix<'_>, Matrix(b): Matrix<'_>, accumulate: bool) {
    assert_eq!(out.len(), a.rows * b.cols, "size of the product");
    matmul::multiply(out, b.cols, accumulate, a, b);
}

/// The first `count` columns.
pub fn leading_columns(data: &[f32], cols: usize, count: usize) -> Vec<f32> {
    data.chunks_exact(cols).flat_map(|row| &row[..count]).copied().collect()
}

/// Scales each row to norm 1.
pub fn normalise_rows(data: &mut [f32], cols: usize) {
    for row in data.chunks_exact_mut(cols) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm.max(f32::MIN_POSITIVE));
    }
}

/// Sum of products.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_columns_of_every_row() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(leading_columns(&x, 3, 2), [1.0, 2.0, 4.0, 5.0]);
        assert_eq!(leading_columns(&x, 3, 3), x);
    }

    #[test]
    fn products_and_transposes() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // 2 × 3
        let b = [1.0, 0.0, 2.0, 1.0, 0.0, 3.0]; // 3 × 2
        let mut out = [f32::NAN; 4];
        multiply(&mut out, Matrix::new(&a, 3), Matrix::new(&b, 2), false);
        assert_eq!(out, [5.0, 11.0, 14.0, 23.0]);
        multiply(&mut out, Matrix::new(&a, 3), Matrix::new(&a, 3).t(), true);
        assert_eq!(out, [19.0, 43.0, 46.0, 100.0]);
        let mut out = [0.0; 4];
        multiply(&mut out, Matrix::new(&b, 2).t(), Matrix::new(&a, 2), false);
        assert_eq!(out, [7.0, 10.0, 18.0, 22.0]);
    }
}
