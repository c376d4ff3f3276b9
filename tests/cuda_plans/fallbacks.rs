//! What kernels do at small temperatures, where one exponential cannot serve all sums, or all gradients, of a tile.

use super::{Run, compare, run_with, sized};
use crate::support::cuda_emulated::{CudaEmulated, clusters};
use crate::support::problem::Problem;
use libtest_mimic::Failed;
use samtone::cuda::{Arithmetic, Cosines, Tile};
use samtone::{DType, Loss};

/// Rows with a negative at a cosine near 1 beside rows whose largest is far lower: at τ = 0.004 the coefficients of neighbouring rows
/// are 2^100 apart. Row 200 has a copy of query 0 as its passage, so that tiles off the diagonal have both too.
pub fn uneven(loss: Loss, shape: (usize, usize, usize)) -> Result<Problem, Failed> {
    let mut problem = sized(super::Kind::Random, loss, shape)?;
    let d = problem.dim;
    for i in 0..problem.rows {
        let near = if i == 200 {
            problem.query[..d].to_vec()
        } else if i % 2 == 0 {
            problem.query[i * d..][..d].to_vec()
        } else {
            problem.passage[(i - 1) * d..][..d].to_vec()
        };
        problem.passage[i * d..][..d].iter_mut().zip(near).for_each(|(x, near)| *x = near + 0.05 * *x);
    }
    Ok(problem.with(|call| call.with_temperature(0.004)))
}

pub fn fallbacks(how: &'static CudaEmulated) -> Result<(), Failed> {
    use Arithmetic::{Exact, F16, F16x2, F16x3};
    let of: &[(Arithmetic, DType, Tile)] = if clusters(how) {
        &[(F16, DType::BF16, Tile::Cluster), (F16x2, DType::F16, Tile::Cluster), (F16x3, DType::F32, Tile::Cluster)]
    } else {
        &[
            (F16, DType::BF16, Tile::Small),
            (F16, DType::BF16, Tile::Large),
            (F16x2, DType::F16, Tile::Large),
            (F16x3, DType::F32, Tile::Large),
            (Exact, DType::F32, Tile::Small),
        ]
    };
    // Kernels of 9.0 have code of their own for tiles in which nothing can be masked: whole ones off the diagonal.
    let shape = if clusters(how) { (256, 256, 24) } else { (140, 160, 24) };
    for &(arithmetic, dtype, tile) in of {
        let problem = uneven(Loss::samtone_both(), shape)?.rounded(dtype);
        for cosines in [Cosines::Kept, Cosines::Recomputed] {
            let got = run_with(&problem, dtype, Run::default(), |p| {
                Ok(how.problem(p).with_arithmetic(arithmetic).with_tile(tile).with_cosines(cosines))
            })?;
            compare(&got, &problem, dtype).map_err(|e| format!("{arithmetic:?} {tile:?} {cosines:?}: {e:?}"))?;
        }
    }
    Ok(())
}
