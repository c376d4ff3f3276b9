//! Partial sums of all ranks, merged.
//!
//! A rank's shard has the complete sums of its rows in QP, QQ and PP, and for every row of the batch the part of PQ that its own queries are.
//! So each rank first sends every other the part of PQ that belongs to the other's rows, and adds up its own in the order of ranks. Then
//! all ranks gather the complete sums. Each rank sends and receives O(M) numbers.

use super::group::{Group, gather, steps};
use crate::error::Result;
use crate::loss::Block;
use crate::partials::{ExpSum, Partials};
use std::ops::Range;

/// Numbers that a row has in PQ alone: a sum as two numbers, and a rank.
const PART: usize = 3;
/// Numbers of a row in all blocks.
const ROW: usize = 2 * 4 + 2;

/// Makes of this rank's partial sums those of all ranks, with the same bits on every rank. `rows` has the rows of each rank.
pub(super) fn merge(group: &mut impl Group, own: Partials, rows: &[Range<usize>]) -> Result<Partials> {
    let (rank, prefixes) = (group.rank(), own.prefixes.len());
    let mine = rows[rank].clone();
    let mut parts: Vec<Vec<f64>> = vec![Vec::new(); group.size()];
    parts[rank] = part(&own, &mine);
    for (to, from) in steps(group) {
        let mut received = vec![0.0; prefixes * mine.len() * PART];
        let out = part(&own, &rows[to]);
        group.exchange(to, bytemuck::cast_slice(&out), from, bytemuck::cast_slice_mut(&mut received))?;
        parts[from] = received;
    }
    let mut merged = own;
    set_parts(&mut merged, &mine, &parts);
    let lengths = rows.iter().map(|rows| rows.len() * prefixes * ROW);
    let places = super::group::ranges(lengths);
    let mut all = vec![0.0; places.last().map_or(0, |place| place.end)];
    all[places[rank].clone()].copy_from_slice(&complete(&merged, &mine));
    gather(group, &mut all, &places)?;
    for (rows, place) in rows.iter().zip(places) {
        set_complete(&mut merged, rows, &all[place]);
    }
    merged.covered = rows.iter().filter(|rows| !rows.is_empty()).cloned().collect();
    Ok(merged)
}

/// What these partials add to PQ of `rows`.
fn part(partials: &Partials, rows: &Range<usize>) -> Vec<f64> {
    let row = |k: usize, i: usize| {
        let of_prefix = &partials.prefixes[k];
        let (sum, exponent) = at(&of_prefix.sums[Block::PQ.index()], i).parts();
        [sum, exponent.into(), of_prefix.above[1][i].into()]
    };
    (0..partials.prefixes.len()).flat_map(|k| rows.clone().flat_map(move |i| row(k, i))).collect()
}

fn at(sums: &[ExpSum], row: usize) -> ExpSum {
    sums.get(row).copied().unwrap_or(ExpSum::EMPTY) // the loss does not use the block
}

/// Leaves in PQ of `rows` what all ranks' `parts` add up to, in the order of ranks.
fn set_parts(partials: &mut Partials, rows: &Range<usize>, parts: &[Vec<f64>]) {
    for (k, of_prefix) in partials.prefixes.iter_mut().enumerate() {
        for (place, row) in rows.clone().enumerate() {
            let (mut sum, mut above) = (ExpSum::EMPTY, 0);
            for part in parts {
                let numbers = &part[(k * rows.len() + place) * PART..][..PART];
                sum.merge(ExpSum::new(numbers[0], numbers[1] as i32));
                above += numbers[2] as u32;
            }
            if let Some(own) = of_prefix.sums[Block::PQ.index()].get_mut(row) {
                *own = sum;
            }
            of_prefix.above[1][row] = above;
        }
    }
}

/// The complete sums of `rows`.
fn complete(partials: &Partials, rows: &Range<usize>) -> Vec<f64> {
    let mut numbers = Vec::with_capacity(partials.prefixes.len() * rows.len() * ROW);
    for of_prefix in &partials.prefixes {
        for i in rows.clone() {
            for sums in &of_prefix.sums {
                let (sum, exponent) = at(sums, i).parts();
                numbers.extend([sum, exponent.into()]);
            }
            numbers.extend(of_prefix.above.iter().map(|above| f64::from(above[i])));
        }
    }
    numbers
}

fn set_complete(partials: &mut Partials, rows: &Range<usize>, numbers: &[f64]) {
    let of_row = |k: usize, place: usize| &numbers[(k * rows.len() + place) * ROW..][..ROW];
    for (k, of_prefix) in partials.prefixes.iter_mut().enumerate() {
        for (place, row) in rows.clone().enumerate() {
            let numbers = of_row(k, place);
            for (sums, pair) in of_prefix.sums.iter_mut().zip(numbers.chunks_exact(2)) {
                if let Some(sum) = sums.get_mut(row) {
                    *sum = ExpSum::new(pair[0], pair[1] as i32);
                }
            }
            for (above, &number) in of_prefix.above.iter_mut().zip(&numbers[8..]) {
                above[row] = number as u32;
            }
        }
    }
}
