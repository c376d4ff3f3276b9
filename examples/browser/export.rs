//! Plans as data for the page: shaders, buffers with their contents, dispatches.

use super::support::backends;
use super::support::case::{Case, Expected};
use super::support::data::{self, Kind};
use super::support::problem::{Buffer, Problem};
use anyhow::Result;
use samtone::wgpu::{Capabilities, Dispatch, Plan, Slot};
use samtone::{DType, GradientOutput, Loss};
use serde::Serialize;
use std::collections::BTreeMap;

/// A device that the page asks for, where the adapter has what it takes.
pub struct Device {
    pub name: &'static str,
    pub features: &'static [&'static str],
    pub limits: &'static [(&'static str, u32)],
    pub language: &'static [&'static str],
    /// Embeddings for which its shaders differ from those of the devices before it.
    pub dtypes: &'static [DType],
}

const LARGE_TILES: (&str, u32) = ("maxComputeWorkgroupStorageSize", 32 << 10);
/// `subgroup_id` and `num_subgroups`.
const SUBGROUP_ID: &str = "subgroup_id";

/// The first is what every browser with WebGPU has, the last what current ones have on current GPUs.
pub const DEVICES: &[Device] = &[
    Device {
        name: "baseline",
        features: &[],
        limits: &[],
        language: &[],
        dtypes: &[DType::F32, DType::F16, DType::BF16],
    },
    Device { name: "large tiles", features: &[], limits: &[LARGE_TILES], language: &[], dtypes: &[DType::F32] },
    Device {
        name: "subgroups",
        features: &["subgroups"],
        limits: &[],
        language: &[SUBGROUP_ID],
        dtypes: &[DType::F32],
    },
    Device { name: "f16", features: &["shader-f16"], limits: &[], language: &[], dtypes: &[DType::F16, DType::BF16] },
    Device {
        name: "everything",
        features: &["shader-f16", "subgroups"],
        limits: &[LARGE_TILES],
        language: &[SUBGROUP_ID],
        dtypes: &[DType::F32, DType::F16, DType::BF16],
    },
];

impl Device {
    /// What a device of exactly these features and limits allows.
    fn capabilities(&self) -> Capabilities {
        let baseline = Capabilities::default();
        Capabilities {
            f16: self.features.contains(&"shader-f16"),
            subgroups: self.features.contains(&"subgroups"),
            workgroup_bytes: self
                .limits
                .iter()
                .find(|l| l.0 == LARGE_TILES.0)
                .map_or(baseline.workgroup_bytes, |l| l.1),
            large_tile_rows: 0, // the cases are small
            ..baseline
        }
    }
}

/// What the page is to run, with what its results are judged by.
pub struct Run {
    pub problem: Problem,
    pub expected: Expected,
    /// Whether `expected` is what the file holds: the type holds its embeddings.
    pub judged_by_file: bool,
    pub dtype: DType,
    pub device: &'static str,
    pub plan: Plan,
}

/// Files of a run.
pub struct Exported {
    pub plan: ExportedPlan,
    /// Contents of the buffers that have some, one after the other.
    pub contents: Vec<u8>,
    /// WGSL by path. Runs on the same device share it.
    pub shaders: BTreeMap<String, String>,
}

#[derive(Serialize)]
pub struct ExportedPlan {
    buffers: Vec<ExportedBuffer>,
    dispatches: Vec<ExportedDispatch>,
    /// Buffers whose bytes, one after the other, are the answer.
    results: Vec<&'static str>,
}

#[derive(Serialize)]
struct ExportedBuffer {
    name: &'static str,
    bytes: u64,
    uniform: bool,
    /// Where in the contents; nothing for a buffer that the dispatches write before they read it.
    contents: Option<Part>,
}

#[derive(Serialize)]
struct Part {
    offset: usize,
    bytes: usize,
}

#[derive(Serialize)]
struct ExportedDispatch {
    shader: String,
    entry: &'static str,
    bindings: Vec<ExportedBinding>,
    workgroups: [u32; 2],
}

#[derive(Serialize)]
struct ExportedBinding {
    binding: u32,
    buffer: &'static str,
    offset: u64,
    bytes: u64,
}

