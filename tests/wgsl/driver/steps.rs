//! Calls: in every type and stride, in parts, with frozen towers, in shards, from threads.

use super::call::{Call, Spec, f32_output};
use super::{Check, compare, demand, nested, sample, sized, text};
use crate::support::foreign;
use crate::support::problem::{Buffer, Problem};
use samtone::half::{bf16, f16};
use samtone::wgpu::results::FIRST_BYTE;
use samtone::wgpu::{Capabilities, Engine, Products, wgpu};
use samtone::{DType, GradientOutput, Loss, Partials};

pub const CHECKS: &[Check] = &[
    ("every type, with gaps between rows, gives what the definition gives", types),
    ("gradients of 16 bits are those of f32, rounded", narrow),
    ("the upstream gradient is read from the device when the backward call runs", upstream),
    ("an upstream gradient on the device has an exponent of its own", far_upstream),
    ("forward and backward apart have the bits of one submission", apart),
    ("a backward call may be repeated", repeated),
    ("a backward call is of the forward call's embeddings, whatever lies in their place", replaced),
    ("a step takes batch after batch", batches),
    ("warming up runs every shader and changes nothing", warm),
    ("a frozen tower is left out", frozen),
    ("shards together give the whole", shards),
    ("partials of another problem are refused", foreign_partials),
    ("partials of the CPU merge with those of a device", with_cpu),
    ("two threads with a step each do not disturb each other", threads),
    ("the same bits on every run", determinism),
    ("results on the device are those of the host", results_on_device),
    ("metrics on the device are exactly 1 where every positive wins", perfect),
    ("products are checked against plain arithmetic", products),
    ("cargo sets what Mesa's Vulkan asks of the environment", environment),
];

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn types() -> Result<(), String> {
    let plain = sample(Loss::samtone_both(), 1)?;
    for (dtype, problem) in TYPES.into_iter().flat_map(|dtype| [(dtype, plain.clone()), (dtype, nested(plain.clone()))])
    {
        let problem = problem.rounded(dtype);
        let d = problem.dim;
        let outputs = [f32_output(d + 3), f32_output(d + 8)];
        let spec = Spec { strides: [d + 5, d + 2], outputs, upstream: -0.5, ..Spec::new(&problem, dtype) };
        compare(&Call::outputs_of(&problem, spec)?, &problem, dtype, -0.5)?;
    }
    Ok(())
}

fn narrow() -> Result<(), String> {
    let shared = sample(Loss::samtone_both(), 2)?;
    let shared = shared.with(|call| call.with_positives((0..70).map(|i| i * 7 % 50).collect::<Vec<_>>()));
    let plain = sample(Loss::samtone_both(), 2)?;
    for problem in [plain.clone(), shared.clone(), nested(plain), nested(shared)] {
        let problem = problem.rounded(DType::BF16);
        let wide = Call::outputs_of(&problem, Spec::new(&problem, DType::BF16))?;
        for dtype in [DType::F16, DType::BF16] {
            for gap in [1, 3] {
                let output = Some(GradientOutput { dtype, row_stride: problem.dim + gap });
                let spec = Spec { outputs: [output; 2], ..Spec::new(&problem, DType::BF16) };
                let got = Call::outputs_of(&problem, spec)?;
                let pairs = [(&got.grad_query, &wide.grad_query), (&got.grad_passage, &wide.grad_passage)];
                // From f32: `half` looks at the upper 32 bits of an f64 only.
                let round = |x: &f64| match dtype {
                    DType::F16 => f64::from(f16::from_f32(*x as f32)),
                    _ => f64::from(bf16::from_f32(*x as f32)),
                };
                let same = pairs.iter().all(|(got, wide)| got.iter().copied().eq(wide.iter().map(round)));
                demand(same, || format!("gradients of {dtype} with a gap of {gap} are not those of f32"))?;
            }
        }
    }
    Ok(())
}

