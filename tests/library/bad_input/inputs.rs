//! What the constructors of embeddings, buffers and losses refuse.

use super::{D, M, N, Outcome, expect_invalid, good, towers};
use samtone::backend;
use samtone::half::{bf16, f16};
use samtone::{Batch, Block, Embeddings, EmbeddingsMut, Group, Loss};

#[test]
fn shapes_of_embeddings() -> Outcome {
    let x = [1.0_f32; 12];
    expect_invalid(Embeddings::new(&x[..0], 0, 3), "rows", "0", "1 to");
    expect_invalid(Embeddings::new(&x[..0], 3, 0), "dim", "0", "1 to");
    expect_invalid(Embeddings::new(&x[..11], 4, 3), "data", "11", "exactly 12");
    expect_invalid(Embeddings::new(&[1.0_f32; 13][..], 4, 3), "data", "13", "exactly 12");
    expect_invalid(Embeddings::with_row_stride(&x[..], 4, 3, 2), "row_stride", "2", "at least dim = 3");
    expect_invalid(Embeddings::with_row_stride(&x[..], 4, 3, 0), "row_stride", "0", "at least dim = 3");
    expect_invalid(Embeddings::with_row_stride(&x[..], 4, 3, 4), "data", "12", "at least 15");
    assert!(Embeddings::with_row_stride(&x[..], 3, 3, 4).is_ok(), "the last row needs no padding");

    let mut y = [1.0_f32; 12];
    expect_invalid(EmbeddingsMut::new(&mut y[..0], 0, 3), "rows", "0", "1 to");
    expect_invalid(EmbeddingsMut::new(&mut y[..0], 3, 0), "dim", "0", "1 to");
    expect_invalid(EmbeddingsMut::new(&mut y[..11], 4, 3), "data", "11", "exactly 12");
    expect_invalid(EmbeddingsMut::with_row_stride(&mut y[..], 4, 3, 2), "row_stride", "2", "at least dim = 3");
    expect_invalid(EmbeddingsMut::with_row_stride(&mut y[..], 4, 3, 4), "data", "12", "at least 15");
    assert_eq!(y, [1.0; 12]);

    let (h, b, f) = ([f16::ONE; 5], [bf16::ONE; 5], [1.0_f64; 5]);
    expect_invalid(Embeddings::new(&h[..], 2, 3), "data", "5", "exactly 6");
    expect_invalid(Embeddings::new(&b[..], 2, 3), "data", "5", "exactly 6");
    expect_invalid(Embeddings::new(&f[..], 2, 3), "data", "5", "exactly 6");
    Ok(())
}

#[test]
fn sizes_that_overflow() {
    let x = [1.0_f32; 12];
    let too_many = i32::MAX as usize + 1;
    let limit = i32::MAX.to_string();
    expect_invalid(Embeddings::new(&x[..], too_many, 3), "rows", &too_many.to_string(), &limit);
    expect_invalid(Embeddings::new(&x[..], usize::MAX, 3), "rows", &usize::MAX.to_string(), &limit);
    expect_invalid(Embeddings::new(&x[..], 1, too_many), "dim", &too_many.to_string(), &limit);
    expect_invalid(Embeddings::new(&x[..], 1, usize::MAX), "dim", &usize::MAX.to_string(), &limit);
    let bound = (isize::MAX as usize / 8).to_string();
    for stride in [usize::MAX, usize::MAX / 2 + 1, isize::MAX as usize / 16 + 1] {
        let rows = if stride == usize::MAX { 2 } else { 3 };
        let matrix = Embeddings::with_row_stride(&x[..], rows, 3, stride);
        expect_invalid(matrix, "row_stride", &stride.to_string(), &bound);
    }
    // Each factor is legal; the product is beyond any slice.
    let side = i32::MAX as usize;
    expect_invalid(Embeddings::new(&x[..], side, side), "row_stride", &side.to_string(), &bound);
    // One row never steps, but its stride still has to be one that an offset can be.
    expect_invalid(
        Embeddings::with_row_stride(&x[..], 1, 3, usize::MAX),
        "row_stride",
        &usize::MAX.to_string(),
        &bound,
    );
    assert!(Embeddings::with_row_stride(&x[..], 1, 3, isize::MAX as usize / 8).is_ok());
}

