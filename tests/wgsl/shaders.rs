//! The shaders without a device. Every module of every variant is valid WGSL and uses no more than its variant needs. It is translated to
//! what drivers take, and keeps the limits that every WebGPU device has. Every dispatch of every plan binds what its entry point uses.
//!
//! Two more compilers judge the modules if they are on the PATH: `spirv-val` of the SPIR-V tools and `tint`, which browsers use. Otherwise
//! their checks are reported as ignored, or fail if the variable `SAMTONE_REQUIRE` names the tool.

mod plans;
mod translate;

use crate::support::report::{Listed, is_required};
use naga::valid::Capabilities;
use samtone::wgpu::{self, ALIGNMENT, Binding, Dispatch, Module, Products, Slot, Variant};
use samtone::{Call, DType, Loss, Problem};
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use translate::{Shader, needed, storage, variants};

type Check = fn() -> Result<(), String>;

const CHECKS: [(&str, Check); 9] = [
    ("every module of every variant needs no more than its variant", valid),
    ("entry points are those that the modules name", entries),
    ("SPIR-V", || each(|shader| shader.spirv().map(drop))),
    ("MSL", || each(|shader| shader.msl().map(drop))),
    ("HLSL", || each(|shader| if shader.is_cooperative() { Ok(()) } else { shader.hlsl().map(drop) })),
    ("GLSL ES", glsl),
    ("workgroups keep the limits of every device", limits),
    ("dispatches bind what their entry points use", bindings),
    ("nothing is bound that u32 does not count", beyond_u32),
];

pub fn trials() -> Vec<Listed> {
    let listed = |name: &str, check: Check| Listed::new("shaders", name, move || Ok(check()?));
    let mut trials: Vec<_> = CHECKS.into_iter().map(|(name, check)| listed(name, check)).collect();
    let tools: [(&str, &str, Check); 2] = [("spirv-val", "--version", spirv_val), ("tint", "--help", tint)];
    for (tool, version, check) in tools {
        let missing = Command::new(tool).arg(version).output().err().filter(|_| !is_required(tool));
        let reason = missing.map(|error| format!("`{tool}` does not run here: {error}"));
        trials.push(listed(&format!("{tool} agrees"), check).ignored(reason));
    }
    trials
}

fn demand(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}

fn each(check: impl Fn(&Shader) -> Result<(), String>) -> Result<(), String> {
    Shader::all()?.iter().try_for_each(check)
}

/// Each capability that is asked for is also needed.
fn valid() -> Result<(), String> {
    for variant in variants() {
        for module in Module::ALL {
            let all = needed(module, variant);
            Shader::new(module, variant, all)?;
            for one in all.iter() {
                demand(Shader::new(module, variant, all - one).is_err(), || {
                    format!("{} for {variant} does not use {one:?}", module.name())
                })?;
            }
        }
    }
    demand(needed(Module::Project, Variant::default()) == Capabilities::empty(), || {
        "the baseline needs something".into()
    })
}

fn entries() -> Result<(), String> {
    each(|shader| {
        let got: BTreeSet<_> = shader.entries().map(|(entry, _)| entry.name.as_str()).collect();
        demand(got == shader.module.entries().iter().copied().collect(), || format!("{}: {got:?}", shader.name()))
    })
}

/// All but f16, which GLSL ES does not have.
fn glsl() -> Result<(), String> {
    each(|shader| {
        let f16 = needed(shader.module, shader.variant).contains(Capabilities::SHADER_FLOAT16);
        let entries = shader.module.entries();
        if f16 { Ok(()) } else { entries.iter().try_for_each(|entry| shader.glsl(entry).map(drop)) }
    })
}

/// 16 KiB of workgroup memory, or 32 KiB with large tiles and with cooperative matrices, 256 invocations, eight storage buffers.
fn limits() -> Result<(), String> {
    each(|shader| {
        for (entry, used) in shader.entries() {
            let name = format!("{} of {}", entry.name, shader.name());
            let invocations: u32 = entry.workgroup_size.iter().product();
            demand(invocations <= 256, || format!("{name} has {invocations} invocations"))?;
            let shared = used.iter().filter(|v| v.space == naga::AddressSpace::WorkGroup);
            let bytes: u32 = shared.map(|v| shader.size(v.ty).next_multiple_of(16)).sum();
            let small = !shader.variant.large_tiles && shader.variant.products == Products::Fma;
            let allowed = if small { 16 << 10 } else { 32 << 10 };
            demand(bytes <= allowed, || format!("{name} takes {bytes} bytes of workgroup memory"))?;
            let buffers = used.iter().filter_map(|v| storage(v)).count();
            demand(buffers <= 8, || format!("{name} uses {buffers} storage buffers"))?;
        }
        Ok(())
    })
}

/// What an entry point uses: by number, whether it is the uniform buffer, is written, and the least bytes it must have.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Use {
    uniform: bool,
    written: bool,
    bytes: u64,
}

fn uses(shaders: &[Shader]) -> BTreeMap<(Module, &str, String), BTreeMap<u32, Use>> {
    let mut all = BTreeMap::new();
    for shader in shaders {
        for (entry, used) in shader.entries() {
            let bound = used.iter().filter_map(|v| {
                let written = storage(v);
                // Of an array whose length the buffer decides, one element.
                let bytes = match shader.ir.types[v.ty].inner {
                    naga::TypeInner::Array { stride, .. } => stride,
                    _ => shader.size(v.ty),
                };
                let use_ = Use { uniform: written.is_none(), written: written == Some(true), bytes: bytes.into() };
                v.binding.map(|binding| (binding.binding, use_))
            });
            all.insert((shader.module, entry.name.as_str(), shader.variant.to_string()), bound.collect());
        }
    }
    all
}