fn upstream() -> Result<(), String> {
    let problem = sample(Loss::samtone_query(), 3)?;
    let spec = Spec { device_upstream: true, upstream: 2.0, ..Spec::new(&problem, DType::F32) };
    let call = Call::new(&problem, spec)?;
    call.forward()?;
    for upstream in [1.0_f32, -0.25, 0.0, 1024.0] {
        call.write_upstream(upstream);
        call.backward()?;
        compare(&call.outputs()?, &problem, DType::F32, 2.0 * f64::from(upstream))?;
    }
    Ok(())
}

/// Gradients that f32 holds, of upstream gradients on the device and from the host that it hardly holds, or only their product.
fn far_upstream() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 3)?;
    let (least, most) = (f32::from_bits(1), f32::MAX);
    let of_one = super::expected(&problem, 1.0)?.grad_tau;
    for (on_host, given) in [
        (1.0, 1e-30_f32),
        (1.0, -1e30),
        (1e38, least),
        (-1e38, 3.0 * least),
        (1e38, f32::MIN_POSITIVE),
        (1e-38, most),
        (1e-30, -1e-30),
        (1e38, -most),
    ] {
        let upstream = on_host * f64::from(given);
        let spec = Spec { device_upstream: true, upstream: on_host, ..Spec::new(&problem, DType::F32) };
        let call = Call::new(&problem, spec)?;
        call.write_upstream(given);
        call.run()?;
        let outputs = call.outputs()?;
        let named = |error| format!("{on_host:e} times {given:e}: {error}");
        let want = upstream * of_one;
        // The host has f64, the device the f32 at the ends of whose range a gradient is 0 or infinite.
        let (tau, got) = (outputs.temperature.tau, f64::from(on_device(&call)?[5]));
        demand((tau - want).abs() <= 1e-4 * want.abs(), || named(format!("{tau:e}")))?;
        if (1e-37..1e38).contains(&want.abs()) {
            demand((got - tau).abs() <= 1e-6 * tau.abs(), || named(format!("{got:e} on the device for {tau:e}")))?;
            compare(&outputs, &problem, DType::F32, upstream).map_err(named)?;
        } else {
            let ends = outputs.grad_query.iter().chain(&outputs.grad_passage).chain([&got]);
            let end = if upstream.abs() < 1.0 { 0.0 } else { f64::INFINITY };
            demand(ends.clone().all(|x| x.abs() == end), || named(format!("not all of {end}: {got:e}")))?;
        }
    }
    let call = Call::new(&problem, Spec { device_upstream: true, ..Spec::new(&problem, DType::F32) })?;
    for upstream in [f32::NAN, f32::INFINITY] {
        call.write_upstream(upstream);
        call.run()?;
        let words = on_device(&call)?;
        let (_, temperature) = call.step.results(&call.buffers()).map_err(text)?;
        let nothing = call.gradients()?.iter().flatten().all(|x| x.is_nan());
        let nothing = nothing && words[5].is_nan() && words[6].is_nan() && temperature.tau.is_nan();
        demand(nothing && words[0].is_finite(), || format!("an upstream gradient of {upstream}: {words:?}"))?;
        // The next one is as good as ever.
        call.write_upstream(3.0);
        call.backward()?;
        compare(&call.outputs()?, &problem, DType::F32, 3.0)?;
    }
    Ok(())
}

fn apart() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 4)?;
    let whole = Call::outputs_of(&problem, Spec::new(&problem, DType::F32))?;
    let call = Call::new(&problem, Spec::new(&problem, DType::F32))?;
    call.forward()?;
    let (evaluation, _) = call.step.results(&call.buffers()).map_err(text)?;
    demand(evaluation == whole.evaluation, || "another evaluation".into())?;
    call.backward()?;
    demand(call.outputs()? == whole, || "other bits".into())
}

fn repeated() -> Result<(), String> {
    let plain = sample(Loss::gte(), 5)?;
    for problem in [plain.clone(), nested(plain)] {
        let call = Call::new(&problem, Spec::new(&problem, DType::F32))?;
        call.run()?;
        let first = call.outputs()?;
        call.backward()?;
        demand(call.outputs()? == first, || "other bits".into())?;
    }
    Ok(())
}

