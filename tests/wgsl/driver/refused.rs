//! Every way to be refused. Each gives a sentence that names what is wrong, and never a panic.

use super::call::{Call, Memory, Spec, f32_output};
use super::steps::on_device;
use super::{Check, compare, demand, sample, sized, text};
use samtone::wgpu::wgpu::{BufferDescriptor, BufferUsages, CommandEncoderDescriptor};
use samtone::wgpu::{BufferRange, Buffers, Capabilities, Engine, Slot, Step, wgpu};
use samtone::{DType, Error, GradientOutput, Loss, ZeroNorm};

pub const CHECKS: &[Check] = &[
    ("buffers that are missing, small, misplaced or of another use", buffers),
    ("a recording that is refused leaves the encoder as it was", encoder),
    ("ranges to read", ranges),
    ("what the backend does not take", unsupported),
    ("what the device cannot hold", limits),
    ("the sentences of docs/wgpu.md", documented),
    ("numbers that are not finite", non_finite),
    ("numbers that are not finite, in a buffer that cannot be read", unreadable),
    ("subnormal numbers are numbers", subnormal),
    ("norms of zero", zero_norm),
    ("results of a step on which nothing has run", nothing_ran),
    ("rows without a negative", no_negative),
    ("a refused call leaves NaN on the device, and the next one works", nan),
    ("a lost device", lost),
];

fn sentence<T>(result: samtone::Result<T>, parts: &[&str]) -> Result<(), String> {
    let said = result.err().map(text).unwrap_or_default();
    demand(parts.iter().all(|part| said.contains(part)), || format!("{said:?} without one of {parts:?}"))
}

fn buffers() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 31)?;
    let call = Call::new(&problem, Spec { device_upstream: true, ..Spec::new(&problem, DType::F32) })?;
    call.write_upstream(1.0);
    let encode = |forward: bool, buffers: &Buffers<'_>| {
        let mut encoder = call.engine.device().create_command_encoder(&CommandEncoderDescriptor::default());
        if forward { call.step.forward(&mut encoder, buffers) } else { call.step.backward(&mut encoder, buffers) }
    };
    let slots = [
        (true, Slot::Query),
        (true, Slot::Passage),
        (false, Slot::Upstream),
        (false, Slot::QueryGradient),
        (false, Slot::PassageGradient),
    ];
    for (forward, slot) in slots {
        let others = [Slot::Query, Slot::Passage, Slot::Upstream, Slot::QueryGradient, Slot::PassageGradient];
        let others = others.into_iter().filter(|other| *other != slot);
        let others = others.filter_map(|other| call.memory(other).map(|memory| (other, memory)));
        let others = others.fold(Buffers::new(), |buffers, (other, memory)| buffers.with(other, memory.range()));
        let name = format!("`{}`", slot.name());
        sentence(encode(forward, &others), &[&name, "no buffer"])?;

        let good = call.memory(slot).ok_or("no memory")?;
        let bytes = good.bytes;
        let at = |offset, bytes| BufferRange { offset, bytes, ..good.range() };
        sentence(encode(forward, &others.with(slot, at(256, bytes - 4))), &[&name, &format!("at least {bytes}")])?;
        sentence(encode(forward, &others.with(slot, at(512, bytes + 4096))), &[&name, "within the buffer"])?;
        sentence(encode(forward, &others.with(slot, at(u64::MAX - 255, bytes))), &[&name, "within the buffer"])?;
        sentence(encode(forward, &others.with(slot, at(4, bytes))), &[&name, "multiples of"])?;
        let useless = Memory::new(&call.engine, bytes, BufferUsages::VERTEX);
        sentence(encode(forward, &others.with(slot, useless.range())), &[&name, "STORAGE"])?;
    }
    // The step is as good as before.
    call.run()?;
    compare(&call.outputs()?, &problem, DType::F32, 1.0)
}

