//! Steps as CUDA graphs, on slices of cudarc.

use super::raw::sample;
use super::slices::{Pairs, Place, debug};
use super::support::problem::Problem;
use super::{Body, Check, demand, text};
use samtone::cuda::cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use samtone::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use samtone::cuda::{Device, DeviceGradients, GradientSlices, Step, StepGraph};
use samtone::{Error, Evaluation, Loss, TemperatureGradient, Tower};
use std::sync::Arc;

/// On a GPU, or on the emulated driver.
pub const CHECKS: &[Check] = &[
    ("slices: graphs: replays have the bits of calls, on embeddings written between them", || {
        for tracking in [true, false] {
            let at = Place::new(0)?;
            if !tracking {
                // SAFETY: everything below is on one stream.
                unsafe { at.stream.context().disable_event_tracking() };
            }
            let (first, second) = (sample(Loss::samtone_both(), 61)?, sample(Loss::samtone_both(), 62)?);
            let wanted = [&first, &second].map(|problem| Captured::new(&at, problem).and_then(|mut of| of.call(3.0)));
            let [of_first, of_second] = wanted;
            let (of_first, of_second) = (of_first?, of_second?);
            let mut of = Captured::new(&at, &first)?;
            let mut graph = of.capture(3.0)?;
            demand(matches!(graph.results(), Err(Error::StateMismatch { .. })), "results before the first launch")?;
            for (problem, wanted) in [(&first, &of_first), (&second, &of_second), (&first, &of_first)] {
                write(&mut graph, &at.stream, problem)?;
                demand(replay(&mut graph, &at)? == *wanted, "other bits")?;
            }
            graph.launch().map_err(text)?;
            graph.launch().map_err(text)?;
            let loss = at.stream.clone_dtoh(&graph.loss().map_err(text)?).map_err(debug)?;
            at.stream.synchronize().map_err(debug)?;
            let evaluation = graph.evaluation().map_err(text)?;
            demand(loss == [evaluation.loss] && evaluation == of_first.0, "another loss")?;
            demand(graph.step().loss().is_ok(), "no loss in the step")?;
            let (evaluation, temperature) = of.step.results(&of.query, &of.passage).map_err(text)?;
            at.judge(&first, evaluation, temperature, &of.gradients, 3.0)?;
            demand(of.call(3.0)? == of_first, "other bits of a call after the graph")?;
        }
        Ok(())
    }),
    ("slices: graphs: the upstream gradient changes between replays", || {
        let at = Place::new(0)?;
        let other = at.stream.context().new_stream().map_err(debug)?;
        let problem = sample(Loss::samtone_both(), 63)?;
        let mut of = Captured::new(&at, &problem)?;
        let plain = of.call(1.0)?;
        let times = |factor: f64, got: &Results| {
            let exact = plain.2.iter().flatten().zip(got.2.iter().flatten()).all(|(a, b)| a * factor == *b);
            demand(exact && plain.1.tau * factor == got.1.tau, &format!("not the gradients times {factor}"))
        };
        let mut graph = of.capture(0.5)?;
        times(0.5, &replay(&mut graph, &at)?)?;
        graph.set_upstream(-2.0).map_err(text)?;
        times(-2.0, &replay(&mut graph, &at)?)?;
        times(-2.0, &replay(&mut graph, &at)?)?;
        let refused = graph.set_upstream(f64::NAN).err().map(text).unwrap_or_default();
        demand(refused.contains("`upstream`"), &refused)?;
        // On the device, and on another stream.
        other.memcpy_htod(&[4.0_f32], &mut graph.buffers().upstream).map_err(debug)?;
        times(4.0, &replay(&mut graph, &at)?)?;
        other.memcpy_htod(&[8.0_f32], &mut graph.buffers().upstream).map_err(debug)?;
        times(1.0, &of.call(1.0)?)?;
        // SAFETY: the stream is alive.
        let written = unsafe { sys::cuStreamQuery(other.cu_stream()) } == sys::CUresult::CUDA_SUCCESS;
        demand(written, "a call did not wait for the upstream gradient to be written over there")
    }),
    ("slices: graphs: inputs that are refused at a replay are named, and the next one goes on", || {
        let at = Place::new(0)?;
        let good = sample(Loss::samtone_both(), 64)?;
        let mut bad = good.clone();
        bad.passage[5 * bad.dim + 7] = f64::INFINITY;
        let mut zero = good.clone();
        zero.query[6 * zero.dim..7 * zero.dim].fill(0.0);
        let mut of = Captured::new(&at, &good)?;
        let wanted = of.call(1.0)?;
        let mut graph = of.capture(1.0)?;
        for problem in [&bad, &zero] {
            write(&mut graph, &at.stream, problem)?;
            clear(&mut graph, &at.stream)?;
            graph.launch().map_err(text)?;
            let named = match graph.results() {
                Err(Error::NonFinite { tower: Tower::Passage, row: 5, column: 7, value }) => value == f64::INFINITY,
                Err(Error::ZeroNorm { tower: Tower::Query, row: 6, prefix: None }) => std::ptr::eq(problem, &zero),
                other => return Err(format!("{other:?}")),
            };
            demand(named, "another error")?;
            demand(
                gradients(&mut graph, &at.stream)?.iter().flatten().all(|x| x.is_nan()),
                "gradients of refused inputs",
            )?;
            let loss = at.stream.clone_dtoh(&graph.loss().map_err(text)?).map_err(debug)?;
            at.stream.synchronize().map_err(debug)?;
            demand(loss[0].is_nan(), "a loss of refused inputs")?;
        }
        write(&mut graph, &at.stream, &good)?;
        demand(replay(&mut graph, &at)? == wanted, "other bits after refused inputs")
    }),
    ("slices: graphs: streams wait for a graph's slices, and it for them", || {
        let at = Place::new(0)?;
        let other = at.stream.context().new_stream().map_err(debug)?;
        let (first, second) = (sample(Loss::samtone_both(), 65)?, sample(Loss::samtone_both(), 66)?);
        let mut of = Captured::new(&at, &first)?;
        let of_first = of.call(1.0)?;
        let of_second = Captured::new(&at, &second)?.call(1.0)?;
        let mut graph = of.capture(1.0)?;
        for (problem, wanted) in [(&second, &of_second), (&first, &of_first), (&second, &of_second)] {
            write(&mut graph, &other, problem)?;
            graph.launch().map_err(text)?;
            let loss = other.clone_dtoh(&graph.loss().map_err(text)?).map_err(debug)?;
            let [query, passage] = gradients(&mut graph, &other)?;
            demand(loss == [wanted.0.loss] && [query, passage] == wanted.2, "other bits on the other stream")?;
        }
        Ok(())
    }),
    ("slices: graphs: whatever is dropped first, launches are done", || {
        let at = Place::new(0)?;
        let problem = sample(Loss::samtone_query(), 67)?;
        let wanted = Captured::new(&at, &problem)?.call(1.0)?;
        let Place { device, stream } = at;
        let at = Place { device: Device::new(0).map_err(text)?, stream };
        let mut of = Captured::of_device(device, &at, &problem)?;
        // The graph before its launch is done.
        let mut graph = of.capture(1.0)?;
        graph.launch().map_err(text)?;
        drop(graph);
        let (evaluation, temperature) = of.step.results(&of.query, &of.passage).map_err(text)?;
        demand((evaluation, temperature, at.download(&of.gradients)?) == wanted, "other bits of a dropped graph")?;
        // It, the embeddings, the step, and with it the last device that has its modules.
        let mut graph = of.capture(1.0)?;
        clear(&mut graph, &at.stream)?;
        graph.launch().map_err(text)?;
        let Captured { step, query, passage, gradients } = of;
        drop((query, passage));
        drop(step);
        demand(at.download(&gradients)? == wanted.2, "other gradients of a dropped step")?;
        // A graph that nobody launches.
        let mut of = Captured::new(&at, &problem)?;
        of.capture(1.0).map(drop)?;
        demand(of.call(1.0)? == wanted, "other bits after a graph that was not launched")
    }),
    ("slices: graphs: on default streams, and from another thread", || {
        let problem = sample(Loss::samtone_both(), 68)?;
        let context = CudaContext::new(0).map_err(debug)?;
        for stream in [context.default_stream(), context.per_thread_stream()] {
            let at = Place { device: Device::new(0).map_err(text)?, stream };
            let mut of = Captured::new(&at, &problem)?;
            let wanted = of.call(2.0)?;
            let mut graph = of.capture(2.0)?;
            demand(replay(&mut graph, &at)? == wanted, "other bits")?;
            clear(&mut graph, &at.stream)?;
            context.synchronize().map_err(debug)?; // cudarc does not order what threads do
            let elsewhere = std::thread::scope(|scope| {
                let launched = scope.spawn(|| graph.launch().and_then(|()| graph.results()));
                launched.join().map_err(|_| "a thread panicked".to_string())
            });
            let (evaluation, temperature) = elsewhere?.map_err(text)?;
            let got = (evaluation, temperature, gradients(&mut graph, &at.stream)?);
            demand(got == wanted, "other bits from another thread")?;
        }
        Ok(())
    }),
    ("slices: graphs: what is not of the step is refused", || {
        let at = Place::new(0)?;
        let problem = sample(Loss::samtone_both(), 69)?;
        let mut of = Captured::new(&at, &problem)?;
        let wanted = of.call(1.0)?;
        let Captured { step, query, passage, gradients } = &mut of;
        let slices = GradientSlices { query: None, passage: Some(gradients.passage.as_view_mut()) };
        let error = step.capture(query.as_view_mut(), passage.as_view_mut(), slices, 1.0).err().map(text);
        let error = error.unwrap_or_default();
        demand(error.contains("`query_gradient` is none") && error.contains("a slice of f32"), &error)?;
        let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
        let error = step.capture(query.slice_mut(1..), passage.as_view_mut(), slices, 1.0).err().map(text);
        let error = error.unwrap_or_default();
        demand(error.contains("`query` is") && error.contains("or more"), &error)?;
        let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
        let error = step.capture(query.as_view_mut(), passage.as_view_mut(), slices, f64::MAX).err().map(text);
        let error = error.unwrap_or_default();
        demand(error.contains("`upstream`"), &error)?;
        // A workspace that was released is there again.
        step.release_workspace();
        let mut graph = of.capture(1.0)?;
        demand(replay(&mut graph, &at)? == wanted, "other bits")
    }),
];

