//! What a real driver does only at times, or only to unusual callers. These checks need the emulated driver, which is told what to do in
//! each of them. See driver.cpp.

use super::memory::Driver;
use super::raw::{sample, with_call};
use super::{Body, demand, text};
use samtone::backend::{self, Backend};
use samtone::cuda::{Architecture, Cuda, Device, Slot};
use samtone::{Batch, Call, DType, Embeddings, Error, GradientBuffers, Loss};

pub const CHECKS: &[(&str, &str, Body)] = &[
    ("kernels are not loaded into a capture, which goes on", "", || {
        with_call(&sample(Loss::info_nce(), 41)?, DType::F32, |call, driver| {
            driver.begin_capture(call.stream)?;
            let refused = call.run(Device::loss_and_gradients).err().unwrap_or_default();
            // SAFETY: the stream is alive.
            let waited = unsafe { call.device.synchronize(call.stream) }.err().map(text).unwrap_or_default();
            driver.end_capture(call.stream)?;
            demand(refused.contains("captured") && refused.contains("Device::load"), &format!("loaded: {refused}"))?;
            demand(waited.contains("captured"), &format!("waited: {waited}"))?;
            call.device.load(&call.plan).map_err(text)?;
            driver.begin_capture(call.stream)?;
            let captured = call.run(Device::loss_and_gradients);
            driver.end_capture(call.stream)?.launch(call.stream)?;
            captured?;
            call.outputs().map(drop)
        })
    }),
    ("a call of which a part does not load enqueues nothing", "loads=3", || {
        with_call(&sample(Loss::info_nce(), 42)?, DType::F32, |call, _| {
            let state = &call.memory[Slot::State as usize];
            state.write(&vec![0x5a; call.plan.slot_bytes(Slot::State) as usize])?;
            let error = call.run(Device::loss_and_gradients).err().unwrap_or_default();
            demand(error.contains("loading gradient_tile_sm80.ptx"), &error)?;
            demand(state.read(call.stream)?.iter().all(|byte| *byte == 0x5a), "the forward call was enqueued")
        })
    }),
    ("launches overlap on a device of 9.0", "capability=90 version=12080 plain=1", || {
        with_call(&sample(Loss::samtone_both(), 43)?, DType::F16, |call, _| {
            let refused = call.run(Device::loss_and_gradients).err().unwrap_or_default();
            demand(refused.contains("`cuLaunchKernelEx`"), &format!("no launch was told to overlap: {refused}"))?;
            demand(call.device.overlaps_launches(), "not on by default")?;
            // SAFETY: as `run` promises of the call that it is given.
            call.run(|device, plan, pointers, stream| unsafe {
                device.clone().with_overlapping_launches(false).loss_and_gradients(plan, pointers, stream)
            })?;
            call.outputs().map(drop)
        })
    }),
    ("launches do not overlap where the driver is too old", "capability=90 version=12020 plain=1", || {
        with_call(&sample(Loss::samtone_both(), 44)?, DType::F16, |call, _| {
            demand(
                !call.device.clone().with_overlapping_launches(true).overlaps_launches(),
                "switched on, and it cannot be",
            )?;
            call.run(Device::loss_and_gradients)
        })
    }),
    (
        "launches do not overlap where the driver cannot be told so",
        "without=cuLaunchKernelEx capability=90 version=12080",
        || {
            with_call(&sample(Loss::samtone_both(), 44)?, DType::F16, |call, _| {
                let device = call.device.clone().with_overlapping_launches(true);
                demand(!device.overlaps_launches(), "switched on, and it cannot be")?;
                call.run(Device::loss_and_gradients)?;
                call.outputs().map(drop)
            })
        },
    ),
    ("the last device gives its context back", "", || {
        let device = Device::new(1).map_err(text)?;
        let driver = Driver::new(&device)?;
        let (first, second) = (device.clone(), Device::new(1).map_err(text)?);
        drop((device, first));
        demand(driver.is_retained(1)?, "one device gave back what two have")?;
        drop(second);
        demand(!driver.is_retained(1)?, "the context is still retained")
    }),
    ("the shared device is one, and stays", "", || {
        let device = Device::shared(1).map_err(text)?;
        let driver = Driver::new(&device)?;
        demand(Device::shared(1).map_err(text)?.context() == device.context(), "another context")?;
        drop(device);
        demand(driver.is_retained(1)?, "it was dropped")?;
        let sentence = Device::shared(2).err().map(text).unwrap_or_default();
        demand(sentence.contains("`ordinal` is 2"), &sentence)
    }),
    ("a device of 9.0 computes by kernels of its own", "capability=90 version=12080", || {
        let architecture = Device::first().map_err(text)?.architecture();
        demand(architecture == Architecture::Sm90a { multiprocessors: 4 }, &format!("{architecture:?}"))?;
        Cuda::CLUSTERS.available().map_err(text)?;
        let call = Call::new(Loss::samtone_both(), 0.1);
        let (q, p): (Vec<f32>, Vec<f32>) = (0..260).map(|i| ((i as f32 * 0.7).sin(), (i as f32 * 0.9).cos())).unzip();
        let compute = |backend: &dyn Backend, dtype: DType| {
            let (q64, p64): (Vec<f64>, Vec<f64>) =
                (q.iter().map(|v| f64::from(*v)).collect(), p.iter().map(|v| f64::from(*v)).collect());
            let (query, passage) = match dtype {
                DType::F64 => (Embeddings::new(&q64, 13, 20)?, Embeddings::new(&p64, 13, 20)?),
                _ => (Embeddings::new(&q, 13, 20)?, Embeddings::new(&p, 13, 20)?),
            };
            let none = GradientBuffers { query: None, passage: None };
            let batch = Batch::new(&call, query, passage)?;
            backend.loss_and_gradients_into(&batch, 1.0, none).map(|(e, t)| [e.loss, t.tau])
        };
        let got = compute(&Cuda::CLUSTERS, DType::F32).map_err(text)?;
        let want = compute(backend::by_name("reference").map_err(text)?, DType::F64).map_err(text)?;
        let near = got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-5 * w.abs());
        demand(near, &format!("{got:?}, wanted {want:?}"))
    }),
    (
        "on a device of 9.0 the smoke check loads every kernel",
        "capability=90 version=12080",
        super::kernels::nothing_is_left_out,
    ),
    ("a device of 9.0 whose driver is too old for those takes the others", "capability=90 version=12040", || {
        let architecture = Device::first().map_err(text)?.architecture();
        demand(architecture == Architecture::Sm80, &format!("{architecture:?}"))?;
        let refused = Cuda::CLUSTERS.available().err().map(text).unwrap_or_default();
        demand(refused.contains("kernels of 9.0"), &refused)
    }),
    ("a state that no call has written is no result", "", || {
        with_call(&sample(Loss::info_nce(), 43)?, DType::F32, |call, _| {
            call.memory[Slot::State as usize].write(&vec![0x5a; call.plan.slot_bytes(Slot::State) as usize])?;
            // SAFETY: the state is there, though no call has written it: what is read are rows that do not exist.
            let read = unsafe { call.device.evaluation(&call.readout, &call.pointers, call.stream) };
            demand(matches!(read, Err(Error::StateMismatch { .. })), &format!("{read:?}"))
        })
    }),
];

