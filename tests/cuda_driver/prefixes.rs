//! Calls with prefixes. Each check runs on a GPU, or on the emulated driver.

use super::raw::{backward_alone, sample, with_call};
use super::support::case::Expected;
use super::support::compare::{against_definition, verdict};
use super::support::problem::{Outputs, Problem};
use super::{Check, demand, text};
use samtone::backend;
use samtone::cuda::{Device, Slot};
use samtone::{DType, Error, Loss, Tower};

pub const CHECKS: &[Check] = &[
    ("prefixes: one call gives what the definition gives", || {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let problem = with_prefixes(Loss::samtone_both(), 81)?.rounded(dtype);
            with_call(&problem, dtype, |call, _| {
                call.run(Device::loss_and_gradients)?;
                judge(&call.outputs()?, &problem, dtype, 0.5)
            })?;
        }
        Ok(())
    }),
    ("prefixes: one that is not the whole embedding, or has a weight", || {
        for (dim, weight) in [(9, 1.0), (24, 3.0), (24, 1.0)] {
            let problem = sample(Loss::samtone_query(), 82)?;
            let problem = problem.with(|call| call.with_prefixes([dim]).with_prefix_weights([weight]));
            with_call(&problem, DType::F32, |call, _| {
                call.run(Device::loss_and_gradients)?;
                let got = call.outputs()?;
                demand(got.evaluation.prefixes.len() == 1, "another number of prefixes")?;
                judge(&got, &problem.rounded(DType::F32), DType::F32, 0.5)
            })?;
        }
        Ok(())
    }),
    ("prefixes: a backward call of its own has the same bits", || {
        backward_alone(&with_prefixes(Loss::samtone_query(), 83)?)
    }),
    ("prefixes: inputs that are refused are named with their prefix, and the device goes on", refusals),
    ("prefixes: the backend takes batches in host memory", || {
        let Ok(cuda) = backend::by_name("cuda") else { return Ok(()) };
        cuda.available().map_err(text)?;
        for dtype in [DType::F32, DType::BF16] {
            let problem = with_prefixes(Loss::samtone_query(), 84)?.rounded(dtype);
            judge(&problem.run(cuda, dtype, -3.0).map_err(text)?, &problem, dtype, -3.0)?;
        }
        Ok(())
    }),
];

/// [`sample`] with prefixes, of which one has weight 0. The last entries belong to none.
pub fn with_prefixes(loss: Loss, seed: u64) -> Result<Problem, String> {
    Ok(sample(loss, seed)?.with(|call| call.with_prefixes([3, 7, 16, 20]).with_prefix_weights([0.5, 1.0, 0.0, 2.0])))
}

/// `problem` holds the embeddings as `dtype` does.
fn judge(got: &Outputs, problem: &Problem, dtype: DType, upstream: f64) -> Result<(), String> {
    let reference = backend::by_name("reference").map_err(text)?;
    let want = Expected::from(problem.run(reference, DType::F64, upstream).map_err(text)?);
    demand(want.prefix_losses.len() == got.evaluation.prefixes.len(), "another number of prefixes")?;
    verdict(&against_definition(got, &want, problem, dtype, upstream))
}

fn refusals() -> Result<(), String> {
    let good = with_prefixes(Loss::samtone_both(), 85)?;
    let (tower, d) = (Tower::Passage, good.dim);
    let change = |change: &dyn Fn(&mut Problem)| {
        let mut problem = good.clone();
        change(&mut problem);
        problem
    };
    let zero = |prefix| Some(Error::ZeroNorm { tower, row: 6, prefix: Some(prefix) });
    let infinite = Error::NonFinite { tower, row: 5, column: 7, value: f64::INFINITY };
    with_call(&good, DType::F32, |call, _| {
        for (problem, want) in [
            (change(&|p| p.passage[5 * d + 7] = f64::INFINITY), Some(infinite)),
            // No prefix has this entry.
            (change(&|p| p.passage[5 * d + 20] = f64::NAN), None),
            (change(&|p| p.passage[6 * d..6 * d + 3].fill(0.0)), zero(3)),
            (change(&|p| p.passage[6 * d..6 * d + 24].fill(0.0)), zero(3)),
            (good.clone(), None),
        ] {
            call.write_embeddings(&problem)?;
            call.run(Device::loss_and_gradients)?;
            // SAFETY: as in `Call::run`; forward and backward are enqueued.
            let error = unsafe { call.device.results(&call.readout, &call.pointers, call.stream) }.err();
            demand(error == want, &format!("{error:?}, wanted {want:?}"))?;
            let gradients = [Slot::QueryGradient, Slot::PassageGradient].map(|slot| call.gradient(slot));
            let mut numbers = gradients.into_iter().collect::<Result<Vec<_>, _>>()?.concat().into_iter();
            demand(numbers.all(|x| x.is_nan() == want.is_some()), &format!("gradients with {want:?}"))?;
        }
        Ok(())
    })?;
    // Where the positive points away from its query, the margin leaves no negative. That happens in the first prefix, in a later one, or in
    // both.
    let group = samtone::Group::new(1.0, &[samtone::Block::QP], 0).and_then(|g| Loss::custom("bare", vec![g]));
    let bare = sample(group.map_err(text)?, 86)?.with(|call| call.with_prefixes([3, 7, 20]).with_margin(-0.5));
    for (entries, prefix) in [(0..3, 3), (3..7, 7), (7..20, 20), (0..20, 3)] {
        let mut problem = bare.clone();
        // Every other row has its positive at a cosine of 1.
        for (i, query) in problem.query.chunks(d).enumerate() {
            let row = &mut problem.passage[if i == 9 { 3 } else { i } * d..][..d];
            row.copy_from_slice(query);
        }
        problem.query.copy_within(3 * d..4 * d, 9 * d);
        for k in entries.clone() {
            (problem.query[2 * d + k], problem.passage[2 * d + k]) = (100.0, -100.0);
        }
        let cpu = problem.run(backend::by_name("cpu").map_err(text)?, DType::F32, 1.0).err();
        let named = matches!(&cpu, Some(Error::NoNegative { row: 2, prefix: Some(k), .. }) if *k == prefix);
        demand(named, &format!("the CPU with {entries:?}: {cpu:?}"))?;
        with_call(&problem, DType::F32, |call, _| {
            call.run(Device::forward)?;
            // SAFETY: as above; forward is enqueued.
            let error = unsafe { call.device.evaluation(&call.readout, &call.pointers, call.stream) }.err();
            demand(error == cpu, &format!("{error:?}, wanted {cpu:?}"))
        })?;
    }
    Ok(())
}