/// The packed embeddings of the forward call are kept, and the caller's need not be there any more.
fn replaced() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 5)?;
    let nothing = Problem { query: vec![f64::NAN; 70 * 37], passage: vec![f64::NAN; 93 * 37], ..problem.clone() };
    let other = sample(Loss::samtone_both(), 6)?;
    for dtype in TYPES {
        let problem = problem.rounded(dtype);
        let whole = Call::outputs_of(&problem, Spec::new(&problem, dtype))?;
        let call = Call::new(&problem, Spec::new(&problem, dtype))?;
        call.forward()?;
        for replacement in [&nothing, &other] {
            call.write_embeddings(replacement);
            call.backward()?;
            demand(call.outputs()? == whole, || format!("{dtype}: other bits"))?;
        }
        let gradients = call.gradients_only();
        call.submit(|encoder| call.step.backward(encoder, &gradients))?;
        demand(call.outputs()? == whole, || format!("{dtype}: other bits without embeddings"))?;
    }
    Ok(())
}

fn batches() -> Result<(), String> {
    let problems = [sample(Loss::samtone_both(), 6)?, sample(Loss::samtone_both(), 7)?];
    let call = Call::new(&problems[0], Spec::new(&problems[0], DType::F32))?;
    for problem in problems.iter().chain(&problems) {
        call.write_embeddings(problem);
        call.run()?;
        compare(&call.outputs()?, problem, DType::F32, 1.0)?;
    }
    Ok(())
}

/// The shaders of plans with an upstream gradient on the device, a frozen tower, gradients of 16 bits and fragments, too.
fn warm() -> Result<(), String> {
    let plain = sample(Loss::samtone_both(), 19)?;
    let engine = Engine::first().map_err(text)?;
    let emulated = Capabilities { products: Products::Emulated, ..*engine.capabilities() };
    let narrow = Some(GradientOutput { dtype: DType::F16, row_stride: plain.dim.next_multiple_of(2) });
    for (dtype, problem) in TYPES.into_iter().flat_map(|dtype| [(dtype, plain.clone()), (dtype, nested(plain.clone()))])
    {
        let problem = problem.rounded(dtype);
        let whole = Spec { device_upstream: true, ..Spec::new(&problem, dtype) };
        let frozen = Spec { outputs: [None, narrow], capabilities: Some(emulated), ..whole.clone() };
        for spec in [whole, frozen] {
            let call = Call::on(&engine, &problem, spec)?;
            engine.warm_up(call.step.plan()).map_err(text)?;
        }
        // Between the passes of a step.
        let call = Call::on(&engine, &problem, Spec::new(&problem, dtype))?;
        call.forward()?;
        engine.warm_up(call.step.plan()).map_err(text)?;
        call.backward()?;
        compare(&call.outputs()?, &problem, dtype, 1.0)?;
    }
    Ok(())
}

fn frozen() -> Result<(), String> {
    let plain = sample(Loss::samtone_both(), 8)?;
    let output = f32_output(plain.dim);
    let frozen = [[None, output], [output, None], [None, None]];
    for (problem, outputs) in [plain.clone(), nested(plain)].iter().flat_map(|p| frozen.map(|outputs| (p, outputs))) {
        let whole = Call::outputs_of(problem, Spec::new(problem, DType::F32))?;
        let spec = Spec { outputs, ..Spec::new(problem, DType::F32) };
        let got = Call::outputs_of(problem, spec)?;
        demand(got.evaluation == whole.evaluation, || "another evaluation".into())?;
        demand(got.temperature == whole.temperature, || "another gradient of the temperature".into())?;
        let kept =
            [(&got.grad_query, &whole.grad_query, outputs[0]), (&got.grad_passage, &whole.grad_passage, outputs[1])];
        for (got, whole, output) in kept {
            demand(if output.is_some() { got == whole } else { got.is_empty() }, || {
                format!("other bits of {outputs:?}")
            })?;
        }
    }
    Ok(())
}

