//! A call on the CPU that processes make together: as in `cpu.rs`, over whatever of Python connects the processes.

use crate::annotations::Capsules;
use crate::cpu::{LastPool, defect, results};
use crate::dlpack::{Tensor, expect_apart};
use crate::errors::Refusal;
use crate::settings::Settings;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyCapsule};
use samtone::distributed::{Distributed, Group, Part, Reduction};
use samtone::{Call, Error, Evaluation, GradientBuffers, TemperatureGradient};
use std::ffi::{c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What exchanges messages, as errors name it.
const ENGINE: &str = "torch.distributed";
/// `PyBUF_WRITE` of Python's stable interface, which pyo3 leaves out of it.
const BUFFER_WRITE: c_int = 0x200;

/// One process's end of a group of processes, which a function of Python connects.
struct Processes {
    rank: usize,
    size: usize,
    /// `exchange(to, out, source, into)` with two memoryviews. It returns when the memory of both is of no more use to it.
    exchange: Py<PyAny>,
}

impl Group for Processes {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&mut self, to: usize, out: &[u8], from: usize, into: &mut [u8]) -> samtone::Result<()> {
        if to == self.rank {
            into.copy_from_slice(out);
            return Ok(());
        }
        Python::attach(|py| {
            let mut call = || {
                // SAFETY: both slices outlive this function, at whose end the views are released. The function of Python, which is this
                // package's own, only reads `out`; the view of it is one to write to because PyTorch warns of others.
                let views = unsafe {
                    [view(py, out.as_ptr().cast_mut(), out.len())?, view(py, into.as_mut_ptr(), into.len())?]
                };
                let result = self.exchange.call1(py, (to, &views[0], from, &views[1]));
                for view in views {
                    view.call_method0("release")?;
                }
                result
            };
            call().map(drop).map_err(|error: PyErr| {
                let rank = self.rank;
                let peers = format!("rank {rank}, which sends to rank {to} and receives from rank {from}");
                Error::Engine { engine: ENGINE, reason: format!("{peers}, says: {}", error.value(py)) }
            })
        })
    }
}

/// A memoryview.
///
/// # Safety
/// So many bytes from `start` on are memory for as long as anybody uses the view, and nobody else writes to them.
unsafe fn view(py: Python<'_>, start: *mut u8, len: usize) -> PyResult<Bound<'_, PyAny>> {
    let len = isize::try_from(len)?;
    // SAFETY: the function looks at no memory, and we are attached to the interpreter. It gives a new reference or sets an exception.
    unsafe {
        let view = pyo3::ffi::PyMemoryView_FromMemory(start.cast::<c_char>(), len, BUFFER_WRITE);
        Bound::from_owned_ptr_or_err(py, view)
    }
}

/// What a process gives of the batch, and where its gradients go.
struct Own {
    call: Call,
    /// Queries and passages; none of a tower without rows.
    towers: [Option<Tensor>; 2],
    gradients: [Option<Tensor>; 2],
}

type Two<'py> = (Option<Bound<'py, PyCapsule>>, Option<Bound<'py, PyCapsule>>);

fn import(names: [&'static str; 2], capsules: &Two<'_>) -> PyResult<[Option<Tensor>; 2]> {
    let tensor = |name, capsule: &Option<Bound<'_, PyCapsule>>| {
        capsule.as_ref().map(|capsule| Tensor::import(name, capsule)).transpose()
    };
    Ok([tensor(names[0], &capsules.0)?, tensor(names[1], &capsules.1)?])
}

impl Own {
    fn new(settings: &Settings, towers: &Two<'_>, gradients: &Two<'_>, lists: &Capsules<'_>) -> PyResult<Self> {
        let own = Self {
            towers: import(["query", "passage"], towers)?,
            gradients: import(["query_gradient", "passage_gradient"], gradients)?,
            call: lists.call(settings)?,
        };
        let [inputs, outputs] = [&own.towers, &own.gradients].map(|x| x.iter().flatten().collect::<Vec<_>>());
        expect_apart(&inputs, &outputs)?;
        Ok(own)
    }

    fn part(&mut self) -> Result<(Part<'_>, GradientBuffers<'_>), Refusal> {
        let [query, passage] = &self.towers;
        let part = Part {
            call: &self.call,
            query: query.as_ref().map(Tensor::embeddings).transpose()?,
            passage: passage.as_ref().map(Tensor::embeddings).transpose()?,
        };
        let [query, passage] = &mut self.gradients;
        let buffers = GradientBuffers {
            query: query.as_mut().map(Tensor::embeddings_mut).transpose()?,
            passage: passage.as_mut().map(Tensor::embeddings_mut).transpose()?,
        };
        Ok((part, buffers))
    }
}

/// The calls of this process in one group, from step to step. It keeps the memory of a call for the next one.
#[pyclass(frozen, module = "samtone._native")]
pub struct Ranks {
    /// None while a call is at work.
    distributed: Mutex<Option<Distributed<Processes>>>,
    /// Threads of the group's own. One of them waits for other processes during a call, and would keep calls in other groups waiting,
    /// for which those processes may wait themselves.
    pool: LastPool,
}

type Computed<'py> = (Vec<f64>, f64, Bound<'py, PyByteArray>);

