//! The raw interface: pointers, streams, graphs, shards. Each check runs on a GPU, or on the emulated driver.

use super::memory::{Driver, Memory};
use super::support::case::Expected;
use super::support::compare::{against_definition, verdict};
use super::support::data::{self, Kind};
use super::support::foreign;
use super::support::problem::{Buffer, Outputs, Problem};
use super::{Check, demand, text};
use samtone::backend;
use samtone::cuda::{Device, GradientOutput, Plan, Pointers, Readout, SkippedSquares, Slot, Stream, Tile};
use samtone::{DType, Error, Loss, Tower, cuda};

pub const CHECKS: &[Check] = &[
    ("one call gives what the definition gives", || {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let problem = sample(Loss::samtone_both(), 1)?.rounded(dtype);
            with_call(&problem, dtype, |call, _| {
                call.run(Device::loss_and_gradients)?;
                let reference = backend::by_name("reference").map_err(text)?;
                let want = Expected::from(problem.run(reference, DType::F64, 0.5).map_err(text)?);
                verdict(&against_definition(&call.outputs()?, &want, &problem, dtype, 0.5))
            })?;
        }
        Ok(())
    }),
    ("a backward call of its own has the same bits", || backward_alone(&sample(Loss::samtone_query(), 2)?)),
    ("large tiles get the shared memory they ask for", || {
        let problem = sample(Loss::samtone_both(), 13)?.rounded(DType::BF16);
        with_call(&problem, DType::BF16, |call, _| {
            let call = call.replan(&problem, |p| Ok(p.with_tile(Tile::Large)))?;
            demand(call.plan.forward().iter().any(|l| l.shared_bytes > 48 << 10), "no launch has more than 48 KiB")?;
            call.run(Device::loss_and_gradients)?;
            let reference = backend::by_name("reference").map_err(text)?;
            let want = Expected::from(problem.run(reference, DType::F64, 0.5).map_err(text)?);
            verdict(&against_definition(&call.outputs()?, &want, &problem, DType::BF16, 0.5))
        })
    }),
    ("skipped squares are counted", || {
        // Two clusters, opposite to each other: what is between them has no mass.
        let mut problem =
            data::problem(Loss::samtone_query(), Kind::Trained, (128, 128, 16), 0.05, 5, 0.0).map_err(text)?;
        for x in [&mut problem.query, &mut problem.passage] {
            x.chunks_mut(16).enumerate().for_each(|(i, row)| row[0] = if i < 64 { 30.0 } else { -30.0 });
        }
        with_call(&problem, DType::BF16, |call, _| {
            // SAFETY: as in `Call::run`.
            let count =
                |call: &Call<'_>| unsafe { call.device.skipped_squares(&call.plan, &call.pointers, call.stream) };
            let error = count(call).err();
            demand(matches!(error, Some(Error::StateMismatch { .. })), &format!("without the option: {error:?}"))?;
            let problem = problem.clone().with(|call| call.with_tile_skipping(1e-3));
            let call = call.replan(&problem, |p| Ok(p))?;
            call.run(Device::loss_and_gradients)?;
            let got = count(&call).map_err(text)?;
            demand(got == SkippedSquares { squares: 7, skipped: 3 }, &format!("{got:?}"))
        })
    }),
    ("two threads on two streams do not disturb each other", || {
        let problems = [sample(Loss::samtone_both(), 3)?, sample(Loss::info_nce(), 4)?];
        let mut alone = Vec::new();
        for problem in &problems {
            with_call(problem, DType::F32, |call, _| {
                call.run(Device::loss_and_gradients)?;
                alone.push(call.outputs()?);
                Ok(())
            })?;
        }
        let device = Device::first().map_err(text)?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = problems
                .iter()
                .map(|problem| {
                    let device = device.clone();
                    scope.spawn(move || {
                        let driver = Driver::new(&device)?;
                        let stream = driver.stream()?;
                        let mut outputs = Vec::new();
                        for _ in 0..3 {
                            with_call_on(&device, stream, problem, DType::F32, |call, _| {
                                call.run(Device::loss_and_gradients)?;
                                outputs.push(call.outputs()?);
                                Ok(())
                            })?;
                        }
                        Ok::<_, String>(outputs)
                    })
                })
                .collect();
            for (thread, want) in threads.into_iter().zip(&alone) {
                let outputs = thread.join().map_err(|_| "a thread panicked")??;
                demand(outputs.iter().all(|got| got == want), "other bits")?;
            }
            Ok(())
        })
    }),
    ("a captured call replays with the same bits, on new inputs too", || {
        let (first, second) = (sample(Loss::samtone_both(), 5)?, sample(Loss::samtone_both(), 6)?);
        with_call(&first, DType::F32, |call, driver| {
            call.device.load(&call.plan).map_err(text)?;
            driver.begin_capture(call.stream)?;
            let captured = call.run(Device::loss_and_gradients);
            // SAFETY: the pointers are those of the call.
            let read = unsafe { call.device.evaluation(&call.readout, &call.pointers, call.stream) };
            let graph = driver.end_capture(call.stream)?;
            captured?;
            let sentence = read.err().map(|e| e.to_string()).unwrap_or_default();
            demand(sentence.contains("captured"), &format!("read during a capture: {sentence}"))?;
            for problem in [&first, &second, &first] {
                call.write_embeddings(problem)?;
                call.clear_gradients()?;
                graph.launch(call.stream)?;
                let replayed = call.outputs()?;
                call.clear_gradients()?;
                call.run(Device::loss_and_gradients)?;
                demand(call.outputs()? == replayed, "other bits")?;
            }
            Ok(())
        })
    }),
    ("a graph of the device's own replays with the same bits, on new inputs too", || {
        let (first, second) = (sample(Loss::samtone_both(), 14)?, sample(Loss::samtone_both(), 15)?);
        for dtype in [DType::F32, DType::BF16] {
            with_call(&first, dtype, |call, driver| {
                // SAFETY: as in `Call::run`, and the memory outlives the graph.
                let mut graph =
                    unsafe { call.device.capture(&call.plan, &call.pointers, call.stream) }.map_err(text)?;
                demand(graph.stream() == call.stream, "another stream")?;
                for problem in [&first, &second, &first] {
                    let problem = problem.rounded(dtype);
                    call.write_embeddings(&problem)?;
                    call.clear_gradients()?;
                    // SAFETY: likewise.
                    unsafe { graph.launch() }.map_err(text)?;
                    let replayed = call.outputs()?;
                    call.clear_gradients()?;
                    call.run(Device::loss_and_gradients)?;
                    demand(call.outputs()? == replayed, "other bits")?;
                }
                let bare = Pointers { side: 0, ..call.pointers };
                // SAFETY: it is refused.
                let refused = unsafe { call.device.capture(&call.plan, &bare, call.stream) }.err().map(text);
                let refused = refused.unwrap_or_default();
                demand(refused.contains("`side` is a null pointer"), &refused)?;
                driver.begin_capture(call.stream)?;
                // SAFETY: likewise.
                let refused = unsafe { call.device.capture(&call.plan, &call.pointers, call.stream) }.err().map(text);
                driver.end_capture(call.stream)?;
                let refused = refused.unwrap_or_default();
                demand(refused.contains("`stream` is being captured"), &refused)
            })?;
        }
        Ok(())
    }),
    ("the upstream gradient is read from the device", || {
        let problem = sample(Loss::samtone_both(), 7)?;
        with_call(&problem, DType::F32, |call, driver| {
            call.run(Device::loss_and_gradients)?;
            let plain = call.outputs()?;
            let upstream = driver.allocate(4)?;
            let mut call = call.replan(&problem, |p| Ok(p.with_device_upstream()))?;
            let missing = call.run(Device::loss_and_gradients).err().unwrap_or_default();
            demand(missing.contains("`upstream` is a null pointer"), &missing)?;
            call.pointers.upstream = upstream.address;
            // SAFETY: four bytes are there.
            unsafe { call.device.set_upstream(&call.plan, &call.pointers, -4.0, call.stream) }.map_err(text)?;
            call.run(Device::loss_and_gradients)?;
            let scaled = call.outputs()?;
            let exact = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| a * -4.0 == *b);
            demand(exact(&plain.grad_query, &scaled.grad_query), "∂L/∂q")?;
            demand(exact(&plain.grad_passage, &scaled.grad_passage), "∂L/∂p")?;
            demand(exact(&[plain.temperature.tau], &[scaled.temperature.tau]), "∂L/∂τ")
        })
    }),
    ("pointers are checked before anything is enqueued", pointers),
    ("inputs that are refused are named, and the device goes on", refusals),
    ("shards give together what one device gives", shards),
    ("the context that is current stays so", || {
        let device = Device::first().map_err(text)?;
        let driver = Driver::new(&device)?;
        with_call(&sample(Loss::info_nce(), 8)?, DType::F32, |call, _| {
            for context in [0, device.context()] {
                driver.set_current(context)?;
                call.run(Device::loss_and_gradients)?;
                call.outputs()?;
                demand(driver.current()? == context, "another context")?;
            }
            Ok(())
        })
    }),
    ("the backend takes batches in host memory", || {
        let Ok(cuda) = backend::by_name("cuda") else { return Ok(()) };
        cuda.available().map_err(text)?;
        for dtype in [DType::F32, DType::BF16] {
            let problem = sample(Loss::samtone_query(), 9)?.rounded(dtype);
            let reference = backend::by_name("reference").map_err(text)?;
            let want = Expected::from(problem.run(reference, DType::F64, -3.0).map_err(text)?);
            let got = problem.run(cuda, dtype, -3.0).map_err(text)?;
            verdict(&against_definition(&got, &want, &problem, dtype, -3.0))?;
        }
        Ok(())
    }),
];