/// Only wgpu notices a buffer of another device.
fn encoder() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 40)?;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()));
    let adapter = adapter.map_err(text)?;
    let [engine, other] = [Engine::on(&adapter).map_err(text)?, Engine::on(&adapter).map_err(text)?];
    let call = Call::on(&engine, &problem, Spec::new(&problem, DType::F32))?;
    let foreign = Memory::storage(&other, call.memory(Slot::Query).ok_or("no memory")?.bytes);
    call.submit(|encoder| {
        let refused = call.step.forward(encoder, &call.buffers().with(Slot::Query, foreign.range()));
        if !matches!(refused, Err(Error::Wgpu { .. })) {
            return refused;
        }
        call.step.forward(encoder, &call.buffers())?;
        call.step.backward(encoder, &call.buffers())
    })?;
    compare(&call.outputs()?, &problem, DType::F32, 1.0)
}

fn ranges() -> Result<(), String> {
    let engine = super::call::engine()?;
    let memory = Memory::storage(&engine, 64);
    let size = memory.buffer.size();
    for (start, end) in [(8, 4), (0, size + 1), (u64::MAX - 1, u64::MAX), (u64::MAX, 0)] {
        sentence(engine.read(&memory.buffer, start..end), &["`bytes`", &format!("0..{size}")])?;
    }
    for (start, end) in [(0, 0), (size, size), (3, 6), (size - 1, size)] {
        let bytes = engine.read(&memory.buffer, start..end).map_err(text)?;
        demand(bytes.len() as u64 == end - start, || format!("{} bytes of {start}..{end}", bytes.len()))?;
    }
    Ok(())
}

fn unsupported() -> Result<(), String> {
    let engine = super::call::engine()?;
    let problem = sample(Loss::samtone_both(), 32)?;
    let spec = Spec::new(&problem, DType::F32);
    let odd = Some(GradientOutput { dtype: DType::F16, row_stride: 37 });
    let odd = Spec { outputs: [f32_output(37), odd], ..spec.clone() };
    sentence(odd.plan(&problem, &engine), &["`gradients.passage`", "f16", "37", "even row strides"])?;
    sentence(Spec::new(&problem, DType::F64).plan(&problem, &engine), &["f64"])?;
    let wide = Some(GradientOutput { dtype: DType::F64, row_stride: 37 });
    sentence(Spec { outputs: [wide, None], ..spec.clone() }.plan(&problem, &engine), &["`gradients.query`", "f64"])?;
    sentence(Spec { rows: 60..71, ..spec.clone() }.plan(&problem, &engine), &["`rows`", "0..70"])?;
    sentence(Spec { upstream: f64::NAN, ..spec.clone() }.plan(&problem, &engine), &["`upstream`"])?;
    let tight = problem.with(|call| call.with_workspace_bytes(100));
    sentence(spec.plan(&tight, &engine), &["workspace_bytes", "100"])
}

fn limits() -> Result<(), String> {
    let engine = super::call::engine()?;
    let device = *engine.capabilities();
    let problem = sized(Loss::samtone_both(), (100, 120, 700), 33)?;
    let with = |capabilities| Spec { capabilities: Some(capabilities), ..Spec::new(&problem, DType::F32) };
    let buffer = with(Capabilities { max_buffer_bytes: 300_000, ..device }).plan(&problem, &engine);
    sentence(buffer, &["336000 bytes", "`passage`", "buffers of 300000 bytes", "limit of this device"])?;
    let permuted = problem.clone().with(|call| call.with_positives((0..100).rev().collect::<Vec<_>>()));
    let binding = with(Capabilities { max_binding_bytes: 200_000, ..device }).plan(&permuted, &engine);
    sentence(binding, &["bytes", "`passage`", "bindings of 200000 bytes", "limit of this device"])?;
    for bytes in [0, 1, 255, 256, 20_000] {
        let nothing = with(Capabilities { max_binding_bytes: bytes, max_buffer_bytes: bytes, ..device });
        sentence(nothing.plan(&problem, &engine), &["limit of this device"])?;
    }
    // More than any device has, of the real one.
    let huge = Spec { strides: [1 << 31, 700], ..Spec::new(&problem, DType::F32) };
    sentence(huge.plan(&problem, &engine), &["`query`", "limit of this device"])
}