/// On the emulated driver, with what it is told.
pub const TOLD: &[(&str, &str, Body)] = &[
    ("slices: graphs: a launch waits for nothing and allocates nothing", "allocations=8", || {
        let at = Place::new(0)?;
        let problem = sample(Loss::samtone_both(), 71)?;
        let mut of = Captured::new(&at, &problem)?;
        let mut graph = of.capture(1.0)?;
        at.stream.synchronize().map_err(debug)?;
        // The emulated driver does what is enqueued when somebody waits, and not before.
        // SAFETY: the stream is alive.
        let query = || unsafe { sys::cuStreamQuery(at.stream.cu_stream()) };
        demand(query() == sys::CUresult::CUDA_SUCCESS, "the capture left work on the stream")?;
        for _ in 0..3 {
            graph.launch().map_err(text)?;
            demand(query() == sys::CUresult::CUDA_ERROR_NOT_READY, "the launch was waited for")?;
        }
        let more = at.stream.alloc_zeros::<u8>(1);
        demand(more.is_err(), "there is memory left")?;
        let (evaluation, temperature) = graph.results().map_err(text)?;
        at.judge(&problem, evaluation, temperature, &of.gradients, 1.0)
    }),
    ("slices: graphs: a capture that is spoiled leaves stream and step as they were", "captures=1", || {
        let at = Place::new(0)?;
        let problem = sample(Loss::samtone_both(), 72)?;
        let mut of = Captured::new(&at, &problem)?;
        let mut graph = of.capture(1.0)?;
        let wanted = replay(&mut graph, &at)?;
        let sentence = of.capture(2.0).err().unwrap_or_default();
        demand(sentence.contains("901 (CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)"), &sentence)?;
        demand(of.results(&at)? == wanted, "the results before it are gone")?;
        demand(of.call(1.0)? == wanted, "other bits of a call after it")
    }),
    (
        "graphs: a launch that is refused during the capture is an error, and the next capture succeeds",
        "refused=2",
        || {
            let at = Place::new(0)?;
            let problem = sample(Loss::samtone_both(), 73)?;
            let mut of = Captured::new(&at, &problem)?;
            let sentence = of.capture(1.0).err().unwrap_or_default();
            demand(
                sentence.contains("`cuLaunchKernel`") && sentence.contains("1 (CUDA_ERROR_INVALID_VALUE)"),
                &sentence,
            )?;
            demand(of.step.loss().is_err(), "a loss")?;
            let mut graph = of.capture(1.0)?;
            let (evaluation, temperature, _) = replay(&mut graph, &at)?;
            at.judge(&problem, evaluation, temperature, &of.gradients, 1.0)
        },
    ),
    ("slices: graphs: each is given back, and one for which there is no memory is an error", "graphs=1", || {
        let at = Place::new(0)?;
        let problem = sample(Loss::samtone_both(), 74)?;
        let (mut first, mut second) = (Captured::new(&at, &problem)?, Captured::new(&at, &problem)?);
        let mut graph = first.capture(1.0)?;
        let sentence = second.capture(1.0).err().unwrap_or_default();
        demand(sentence.contains("`cuGraphInstantiateWithFlags`") && sentence.contains("no memory left"), &sentence)?;
        let wanted = second.call(1.0)?;
        demand(replay(&mut graph, &at)? == wanted, "other bits")?;
        drop(graph);
        for _ in 0..2 {
            let mut graph = second.capture(1.0)?;
            demand(replay(&mut graph, &at)? == wanted, "other bits of the second")?;
        }
        Ok(())
    }),
    ("slices: graphs: none is captured on a stream that is being captured, which goes on", "", || {
        let at = Place::new(0)?;
        // SAFETY: everything below is on one stream.
        unsafe { at.stream.context().disable_event_tracking() };
        let problem = sample(Loss::samtone_both(), 75)?;
        let mut of = Captured::new(&at, &problem)?;
        let wanted = of.call(1.0)?;
        at.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).map_err(debug)?;
        let sentence = of.capture(1.0).err().unwrap_or_default();
        at.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(|e| format!("spoiled: {e:?}"))?;
        demand(sentence.contains("`stream` is being captured"), &sentence)?;
        let mut graph = of.capture(1.0)?;
        demand(replay(&mut graph, &at)? == wanted, "other bits")
    }),
];