fn shards() -> Result<(), String> {
    let shared = sample(Loss::samtone_both(), 9)?;
    let shared = shared.with(|call| call.with_positives((0..70).map(|i| i * i % 40).collect::<Vec<_>>()));
    // Queries are passages of other rows, and of other shards.
    let chain = sample(Loss::samtone_both(), 9)?.with(|call| {
        let (query, passage): (Vec<_>, Vec<_>) = ((0..70).collect(), (0..93).map(|j| j * 7 % 80).collect());
        call.with_query_ids(query).with_passage_ids(passage).with_shared_ids(true)
    });
    let plain = [sample(Loss::samtone_both(), 9)?, shared, chain, sample(Loss::clip(), 9)?];
    for mut problem in plain.clone().into_iter().chain(plain.map(nested)) {
        problem.name.push_str(" in shards");
        let ends = [0, 1, 23, 70];
        let calls = ends
            .windows(2)
            .map(|ends| Call::new(&problem, Spec { rows: ends[0]..ends[1], ..Spec::new(&problem, DType::F32) }));
        let calls: Vec<_> = calls.collect::<Result<_, String>>()?;
        let mut merged: Option<Partials> = None;
        for call in &calls {
            call.submit(|encoder| call.step.partials(encoder, &call.buffers()))?;
            let partials = call.step.read_partials(&call.buffers()).map_err(text)?;
            match &mut merged {
                Some(merged) => merged.merge(&partials).map_err(text)?,
                None => merged = Some(partials),
            }
        }
        let merged = merged.ok_or("no shard")?;
        let mut sum: Option<super::Outputs> = None;
        for call in &calls {
            call.step.write_partials(&merged).map_err(text)?;
            call.submit(|encoder| {
                call.step.combine(encoder)?;
                call.step.backward(encoder, &call.buffers())
            })?;
            let outputs = call.outputs()?;
            match &mut sum {
                None => sum = Some(outputs),
                Some(sum) => {
                    demand(sum.evaluation == outputs.evaluation, || "shards evaluate differently".into())?;
                    sum.grad_query.extend(outputs.grad_query);
                    sum.grad_passage.iter_mut().zip(outputs.grad_passage).for_each(|(a, b)| *a += b);
                    sum.temperature.tau += outputs.temperature.tau;
                    sum.temperature.log_beta += outputs.temperature.log_beta;
                }
            }
        }
        compare(&sum.ok_or("no shard")?, &problem, DType::F32, 1.0).map_err(|e| format!("{}: {e}", problem.name))?;
    }
    Ok(())
}

fn foreign_partials() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 10)?;
    let shard = Call::new(&problem, Spec { rows: 0..30, ..Spec::new(&problem, DType::F32) })?;
    shard.submit(|encoder| shard.step.partials(encoder, &shard.buffers()))?;
    let partials = shard.step.read_partials(&shard.buffers()).map_err(text)?;
    let incomplete = shard.step.write_partials(&partials).err().map(text).unwrap_or_default();
    demand(incomplete.contains("0..70"), || incomplete.clone())?;
    let other = sample(Loss::info_nce(), 10)?;
    let other = Call::new(&other, Spec::new(&other, DType::F32))?;
    let foreign = other.step.write_partials(&partials).err().map(text).unwrap_or_default();
    demand(foreign.contains("saved state"), || foreign.clone())?;
    // Each part, to be used and to be merged; other embeddings show when they are merged.
    foreign::all_refused(&problem, |other| shard.step.write_partials(other))?;
    foreign::all_refused(&problem, |other| partials.clone().merge(other))?;
    let moved = foreign::other_embeddings(&problem).map_err(text)?;
    let error = partials.clone().merge(&moved).err().map(text).unwrap_or_default();
    demand(error.contains("row 0 has a cosine of"), || error.clone())?;
    let error = shard.step.write_partials(&moved).err().map(text).unwrap_or_default();
    demand(error.contains("row 0 has a cosine of"), || format!("merged elsewhere: {error}"))?;
    let all = foreign::partials(&problem, 0..70).map_err(text)?;
    shard.step.write_partials(&all).map_err(text)?;
    let idle = Call::new(&problem, Spec::new(&problem, DType::F32))?;
    let error = idle.step.write_partials(&all).err().map(text).unwrap_or_default();
    demand(error.contains("no forward call"), || format!("on a step that has packed nothing: {error}"))
}

/// Sums of different backends belong together: shards here, and one on the CPU.
fn with_cpu() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 9)?;
    let problem = problem.with(|call| call.with_passage_ids((0..93).map(|j| j % 90).collect::<Vec<_>>()));
    [problem.clone(), nested(problem)].iter().try_for_each(merged_with_cpu)
}