#[test]
fn rows_that_are_not_there() -> Outcome {
    // Of two rows, a stride apart that is larger than they: what lies behind the last one is none.
    let x = [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0];
    let matrix = Embeddings::with_row_stride(&x[..], 2, 2, 3)?;
    assert_eq!(matrix.row_to_f64(1)?, [4.0, 5.0]);
    // Times the stride, the last ones are 0 and 1 where numbers wrap around.
    for row in [2, usize::MAX, usize::MAX / 2, usize::MAX / 3, usize::MAX / 3 + 1] {
        expect_invalid(matrix.row_to_f64(row), "row", &row.to_string(), "0 to 1");
    }
    Ok(())
}

#[test]
fn towers_that_do_not_fit_together() -> Outcome {
    let (q, p) = towers();
    let (call, query) = (good(), Embeddings::new(&q, M, D)?);
    expect_invalid(Batch::new(&call, query, Embeddings::new(&p, 9, 2)?), "passage", "dimension 2", "3");
    expect_invalid(Batch::new(&call, Embeddings::new(&p, N, D)?, query), "passage", "4 rows", "6");
    let half: Vec<f16> = p.iter().map(|&v| f16::from_f32(v)).collect();
    expect_invalid(Batch::new(&call, query, Embeddings::new(&half, N, D)?), "passage", "f16", "f32");
    Ok(())
}

#[test]
fn losses() -> Outcome {
    use Block::{PQ, QP};
    for coefficient in [-1.0, f64::NAN, f64::INFINITY, f64::MAX, 1.1e30, 0.9e-30, 1e-300, -1e-300] {
        let group = Group::new(coefficient, &[QP], 1);
        expect_invalid(group, "coefficient", &format!("{coefficient:?}"), "0, or a number from 1e-30 to 1e30");
    }
    assert!([0.0, -0.0, 1e-30, 1e30].into_iter().all(|c| Group::new(c, &[QP], 1).is_ok()));
    let many = vec![Group::new(1.0, &[QP], 1)?; Loss::MAX_GROUPS + 1];
    expect_invalid(Loss::custom("many", many), "groups", "65537 groups", "1 to 65536");
    expect_invalid(Group::new(1.0, &[], 1), "blocks", "[]", "one to four different blocks");
    expect_invalid(Group::new(1.0, &[QP, PQ, QP], 1), "blocks", "[QP, PQ, QP]", "one to four different blocks");
    expect_invalid(Group::new(1.0, &[QP], 3), "positive_copies", "3", "0, 1 or 2");
    expect_invalid(Loss::custom("none", Vec::new()), "groups", "[]", "at least one with a coefficient above 0");
    let idle = vec![Group::new(0.0, &[QP], 1)?];
    expect_invalid(Loss::custom("idle", idle), "groups", "0.0", "at least one with a coefficient above 0");
    for alpha in [-0.1, 1.1, f64::NAN, f64::INFINITY, 1e-31, f64::MIN_POSITIVE] {
        let allowed = "a number from 0 to 1, and 0 or at least 1e-30";
        expect_invalid(Loss::pair(alpha), "alpha", &format!("{alpha:?}"), allowed);
    }
    assert!(Loss::pair(0.0).is_ok() && Loss::pair(1.0).is_ok());
    for (known, ..) in Loss::PRESETS {
        expect_invalid(Loss::by_name("samtone"), "name", "\"samtone\"", known);
    }
    Ok(())
}

#[test]
fn unknown_backend() {
    for known in backend::all() {
        expect_invalid(backend::by_name("tpu").map(|b| b.name()), "backend", "\"tpu\"", known.name());
    }
}