/// The table of limits quotes sentences, with dots for what depends on the call.
fn documented() -> Result<(), String> {
    let engine = super::call::engine()?;
    let problem = sample(Loss::samtone_both(), 32)?;
    let spec = Spec::new(&problem, DType::F32);
    let odd = Some(GradientOutput { dtype: DType::F16, row_stride: 37 });
    let tight = problem.clone().with(|call| call.with_workspace_bytes(100));
    let refused = [
        Spec::new(&problem, DType::F64).plan(&problem, &engine).err(),
        Spec { strides: [1 << 31, 700], ..spec.clone() }.plan(&problem, &engine).err(),
        Spec { outputs: [odd, None], ..spec.clone() }.plan(&problem, &engine).err(),
        spec.plan(&tight, &engine).err(),
        Some(Error::WgpuUnavailable { reason: "no adapter was found".into() }),
    ];
    let (_, table) = include_str!("../../../docs/wgpu.md").split_once("## Limits").ok_or("no section of limits")?;
    let rows = table.lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    let quoted: Vec<_> = rows.map(|row| row.rsplit(" | ").next().unwrap_or_default().trim_start_matches('`')).collect();
    demand(quoted.len() == refused.len(), || format!("{quoted:?}"))?;
    for (quoted, refused) in quoted.into_iter().zip(refused) {
        let said = refused.map(text).ok_or("accepted")?;
        let double = quoted.contains("``");
        let sentence = quoted.split(if double { "``" } else { "`" }).next().unwrap_or_default();
        let mut rest = said.as_str();
        for part in sentence.split('…').filter(|part| !part.is_empty()) {
            rest = rest.split_once(part).ok_or_else(|| format!("{part:?} of {sentence:?} is not in {said:?}"))?.1;
        }
    }
    Ok(())
}

fn results(call: &Call) -> Result<Error, String> {
    call.run()?;
    call.step.results(&call.buffers()).err().ok_or_else(|| "accepted".into())
}

fn non_finite() -> Result<(), String> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut problem = sample(Loss::samtone_query(), 34)?;
            // The lowest row is named, and its first column; queries before passages.
            problem.passage[50 * 37 + 7] = value;
            problem.passage[66 * 37] = value;
            let spec = Spec { strides: [38, 40], ..Spec::new(&problem, dtype) };
            let of_passage = results(&Call::new(&problem, spec.clone())?)?.to_string();
            let parts = ["the passage embedding in row 50", "column 7"];
            demand(parts.iter().all(|part| of_passage.contains(part)), || of_passage.clone())?;
            problem.query[69 * 37 + 36] = value;
            let of_query = results(&Call::new(&problem, spec)?)?.to_string();
            let parts = ["the query embedding in row 69", "column 36"];
            demand(parts.iter().all(|part| of_query.contains(part)), || of_query.clone())?;
        }
    }
    Ok(())
}

fn unreadable() -> Result<(), String> {
    let mut problem = sample(Loss::samtone_query(), 41)?;
    problem.query[3 * 37] = f64::NAN;
    let call = Call::new(&problem, Spec::new(&problem, DType::F32))?;
    call.run()?;
    let descriptor = BufferDescriptor {
        label: None,
        size: call.memory(Slot::Query).ok_or("no memory")?.bytes,
        usage: BufferUsages::STORAGE,
        mapped_at_creation: false,
    };
    let unreadable = call.engine.device().create_buffer(&descriptor);
    sentence(call.step.results(&call.buffers().with(Slot::Query, &unreadable)), &["`query`", "row 3", "COPY_SRC"])
}