#[pymethods]
impl Ranks {
    /// `exchange(to, out, source, into)` sends the bytes of the memoryview `out` to rank `to` and fills the memoryview `into` with
    /// those that rank `source` sends. Any of the two may be empty, and the other rank knows.
    #[new]
    fn new(rank: usize, size: usize, exchange: Py<PyAny>) -> Self {
        Self {
            distributed: Mutex::new(Some(Distributed::new(Processes { rank, size, exchange }))),
            pool: LastPool::default(),
        }
    }

    /// One call, which every process of the group makes. `towers` are matrices, or None for one without rows. `gradients` are matrices that
    /// receive ∂L/∂q and ∂L/∂p of these rows, or None; without `differentiate` there are none.
    ///
    /// Gives the numbers of `cpu_step`, those of the whole batch, and the row losses of the whole batch as the bytes of float64 numbers.
    #[allow(clippy::too_many_arguments)] // it is a call across a language border; its one caller passes them by name
    fn step<'py>(
        &self,
        py: Python<'py>,
        settings: &Bound<'_, Settings>,
        towers: Two<'_>,
        gradients: Two<'_>,
        differentiate: bool,
        annotations: Capsules<'_>,
        threads: usize,
    ) -> PyResult<Computed<'py>> {
        let settings = settings.get();
        self.with(settings.reduction, |distributed| {
            let own = Own::new(settings, &towers, &gradients, &annotations);
            let mut own = match own.and_then(|own| Ok((own, self.pool.of(threads)?))) {
                Ok(own) => own,
                Err(error) => return Ok(Err(give_up(py, distributed, &error))),
            };
            let (part, buffers) = match own.0.part() {
                Ok(both) => both,
                Err(refusal) => return Ok(Err(give_up(py, distributed, &refusal.into()))),
            };
            let pool = &own.1;
            let computed = py.detach(|| {
                let compute = || compute(distributed, &part, differentiate.then_some(buffers));
                catch_unwind(AssertUnwindSafe(|| pool.install(compute)))
            });
            let computed = computed.map_err(|panic| defect(&*panic))?;
            Ok(computed.map_err(|error| Refusal(error).into()).map(|(evaluation, temperature)| {
                let row_losses: Vec<u8> = evaluation.row_losses.iter().flat_map(|loss| loss.to_ne_bytes()).collect();
                (results(&evaluation), settings.derivative(temperature), PyByteArray::new(py, &row_losses))
            }))
        })
    }

    /// Tells the other processes, which are in `step`, that this one cannot take part, and why. Raises what they raise.
    fn give_up(&self, py: Python<'_>, reason: &str) -> PyResult<()> {
        self.with(Reduction::default(), |distributed| {
            Ok(Err(py.detach(|| Refusal(distributed.give_up(reason))).into()))
        })
    }

    /// Gives back the memory that calls keep for the next one.
    fn release(&self) {
        let mut kept = self.kept();
        *kept = kept.take().map(|distributed| Distributed::new(distributed.into_group()));
    }
}

impl Ranks {
    fn kept(&self) -> MutexGuard<'_, Option<Distributed<Processes>>> {
        self.distributed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock is not held during the call, which lets other threads have the interpreter. An error of `call` itself is a defect, after
    /// which the group is not used again.
    fn with<T>(
        &self,
        reduction: Reduction,
        call: impl FnOnce(&mut Distributed<Processes>) -> PyResult<PyResult<T>>,
    ) -> PyResult<T> {
        let taken = self.kept().take();
        let Some(mut distributed) = taken.map(|distributed| distributed.with_reduction(reduction)) else {
            let sentence = "argument `group` is in another call of this process, or such a call has ended by a defect; \
                allowed: one call in a group at a time";
            return Err(PyRuntimeError::new_err(sentence));
        };
        let result = call(&mut distributed)?;
        *self.kept() = Some(distributed);
        result
    }
}

fn compute(
    distributed: &mut Distributed<Processes>,
    part: &Part<'_>,
    buffers: Option<GradientBuffers<'_>>,
) -> samtone::Result<(Evaluation, TemperatureGradient)> {
    match buffers {
        Some(buffers) => distributed.loss_and_gradients_into(part, 1.0, buffers),
        None => {
            distributed.evaluate(part).map(|evaluation| (evaluation, TemperatureGradient { tau: 0.0, log_beta: 0.0 }))
        }
    }
}

fn give_up(py: Python<'_>, distributed: &mut Distributed<Processes>, error: &PyErr) -> PyErr {
    let reason = error.value(py).to_string();
    py.detach(|| Refusal(distributed.give_up(&reason))).into()
}