fn merged_with_cpu(problem: &Problem) -> Result<(), String> {
    let [query, passage] = [&problem.query, &problem.passage].map(|x| Buffer::new(DType::F32, x));
    let batch = problem.batch(&query, &passage).map_err(text)?;
    let cpu = samtone::cpu::Shard::new(&batch, 0..31).map_err(text)?;
    let mut merged = cpu.partials().map_err(text)?;
    let call = Call::new(problem, Spec { rows: 31..70, ..Spec::new(problem, DType::F32) })?;
    call.submit(|encoder| call.step.partials(encoder, &call.buffers()))?;
    merged.merge(&call.step.read_partials(&call.buffers()).map_err(text)?).map_err(text)?;
    call.step.write_partials(&merged).map_err(text)?;
    call.submit(|encoder| {
        call.step.combine(encoder)?;
        call.step.backward(encoder, &call.buffers())
    })?;
    let (mut sum, own) = (call.outputs()?, cpu.gradients(&merged, 1.0).map_err(text)?);
    let of_cpu = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    sum.grad_query = [of_cpu(&own.query), sum.grad_query].concat();
    sum.grad_passage.iter_mut().zip(of_cpu(&own.passage)).for_each(|(a, b)| *a += b);
    sum.temperature.tau += own.temperature.tau;
    sum.temperature.log_beta += own.temperature.log_beta;
    compare(&sum, problem, DType::F32, 1.0)
}

fn threads() -> Result<(), String> {
    let problems = [sample(Loss::samtone_both(), 11)?, sample(Loss::info_nce(), 12)?];
    let alone = problems.iter().map(|p| Call::outputs_of(p, Spec::new(p, DType::F32)));
    let alone: Vec<_> = alone.collect::<Result<_, String>>()?;
    std::thread::scope(|scope| {
        let runs = problems.iter().zip(&alone).map(|(problem, alone)| {
            scope.spawn(move || {
                let call = Call::new(problem, Spec::new(problem, DType::F32))?;
                for _ in 0..5 {
                    call.run()?;
                    demand(call.outputs()? == *alone, || format!("{}: other bits", problem.name))?;
                }
                Ok(())
            })
        });
        let runs: Vec<_> = runs.collect();
        runs.into_iter().try_for_each(|run| run.join().map_err(|_| "a thread panicked".to_string())?)
    })
}

fn determinism() -> Result<(), String> {
    let problem = sized(Loss::samtone_both(), (130, 150, 24), 13)?;
    let call = Call::new(&problem, Spec::new(&problem, DType::F32))?;
    call.run()?;
    let first = call.outputs()?;
    for _ in 1..20 {
        call.run()?;
        demand(call.outputs()? == first, || "other bits".into())?;
    }
    Ok(())
}

