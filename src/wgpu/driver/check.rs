//! Checks whether a device's cooperative matrices are right. Those of some drivers are not.

use super::engine::Engine;
use super::host::run;
use crate::Problem;
use crate::batch::{Batch, Embeddings, EmbeddingsMut};
use crate::call::Call;
use crate::dtype::DType;
use crate::error::Result;
use crate::loss::Loss;
use crate::output::GradientBuffers;
use crate::wgpu::{Capabilities, Plan, Products};
use half::f16;

/// Two tiles along each axis, of which the second is not full. Also the last fragment along the dimension is not full.
const ROWS: usize = 70;
const DIM: usize = 40;
/// Allowed difference between gradients with logits' gradients of f16 and of f32, relative to the largest entry. Wrong layouts or types
/// differ by about 1.
const TOLERANCE: f32 = 2e-3;

/// Whether `products` give what plain arithmetic gives. They do not if either fails, or if the device lacks what they need.
pub(super) fn agrees(engine: &Engine, products: Products) -> bool {
    let plain = Capabilities { products: Products::Fma, ..*engine.capabilities() };
    let checked = Capabilities { products, ..plain };
    if checked.variant(DType::F16).products != products {
        return false; // plain arithmetic would be compared with itself
    }
    match (gradients(engine, &checked), gradients(engine, &plain)) {
        (Ok(got), Ok(want)) => is_close(&got, &want),
        _ => false,
    }
}

fn is_close(got: &[f32], want: &[f32]) -> bool {
    let largest = want.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
    largest > 0.0 && got.iter().zip(want).all(|(got, want)| (got - want).abs() <= TOLERANCE * largest)
}

/// The loss and both gradients of a small batch.
fn gradients(engine: &Engine, capabilities: &Capabilities) -> Result<Vec<f32>> {
    // The numbers have no pattern that a transposed fragment would share.
    let number = |k: usize| f16::from_f32(((k * k % 8191) * 7919 % 8191) as f32 / 4096.0 - 1.0);
    let (q, p): (Vec<_>, Vec<_>) = (0..ROWS * DIM).map(|k| (number(k + 1), number(3 * k + 100_003))).unzip();
    let call = Call::new(Loss::samtone_both(), 0.05);
    let batch = Batch::new(&call, Embeddings::new(&q, ROWS, DIM)?, Embeddings::new(&p, ROWS, DIM)?)?;
    let problem = Problem::new(*batch.pairs(), DType::F16, DIM)?;
    let (mut of_q, mut of_p) = (vec![f32::NAN; ROWS * DIM], vec![f32::NAN; ROWS * DIM]);
    let buffers = GradientBuffers {
        query: Some(EmbeddingsMut::new(&mut of_q, ROWS, DIM)?),
        passage: Some(EmbeddingsMut::new(&mut of_p, ROWS, DIM)?),
    };
    run(engine, Plan::new(&problem, capabilities)?, &batch, buffers)?;
    Ok([of_q, of_p].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_does_not_pass() {
        let want = [1.0, -0.5, 0.25];
        assert!(is_close(&[1.0, -0.5, 0.2505], &want));
        assert!(!is_close(&[1.0, 0.25, -0.5], &want));
        assert!(!is_close(&[1.0, f32::NAN, 0.25], &want));
        assert!(!is_close(&[0.0; 3], &[0.0; 3]));
    }
}
