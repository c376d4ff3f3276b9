//! The matrix products of one step of the loss with the query tower's negatives, and nothing else: what no implementation on
//! top of the same library can beat.

use gemm::Parallelism;
use rayon::prelude::*;
use std::fmt;

/// How a product is spread over the cores.
#[derive(Debug, Clone, Copy)]
pub enum Schedule {
    /// One call; the library spreads it.
    Library,
    /// Independent products of one thread each, with outputs of at most this edge.
    Tiles(usize),
    /// As many bands of rows as there are threads.
    Bands,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library => f.write_str("library threads"),
            Self::Tiles(edge) => write!(f, "tiles of {edge}"),
            Self::Bands => f.write_str("bands of rows"),
        }
    }
}

impl Schedule {
    pub const ALL: [Self; 4] = [Self::Library, Self::Tiles(512), Self::Tiles(1024), Self::Bands];
}

/// A strided matrix.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn rows(self, start: usize, len: usize) -> Self {
        Self { data: &self.data[start * self.row_stride..], rows: len, ..self }
    }

    fn cols(self, start: usize, len: usize) -> Self {
        self.transposed().rows(start, len).transposed()
    }

    fn fits(&self) -> bool {
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride < self.data.len()
    }
}

/// Inputs and outputs of the products, allocated once.
pub struct Products<'a> {
    query: Matrix<'a>,
    passage: Matrix<'a>,
    square: Vec<f32>,
    out: Vec<f32>,
    recompute: bool,
}

impl<'a> Products<'a> {
    /// `recompute`: cosines are computed in both passes.
    pub fn new(query: &'a [f32], passage: &'a [f32], rows: usize, dim: usize, recompute: bool) -> Self {
        // Room for the ragged tiles of any schedule.
        let edge = |len: usize| len.next_multiple_of(1024);
        Self {
            query: Matrix::new(query, rows, dim),
            passage: Matrix::new(passage, rows, dim),
            square: query.iter().copied().cycle().take(rows * rows).collect(),
            out: vec![0.0; edge(rows) * edge(rows).max(edge(dim))],
            recompute,
        }
    }

    /// Q·Pᵀ and half of Q·Qᵀ, once or twice; then S-shaped times P, its transpose times Q, and S-shaped times Q.
    pub fn run(&mut self, schedule: Schedule) {
        let (q, p, n) = (self.query, self.passage, self.query.rows);
        let g = Matrix::new(&self.square, n, n);
        for _ in 0..if self.recompute { 2 } else { 1 } {
            multiply(&mut self.out, schedule, q, p.transposed());
            multiply(&mut self.out, schedule, q, q.rows(0, n.div_ceil(2)).transposed());
        }
        multiply(&mut self.out, schedule, g, p);
        multiply(&mut self.out, schedule, g.transposed(), q);
        multiply(&mut self.out, schedule, g, q);
    }
}

fn multiply(out: &mut [f32], schedule: Schedule, lhs: Matrix<'_>, rhs: Matrix<'_>) {
    let (rows, cols) = match schedule {
        Schedule::Library => return one(out, lhs, rhs, Parallelism::Rayon(0)),
        Schedule::Tiles(edge) => (lhs.rows.min(edge), rhs.cols.min(edge)),
        Schedule::Bands => (lhs.rows.div_ceil(rayon::current_num_threads()), rhs.cols),
    };
    let grid = (lhs.rows.div_ceil(rows), rhs.cols.div_ceil(cols));
    out.par_chunks_mut(rows * cols).take(grid.0 * grid.1).enumerate().for_each(|(k, out)| {
        let (row, col) = (k / grid.1 * rows, k % grid.1 * cols);
        let lhs = lhs.rows(row, rows.min(lhs.rows - row));
        let rhs = rhs.cols(col, cols.min(rhs.cols - col));
        one(out, lhs, rhs, Parallelism::None);
    });
}

/// out = lhs·rhs, row-major.
fn one(out: &mut [f32], lhs: Matrix<'_>, rhs: Matrix<'_>, parallelism: Parallelism) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert!(rhs.rows == k && lhs.fits() && rhs.fits() && m * n <= out.len());
    // SAFETY: the assertion above keeps every element that the shapes and strides address inside its slice, and `out` is
    // borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}
