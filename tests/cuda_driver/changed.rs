//! Backward calls with other embeddings than those of the forward call. Each check runs on a GPU, or on the emulated driver.

use super::prefixes::with_prefixes;
use super::raw::{Call, sample, with_call};
#[cfg(feature = "cudarc")]
use super::slices::{Pairs, Place, debug};
use super::support::problem::Problem;
use super::{Check, demand, text};
#[cfg(feature = "cudarc")]
use samtone::cuda::{self, GradientSlices, Step};
use samtone::cuda::{Device, Slot};
use samtone::{DType, Error, Loss, Tower};

pub const CHECKS: &[Check] = &[
    ("a backward call without packing refuses another embedding", || refused(Way::Packed)),
    ("a backward call of its own refuses another embedding", || refused(Way::Alone)),
];

#[cfg(feature = "cudarc")]
pub const SLICES: &[Check] = &[
    ("slices: gradients of a forward call refuse another batch", forward_refuses),
    ("slices: a step refuses another batch in its backward call", step_refuses),
];

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Packed,
    Alone,
}

/// An embedding that a backward call has in place of that of the forward call, and the error that names it.
struct Change {
    tower: Tower,
    row: usize,
    change: fn(&mut [f64]),
    is_named: fn(&Error, Tower, usize) -> bool,
}

fn non_finite(error: &Error, tower: Tower, row: usize) -> bool {
    matches!(error, Error::NonFinite { tower: t, row: r, column: 7, .. } if (*t, *r) == (tower, row))
}

fn other_norm(error: &Error, tower: Tower, row: usize) -> bool {
    let place = format!("a {tower} embedding in row {row} ");
    matches!(error, Error::StateMismatch { saved, given } if saved.starts_with(&place) && given.starts_with("one of norm "))
}

const CHANGES: [Change; 6] = [
    Change { tower: Tower::Query, row: 5, change: |x| x[7] = f64::NAN, is_named: non_finite },
    Change { tower: Tower::Passage, row: 6, change: |x| x[7] = f64::INFINITY, is_named: non_finite },
    Change { tower: Tower::Query, row: 36, change: |x| x[0] += 1e-3, is_named: other_norm },
    Change { tower: Tower::Query, row: 4, change: |x| x[19] += 1e-2, is_named: other_norm }, // in the longest prefix alone
    Change { tower: Tower::Passage, row: 40, change: |x| x.fill(0.0), is_named: other_norm },
    Change { tower: Tower::Passage, row: 0, change: |x| x.iter_mut().for_each(|x| *x *= 2.0), is_named: other_norm },
];

impl Change {
    fn made_to(&self, problem: &Problem) -> Problem {
        let mut problem = problem.clone();
        let d = problem.dim;
        let x = if self.tower == Tower::Query { &mut problem.query } else { &mut problem.passage };
        (self.change)(&mut x[self.row * d..][..d]);
        problem
    }

    fn expect(&self, error: Option<Error>) -> Result<(), String> {
        let named = error.as_ref().is_some_and(|error| (self.is_named)(error, self.tower, self.row));
        demand(named, &format!("of the {} in row {}: {error:?}", self.tower, self.row))
    }
}

/// Without prefixes, and with some.
fn samples(seed: u64) -> Result<[Problem; 2], String> {
    Ok([sample(Loss::samtone_both(), seed)?, with_prefixes(Loss::samtone_both(), seed)?])
}

fn refused(way: Way) -> Result<(), String> {
    samples(41)?.iter().try_for_each(|good| refused_after(good, way))
}

