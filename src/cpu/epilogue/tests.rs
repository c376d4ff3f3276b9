//! Every instruction set and every way to take exponentials gives the same results.

use super::gradient::{TileGradient, gradient_apart, gradient_portable};
use super::sums::{sum_apart_body, sum_shared_body};
use super::*;
use crate::cpu::side::{Anchors, padded};

/// A space of `n` indices with colliding keys, owners and thresholds.
fn side(n: usize, seed: u32) -> Side {
    let draw = |k: usize, salt: u32, below: u32| (k as u32 * 2_654_435_761 + salt * seed).rotate_left(11) % below;
    let real = |k, salt| draw(k, salt, 1000) as f32 / 1000.0;
    let keys = |salt, below| padded((0..n).map(|k| draw(k, salt, below)), 0);
    let owner = (0..n).map(|k| if draw(k, 5, 3) == 0 { k as u32 } else { Candidates::EVERYONE });
    Side {
        anchors: Anchors { query_key: keys(2, 9), passage_key: keys(3, 9), row: padded(0..n as u32, 0) },
        candidates: Candidates {
            query_key: keys(7, 9),
            passage_key: keys(8, 9),
            swapped: seed.is_multiple_of(2),
            owner: padded(owner, 0),
        },
        numbers: vec![Numbers {
            inverse: padded((0..n).map(|k| 0.1 + real(k, 1)), 0.0),
            threshold: padded((0..n).map(|k| real(k, 4)), 0.0),
            positive: padded((0..n).map(|k| real(k, 6)), 0.0),
            above: padded((0..n).map(|k| real(k, 6)), 0.0),
        }],
    }
}

fn tile<'a>(rows: usize, cols: usize, stride: usize, sides: &'a [Side; 2], beta: f64) -> Tile<'a> {
    Tile {
        rows,
        cols,
        stride,
        row_start: 3,
        col_start: 5,
        row_side: &sides[0],
        col_side: &sides[1],
        row: &sides[0].numbers[0],
        col: &sides[1].numbers[0],
        beta: Beta::new(beta),
    }
}

fn products(count: usize) -> Vec<f32> {
    (0..count).map(|k| ((k * 37 % 211) as f32 - 100.0) / 90.0).collect()
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let sides = [side(40, 77), side(50, 1234)];
    let tile = tile(37, 45, 48, &sides, 20.0);
    let raw = products(37 * 48);
    let got = sum_tile(&raw, &tile, true, true, true);
    let want = sum_shared_body::<true, true, true, true>(&raw, &tile).unwrap();
    assert_eq!((&got.rows, &got.cols), (&want.rows, &want.cols));
    assert_eq!((&got.rows_above, &got.cols_above), (&want.rows_above, &want.cols_above));
    assert!(got.rows.iter().any(|s| s.ln() > 0.0) && got.cols_above.iter().any(|&a| a > 0));
    // Without fused multiply-add, and with other offsets, only the last digits may differ.
    let unfused = sum_shared_body::<false, true, true, true>(&raw, &tile).unwrap();
    let apart = sum_apart_body::<true, true, true, true>(&raw, &tile);
    for near in [unfused, apart] {
        for (a, b) in near.rows.iter().chain(&near.cols).zip(got.rows.iter().chain(&got.cols)) {
            approx::assert_abs_diff_eq!(a.ln().max(-1e9), b.ln().max(-1e9), epsilon = 1e-5);
        }
        assert_eq!((&near.rows_above, &near.cols_above), (&got.rows_above, &got.cols_above));
    }

    let coefficients = Coefficients::new((0..60).map(|k| f64::from(k % 7) - 3.0), 0.0);
    let edges = Edges { rows: Some(&coefficients), cols: Some(&coefficients), count_cols: true };
    let add = products(raw.len());
    let run = |f: &dyn Fn(&mut [f32]) -> TileGradient| {
        let mut x = raw.clone();
        let gradient = f(&mut x);
        (x, gradient)
    };
    let got = run(&|x| gradient_tile(x, Some(&add), &tile, &edges, true, true));
    assert_eq!(got, run(&|x| gradient_portable(x, Some(&add), &tile, &edges)));
    assert!(got.1.beta != 0.0 && got.1.radial.iter().map(Vec::len).eq([37, 45]));
    let apart = run(&|x| gradient_apart(x, Some(&add), &tile, &edges));
    let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{a} {b}");
    for r in 0..37 {
        (0..45).for_each(|c| close(apart.0[r * 48 + c].into(), got.0[r * 48 + c].into()));
    }
    for (a, b) in apart.1.radial.iter().flatten().zip(got.1.radial.iter().flatten()) {
        assert!((a - b).abs() <= 1e-3 * b.abs().max(1.0), "{a} {b}");
    }
}

#[test]
fn numbers_far_apart_get_offsets_of_their_own() {
    let sides = [side(40, 76), side(50, 1234)].map(|mut side| {
        side.numbers[0].threshold.fill(f32::INFINITY);
        side.numbers[0].inverse.fill(1.0);
        side
    });
    // Row 1 has cosines of −1, where the others have 1: at β = 100 that is 288 powers of two.
    let tile = tile(20, 32, 32, &sides, 100.0);
    let x: Vec<f32> = (0..20 * 32).map(|k| if k / 32 == 1 { -1.0 } else { 1.0 }).collect();
    assert!(sum_shared_body::<true, false, true, true>(&x, &tile).is_none());
    let sums = sum_tile(&x, &tile, false, true, true);
    approx::assert_abs_diff_eq!(sums.rows[0].ln(), 100.0 + 32_f64.ln(), epsilon = 1e-5);
    approx::assert_abs_diff_eq!(sums.rows[1].ln(), -100.0 + 32_f64.ln(), epsilon = 1e-5);
    // So are the coefficients of such a row.
    let logs = |k: usize| if k == 4 { 90.0 } else { -110.0 };
    let a = Coefficients::new((0..60).map(logs), 0.0);
    let b = Coefficients::new((0..60).map(|_| -110.0), 0.0);
    let edges = Edges { rows: Some(&a), cols: Some(&b), count_cols: false };
    let mut gradient = x.clone();
    gradient_tile(&mut gradient, None, &tile, &edges, false, false);
    approx::assert_relative_eq!(f64::from(gradient[32]), (-10.0_f64).exp() + (-210.0_f64).exp(), max_relative = 1e-5);
    approx::assert_relative_eq!(f64::from(gradient[0]), 2.0 * (-10.0_f64).exp(), max_relative = 1e-5);
}

#[test]
fn what_an_earlier_tile_left_beyond_the_edge_is_harmless() {
    let sides = [side(8, 5), side(20, 6)];
    let tile = tile(4, 5, 16, &sides, 10.0);
    let coefficients = Coefficients::new((0..20).map(|_| 0.0), 0.0);
    let run = |rest: f32| {
        let mut x: Vec<f32> = (0..64).map(|k| if k % 16 < 5 { 0.5 } else { rest }).collect();
        let sums = sum_tile(&x, &tile, false, true, true);
        let edges = Edges { rows: Some(&coefficients), cols: Some(&coefficients), count_cols: true };
        (sums.rows, sums.cols, gradient_tile(&mut x, None, &tile, &edges, false, true))
    };
    let clean = run(0.0);
    for rest in [f32::INFINITY, f32::NAN, 1e30] {
        assert_eq!(run(rest), clean);
    }
}
