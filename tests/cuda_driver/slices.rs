//! The interface on slices of cudarc. Each check runs on a GPU, or on the emulated driver.

use super::raw::sample;
use super::support::case::Expected;
use super::support::compare::{against_definition, verdict};
use super::support::problem::{Buffer, Outputs, Problem};
use super::{Check, demand, text};
use samtone::backend;
use samtone::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use samtone::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use samtone::cuda::{self, Device, DeviceBatch, DeviceGradients, GradientSlices, Shard, Step};
use samtone::half::f16;
use samtone::{DType, Error, Evaluation, Loss, Tower};
use std::sync::Arc;

pub const CHECKS: &[Check] = &[
    ("slices: one call gives what the definition gives", || {
        let at = Place::new(0)?;
        for loss in [Loss::samtone_both(), Loss::samtone_query()] {
            let problem = sample(loss, 21)?;
            let (query, passage) = at.upload(&problem)?;
            let pairs = Pairs::of(&problem)?;
            let batch = pairs.batch(&query, &passage)?;
            let out = cuda::loss_and_gradients(&at.device, &at.stream, &batch, 0.25);
            let out = out.map_err(text)?;
            let (evaluation, temperature) = out.results(&batch).map_err(text)?;
            let on_device = at.stream.clone_dtoh(&out.loss().map_err(text)?).map_err(debug)?;
            at.stream.synchronize().map_err(debug)?;
            demand(on_device == [evaluation.loss], "another loss on the device")?;
            at.judge(&problem, evaluation, temperature, &out.gradients, 0.25)?;
        }
        Ok(())
    }),
    ("slices: gradients of a forward call, the upstream gradient on the device", || {
        let at = Place::new(0)?;
        let problem = sample(Loss::samtone_both(), 22)?;
        let (query, passage) = at.upload(&problem)?;
        let pairs = Pairs::of(&problem)?;
        let batch = pairs.batch(&query, &passage)?;
        let mut forward = cuda::forward(&at.device, &at.stream, &batch).map_err(text)?;
        demand(
            matches!(forward.temperature(&batch), Err(Error::StateMismatch { .. })),
            "a temperature before backward",
        )?;
        let evaluation = forward.evaluation(&batch).map_err(text)?;
        let upstream = at.stream.clone_htod(&[-2.0_f32]).map_err(debug)?;
        let gradients = forward.backward(&batch, &upstream).map_err(text)?;
        let temperature = forward.temperature(&batch).map_err(text)?;
        at.judge(&problem, evaluation.clone(), temperature, &gradients, -2.0)?;
        let again = forward.backward(&batch, -2.0).map_err(text)?;
        demand(at.download(&again)? == at.download(&gradients)?, "other bits with the number from the host")?;
        let error = forward.backward(&batch, f64::MAX).err().map(text).unwrap_or_default();
        demand(error.contains("`upstream`"), &error)
    }),
    ("slices: a step is used again, for other pairs and shapes", || {
        let at = Place::new(0)?;
        let (first, mut second) = (sample(Loss::samtone_both(), 23)?, sample(Loss::samtone_both(), 24)?);
        second.call = samtone::Call::new(Loss::samtone_both(), 0.05); // without its positives
        let wide = samtone_wide()?;
        let mut step: Option<Step> = None;
        for problem in [&first, &second, &wide, &first] {
            let (query, passage) = at.upload(problem)?;
            let pairs = Pairs::of(problem)?;
            let batch = pairs.batch(&query, &passage)?;
            let planned = batch.problem().map_err(text)?;
            match &mut step {
                None => step = Some(Step::new(&at.device, &at.stream, &planned).map_err(text)?),
                Some(step) => step.prepare(&planned).map_err(text)?,
            }
            let step = step.as_mut().ok_or("no step")?;
            demand(step.loss().is_err(), "a loss before the call")?;
            step.forward(&query, &passage).map_err(text)?;
            demand(step.temperature().is_err(), "a temperature before the backward call")?;
            let mut gradients = at.gradients(problem)?;
            for _ in 0..2 {
                let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
                step.loss_and_gradients(&query, &passage, slices, 1.0).map_err(text)?;
            }
            let (evaluation, temperature) = step.results(&query, &passage).map_err(text)?;
            let on_device = at.stream.clone_dtoh(&step.temperature().map_err(text)?).map_err(debug)?;
            at.stream.synchronize().map_err(debug)?;
            demand(on_device == [temperature.tau, temperature.log_beta], "another temperature on the device")?;
            at.judge(problem, evaluation, temperature, &gradients, 1.0)?;
        }
        Ok(())
    }),
    ("slices: a step is captured and replayed", || {
        let at = Place::new(0)?;
        // SAFETY: everything below is on one stream.
        unsafe { at.stream.context().disable_event_tracking() };
        let problem = sample(Loss::samtone_query(), 25)?;
        let (query, passage) = at.upload(&problem)?;
        let pairs = Pairs::of(&problem)?;
        let batch = pairs.batch(&query, &passage)?;
        let planned = batch.problem().map_err(text)?;
        let mut step = Step::new(&at.device, &at.stream, &planned).map_err(text)?;
        let mut gradients = at.gradients(&problem)?;
        at.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(debug)?;
        let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
        let captured = step.loss_and_gradients(&query, &passage, slices, 3.0);
        let refused = step.prepare(&planned).err().map(text).unwrap_or_default();
        let graph = at.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(debug)?.ok_or("no graph")?;
        captured.map_err(text)?;
        demand(refused.contains("captured"), &format!("prepared during a capture: {refused}"))?;
        for _ in 0..2 {
            graph.launch().map_err(debug)?;
            let (evaluation, temperature) = step.results(&query, &passage).map_err(text)?;
            at.judge(&problem, evaluation, temperature, &gradients, 3.0)?;
        }
        Ok(())
    }),
    ("slices: other element types, frozen towers, gradients in f16", || {
        let at = Place::new(0)?;
        let problem = sample(Loss::samtone_both(), 26)?.rounded(DType::F16);
        let bits =
            |x: &[f64]| x.iter().map(|&x| <f16 as samtone::Element>::from_f64(x).to_bits()).collect::<Vec<u16>>();
        let query = at.stream.clone_htod(&bits(&problem.query)).map_err(debug)?;
        let passage = at.stream.clone_htod(&bits(&problem.passage)).map_err(debug)?;
        // SAFETY: the bits are those of f16.
        let views = unsafe { (query.transmute::<f16>(query.len()), passage.transmute::<f16>(passage.len())) };
        let (query, passage) = (views.0.ok_or("query")?, views.1.ok_or("passage")?);
        let pairs = Pairs::of(&problem)?;
        let plain = cuda::Problem::new(pairs.pairs()?, DType::F16, problem.dim);
        let output = cuda::GradientOutput { dtype: DType::F16, row_stride: problem.dim };
        let frozen = plain.and_then(|p| p.with_gradients(None, Some(output))).map_err(text)?;
        let mut step = Step::new(&at.device, &at.stream, &frozen).map_err(text)?;
        let mut memory = at.stream.alloc_zeros::<u16>(problem.passage.len()).map_err(debug)?;
        let len = memory.len();
        // SAFETY: as above.
        let view = unsafe { memory.transmute_mut::<f16>(len) };
        step.loss_and_gradients(&query, &passage, GradientSlices { query: None, passage: view }, 1.0).map_err(text)?;
        let (evaluation, temperature) = step.results(&query, &passage).map_err(text)?;
        let got = at.stream.clone_dtoh(&memory).map_err(debug)?;
        at.stream.synchronize().map_err(debug)?;
        let grad_passage = got.iter().map(|&bits| f16::from_bits(bits).to_f64()).collect();
        let want = expected(&problem, 1.0)?;
        let got = Outputs { evaluation, grad_query: want.grad_query.clone(), grad_passage, temperature };
        // Gradients rounded to f16 are as exact as bf16 inputs are held to.
        verdict(&against_definition(&got, &want, &problem, DType::BF16, 1.0))?;

        let mut wrong = at.stream.alloc_zeros::<f32>(problem.passage.len()).map_err(debug)?;
        let slices = GradientSlices { query: None, passage: Some(wrong.as_view_mut()) };
        let error = step.backward(&query, &passage, slices, 1.0).err().map(text).unwrap_or_default();
        demand(error.contains("`passage_gradient` is a slice of f32") && error.contains("a slice of f16"), &error)?;
        let error = step.forward(&wrong, &wrong).err().map(text).unwrap_or_default();
        demand(error.contains("embeddings of type f32") && error.contains("f16, the type of the step"), &error)
    }),
    ("slices: inputs that are refused are named", || {
        let at = Place::new(0)?;
        let mut problem = sample(Loss::samtone_both(), 27)?;
        problem.query[3 * problem.dim + 1] = f64::NAN;
        let (query, passage) = at.upload(&problem)?;
        let pairs = Pairs::of(&problem)?;
        let batch = pairs.batch(&query, &passage)?;
        let out = cuda::loss_and_gradients(&at.device, &at.stream, &batch, 1.0);
        match out.map_err(text)?.results(&batch) {
            Err(Error::NonFinite { tower: Tower::Query, row: 3, column: 1, value }) if value.is_nan() => {}
            other => return Err(format!("{other:?}")),
        }
        let short = DeviceBatch::new(query.as_view(), passage.as_view(), problem.dim + 1, pairs.pairs()?);
        demand(short.is_err_and(|e| e.to_string().contains("37 rows of 25")), "a batch of another shape")?;
        if cuda::device_count().map_err(text)? > 1 {
            let other = Device::new(1).map_err(text)?;
            let out = cuda::forward(&other, &at.stream, &batch);
            let error = out.err().map(text).unwrap_or_default();
            demand(error.contains("`stream` belongs to the primary context of device 0"), &error)?;
        }
        Ok(())
    }),
    ("slices: shards on all devices, and on the CPU, give together what one device gives", || {
        shards_on_all_devices(&sample(Loss::samtone_both(), 28)?)
    }),
    ("slices: partial sums of inputs that are refused are an error", || {
        let at = Place::new(0)?;
        let good = sample(Loss::samtone_both(), 31)?;
        let of_prefixes = good.clone().with(|call| call.with_prefixes([3, 24]));
        for (problem, prefix) in [(good, None), (of_prefixes, Some(3))] {
            let d = problem.dim;
            let (mut infinite, mut zero) = (problem.clone(), problem.clone());
            infinite.passage[40 * d + 2] = f64::INFINITY;
            zero.query[36 * d..37 * d].fill(0.0);
            // The memory of a state is that of an earlier one, whose call was accepted or refused.
            for (problem, row) in [(&infinite, Some(40)), (&problem, None), (&zero, Some(36)), (&problem, None)] {
                let (query, passage) = at.upload(problem)?;
                let pairs = Pairs::of(problem)?;
                let batch = pairs.batch(&query, &passage)?;
                let mut shard = Shard::new(&at.device, &at.stream, &batch, 0..10).map_err(text)?;
                let expected = match shard.partials() {
                    Err(Error::NonFinite { tower: Tower::Passage, row: 40, column: 2, .. }) => row == Some(40),
                    Err(Error::ZeroNorm { tower: Tower::Query, row: 36, prefix: k }) => row == Some(36) && k == prefix,
                    Ok(_) => row.is_none(),
                    other => return Err(format!("{other:?}")),
                };
                demand(expected, "another result of a shard")?;
            }
        }
        Ok(())
    }),
    ("slices: streams wait for each other's slices", || {
        // Freed over there after their use here; one at a time, since waiting for one is waiting for all.
        for freed in [None, Some(0), Some(1), Some(2)] {
            let at = Place::new(0)?;
            let other = at.stream.context().new_stream().map_err(debug)?;
            let problem = sample(Loss::samtone_both(), 29)?;
            let [query, passage] = [&problem.query, &problem.passage].map(|x| x.iter().map(|&x| x as f32).collect());
            let mut slices: Vec<CudaSlice<f32>> = [query, passage, vec![0.5]]
                .map(|values| other.clone_htod(&values).map_err(debug))
                .into_iter()
                .collect::<Result<_, _>>()?;
            let pairs = Pairs::of(&problem)?;
            let batch = pairs.batch(&slices[0], &slices[1])?;
            let forward = cuda::forward(&at.device, &at.stream, &batch);
            let mut forward = forward.map_err(text)?;
            // What is made here is waited for over there.
            let loss = |forward: &cuda::Forward| {
                let loss = other.clone_dtoh(&forward.loss().map_err(text)?).map_err(debug)?;
                other.synchronize().map_err(debug).map(|()| loss)
            };
            let early = freed.is_none().then(|| loss(&forward)).transpose()?;
            let gradients = forward.backward(&batch, &slices[2]).map_err(text)?;
            freed.map(|k| slices.remove(k));
            let loss = loss(&forward)?;
            demand(early.is_none_or(|early| early == loss), "another loss before the backward call")?;
            let (query, passage) = at.upload(&problem)?;
            let batch = pairs.batch(&query, &passage)?;
            let evaluation = forward.evaluation(&batch).map_err(text)?;
            demand(loss == [evaluation.loss], "another loss on the other stream")?;
            at.judge(&problem, evaluation, forward.temperature(&batch).map_err(text)?, &gradients, 0.5)?;
        }
        Ok(())
    }),
];