/// A step and its slices.
struct Captured {
    step: Step,
    query: CudaSlice<f32>,
    passage: CudaSlice<f32>,
    gradients: DeviceGradients,
}

/// What a call gives, to the bit.
type Results = (Evaluation, TemperatureGradient, [Vec<f64>; 2]);

impl Captured {
    fn new(at: &Place, problem: &Problem) -> Result<Self, String> {
        Self::of_device(at.device.clone(), at, problem)
    }

    /// The step has the last clone of `device`.
    fn of_device(device: Device, at: &Place, problem: &Problem) -> Result<Self, String> {
        let (query, passage) = at.upload(problem)?;
        let gradients = at.gradients(problem)?;
        let pairs = Pairs::of(problem)?;
        let planned = pairs.batch(&query, &passage)?.problem().map_err(text)?;
        let step = Step::new(&device, &at.stream, &planned).map_err(text)?;
        Ok(Self { step, query, passage, gradients })
    }

    fn capture(&mut self, upstream: f64) -> Result<StepGraph<'_, f32, f32>, String> {
        let Self { step, query, passage, gradients } = self;
        let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
        step.capture(query.as_view_mut(), passage.as_view_mut(), slices, upstream).map_err(text)
    }

    /// A call without a graph.
    fn call(&mut self, upstream: f64) -> Result<Results, String> {
        let Self { step, query, passage, gradients } = self;
        let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
        step.loss_and_gradients(query, passage, slices, upstream).map_err(text)?;
        let at = Place { device: Device::new(0).map_err(text)?, stream: step.stream().clone() };
        self.results(&at)
    }

    fn results(&self, at: &Place) -> Result<Results, String> {
        let (evaluation, temperature) = self.step.results(&self.query, &self.passage).map_err(text)?;
        Ok((evaluation, temperature, at.download(&self.gradients)?))
    }
}

