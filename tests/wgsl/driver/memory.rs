//! Buffers: shared ones, buffers of exactly the size that a plan asks for, and devices that bind little at once.

use super::call::{CALLERS, Call, Memory, Spec, f32_output, rows_of_bytes, rows_to_bytes};
use super::{Check, compare, demand, nested, sample, sized, text};
use crate::support::problem::{Outputs, Problem};
use samtone::wgpu::wgpu::{BufferUsages, CommandEncoderDescriptor};
use samtone::wgpu::{BufferRange, Buffers, Capabilities, Dispatch, Engine, Plan, Slot};
use samtone::{DType, GradientOutput, Loss};

pub const CHECKS: &[Check] = &[
    ("one buffer may hold all that is the caller's", one_buffer),
    ("buffers of the bytes that a plan asks for, whatever they hold, are enough", exact),
    ("the scratch keeps its bound", bound),
    ("a device that binds 40 KiB at once", small_bindings),
    ("every shape that has an edge", shapes),
];

fn one_buffer() -> Result<(), String> {
    let problem = sample(Loss::samtone_both(), 21)?;
    let spec = Spec { device_upstream: true, ..Spec::new(&problem, DType::F32) };
    let call = Call::new(&problem, spec)?;
    call.write_upstream(0.5);
    call.run()?;
    let want = call.outputs()?;

    let plan = call.step.plan();
    let mut end = 512;
    let ranges = CALLERS.map(|slot| {
        let (offset, bytes) = (end, plan.slot_bytes(slot));
        end = (offset + bytes).next_multiple_of(256) + 256;
        (slot, offset, bytes)
    });
    let memory = Memory::storage(&call.engine, end);
    let at = |(slot, offset, bytes): (Slot, u64, u64)| (slot, BufferRange { buffer: &memory.buffer, offset, bytes });
    let mut content = vec![0xff; end as usize];
    let contents = [
        rows_to_bytes(&problem.query, problem.dim, problem.dim, DType::F32),
        rows_to_bytes(&problem.passage, problem.dim, problem.dim, DType::F32),
        Vec::new(),
        Vec::new(),
        0.5_f32.to_le_bytes().to_vec(),
    ];
    for ((_, offset, _), bytes) in ranges.iter().zip(&contents) {
        content[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    call.engine.queue().write_buffer(&memory.buffer, 0, &content);
    let buffers = ranges.into_iter().map(at).fold(Buffers::new(), |buffers, (slot, range)| buffers.with(slot, range));
    call.submit(|encoder| {
        call.step.forward(encoder, &buffers)?;
        call.step.backward(encoder, &buffers)
    })?;
    let (evaluation, temperature) = call.step.results(&buffers).map_err(text)?;
    demand((evaluation, temperature) == (want.evaluation, want.temperature), || "other results".into())?;
    let after = call.engine.read(&memory.buffer, 0..end).map_err(text)?;
    for (slot, offset, bytes) in ranges {
        let (offset, bytes) = (offset as usize, bytes as usize);
        let rows = if slot == Slot::QueryGradient { problem.rows } else { problem.passages };
        let gradient = match slot {
            Slot::QueryGradient => &want.grad_query,
            Slot::PassageGradient => &want.grad_passage,
            _ => continue,
        };
        let output = GradientOutput { dtype: DType::F32, row_stride: problem.dim };
        let got = rows_of_bytes(&after[offset..offset + bytes], rows, problem.dim, output)?;
        demand(got == *gradient, || format!("other bits of {}", slot.name()))?;
        content[offset..offset + bytes].copy_from_slice(&after[offset..offset + bytes]);
    }
    demand(after == content, || "something else was written".into())
}

/// Runs a plan on buffers of exactly its bytes, all of them with guards and full of NaN; what a call does not keep from forward
/// to backward is filled with something else in between.
fn on_exact_buffers(engine: &Engine, problem: &Problem, spec: &Spec) -> Result<(Plan, Outputs), String> {
    let plan = spec.plan(problem, engine).map_err(text)?;
    let usage = |slot| if slot == Slot::Uniforms { BufferUsages::UNIFORM } else { BufferUsages::STORAGE };
    let used = Slot::ALL.into_iter().filter(|slot| plan.slot_bytes(*slot) > 0);
    let memory: Vec<_> = used.map(|slot| (slot, Memory::new(engine, plan.slot_bytes(slot), usage(slot)))).collect();
    let of = |slot| memory.iter().find(|(other, _)| *other == slot).map(|(_, memory)| memory);
    let write = |slot, bytes: &[u8]| of(slot).into_iter().for_each(|memory| memory.write(bytes));
    write(Slot::Uniforms, plan.uniforms());
    write(Slot::Side, plan.side_data());
    write(Slot::Query, &rows_to_bytes(&problem.query, problem.dim, spec.strides[0], spec.dtype));
    write(Slot::Passage, &rows_to_bytes(&problem.passage, problem.dim, spec.strides[1], spec.dtype));
    let buffers = memory.iter().fold(Buffers::new(), |buffers, (slot, memory)| buffers.with(*slot, memory.range()));
    let submit = |dispatches: Vec<&Dispatch>| {
        let mut encoder = engine.device().create_command_encoder(&CommandEncoderDescriptor::default());
        // SAFETY: uniforms and side data are written above, and nothing but the dispatches writes to the other slots of the plan.
        unsafe { engine.encode(&plan, dispatches, &buffers, &mut encoder, None) }.map_err(text)?;
        engine.queue().submit([encoder.finish()]);
        Ok::<_, String>(())
    };
    submit(plan.forward().collect())?;
    for slot in [Slot::Scratch, Slot::QuerySums, Slot::PassageSums] {
        write(slot, &vec![0x7f; plan.slot_bytes(slot) as usize]);
    }
    submit(plan.backward().iter().collect())?;

    let read = |slot| of(slot).map_or(Ok(Vec::new()), Memory::read);
    for slot in Slot::ALL {
        read(slot).map_err(|error| format!("{}: {error}", slot.name()))?;
    }
    demand(read(Slot::Uniforms)? == plan.uniforms(), || "uniforms have changed".into())?;
    let state = read(Slot::State)?;
    demand(plan.refusal(&state).map_err(text)?.is_none(), || "refused".into())?;
    let gradient = |k: usize, slot, rows| match spec.outputs[k] {
        Some(output) => rows_of_bytes(&read(slot)?, rows, problem.dim, output),
        None => Ok(Vec::new()),
    };
    let outputs = Outputs {
        evaluation: plan.evaluation(&state).map_err(text)?,
        temperature: plan.temperature(&state).map_err(text)?,
        grad_query: gradient(0, Slot::QueryGradient, problem.rows)?,
        grad_passage: gradient(1, Slot::PassageGradient, problem.passages)?,
    };
    Ok((plan, outputs))
}

fn exact() -> Result<(), String> {
    let engine = super::call::engine()?;
    let plain = sized(Loss::samtone_both(), (90, 101, 35), 22)?.rounded(DType::F16);
    let shared = plain.clone().with(|call| call.with_positives((0..90).map(|i| i * 3 % 70).collect::<Vec<_>>()));
    for problem in [plain.clone(), shared.clone(), nested(plain), nested(shared)] {
        for dtype in [DType::F32, DType::F16] {
            let spec =
                Spec { strides: [39, 36], outputs: [f32_output(37), f32_output(35)], ..Spec::new(&problem, dtype) };
            let (plan, outputs) = on_exact_buffers(&engine, &problem, &spec)?;
            compare(&outputs, &problem, dtype, 1.0).map_err(|error| format!("{plan}{error}"))?;
        }
    }
    Ok(())
}

/// The problem with a bound on the workspace.
fn with_workspace(problem: &Problem, bytes: usize) -> Problem {
    problem.clone().with(|call| call.with_workspace_bytes(bytes))
}

fn bound() -> Result<(), String> {
    let engine = super::call::engine()?;
    let plain = sized(Loss::samtone_both(), (200, 260, 16), 23)?;
    let prefixes = plain.clone().with(|call| call.with_prefixes([3, 11, 16]));
    [plain, prefixes].iter().try_for_each(|problem| keeps_its_bound(&engine, problem))
}

fn keeps_its_bound(engine: &Engine, problem: &Problem) -> Result<(), String> {
    let spec = Spec::new(problem, DType::F32);
    let needed = match spec.plan(&with_workspace(problem, 1000), engine) {
        Err(samtone::Error::WorkspaceTooSmall { needed, given: 1000, .. }) => needed,
        other => return Err(format!("{other:?}")),
    };
    let whole = Call::outputs_of(problem, spec.clone())?;
    compare(&whole, problem, DType::F32, 1.0)?;
    for bytes in [needed, needed + 1, 3 * needed, 5 * needed + 77] {
        let tight = with_workspace(problem, bytes);
        let (plan, outputs) = on_exact_buffers(engine, &tight, &spec)?;
        demand(plan.bounded_bytes() <= bytes as u64, || format!("{} bytes of {bytes}", plan.bounded_bytes()))?;
        compare(&outputs, problem, DType::F32, 1.0).map_err(|error| format!("{bytes} bytes: {error}"))?;
    }
    Ok(())
}

fn small_bindings() -> Result<(), String> {
    let engine = super::call::engine()?;
    let small = Capabilities { max_binding_bytes: 40 << 10, workgroup_bytes: 16 << 10, ..*engine.capabilities() };
    // Rows of 256 bytes: in order, a window holds 158 of them; in another order all passages are bound at once.
    for (shape, permuted, prefixes) in [
        ((190, 200, 64), false, None),
        ((200, 220, 30), true, None),
        ((80, 100, 46), false, Some([30, 46])),
        ((90, 100, 30), true, Some([1, 30])),
    ] {
        let mut problem = sized(Loss::samtone_both(), shape, 24)?;
        if permuted {
            problem = problem.with(|call| call.with_positives((0..shape.0 as u32).rev().collect::<Vec<_>>()));
        }
        if let Some(prefixes) = prefixes {
            problem = problem.with(|call| call.with_prefixes(prefixes)); // more than two tiles are not bound at once
        }
        let spec = Spec { capabilities: Some(small), ..Spec::new(&problem, DType::F32) };
        let (plan, outputs) = on_exact_buffers(&engine, &problem, &spec)?;
        let largest = plan.forward().chain(plan.backward()).flat_map(|d| &d.bindings).map(|b| b.bytes).max();
        demand(largest <= Some(40 << 10), || format!("{largest:?} bytes are bound"))?;
        compare(&outputs, &problem, DType::F32, 1.0).map_err(|error| format!("{}: {error}", problem.name))?;
    }
    Ok(())
}

/// One row; far more passages than rows; one passage for all rows; one number in an embedding, or many.
fn shapes() -> Result<(), String> {
    let engine = super::call::engine()?;
    for (shape, one) in [
        ((1, 1, 3), false),
        ((1, 700, 5), false),
        ((2, 400, 9), true),
        ((150, 151, 8), true),
        ((65, 129, 1), false),
        ((33, 40, 5000), false),
        ((64, 64, 64), false),
        ((129, 193, 17), false),
    ] {
        let mut problem = sized(Loss::samtone_both(), shape, 25)?.with(|call| call.with_temperature(0.2));
        if one {
            problem = problem.with(|call| call.with_positives(vec![1; shape.0]));
        }
        let mut prefixes = vec![shape.2.div_ceil(3), shape.2 / 2 + 1, shape.2 - shape.2 / 5];
        prefixes.dedup();
        let nested = problem.clone().with(|call| call.with_prefixes(prefixes));
        let both = [DType::F32, DType::BF16].into_iter().flat_map(|dtype| [(dtype, &problem), (dtype, &nested)]);
        for (dtype, problem) in both {
            let problem = problem.rounded(dtype);
            let (_, outputs) = on_exact_buffers(&engine, &problem, &Spec::new(&problem, dtype))?;
            compare(&outputs, &problem, dtype, 1.0).map_err(|error| format!("{} {dtype}: {error}", problem.name))?;
        }
    }
    Ok(())
}