fn bindings() -> Result<(), String> {
    let shaders = Shader::all()?;
    let uses = uses(&shaders);
    let mut seen = BTreeSet::new();
    for planned in plans::all()? {
        let plan = &planned.plan;
        let limits = planned.capabilities;
        let said = |dispatch: &Dispatch, what: String| format!("{}: {dispatch}: {what}", planned.name);
        let of_slots: Vec<_> = Slot::ALL.iter().map(|slot| plan.slot_bytes(*slot)).collect();
        demand(of_slots.iter().all(|b| *b <= limits.max_buffer_bytes && b % 4 == 0), || {
            format!("{}: {of_slots:?}", planned.name)
        })?;
        for dispatch in plan.forward().chain(plan.backward()) {
            seen.insert((dispatch.module, dispatch.entry));
            let wanted = &uses[&(dispatch.module, dispatch.entry, plan.variant().to_string())];
            let got: Vec<_> = dispatch.bindings.iter().map(|b| b.index).collect();
            demand(got.iter().eq(wanted.keys()), || said(dispatch, format!("binds {got:?}, uses {wanted:?}")))?;
            for binding in &dispatch.bindings {
                let use_ = wanted[&binding.index];
                let Binding { slot, offset, bytes, .. } = *binding;
                let fits = offset % ALIGNMENT == 0
                    && bytes % 4 == 0
                    && bytes >= use_.bytes
                    && bytes <= limits.max_binding_bytes
                    && offset + bytes <= plan.slot_bytes(slot)
                    && use_.uniform == (slot == Slot::Uniforms);
                demand(fits, || said(dispatch, format!("{binding:?} for {use_:?}")))?;
            }
            let grid = dispatch.workgroups;
            demand(grid.iter().all(|g| (1..=limits.max_workgroups).contains(g)), || said(dispatch, "its grid".into()))?;
            exclusive(dispatch, wanted).map_err(|what| said(dispatch, what))?;
        }
    }
    let all: BTreeSet<_> = Module::ALL.iter().flat_map(|m| m.entries().iter().map(|e| (*m, *e))).collect();
    demand(seen == all, || format!("no plan dispatches {:?}", all.difference(&seen).collect::<Vec<_>>()))
}

/// Also on a device that binds more.
fn beyond_u32() -> Result<(), String> {
    let limits = wgpu::Capabilities { max_binding_bytes: 1 << 40, max_buffer_bytes: 1 << 40, ..Default::default() };
    let plan = || {
        let call = Call::new(Loss::samtone_both(), 0.05);
        let problem = Problem::new(call.pairs(3, 5)?, DType::F32, 8)?.with_row_strides(1 << 30, 1 << 30)?;
        wgpu::Plan::new(&problem, &limits)
    };
    let plan = plan().map_err(|e| e.to_string())?;
    let bytes = plan.forward().chain(plan.backward()).flat_map(|d| &d.bindings).map(|b| b.bytes);
    demand(bytes.max() <= Some(u32::MAX.into()), || format!("{plan}"))
}

/// What [`Slot`] promises: a buffer is read or written within a dispatch, not both, also where the caller's slots share one; and
/// what is written twice is so in different places.
fn exclusive(dispatch: &Dispatch, uses: &BTreeMap<u32, Use>) -> Result<(), String> {
    let written = |b: &Binding| uses[&b.index].written;
    for (k, a) in dispatch.bindings.iter().enumerate() {
        for b in &dispatch.bindings[k + 1..] {
            let one_buffer = a.slot == b.slot || (a.slot.is_callers() && b.slot.is_callers());
            demand(!one_buffer || written(a) == written(b), || format!("reads and writes {a:?} and {b:?}"))?;
            let apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
            demand(!(a.slot == b.slot && written(a)) || apart, || format!("writes {a:?} and {b:?}"))?;
        }
    }
    Ok(())
}

/// Runs a tool on a file that holds `content`.
fn judged(tool: &str, arguments: &[&str], extension: &str, content: &[u8], name: &str) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let file = folder.path().join(format!("shader.{extension}"));
    std::fs::write(&file, content).map_err(|e| e.to_string())?;
    let output = Command::new(tool).args(arguments).arg(&file).output().map_err(|e| format!("{tool}: {e}"))?;
    demand(output.status.success(), || {
        format!(
            "{tool} on {name}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

fn spirv_val() -> Result<(), String> {
    each(|shader| {
        // Distributions have a spirv-val older than this extension.
        if shader.is_cooperative() {
            return Ok(());
        }
        let bytes: Vec<u8> = shader.spirv()?.iter().flat_map(|word| word.to_le_bytes()).collect();
        judged("spirv-val", &["--target-env", "vulkan1.1"], "spv", &bytes, &shader.name())
    })
}

/// What a browser may be given: with the directive that asks for subgroups.
fn tint() -> Result<(), String> {
    each(|shader| {
        if shader.is_cooperative() {
            return Ok(());
        }
        let source = shader.module.source(shader.variant, true);
        judged("tint", &["--format", "wgsl", "--output-name", "/dev/null"], "wgsl", source.as_bytes(), &shader.name())
    })
}
