//! The CUDA backend's plans, run launch by launch on the emulator. It does what a GPU would do, on any machine.

use super::emulator::{self, Compiler, Device};
use super::report::{self, Listed, is_required};
use libtest_mimic::{Arguments, Failed};
use samtone::backend::Backend;
use samtone::batch::{Data, DataMut};
use samtone::cuda::abi::{
    GRAD_LOG_BETA, GRAD_TAU, LOSS, MRR_PQ, MRR_QP, NO_NEGATIVE, NO_NEGATIVE_GROUP, NON_FINITE_PASSAGE,
    NON_FINITE_QUERY, NONE, PRECISION_PQ, PRECISION_QP, RESULTS, STATUS_WORDS, ZERO_PASSAGE, ZERO_QUERY,
};
use samtone::cuda::{
    Address, Architecture, Array, ArrayId, Cosines, GradientOutput, Launch, Plan, Problem, Slot, Tile,
};
use samtone::{
    Batch, DType, Embeddings, EmbeddingsMut, Error, Evaluation, GradientBuffers, Metrics, Prefix, PrefixEvaluation,
    Result, TemperatureGradient, Tower,
};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Of one architecture's kernels.
pub type Check = fn(&'static CudaEmulated) -> std::result::Result<(), Failed>;

/// Runs every check for both architectures, after `trials`. Without a C++ compiler they are reported as ignored, unless `SAMTONE_REQUIRE`
/// names the backend. Those that take longest begin first, lest one of them runs alone at the end: the larger architecture, and whatever
/// is first in the list.
pub fn run_checks<const N: usize>(checks: [(&str, Check); N], mut trials: Vec<Listed>) -> ExitCode {
    for how in [&CudaEmulated::SM90A, &CudaEmulated::SM80] {
        let absent = how.available().err().filter(|_| !is_required(how.name())).map(|reason| reason.to_string());
        let listed = |(name, check): (&str, Check)| {
            let run = move || check(how);
            Listed::new(how.name(), format!("{}: {name}", how.name()), run).ignored(absent.clone())
        };
        trials.extend(checks.map(listed));
    }
    report::run(&Arguments::from_args(), trials)
}

/// Whether its kernels are those of clusters, with squares of 256 x 256.
pub fn clusters(how: &CudaEmulated) -> bool {
    how.clusters
}

/// Every kernel file of the backend.
pub const FILES: [&str; 17] = [
    "logsumexp_sm90a.cu",
    "logsumexp_prefixes_sm90a.cu",
    "gradient_tile_prefixes_sm90a.cu",
    "gradient_tile_sm90a.cu",
    "gradient_product_sm90a.cu",
    "prepare.cu",
    "logsumexp_sm80.cu",
    "logsumexp_prefixes_sm80.cu",
    "gradient_tile_prefixes_sm80.cu",
    "combine.cu",
    "skip_squares.cu",
    "gradient_tile_sm80.cu",
    "gradient_product_sm80.cu",
    "project.cu",
    "prepare_prefixes.cu",
    "prefixes.cu",
    "project_prefixes.cu",
];

/// The plans on the emulator: `cuda-emulated`, with the kernels that a plan takes for the batch on every device, and
/// `cuda-emulated-sm90a`, with those of compute capability 9.0 for batches of any size.
pub struct CudaEmulated {
    clusters: bool,
}

impl CudaEmulated {
    pub const SM80: Self = Self { clusters: false };
    pub const SM90A: Self = Self { clusters: true };

    /// Two clusters, so that each has several squares to visit.
    pub fn problem<'a>(&self, problem: Problem<'a>) -> Problem<'a> {
        match self.clusters {
            false => problem,
            true => problem.with_architecture(Architecture::Sm90a { multiprocessors: 4 }).with_tile(Tile::Cluster),
        }
    }
}

/// How launches run; by default with races detected, in the order of seed 0.
#[derive(Clone, Default)]
pub struct Run {
    pub seed: u64,
    pub ignore_races: bool,
    /// Label left out, in the kernels of one file (`Launch::module`).
    pub mutant: Option<(&'static str, &'static str)>,
    /// What is done to every launch of the plan: a planted fault.
    pub change: Option<fn(&mut Launch)>,
}