#[cfg(feature = "cudarc")]
pub use slices::CHECKS as SLICES;
#[cfg(not(feature = "cudarc"))]
pub const SLICES: &[(&str, &str, Body)] = &[];

#[cfg(feature = "cudarc")]
mod slices {
    use super::super::slices::{Pairs, Place, debug, samtone_wide};
    use super::super::{Body, demand, text};
    use super::sample;
    use samtone::cuda::cudarc::driver::CudaContext;
    use samtone::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    use samtone::cuda::{self, Device, GradientSlices, Step};
    use samtone::{Error, Loss};

    const GLOBAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;

    pub const CHECKS: &[(&str, &str, Body)] = &[
        ("slices: nothing is made, allocated or freed during a capture, which goes on", "", || {
            let at = Place::new(0)?;
            // SAFETY: everything below is on one stream.
            unsafe { at.stream.context().disable_event_tracking() };
            let problem = sample(Loss::samtone_query(), 51)?;
            let (query, passage) = at.upload(&problem)?;
            let pairs = Pairs::of(&problem)?;
            let batch = pairs.batch(&query, &passage)?;
            let planned = batch.problem().map_err(text)?;
            let mut gradients = at.gradients(&problem)?;
            let during = |call: &mut dyn FnMut() -> samtone::Result<()>| {
                at.stream.begin_capture(GLOBAL).map_err(debug)?;
                let result = call();
                at.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(|e| format!("spoiled: {e:?}"))?;
                Ok::<_, String>(result.err().map(text).unwrap_or_default())
            };
            let refused = |what: &str, call: &mut dyn FnMut() -> samtone::Result<()>| {
                let sentence = during(call)?;
                demand(sentence.contains("`stream` is being captured"), &format!("{what}: {sentence}"))
            };
            refused("a step", &mut || Step::new(&at.device, &at.stream, &planned).map(drop))?;
            let mut step = Step::new(&at.device, &at.stream, &planned).map_err(text)?;
            step.release_workspace();
            refused("a workspace", &mut || step.forward(&query, &passage))?;
            let forward = cuda::forward(&at.device, &at.stream, &batch);
            let mut forward = forward.map_err(text)?;
            refused("gradients", &mut || forward.backward(&batch, 1.0).map(drop))?;
            step.forward(&query, &passage).map_err(text)?;
            let kept = during(&mut || {
                step.release_workspace();
                let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
                step.loss_and_gradients(&query, &passage, slices, 1.0)
            })?;
            demand(kept.is_empty(), &kept)?;
            let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
            step.loss_and_gradients(&query, &passage, slices, 1.0).map_err(text)?;
            let (evaluation, temperature) = step.results(&query, &passage).map_err(text)?;
            at.judge(&problem, evaluation, temperature, &gradients, 1.0)
        }),
        ("slices: a capture with event tracking says why it cannot be", "", || {
            let at = Place::new(0)?;
            let problem = sample(Loss::samtone_query(), 52)?;
            let (query, passage) = at.upload(&problem)?;
            let pairs = Pairs::of(&problem)?;
            let planned = pairs.batch(&query, &passage)?.problem().map_err(text)?;
            let mut step = Step::new(&at.device, &at.stream, &planned).map_err(text)?;
            at.stream.begin_capture(GLOBAL).map_err(debug)?;
            let error = step.forward(&query, &passage).err().map(text).unwrap_or_default();
            let _ = at.stream.end_capture(CUgraphInstantiate_flags(0));
            demand(error.contains("905") && error.contains("event tracking"), &error)
        }),
        ("slices: modules stay until their kernels are done", "", || {
            let Place { device, stream } = Place::new(0)?;
            let problem = sample(Loss::samtone_both(), 53)?;
            let at = Place { device: Device::new(1).map_err(text)?, stream };
            let (query, passage) = at.upload(&problem)?;
            let pairs = Pairs::of(&problem)?;
            let batch = pairs.batch(&query, &passage)?;
            let out = cuda::loss_and_gradients(&device, &at.stream, &batch, 1.0);
            let out = out.map_err(text)?;
            drop(device);
            // With the rest of it goes the last clone of the device.
            let cuda::DeviceLossAndGradients { gradients, .. } = { out };
            let [query, _] = at.download(&gradients)?;
            demand(query.iter().all(|x| x.is_finite()), "no gradients")
        }),
        ("slices: a step for which there is no memory remains what it was", "allocations=9", || {
            let at = Place::new(0)?;
            let problem = sample(Loss::samtone_both(), 54)?;
            let wide = samtone_wide()?;
            let (query, passage) = at.upload(&problem)?; // 2
            let mut gradients = at.gradients(&problem)?; // 4
            let pairs = Pairs::of(&problem)?;
            let planned = pairs.batch(&query, &passage)?.problem().map_err(text)?;
            let mut step = Step::new(&at.device, &at.stream, &planned).map_err(text)?; // 8
            let wide = Pairs::of(&wide)?;
            let larger = cuda::Problem::new(wide.pairs()?, samtone::DType::F32, problem.dim);
            let failed = step.prepare(&larger.map_err(text)?);
            demand(matches!(failed, Err(Error::OutOfMemory { bytes, .. }) if bytes > 0), &format!("{failed:?}"))?;
            let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
            step.loss_and_gradients(&query, &passage, slices, 1.0).map_err(text)?;
            let (evaluation, temperature) = step.results(&query, &passage).map_err(text)?;
            at.judge(&problem, evaluation, temperature, &gradients, 1.0)
        }),
        ("slices: a call that fails halfway leaves no result", "refused=4", || {
            let at = Place::new(0)?;
            let problem = sample(Loss::samtone_both(), 55)?;
            let (query, passage) = at.upload(&problem)?;
            let pairs = Pairs::of(&problem)?;
            let planned = pairs.batch(&query, &passage)?.problem().map_err(text)?;
            let mut step = Step::new(&at.device, &at.stream, &planned).map_err(text)?;
            let launches = step.plan().forward().len();
            demand((3..5).contains(&launches), &format!("the refused launch is not of the second of {launches}"))?;
            step.forward(&query, &passage).map_err(text)?;
            let refused = step.forward(&query, &passage);
            demand(matches!(refused, Err(Error::Cuda { code: 1, .. })), &format!("{refused:?}"))?;
            let read = step.evaluation(&query, &passage);
            demand(matches!(read, Err(Error::StateMismatch { .. })), &format!("{read:?}"))?;
            demand(step.loss().is_err(), "a loss")?;
            step.forward(&query, &passage).map_err(text)?;
            step.evaluation(&query, &passage).map(drop).map_err(text)
        }),
        ("slices: side data stay until they are copied", "late=100000", || {
            let at = Place::new(0)?;
            let call = samtone::Call::new(Loss::info_nce(), 0.1).with_workspace_bytes(8 << 20);
            // Large enough for the allocator to give the memory back to the system at once.
            let [first, second] = [6000, 5000]
                .map(|rows| call.pairs(rows, rows).and_then(|pairs| cuda::Problem::new(pairs, samtone::DType::F32, 1)));
            let mut step = Step::new(&at.device, &at.stream, &first.map_err(text)?).map_err(text)?;
            step.prepare(&second.map_err(text)?).map_err(text)?;
            drop(step);
            at.stream.synchronize().map_err(debug)
        }),
        ("slices: a step on the default stream of a thread may move to another thread", "", || {
            let context = CudaContext::new(0).map_err(debug)?;
            let at = Place { device: Device::new(0).map_err(text)?, stream: context.per_thread_stream() };
            let problem = sample(Loss::samtone_both(), 57)?;
            let (query, passage) = at.upload(&problem)?;
            let mut gradients = at.gradients(&problem)?;
            context.synchronize().map_err(debug)?; // the inputs: cudarc does not order them between threads
            let pairs = Pairs::of(&problem)?;
            let planned = pairs.batch(&query, &passage)?.problem().map_err(text)?;
            let mut step = Step::new(&at.device, &at.stream, &planned).map_err(text)?;
            let elsewhere = |work: &mut (dyn FnMut() -> samtone::Result<()> + Send)| {
                let done = std::thread::scope(|scope| scope.spawn(work).join());
                done.map_err(|_| "a thread panicked".to_string())?.map_err(text)
            };
            elsewhere(&mut || step.forward(&query, &passage))?;
            let slices = GradientSlices::both(&mut gradients.query, &mut gradients.passage);
            step.backward(&query, &passage, slices, 1.0).map_err(text)?;
            let mut results = None;
            elsewhere(&mut || step.results(&query, &passage).map(|r| results = Some(r)))?;
            let (evaluation, temperature) = results.ok_or("no results")?;
            at.judge(&problem, evaluation, temperature, &gradients, 1.0)?;
            step.forward(&query, &passage).map_err(text)?;
            elsewhere(&mut || {
                drop(step.plan().clone());
                Ok(())
            })?;
            let moved = std::thread::spawn(move || drop(step));
            moved.join().map_err(|_| "a thread panicked")?;
            context.synchronize().map_err(debug)
        }),
        ("slices: results and gradients are of the batch of the forward call", "", || {
            let at = Place::new(0)?;
            let problem = sample(Loss::samtone_both(), 58)?;
            let (query, passage) = at.upload(&problem)?;
            let pairs = Pairs::of(&problem)?;
            let batch = pairs.batch(&query, &passage)?;
            let mut forward = cuda::forward(&at.device, &at.stream, &batch).map_err(text)?;
            let short = samtone::Call::new(Loss::samtone_both(), 0.05);
            let short = short.pairs(37, 37).map_err(text)?;
            let other = cuda::DeviceBatch::new(query.as_view(), passage.slice(..37 * 24), 24, short).map_err(text)?;
            for error in [forward.backward(&other, 1.0).err(), forward.evaluation(&other).err()] {
                let sentence = error.map(text).unwrap_or_default();
                demand(sentence.contains("37 queries x 41 passages of dimension 24"), &sentence)?;
                demand(sentence.contains("used with 37 queries x 37 passages"), &sentence)?;
            }
            forward.backward(&batch, 1.0).map(drop).map_err(text)
        }),
    ];
}