#[cfg(feature = "cudarc")]
pub use slices::CHECKS as SLICES;

#[cfg(feature = "cudarc")]
mod slices {
    use super::super::slices::{Pairs, Place, debug, shards_on_all_devices};
    use super::*;
    use samtone::cuda::cudarc::driver::CudaSlice;
    use samtone::cuda::{self, GradientSlices, Shard, Step};

    pub const CHECKS: &[Check] = &[
        ("prefixes: slices: one call, and a forward and a backward call", || {
            let at = Place::new(0)?;
            let problem = with_prefixes(Loss::samtone_both(), 91)?;
            let (query, passage) = at.upload(&problem)?;
            let pairs = Pairs::of(&problem)?;
            let batch = pairs.batch(&query, &passage)?;
            let out = cuda::loss_and_gradients(&at.device, &at.stream, &batch, -2.0).map_err(text)?;
            let (evaluation, temperature) = out.results(&batch).map_err(text)?;
            let on_device = at.stream.clone_dtoh(&out.loss().map_err(text)?).map_err(debug)?;
            at.stream.synchronize().map_err(debug)?;
            demand(on_device == [evaluation.loss], "another loss on the device")?;
            at.judge(&problem, evaluation.clone(), temperature, &out.gradients, -2.0)?;
            let mut forward = cuda::forward(&at.device, &at.stream, &batch).map_err(text)?;
            demand(forward.evaluation(&batch).map_err(text)? == evaluation, "other results of a forward call")?;
            let upstream = at.stream.clone_htod(&[-2.0_f32]).map_err(debug)?;
            let gradients = forward.backward(&batch, &upstream).map_err(text)?;
            let temperature = forward.temperature(&batch).map_err(text)?;
            at.judge(&problem, evaluation, temperature, &gradients, -2.0)
        }),
        ("prefixes: slices: a step is prepared for other prefixes, and captured", || {
            let at = Place::new(0)?;
            let several = with_prefixes(Loss::samtone_both(), 92)?;
            let plain = sample(Loss::samtone_both(), 92)?;
            let one = plain.clone().with(|call| call.with_prefixes([5]));
            let (query, passage) = at.upload(&several)?;
            let (mut query, mut passage): (CudaSlice<f32>, CudaSlice<f32>) = (query, passage);
            let mut gradients = at.gradients(&several)?;
            let first = Pairs::of(&plain)?.batch(&query, &passage)?.problem().map_err(text)?;
            let mut step = Step::new(&at.device, &at.stream, &first).map_err(text)?;
            for problem in [&several, &one, &plain, &several] {
                let prepared = Pairs::of(problem)?.batch(&query, &passage)?.problem().map_err(text)?;
                step.prepare(&prepared).map_err(text)?;
                let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
                step.loss_and_gradients(&query, &passage, slices, 1.0).map_err(text)?;
                let (evaluation, temperature) = step.results(&query, &passage).map_err(text)?;
                let on_device = at.stream.clone_dtoh(&step.temperature().map_err(text)?).map_err(debug)?;
                at.stream.synchronize().map_err(debug)?;
                demand(on_device == [temperature.tau, temperature.log_beta], "another temperature on the device")?;
                at.judge(problem, evaluation, temperature, &gradients, 1.0)?;
            }
            let (wanted, bits) = (step.results(&query, &passage).map_err(text)?, at.download(&gradients)?);
            let mut graph = {
                let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
                step.capture(query.as_view_mut(), passage.as_view_mut(), slices, 1.0).map_err(text)?
            };
            for _ in 0..2 {
                graph.launch().map_err(text)?;
                demand(graph.results().map_err(text)? == wanted, "other bits of a replay")?;
            }
            drop(graph);
            demand(at.download(&gradients)? == bits, "other bits of the gradients of a replay")
        }),
        ("prefixes: slices: shards on all devices, and on the CPU, give together what one device gives", || {
            shards_on_all_devices(&with_prefixes(Loss::samtone_both(), 93)?)
        }),
        ("prefixes: slices: partial sums of other embeddings are refused", || {
            let at = Place::new(0)?;
            let problem = with_prefixes(Loss::samtone_both(), 93)?;
            let (query, passage) = at.upload(&problem)?;
            let batch = Pairs::of(&problem)?.batch(&query, &passage)?;
            let mut shard = Shard::new(&at.device, &at.stream, &batch, 0..10).map_err(text)?;
            // An entry that the first prefix does not have. The cosines of that prefix are the same, so those of another tell.
            let mut other = problem.clone();
            other.passage[4 * other.dim + 18] += 5.0;
            let foreign = super::super::support::foreign::partials(&other, 0..37).map_err(text)?;
            let error = shard.evaluate(&foreign).err().map(text).unwrap_or_default();
            demand(error.contains("row 4 has a cosine of"), &error)
        }),
    ];
}