fn subnormal() -> Result<(), String> {
    // Multiples of the least number of each type, and of the largest, beside ordinary rows.
    for (dtype, least, most) in [
        (DType::F32, 2_f64.powi(-149), 2_f64.powi(127)),
        (DType::BF16, 2_f64.powi(-133), 2_f64.powi(127)),
        (DType::F16, 2_f64.powi(-24), 2_f64.powi(15)),
    ] {
        let mut problem = sized(Loss::samtone_both(), (20, 24, 19), 35)?;
        for (row, scale) in [(0, least), (3, least), (5, most), (19, least)] {
            for k in 0..19 {
                let whole = ((row * 7 + k * 5) % 13) as f64 - 6.0;
                let small = if scale > 1.0 { whole / 8.0 } else { whole };
                problem.query[row * 19 + k] = small * scale;
                problem.passage[(row + 4) * 19 + k] = -small * scale;
            }
        }
        // One element, the least there is.
        problem.query[10 * 19..11 * 19].fill(0.0);
        problem.query[10 * 19 + 18] = least;
        let problem = problem.rounded(dtype);
        // Gradients of such rows leave the range of f32: forward results and those of other rows are what counts.
        let want = super::expected(&problem, 1.0)?;
        let call = Call::new(&problem, Spec::new(&problem, dtype))?;
        call.run()?;
        let got = call.outputs().map_err(|error| format!("{dtype}: {error}"))?;
        let off = (got.evaluation.loss - want.loss).abs();
        demand(off <= 1e-5 * want.loss, || format!("{dtype}: a loss of {} for {}", got.evaluation.loss, want.loss))?;
        for (k, (got, want)) in got.evaluation.row_losses.iter().zip(&want.row_losses).enumerate() {
            demand((got - want).abs() <= 1e-4 * want.abs().max(1e-3), || format!("{dtype} row {k}: {got}, {want}"))?;
        }
        for (got, want) in got.grad_query.chunks(19).zip(want.grad_query.chunks(19)) {
            let representable = want.iter().all(|x| x.abs() < 1e37) && want.iter().any(|x| x.abs() > 1e-30);
            let size = want.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
            let close = got.iter().zip(want).all(|(g, w)| (g - w).abs() <= 1e-3 * size);
            demand(close || !representable, || format!("{dtype}: {got:?}, {want:?}"))?;
        }
    }
    Ok(())
}

fn zero_norm() -> Result<(), String> {
    let mut problem = sample(Loss::samtone_both(), 36)?;
    problem.passage[80 * 37..81 * 37].fill(-0.0);
    problem.passage[91 * 37..92 * 37].fill(0.0);
    let spec = Spec::new(&problem, DType::F32);
    let said = results(&Call::new(&problem, spec.clone())?)?.to_string();
    demand(said.contains("the passage embedding in row 80 has norm zero"), || said.clone())?;
    problem.query[37 * 2..37 * 3].fill(0.0);
    let said = results(&Call::new(&problem, spec.clone())?)?.to_string();
    demand(said.contains("the query embedding in row 2 has norm zero"), || said.clone())?;
    let problem = problem.with(|call| call.with_zero_norm(ZeroNorm::ZeroGradient));
    let got = Call::outputs_of(&problem, spec)?;
    let of = |x: &[f64], row: usize| x[row * 37..][..37].iter().all(|v| *v == 0.0);
    demand(of(&got.grad_query, 2) && of(&got.grad_passage, 80) && !of(&got.grad_query, 1), || "gradients".into())?;
    compare(&got, &problem, DType::F32, 1.0)
}