type Graph<'a> = StepGraph<'a, f32, f32>;

/// Enqueues the embeddings of a problem of the same shape into the graph's slices.
fn write(graph: &mut Graph<'_>, stream: &Arc<CudaStream>, problem: &Problem) -> Result<(), String> {
    let [query, passage] =
        [&problem.query, &problem.passage].map(|x| x.iter().map(|&x| x as f32).collect::<Vec<f32>>());
    let mut buffers = graph.buffers();
    stream.memcpy_htod(&query, &mut buffers.query).map_err(debug)?;
    stream.memcpy_htod(&passage, &mut buffers.passage).map_err(debug)
}

/// Enqueues that gradients are numbers which no call gives.
fn clear(graph: &mut Graph<'_>, stream: &Arc<CudaStream>) -> Result<(), String> {
    let slices = graph.buffers().gradients;
    for mut view in [slices.query, slices.passage].into_iter().flatten() {
        let values = vec![1e30_f32; view.len()];
        stream.memcpy_htod(&values, &mut view).map_err(debug)?;
    }
    Ok(())
}

/// Both gradients, copied on that stream.
fn gradients(graph: &mut Graph<'_>, stream: &Arc<CudaStream>) -> Result<[Vec<f64>; 2], String> {
    let slices = graph.buffers().gradients;
    let (Some(query), Some(passage)) = (slices.query, slices.passage) else { return Err("no gradients".into()) };
    let copies = [stream.clone_dtoh(&query).map_err(debug)?, stream.clone_dtoh(&passage).map_err(debug)?];
    stream.synchronize().map_err(debug)?;
    Ok(copies.map(|values| values.into_iter().map(f64::from).collect()))
}

/// One launch, and what it gives.
fn replay(graph: &mut Graph<'_>, at: &Place) -> Result<Results, String> {
    clear(graph, &at.stream)?;
    graph.launch().map_err(text)?;
    let (evaluation, temperature) = graph.results().map_err(text)?;
    Ok((evaluation, temperature, gradients(graph, &at.stream)?))
}