/// A backward call of its own, in a workspace that holds nothing of the first call, has the same bits.
pub fn backward_alone(problem: &Problem) -> Result<(), String> {
    with_call(problem, DType::F32, |call, _| {
        call.run(Device::loss_and_gradients)?;
        let fused = call.outputs()?;
        call.clear_gradients()?;
        call.run(Device::forward)?;
        call.memory[Slot::Workspace as usize].write(&vec![0x7e; call.plan.slot_bytes(Slot::Workspace) as usize])?;
        call.run(Device::backward_alone)?;
        demand(call.outputs()? == fused, "other bits")
    })
}

/// Shared positives, so that passages are visited in another order than they lie in, and a ragged shape.
pub fn sample(loss: Loss, seed: u64) -> Result<Problem, String> {
    let problem = data::problem(loss, Kind::Random, (37, 41, 24), 0.05, seed, 0.0).map_err(text)?;
    let positives: Vec<_> = (0..37).map(|i| if i == 9 { 3 } else { i }).collect();
    Ok(problem.with(|call| call.with_positives(positives)))
}

/// A plan with memory for all of its slots, on a stream.
pub struct Call<'a> {
    pub device: &'a Device,
    pub plan: Plan,
    pub readout: Readout,
    pub memory: Vec<Memory<'a>>,
    pub pointers: Pointers,
    pub stream: Stream,
    driver: &'a Driver,
    dtype: DType,
}