fn no_negative() -> Result<(), String> {
    // Rows 4 … 8 share a passage id with everybody they meet.
    let problem = sized(Loss::decoupled(), (9, 9, 16), 37)?.with(|call| call.with_passage_ids([5; 9]));
    let said = results(&Call::new(&problem, Spec::new(&problem, DType::F32))?)?.to_string();
    demand(said.contains("row 0 has no negative left in group 0"), || said.clone())?;
    let problem = problem.with(|call| call.with_weights([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]));
    let said = results(&Call::new(&problem, Spec::new(&problem, DType::F32))?)?.to_string();
    demand(said.contains("row 3 has no negative left in group 0"), || said.clone())
}

fn nan() -> Result<(), String> {
    let good = sample(Loss::samtone_both(), 38)?;
    let mut bad = good.clone();
    bad.query[5] = f64::NAN;
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let output = Some(GradientOutput { dtype, row_stride: 38 });
        let call = Call::new(&bad, Spec { outputs: [output; 2], ..Spec::new(&bad, DType::F32) })?;
        call.run()?;
        let words = on_device(&call)?;
        demand([0, 5, 6].iter().all(|k| words[*k].is_nan()), || format!("{words:?}"))?;
        demand(call.gradients()?.iter().flatten().all(|v| v.is_nan()), || "a gradient is a number".into())?;
        demand(call.step.results(&call.buffers()).is_err(), || "accepted".into())?;
        call.write_embeddings(&good);
        call.run()?;
        let outputs = call.outputs()?;
        demand(outputs.grad_query.iter().chain(&outputs.grad_passage).all(|v| v.is_finite()), || "NaN stays".into())?;
        if dtype == DType::F32 {
            compare(&outputs, &good, DType::F32, 1.0)?;
        }
    }
    Ok(())
}

fn lost() -> Result<(), String> {
    let engine = Engine::first().map_err(text)?;
    let problem = sample(Loss::samtone_both(), 39)?;
    let call = Call::on(&engine, &problem, Spec::new(&problem, DType::F32))?;
    call.run()?;
    call.outputs()?;
    engine.device().destroy();
    let mut encoder = engine.device().create_command_encoder(&CommandEncoderDescriptor::default());
    // What only records may or may not notice.
    let _ = call.step.forward(&mut encoder, &call.buffers());
    let _ = call.step.backward(&mut encoder, &call.buffers());
    let _ = Step::new(&engine, call.spec.plan(&problem, &engine).map_err(text)?);
    sentence(call.step.results(&call.buffers()), &["wgpu's"])?;
    sentence(call.step.read_partials(&call.buffers()), &["wgpu's"])?;
    // Another device is as good as before.
    let other = Call::new(&problem, Spec::new(&problem, DType::F32))?;
    other.run()?;
    compare(&other.outputs()?, &problem, DType::F32, 1.0)
}

fn nothing_ran() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 41)?;
    let call = Call::new(&problem, Spec::new(&problem, DType::F32))?;
    sentence(call.step.results(&call.buffers()), &["no forward call"])?;
    sentence(call.step.read_partials(&call.buffers()), &["no forward call"])?;
    // Gradients of nothing are none, and not 0.
    let nan = |call: &Call, when: &str| {
        call.backward()?;
        let numbers = call.gradients()?.iter().flatten().filter(|x| !x.is_nan()).count();
        let words = on_device(call)?;
        demand(numbers == 0 && words[5].is_nan() && words[6].is_nan(), || {
            format!("{when}: {numbers} numbers, {words:?}")
        })?;
        sentence(call.step.results(&call.buffers()), &["no forward call"])
    };
    nan(&call, "before any call")?;
    call.run()?;
    compare(&call.outputs()?, &problem, DType::F32, 1.0)?;
    // The first part of a forward call has replaced what the backward call needs, and the second has not run.
    call.submit(|encoder| call.step.partials(encoder, &call.buffers()))?;
    call.step.read_partials(&call.buffers()).map_err(text)?;
    nan(&call, "after partials")?;
    call.submit(|encoder| {
        call.step.combine(encoder)?;
        call.step.backward(encoder, &call.buffers())
    })?;
    compare(&call.outputs()?, &problem, DType::F32, 1.0)
}