impl Run {
    /// A case with its embeddings rounded to `dtype`, on `device`.
    pub fn new(case: &Case, dtype: DType, device: &Device) -> Result<(Self, Exported)> {
        let problem = case.problem.rounded(dtype);
        let judged_by_file = case.problem.is_exact_in(dtype);
        let expected = if judged_by_file {
            case.expected.clone()
        } else {
            // The case's outputs belong to embeddings that this type cannot hold.
            problem.run(backends::by_name("reference")?, DType::F64, 1.0)?.into()
        };
        let [query, passage] = [&problem.query, &problem.passage].map(|x| Buffer::new(dtype, x));
        let gradients = Some(GradientOutput { dtype: DType::F32, row_stride: problem.dim });
        let planned = samtone::Problem::new(problem.pairs()?, dtype, problem.dim)?;
        let plan = Plan::new(&planned.with_gradients(gradients, gradients)?, &device.capabilities())?;
        let exported = export(&plan, &bytes(&query), &bytes(&passage), device);
        Ok((Self { problem, expected, judged_by_file, dtype, device: device.name, plan }, exported))
    }

    /// Buffers that the page sends back, in this order.
    pub const RESULTS: [Slot; 3] = [Slot::State, Slot::QueryGradient, Slot::PassageGradient];
}

fn bytes(x: &Buffer) -> Vec<u8> {
    match x {
        Buffer::F64(x) => bytemuck::cast_slice(x).to_vec(),
        Buffer::F32(x) => bytemuck::cast_slice(x).to_vec(),
        Buffer::F16(x) => bytemuck::cast_slice(x).to_vec(),
        Buffer::BF16(x) => bytemuck::cast_slice(x).to_vec(),
    }
}

fn export(plan: &Plan, query: &[u8], passage: &[u8], device: &Device) -> Exported {
    let mut contents = Vec::new();
    let mut buffers = Vec::new();
    for slot in Slot::ALL.into_iter().filter(|slot| plan.slot_bytes(*slot) > 0) {
        let content = match slot {
            Slot::Query => Some(query),
            Slot::Passage => Some(passage),
            Slot::Uniforms => Some(plan.uniforms()),
            Slot::Side => Some(plan.side_data()),
            _ => None,
        };
        let part = content.map(|content| {
            let offset = contents.len();
            contents.extend_from_slice(content);
            Part { offset, bytes: content.len() }
        });
        let (bytes, uniform) = (plan.slot_bytes(slot), slot == Slot::Uniforms);
        buffers.push(ExportedBuffer { name: slot.name(), bytes, uniform, contents: part });
    }

    let mut shaders = BTreeMap::new();
    let mut dispatches = Vec::new();
    for Dispatch { module, entry, bindings, workgroups } in plan.forward().chain(plan.backward()) {
        let storage = if plan.variant().f16 { "f16" } else { "f32" };
        let shader = format!("shaders/{}/{storage}/{}.wgsl", device.name.replace(' ', "-"), module.name());
        shaders.entry(shader.clone()).or_insert_with(|| module.source(plan.variant(), true));
        let bindings = bindings.iter().map(|b| ExportedBinding {
            binding: b.index,
            buffer: b.slot.name(),
            offset: b.offset,
            bytes: b.bytes,
        });
        dispatches.push(ExportedDispatch { shader, entry, bindings: bindings.collect(), workgroups: *workgroups });
    }
    let results = Run::RESULTS.iter().map(|slot| slot.name()).collect();
    Exported { plan: ExportedPlan { buffers, dispatches, results }, contents, shaders }
}

/// Problems of several tiles along both edges: golden files have one. Judged by the reference.
pub fn seeded() -> Result<Vec<Case>> {
    let problems = [
        data::problem(Loss::samtone_both(), Kind::Random, (150, 170, 40), 0.05, 1, 0.0)?,
        data::problem(Loss::samtone_query(), Kind::Trained, (131, 131, 33), 0.01, 2, 0.0)?,
        data::problem(Loss::gte(), Kind::Anisotropic, (100, 257, 24), 0.05, 3, 0.0)?,
        data::problem(Loss::samtone_both(), Kind::Random, (140, 170, 70), 0.05, 4, 0.0)?
            .with(|call| call.with_prefixes([5, 24, 70])),
    ];
    let case = |problem: Problem| {
        // As f32 holds them, so that the expected outputs belong to what most devices are given.
        let problem = problem.rounded(DType::F32);
        let expected = problem.run(backends::by_name("reference")?, DType::F64, 1.0)?.into();
        Ok(Case { problem, expected })
    };
    problems.into_iter().map(case).collect()
}