fn bytes(buffer: &Buffer) -> Vec<u8> {
    match buffer {
        Buffer::F64(x) => bytemuck::cast_slice(x).to_vec(),
        Buffer::F32(x) => bytemuck::cast_slice(x).to_vec(),
        Buffer::F16(x) => bytemuck::cast_slice(x).to_vec(),
        Buffer::BF16(x) => bytemuck::cast_slice(x).to_vec(),
    }
}

pub fn with_call(
    problem: &Problem,
    dtype: DType,
    check: impl FnOnce(&mut Call<'_>, &Driver) -> Result<(), String>,
) -> Result<(), String> {
    let device = Device::first().map_err(text)?;
    let stream = Driver::new(&device)?.stream()?;
    with_call_on(&device, stream, problem, dtype, check)
}

/// Runs `check` on the call of a problem with upstream gradient 0.5 and gradients in f32.
fn with_call_on(
    device: &Device,
    stream: Stream,
    problem: &Problem,
    dtype: DType,
    check: impl FnOnce(&mut Call<'_>, &Driver) -> Result<(), String>,
) -> Result<(), String> {
    let driver = Driver::new(device)?;
    let plain = problem.pairs().and_then(|pairs| cuda::Problem::new(pairs, dtype, problem.dim));
    let mut call = Call::new(device, &driver, stream, dtype, &plain.and_then(|p| p.with_upstream(0.5)).map_err(text)?)?;
    call.write_embeddings(problem)?;
    check(&mut call, &driver)
}

impl<'a> Call<'a> {
    fn new(
        device: &'a Device,
        driver: &'a Driver,
        stream: Stream,
        dtype: DType,
        problem: &cuda::Problem<'_>,
    ) -> Result<Self, String> {
        let plan = Plan::new(problem).map_err(text)?;
        let readout = Readout::new(problem, &plan).map_err(text)?;
        let memory = Slot::ALL.map(|slot| driver.allocate(plan.slot_bytes(slot)));
        let memory = memory.into_iter().collect::<Result<Vec<_>, _>>()?;
        let at = |slot: Slot| memory[slot as usize].address;
        let pointers = Pointers {
            query: at(Slot::Query),
            passage: at(Slot::Passage),
            side: at(Slot::Side),
            state: at(Slot::State),
            workspace: at(Slot::Workspace),
            query_gradient: at(Slot::QueryGradient),
            passage_gradient: at(Slot::PassageGradient),
            upstream: 0,
        };
        memory[Slot::Side as usize].write(plan.side_data())?;
        device.check_pointers(&plan, &pointers).map_err(text)?;
        Ok(Self { device, plan, readout, memory, pointers, stream, driver, dtype })
    }

    /// Another plan for the same embeddings.
    pub fn replan(
        &self,
        problem: &Problem,
        change: impl FnOnce(cuda::Problem<'_>) -> samtone::Result<cuda::Problem<'_>>,
    ) -> Result<Self, String> {
        let plain = problem.pairs().and_then(|pairs| cuda::Problem::new(pairs, self.dtype, problem.dim));
        let changed = plain.and_then(|p| p.with_upstream(0.5)).and_then(change).map_err(text)?;
        let call = Self::new(self.device, self.driver, self.stream, self.dtype, &changed)?;
        call.write_embeddings(problem)?;
        Ok(call)
    }

    pub fn write_embeddings(&self, problem: &Problem) -> Result<(), String> {
        self.memory[Slot::Query as usize].write(&bytes(&Buffer::new(self.dtype, &problem.query)))?;
        self.memory[Slot::Passage as usize].write(&bytes(&Buffer::new(self.dtype, &problem.passage)))
    }

    pub fn clear_gradients(&self) -> Result<(), String> {
        [Slot::QueryGradient, Slot::PassageGradient].into_iter().try_for_each(|slot| {
            self.memory[slot as usize].write(&vec![0xff; self.plan.slot_bytes(slot) as usize]) // NaN
        })
    }

    pub fn run(&self, call: unsafe fn(&Device, &Plan, &Pointers, Stream) -> samtone::Result<()>) -> Result<(), String> {
        // SAFETY: every slot has as many bytes as the plan says, the side data are there, and the stream is the context's.
        unsafe { call(self.device, &self.plan, &self.pointers, self.stream) }.map_err(text)
    }

    pub fn gradient(&self, slot: Slot) -> Result<Vec<f64>, String> {
        let bytes = self.memory[slot as usize].read(self.stream)?;
        Ok(bytes.chunks_exact(4).map(|x| f64::from(f32::from_le_bytes([x[0], x[1], x[2], x[3]]))).collect())
    }

    pub fn outputs(&self) -> Result<Outputs, String> {
        // SAFETY: as in `run`; forward and backward are enqueued.
        let results = unsafe { self.device.results(&self.readout, &self.pointers, self.stream) };
        let (evaluation, temperature) = results.map_err(text)?;
        let (grad_query, grad_passage) = (self.gradient(Slot::QueryGradient)?, self.gradient(Slot::PassageGradient)?);
        Ok(Outputs { evaluation, grad_query, grad_passage, temperature })
    }
}

fn pointers() -> Result<(), String> {
    with_call(&sample(Loss::samtone_both(), 10)?, DType::F16, |call, driver| {
        let good = call.pointers;
        let mut sentence_of = |pointers: Pointers| {
            call.pointers = pointers;
            call.run(Device::loss_and_gradients).err().unwrap_or_default()
        };
        let workspace = sentence_of(Pointers { workspace: good.workspace + 128, ..good });
        demand(workspace.contains("`workspace`") && workspace.contains("multiples of 256"), &workspace)?;
        let query = sentence_of(Pointers { query: good.query + 1, ..good });
        demand(query.contains("`query`") && query.contains("multiples of 2 bytes"), &query)?;
        let gradient = sentence_of(Pointers { passage_gradient: 0, ..good });
        demand(gradient.contains("`passage_gradient` is a null pointer"), &gradient)?;

        let check = |pointers: &Pointers| call.device.check_pointers(&call.plan, pointers);
        check(&good).map_err(text)?;
        check(&Pointers { query_gradient: 0, ..good }).map_err(text)?;
        let short = driver.allocate(64)?;
        let sentence = check(&Pointers { state: short.address, ..good }).err().map(text).unwrap_or_default();
        demand(sentence.contains("`state` is 64 bytes"), &sentence)?;
        let host = [0_u64; 64];
        let address = (host.as_ptr() as u64).next_multiple_of(256);
        let sentence = check(&Pointers { side: address, ..good }).err().map(text).unwrap_or_default();
        demand(sentence.contains("`side`"), &sentence)?;
        let pinned = Pointers { side: driver.pinned(call.plan.slot_bytes(Slot::Side))?.next_multiple_of(256), ..good };
        let sentence = check(&pinned).err().map(text).unwrap_or_default();
        demand(sentence.contains("`side` belongs to the host"), &sentence)?;
        check(&Pointers { passage: good.query, ..good }).err().map_or(Ok(()), |e| {
            demand(e.to_string().contains("`passage` is"), &format!("{e}")) // too short, but not refused for the overlap
        })?;
        let sentence = check(&Pointers { state: good.workspace, ..good }).err().map(text).unwrap_or_default();
        demand(sentence.contains("part of which is `state`") && sentence.contains("`workspace`"), &sentence)?;
        if cuda::device_count().map_err(text)? > 1 {
            let other = Device::new(1).map_err(text)?;
            let sentence = other.check_pointers(&call.plan, &good).err().map(text).unwrap_or_default();
            demand(sentence.contains("device 0") && sentence.contains("allowed: device 1"), &sentence)?;
        }
        Ok(())
    })
}

fn refusals() -> Result<(), String> {
    let good = sample(Loss::samtone_both(), 11)?;
    let change = |change: &dyn Fn(&mut Problem)| {
        let mut problem = good.clone();
        change(&mut problem);
        problem
    };
    let (tower, dim) = (Tower::Passage, good.dim);
    let nan = change(&|p| p.passage[5 * dim + 7] = f64::NEG_INFINITY);
    let zero = change(&|p| p.passage[6 * dim..7 * dim].fill(0.0));
    with_call(&good, DType::F32, |call, _| {
        let error_of = |problem: &Problem| {
            call.write_embeddings(problem)?;
            call.run(Device::loss_and_gradients)?;
            // SAFETY: as in `Call::run`; forward and backward are enqueued.
            let error = unsafe { call.device.results(&call.readout, &call.pointers, call.stream) }.err();
            let refused = call.gradient(Slot::QueryGradient)?.iter().all(|x| x.is_nan());
            Ok::<_, String>((error, refused))
        };
        let want = Error::NonFinite { tower, row: 5, column: 7, value: f64::NEG_INFINITY };
        let got = error_of(&nan)?;
        demand(got == (Some(want), true), &format!("{got:?}"))?;
        let got = error_of(&zero)?;
        demand(got == (Some(Error::ZeroNorm { tower, row: 6, prefix: None }), true), &format!("{got:?}"))?;
        let got = error_of(&good)?;
        demand(got == (None, false), &format!("{got:?}"))
    })?;
    // Without a copy of the positive and without negatives a softmax is empty.
    let group = samtone::Group::new(1.0, &[samtone::Block::QP], 0).and_then(|g| Loss::custom("bare", vec![g]));
    let loss = group.unwrap_or_else(|_| Loss::info_nce());
    let masked = good.clone().with(|call| call.with_loss(loss).with_passage_ids(vec![1; good.passages]));
    with_call(&masked, DType::F32, |call, _| {
        let error =
            call.run(Device::loss_and_gradients).and_then(|()| call.outputs().map(drop)).err().unwrap_or_default();
        demand(error.contains("row 0 has no negative") && error.contains("`bare`"), &error)
    })
}

fn shards() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 12)?;
    let whole_gradient = Some(GradientOutput { dtype: DType::F32, row_stride: problem.dim });
    with_call(&problem, DType::F32, |call, _| {
        call.run(Device::loss_and_gradients)?;
        let whole = call.outputs()?;
        let ranges = [0..16, 16..37];
        let mut shards = Vec::new();
        for rows in ranges.clone() {
            let gradient = whole_gradient;
            shards.push(call.replan(&problem, |p| p.with_rows(rows)?.with_gradients(gradient, gradient))?);
        }
        let mut merged = None;
        for shard in &shards {
            shard.run(Device::partials)?;
            // SAFETY: as in `Call::run`; the sums are enqueued.
            let own =
                unsafe { shard.device.read_partials(&shard.readout, &shard.pointers, shard.stream) }.map_err(text)?;
            match &mut merged {
                None => merged = Some(own),
                Some(all) => all.merge(&own).map_err(text)?,
            }
        }
        let merged = merged.ok_or("no shards")?;
        // SAFETY: as below.
        foreign::all_refused(&problem, |other| unsafe {
            let shard = &shards[0];
            shard.device.write_partials(&shard.readout, other, &shard.pointers, shard.stream)
        })?;
        foreign::all_refused(&problem, |other| merged.clone().merge(other))?;
        let moved = foreign::other_embeddings(&problem).map_err(text)?;
        let error = merged.clone().merge(&moved).err().map(|e| e.to_string()).unwrap_or_default();
        demand(error.contains("row 0 has a cosine of"), &error)?;
        // SAFETY: as below.
        let written = unsafe {
            shards[0].device.write_partials(&shards[0].readout, &moved, &shards[0].pointers, shards[0].stream)
        };
        let error = written.err().map(|e| e.to_string()).unwrap_or_default();
        demand(error.contains("row 0 has a cosine of"), &error)?;
        let mut sum =
            Outputs { grad_query: vec![], grad_passage: vec![0.0; whole.grad_passage.len()], ..whole.clone() };
        (sum.temperature.tau, sum.temperature.log_beta) = (0.0, 0.0);
        for shard in &shards {
            // SAFETY: as in `Call::run`; the sums are in the state.
            unsafe { shard.device.write_partials(&shard.readout, &merged, &shard.pointers, shard.stream) }
                .map_err(text)?;
            shard.run(Device::combine)?;
            shard.run(Device::backward)?;
            let own = shard.outputs()?;
            sum.evaluation = own.evaluation;
            sum.grad_query.extend(own.grad_query);
            sum.grad_passage.iter_mut().zip(own.grad_passage).for_each(|(sum, own)| *sum += own);
            sum.temperature.tau += own.temperature.tau;
            sum.temperature.log_beta += own.temperature.log_beta;
        }
        verdict(&against_definition(&sum, &Expected::from(whole), &problem, DType::F32, 0.5))
    })
}