/// cudarc's own text needs a driver, which is here.
pub fn debug(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

pub fn samtone_wide() -> Result<Problem, String> {
    use super::support::data::{Kind, problem};
    problem(Loss::samtone_both(), Kind::Trained, (70, 90, 33), 0.05, 30, 0.0).map_err(text)
}

/// Two shards on the first and the last device and a third on the CPU, merged. The problem has 37 rows.
pub fn shards_on_all_devices(problem: &Problem) -> Result<(), String> {
    let devices = cuda::device_count().map_err(text)?;
    let pairs = Pairs::of(problem)?;
    let places = [Place::new(0)?, Place::new(devices - 1)?];
    let uploads = [places[0].upload(problem)?, places[1].upload(problem)?];
    let batches = [pairs.batch(&uploads[0].0, &uploads[0].1)?, pairs.batch(&uploads[1].0, &uploads[1].1)?];
    let ranges = [0..10, 10..29];
    let mut shards = Vec::new();
    for ((at, batch), rows) in places.iter().zip(&batches).zip(ranges) {
        let shard = Shard::new(&at.device, &at.stream, batch, rows);
        shards.push(shard.map_err(text)?);
    }
    let (query, passage) = (Buffer::new(DType::F32, &problem.query), Buffer::new(DType::F32, &problem.passage));
    let host = problem.batch(&query, &passage).map_err(text)?;
    let cpu = samtone::cpu::Shard::new(&host, 29..37).map_err(text)?;

    let mut merged = cpu.partials().map_err(text)?;
    demand(shards[0].evaluate(&merged).is_err(), "partials that do not cover every row")?;
    for shard in &mut shards {
        merged.merge(&shard.partials().map_err(text)?).map_err(text)?;
    }
    let evaluation = shards[1].evaluate(&merged).map_err(text)?;
    let last = cpu.gradients(&merged, 1.5).map_err(text)?;
    let mut sum = Outputs {
        evaluation,
        grad_query: Vec::new(),
        grad_passage: last.passage.iter().map(|&x| f64::from(x)).collect(),
        temperature: last.temperature,
    };
    for (shard, at) in shards.iter_mut().zip(&places) {
        let (gradients, temperature) = shard.gradients(&merged, 1.5).map_err(text)?;
        let [query, passage] = at.download(&gradients)?;
        sum.grad_query.extend(query);
        sum.grad_passage.iter_mut().zip(passage).for_each(|(sum, own)| *sum += own);
        sum.temperature.tau += temperature.tau;
        sum.temperature.log_beta += temperature.log_beta;
    }
    sum.grad_query.extend(last.query.iter().map(|&x| f64::from(x)));
    verdict(&against_definition(&sum, &expected(problem, 1.5)?, problem, DType::F32, 1.5))
}

fn expected(problem: &Problem, upstream: f64) -> Result<Expected, String> {
    let reference = backend::by_name("reference").map_err(text)?;
    problem.rounded(DType::F32).run(reference, DType::F64, upstream).map(Expected::from).map_err(text)
}

/// A device, and a stream of its primary context.
pub struct Place {
    pub device: Device,
    pub stream: Arc<CudaStream>,
}

impl Place {
    pub fn new(ordinal: usize) -> Result<Self, String> {
        let device = Device::new(ordinal).map_err(text)?;
        let stream = CudaContext::new(ordinal).and_then(|context| context.new_stream()).map_err(debug)?;
        Ok(Self { device, stream })
    }

    pub fn upload(&self, problem: &Problem) -> Result<(CudaSlice<f32>, CudaSlice<f32>), String> {
        let tower = |x: &[f64]| self.stream.clone_htod(&x.iter().map(|&x| x as f32).collect::<Vec<_>>()).map_err(debug);
        Ok((tower(&problem.query)?, tower(&problem.passage)?))
    }

    pub fn gradients(&self, problem: &Problem) -> Result<DeviceGradients, String> {
        let slice = |x: &[f64]| self.stream.clone_htod(&vec![f32::NAN; x.len()]).map_err(debug);
        Ok(DeviceGradients { query: slice(&problem.query)?, passage: slice(&problem.passage)? })
    }

    pub fn download(&self, gradients: &DeviceGradients) -> Result<[Vec<f64>; 2], String> {
        let slice = |x: &CudaSlice<f32>| {
            let values = self.stream.clone_dtoh(x).map_err(debug)?;
            self.stream.synchronize().map_err(debug)?;
            Ok::<_, String>(values.into_iter().map(f64::from).collect())
        };
        Ok([slice(&gradients.query)?, slice(&gradients.passage)?])
    }

    pub fn judge(
        &self,
        problem: &Problem,
        evaluation: Evaluation,
        temperature: samtone::TemperatureGradient,
        gradients: &DeviceGradients,
        upstream: f64,
    ) -> Result<(), String> {
        let [grad_query, grad_passage] = self.download(gradients)?;
        let got = Outputs { evaluation, grad_query, grad_passage, temperature };
        verdict(&against_definition(&got, &expected(problem, upstream)?, problem, DType::F32, upstream))
    }
}

/// The pairs of a problem, whose embeddings are elsewhere.
pub struct Pairs<'a>(&'a Problem);

impl<'a> Pairs<'a> {
    pub fn of(problem: &'a Problem) -> Result<Self, String> {
        Ok(Self(problem))
    }

    pub fn pairs(&self) -> Result<samtone::Pairs<'a>, String> {
        self.0.pairs().map_err(text)
    }

    pub fn batch<'b>(
        &self,
        query: &'b CudaSlice<f32>,
        passage: &'b CudaSlice<f32>,
    ) -> Result<DeviceBatch<'b, f32>, String>
    where
        'a: 'b,
    {
        DeviceBatch::new(query.as_view(), passage.as_view(), self.0.dim, self.pairs()?).map_err(text)
    }
}