/// The results in the state, f32.
pub fn on_device(call: &Call) -> Result<[f32; 7], String> {
    let state = call.step.state().ok_or("no state")?;
    let bytes = call.engine.read(state, FIRST_BYTE..FIRST_BYTE + 28).map_err(text)?;
    let mut words = [0.0; 7];
    words.iter_mut().zip(bytes.chunks(4)).for_each(|(w, b)| *w = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(words)
}

fn results_on_device() -> Result<(), String> {
    for loss in [Loss::samtone_both(), Loss::clip()] {
        expect_on_device(&sized(loss, (150, 190, 20), 14)?)?;
    }
    Ok(())
}

/// Fails unless the results that are left on the device, for an upstream gradient of 3, are those that the host reads.
pub fn expect_on_device(problem: &Problem) -> Result<(), String> {
    let call = Call::new(problem, Spec { upstream: 3.0, ..Spec::new(problem, DType::F32) })?;
    call.run()?;
    let outputs = call.outputs()?;
    let [there_p, there_m, back_p, back_m] = outputs.metrics();
    let (tau, log_beta) = (outputs.temperature.tau, outputs.temperature.log_beta);
    let host = [outputs.evaluation.loss, there_p, there_m, back_p, back_m, tau, log_beta];
    for (k, (got, want)) in on_device(&call)?.into_iter().zip(host).enumerate() {
        let off = (f64::from(got) - want).abs() / want.abs().max(f64::MIN_POSITIVE);
        demand(off <= 1e-6, || format!("word {k} is {got:e} instead of {want:e}"))?;
    }
    Ok(())
}

/// Weights are normalized as f32, and do not add up to 1.
fn perfect() -> Result<(), String> {
    let engine = super::call::engine()?;
    let weights: [&[f32]; 4] = [&[1.0], &[0.1, 0.2, 0.7], &[1.0, 0.0, 2.5, 0.125, 1e-3], &[f32::MAX, 1.0, 1e-20]];
    for (capabilities, rows) in [*engine.capabilities(), Capabilities::default()]
        .into_iter()
        .flat_map(|capabilities| [1, 3, 5, 7, 41, 70, 107, 193].map(|rows| (capabilities, rows)))
    {
        for weights in weights {
            let mut problem = sized(Loss::clip(), (rows, rows, 2), 15)?;
            // Directions of their own, on a half circle.
            let angle = |k: usize| (k / 2) as f64 / rows as f64 * std::f64::consts::PI;
            problem.query = (0..2 * rows).map(|k| if k % 2 == 0 { angle(k).cos() } else { angle(k).sin() }).collect();
            problem.passage = problem.query.clone();
            let of_rows: Vec<f32> = (0..rows).map(|i| weights[i % weights.len()]).collect();
            let mut problem = problem.with(|call| call.with_weights(of_rows));
            let run = |problem: &Problem| {
                let spec = Spec { capabilities: Some(capabilities), ..Spec::new(problem, DType::F32) };
                let call = Call::new(problem, spec)?;
                call.run()?;
                Ok::<_, String>((on_device(&call)?, call.outputs()?.metrics()))
            };
            let (words, metrics) = run(&problem)?;
            demand(words[1..5] == [1.0; 4] && metrics == [1.0; 4], || {
                format!("{rows} rows, weights {weights:?}: {words:?} and {metrics:?}")
            })?;
            if rows > 3 {
                // One of rows 0 and 3 has the passage of the other, and both lose.
                let (a, b) = problem.passage.split_at_mut(6);
                a[..2].swap_with_slice(&mut b[..2]);
                let (words, metrics) = run(&problem)?;
                let close = |k: usize| (f64::from(words[1 + k]) - metrics[k]).abs() <= 1e-6;
                demand((0..4).all(|k| words[1 + k] < 1.0 && metrics[k] < 1.0 && close(k)), || {
                    format!("{rows} rows, weights {weights:?}, two of them lost: {words:?} and {metrics:?}")
                })?;
            }
        }
    }
    Ok(())
}

/// Emulated matrices pass where the device has what they need, and nothing passes by falling back on plain arithmetic.
fn products() -> Result<(), String> {
    let engine = super::call::engine()?;
    let needed = Capabilities { products: Products::Emulated, ..*engine.capabilities() };
    let possible = needed.variant(DType::F16).products == Products::Emulated;
    demand(engine.agrees(Products::Emulated) == possible, || format!("emulated matrices, possible: {possible}"))?;
    let small = wgpu::Limits { max_compute_workgroup_storage_size: 16 << 10, ..engine.device().limits() };
    let descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    let instance = wgpu::Instance::new(descriptor);
    let adapter =
        pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default())).map_err(text)?;
    let descriptor = wgpu::DeviceDescriptor { required_limits: small, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).map_err(text)?;
    let bare = Engine::new(&device, &queue);
    demand(!bare.agrees(Products::Emulated), || "without f16 and subgroups".into())?;
    demand(bare.agrees(Products::Fma), || "plain arithmetic against itself".into())
}

/// Without it each instance prints an error where no display is. Cargo has it from `.cargo/config.toml`.
fn environment() -> Result<(), String> {
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map(std::path::PathBuf::from);
    let by_cargo = std::env::var_os("CARGO").is_some();
    demand(!by_cargo || folder.as_ref().is_some_and(|folder| folder.is_absolute()), || format!("it is {folder:?}"))
}