fn refused_after(good: &Problem, way: Way) -> Result<(), String> {
    let d = good.dim;
    with_call(good, DType::F32, |call, _| {
        call.run(Device::loss_and_gradients)?;
        let want = call.outputs()?;
        // SAFETY: as in `Call::run`; forward and backward are enqueued.
        let error_of =
            |call: &Call<'_>| unsafe { call.device.results(&call.readout, &call.pointers, call.stream) }.err();
        // Waits, for embeddings are written past the stream.
        let forward = |call: &Call<'_>| {
            call.run(Device::forward)?;
            // SAFETY: the stream is alive.
            unsafe { call.device.synchronize(call.stream) }.map_err(text)
        };
        let backward = |call: &Call<'_>| {
            call.clear_gradients()?;
            call.run(if way == Way::Packed { Device::backward } else { Device::backward_alone })?;
            Ok::<_, String>([call.gradient(Slot::QueryGradient)?, call.gradient(Slot::PassageGradient)?])
        };
        for change in &CHANGES {
            forward(call)?;
            call.write_embeddings(&change.made_to(good))?;
            let gradients = backward(call)?;
            change.expect(error_of(call))?;
            let rows = |tower: usize| gradients[tower].chunks(d).map(|row| row.iter().all(|x| x.is_nan()));
            if way == Way::Alone {
                demand(rows(0).chain(rows(1)).all(|nan| nan), "a gradient of a refused call is a number")?;
            } else {
                let own = usize::from(change.tower == Tower::Passage);
                demand(rows(own).nth(change.row) == Some(true), "the gradient of the other embedding is a number")?;
                // What is packed is that of the forward call, so rows that are not paired with it have its gradients.
                let [query, passage] = [&want.grad_query, &want.grad_passage];
                let same = |got: &[f64], want: &[f64]| {
                    got.chunks(d).zip(want.chunks(d)).map(|(a, b)| usize::from(a == b)).sum::<usize>()
                };
                let rows = good.rows + good.passages;
                let equal = same(&gradients[0], query) + same(&gradients[1], passage);
                demand(equal >= rows - 3, &format!("{equal} of {rows} rows have the gradients of the forward call"))?;
            }
            // Until the next forward call.
            call.write_embeddings(good)?;
            backward(call)?;
            let error = error_of(call);
            demand(error.is_some(), "a state is right again without a forward call")?;
            forward(call)?;
            backward(call)?;
            demand(call.outputs()? == want, "a refused call left a trace")?;
        }
        Ok(())
    })
}

#[cfg(feature = "cudarc")]
fn forward_refuses() -> Result<(), String> {
    samples(42)?.iter().try_for_each(forward_refuses_after)
}

#[cfg(feature = "cudarc")]
fn forward_refuses_after(good: &Problem) -> Result<(), String> {
    let at = Place::new(0)?;
    let (query, passage) = at.upload(good)?;
    let pairs = Pairs::of(good)?;
    let batch = pairs.batch(&query, &passage)?;
    for change in &CHANGES {
        let mut forward = cuda::forward(&at.device, &at.stream, &batch).map_err(text)?;
        let (query, passage) = at.upload(&change.made_to(good))?;
        let other = pairs.batch(&query, &passage)?;
        let gradients = forward.backward(&other, 1.0).map_err(text)?;
        change.expect(forward.temperature(&other).err())?;
        change.expect(forward.evaluation(&other).err())?;
        let [query, passage] = at.download(&gradients)?;
        demand(query.iter().chain(&passage).all(|x| x.is_nan()), "a gradient of a refused call is a number")?;
    }
    Ok(())
}

#[cfg(feature = "cudarc")]
fn step_refuses() -> Result<(), String> {
    samples(43)?.iter().try_for_each(step_refuses_after)
}

#[cfg(feature = "cudarc")]
fn step_refuses_after(good: &Problem) -> Result<(), String> {
    let at = Place::new(0)?;
    let (query, passage) = at.upload(good)?;
    let pairs = Pairs::of(good)?;
    let planned = pairs.batch(&query, &passage)?.problem().map_err(text)?;
    let mut step = Step::new(&at.device, &at.stream, &planned).map_err(text)?;
    let mut gradients = at.gradients(good)?;
    for change in &CHANGES {
        step.forward(&query, &passage).map_err(text)?;
        let (other_query, other_passage) = at.upload(&change.made_to(good))?;
        let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
        step.backward(&other_query, &other_passage, slices, 1.0).map_err(text)?;
        change.expect(step.results(&other_query, &other_passage).err())?;
        let on_device = at.stream.clone_dtoh(&step.loss().map_err(text)?).map_err(debug)?;
        at.stream.synchronize().map_err(debug)?;
        demand(on_device[0].is_finite(), "the loss of the forward call")?;
    }
    let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
    step.loss_and_gradients(&query, &passage, slices, 1.0).map_err(text)?;
    let (evaluation, temperature) = step.results(&query, &passage).map_err(text)?;
    at.judge(good, evaluation, temperature, &gradients, 1.0)
}