/// Names another executable that speaks the protocol of kernels/README.md, to run plans instead of the emulator.
pub const ANOTHER_DEVICE: &str = "SAMTONE_EMULATED_DEVICE";

fn executable() -> std::result::Result<PathBuf, String> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    // One that does not start fails the tests, which do not fall back to the emulator and are not ignored.
    let another = || std::env::var_os(ANOTHER_DEVICE).map(PathBuf::from);
    BUILT.get_or_init(|| another().map_or_else(|| Compiler::find()?.build_all("cuda", &FILES), Ok)).clone()
}

fn failure(what: String) -> Error {
    Error::Unsupported { backend: "cuda-emulated", what, allowed: "kernels that the emulator runs".into() }
}

/// Devices that nobody uses now.
static IDLE: Mutex<Vec<Device>> = Mutex::new(Vec::new());

/// A plan on an emulated device. Each array is a buffer of its own, so that whoever leaves it is caught.
pub struct Emulated {
    plan: Plan,
    device: Option<Device>,
    buffers: Vec<u64>,
    run: Run,
}

impl Emulated {
    pub fn new(plan: Plan, run: Run) -> Result<Self> {
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let start = || executable().and_then(|path| Device::start(&path)).map_err(failure);
        let mut device = idle.map_or_else(start, Ok)?;
        let mut buffers = Vec::new();
        for array in plan.arrays() {
            buffers.push(device.allocate(array.name, array.bytes as usize).map_err(failure)?);
        }
        let mut this = Self { plan, device: Some(device), buffers, run };
        for (id, array) in this.plan.arrays().to_vec().iter().enumerate() {
            if array.slot == Slot::Side {
                let content = &this.plan.side_data()[array.offset as usize..(array.offset + array.bytes) as usize];
                let content = content.to_vec();
                this.write(ArrayId(id), &content)?;
            }
        }
        Ok(this)
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    fn device(&mut self) -> Result<&mut Device> {
        self.device.as_mut().ok_or_else(|| failure("a device that has failed".into()))
    }

    fn write(&mut self, id: ArrayId, bytes: &[u8]) -> Result<()> {
        let address = self.buffers[id.0];
        self.device()?.write(address, bytes).map_err(failure)
    }

    fn find(&self, name: &str) -> Result<(ArrayId, Array)> {
        let found = self.plan.arrays().iter().position(|a| a.name == name);
        let id = found.ok_or_else(|| failure(format!("no array `{name}`")))?;
        Ok((ArrayId(id), self.plan.arrays()[id].clone()))
    }

    pub fn upload<T: bytemuck::Pod>(&mut self, name: &str, values: &[T]) -> Result<()> {
        let (id, _) = self.find(name)?;
        self.write(id, bytemuck::cast_slice(values))
    }

    pub fn download<T: bytemuck::Pod>(&mut self, name: &str) -> Result<Vec<T>> {
        let (id, array) = self.find(name)?;
        let address = self.buffers[id.0];
        self.device()?.download(address, array.bytes as usize / size_of::<T>()).map_err(failure)
    }

    pub fn upload_embeddings(&mut self, name: &str, x: Embeddings<'_>) -> Result<()> {
        let len = (x.rows() - 1) * x.row_stride() + x.dim();
        match x.data() {
            Data::F32(data) => self.upload(name, &data[..len]),
            Data::F16(data) => self.upload(name, &data[..len]),
            Data::BF16(data) => self.upload(name, &data[..len]),
            Data::F64(_) => Err(failure("f64".into())),
        }
    }

    /// Runs a part of the plan.
    pub fn launch(&mut self, part: fn(&Plan) -> &[Launch]) -> Result<()> {
        for mut launch in part(&self.plan).to_vec() {
            self.run.change.into_iter().for_each(|change| change(&mut launch));
            let mut emulated = emulator::Launch::new(&launch.kernel, launch.threads)
                .grid(launch.grid[0], launch.grid[1], 1)
                .shared_bytes(launch.shared_bytes)
                .seed(self.run.seed)
                .detect_races(!self.run.ignore_races)
                .overlaps(true)
                .mutant_if_reached(self.run.mutant.filter(|(module, _)| *module == launch.module).map_or("", |m| m.1));
            for argument in &launch.arguments {
                let mut bytes = argument.bytes.clone();
                for (at, address) in &argument.pointers {
                    let value = match address {
                        Address::Null => 0,
                        Address::In(id, offset) => self.buffers[id.0].wrapping_add_signed(*offset),
                    };
                    bytes[*at..at + 8].copy_from_slice(&value.to_le_bytes());
                }
                emulated = emulated.argument_bytes(bytes);
            }
            let result = self.device()?.launch(&emulated);
            if let Err(sentence) = result {
                self.device = None; // whatever it left behind
                return Err(failure(sentence));
            }
        }
        Ok(())
    }

    /// The error that the status names, if any; rows and columns are looked up in `batch`.
    pub fn check_status(&mut self, batch: &Batch<'_>) -> Result<()> {
        let status: Vec<u32> = self.download("status")?;
        // Status of the call, and then of each prefix, unless the whole embedding is the only one.
        let of_prefixes: Vec<_> = status.chunks(STATUS_WORDS).skip(1).collect();
        let lengths = batch.call().prefixes().map(|_| batch.prefixes());
        let prefix = |k: usize| lengths.as_ref().map(|prefixes| prefixes[k].dim);
        for (k, (tower, x)) in
            [(Tower::Query, batch.query()), (Tower::Passage, batch.passage())].into_iter().enumerate()
        {
            let not_finite = status[[NON_FINITE_QUERY, NON_FINITE_PASSAGE][k]];
            if not_finite != NONE {
                let row = not_finite as usize;
                let bad = x.row_to_f64(row)?.into_iter().enumerate().find(|(_, v)| !v.is_finite());
                let (column, value) = bad.ok_or_else(|| failure(format!("{tower} row {row} is finite")))?;
                return Err(Error::NonFinite { tower, row, column, value });
            }
            let zero = status[[ZERO_QUERY, ZERO_PASSAGE][k]];
            if zero != NONE && batch.call().zero_norm() == samtone::ZeroNorm::Error {
                return Err(Error::ZeroNorm { tower, row: zero as usize, prefix: prefix(0) });
            }
        }
        if status[NO_NEGATIVE] != NONE {
            let (row, group) = (status[NO_NEGATIVE] as usize, status[NO_NEGATIVE_GROUP] as usize);
            let first = of_prefixes.iter().position(|of_prefix| of_prefix[NO_NEGATIVE] != NONE);
            let prefix = prefix(first.unwrap_or(0));
            return Err(Error::NoNegative { loss: batch.call().loss().name().into(), group, row, prefix });
        }
        Ok(())
    }

    /// Loss and metrics. `listed` are the prefixes that the call names.
    pub fn evaluation(&mut self, listed: &[Prefix]) -> Result<Evaluation> {
        let results: Vec<f64> = self.download("results")?;
        let metrics = |of: &[f64]| {
            let metrics = |precision: usize, mrr: usize| Metrics { precision_at_1: of[precision], mrr: of[mrr] };
            [metrics(PRECISION_QP, MRR_QP), metrics(PRECISION_PQ, MRR_PQ)]
        };
        // Results of the call come first, and then those of each prefix, unless the whole embedding is the only one.
        let of_prefixes: Vec<_> = results.chunks(RESULTS).skip(usize::from(results.len() > RESULTS)).collect();
        let of_prefix = |(prefix, of): (&Prefix, &&[f64])| {
            let [query_to_passage, passage_to_query] = metrics(of);
            PrefixEvaluation {
                dim: prefix.dim,
                weight: prefix.weight,
                loss: of[LOSS],
                query_to_passage,
                passage_to_query,
            }
        };
        let [query_to_passage, passage_to_query] = metrics(&results);
        let mut row_losses: Vec<f64> = self.download("row_losses")?;
        row_losses.truncate(row_losses.len() / (results.len() / RESULTS));
        Ok(Evaluation {
            loss: results[LOSS],
            row_losses,
            query_to_passage,
            passage_to_query,
            prefixes: listed.iter().zip(&of_prefixes).map(of_prefix).collect(),
        })
    }

    pub fn temperature(&mut self) -> Result<TemperatureGradient> {
        let results: Vec<f64> = self.download("results")?;
        Ok(TemperatureGradient { tau: results[GRAD_TAU], log_beta: results[GRAD_LOG_BETA] })
    }

    fn fetch(&mut self, name: &str, out: Option<EmbeddingsMut<'_>>) -> Result<()> {
        fn copy<T: bytemuck::Pod>(from: Vec<T>, to: &mut [T], dim: usize, stride: usize) {
            from.chunks(stride)
                .zip(to.chunks_mut(stride))
                .for_each(|(from, to)| to[..dim].copy_from_slice(&from[..dim]));
        }
        let Some(mut out) = out else { return Ok(()) };
        let (dim, stride) = (out.dim(), out.row_stride());
        match out.data_mut() {
            DataMut::F32(to) => copy(self.download(name)?, to, dim, stride),
            DataMut::F16(to) => copy(self.download(name)?, to, dim, stride),
            DataMut::BF16(to) => copy(self.download(name)?, to, dim, stride),
            DataMut::F64(_) => return Err(failure("f64".into())),
        }
        Ok(())
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let device = self.device.take().filter(|device| device.has_room(1000));
        if let Some(mut device) = device
            && device.release_all().is_ok()
        {
            IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(device);
        }
    }
}

/// Where a call's gradients go, in the words of a plan.
pub fn output(out: &Option<EmbeddingsMut<'_>>) -> Option<GradientOutput> {
    out.as_ref().map(|x| GradientOutput { dtype: x.dtype(), row_stride: x.row_stride() })
}

/// The prefixes that a call names.
pub fn listed(batch: &Batch<'_>) -> Vec<Prefix> {
    batch.call().prefixes().map(|_| batch.prefixes()).unwrap_or_default()
}

/// Loss and gradients of a whole batch by the plan of `problem`.
pub fn run(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    buffers: GradientBuffers<'_>,
    how: Run,
) -> Result<(Evaluation, TemperatureGradient)> {
    let mut emulated = Emulated::new(Plan::new(problem)?, how)?;
    emulated.upload_embeddings("query", batch.query())?;
    emulated.upload_embeddings("passage", batch.passage())?;
    emulated.launch(Plan::forward)?;
    emulated.launch(Plan::backward)?;
    emulated.check_status(batch)?;
    emulated.fetch("query_gradient", buffers.query)?;
    emulated.fetch("passage_gradient", buffers.passage)?;
    Ok((emulated.evaluation(&listed(batch))?, emulated.temperature()?))
}

/// Kept cosines for one half of all cases and recomputed ones for the other: by type, so that every case has both, and by loss and
/// shape, so that every type has.
fn alternating(batch: &Batch<'_>) -> Cosines {
    let (loss, rows, passages) = (batch.call().loss(), batch.rows(), batch.passages());
    match (batch.dtype() as usize + loss.name().len() + rows + passages) % 2 {
        0 => Cosines::Kept,
        _ => Cosines::Recomputed,
    }
}

impl Backend for CudaEmulated {
    fn name(&self) -> &'static str {
        if self.clusters { "cuda-emulated-sm90a" } else { "cuda-emulated" }
    }

    fn dtypes(&self) -> &'static [DType] {
        &[DType::F32, DType::F16, DType::BF16]
    }

    fn available(&self) -> Result<()> {
        executable().map(drop).map_err(|why| Error::Unsupported {
            backend: self.name(),
            what: format!("this machine: {why}"),
            allowed: "Linux with g++ from 11 on, or a like compiler that `CXX` names".into(),
        })
    }

    fn loss_and_gradients_into(
        &self,
        batch: &Batch<'_>,
        upstream: f64,
        buffers: GradientBuffers<'_>,
    ) -> Result<(Evaluation, TemperatureGradient)> {
        let problem = Problem::new(*batch.pairs(), batch.dtype(), batch.dim())?
            .with_row_strides(batch.query().row_stride(), batch.passage().row_stride())?
            .with_gradients(output(&buffers.query), output(&buffers.passage))?
            .with_upstream(upstream)?
            .with_cosines(alternating(batch));
        let problem = if self.clusters { problem.with_room_for(Tile::Cluster) } else { problem };
        run(&self.problem(problem), batch, buffers, Run::default())
    }
}
