//! A call on the CPU: capsules in, gradients into capsules, on as many threads as PyTorch uses.

use crate::annotations::Capsules;
use crate::dlpack::{Tensor, expect_apart};
use crate::errors::{Refusal, invalid};
use crate::settings::Settings;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use rayon::{ThreadPool, ThreadPoolBuilder};
use samtone::cpu::Workspace;
use samtone::{Batch, Evaluation, GradientBuffers, Metrics};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

/// Threads for one number of them, of one process.
pub struct Pool {
    process: u32,
    threads: usize,
    pool: Arc<ThreadPool>,
}

/// The pool of the last call, for the next one.
#[derive(Default)]
pub struct LastPool(Mutex<Option<Pool>>);

/// The pool of calls of this process alone.
static POOL: LastPool = LastPool(Mutex::new(None));

/// Memory of earlier calls; as many as have ever run at once.
static WORKSPACES: Mutex<Vec<Workspace>> = Mutex::new(Vec::new());

impl LastPool {
    /// A pool of so many threads. One of another size ends its threads once the calls that use it are done.
    pub fn of(&self, threads: usize) -> Result<Arc<ThreadPool>, Refusal> {
        let threads = threads.max(1);
        let refused =
            |why: String| invalid("threads", format!("{threads}, {why}"), "as many threads as the system gives");
        let process = std::process::id();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = kept.as_ref().filter(|kept| kept.process == process && kept.threads == threads) {
            return Ok(Arc::clone(&found.pool));
        }
        let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|index| format!("samtone-{index}"));
        let pool = Arc::new(builder.build().map_err(|error| refused(error.to_string()))?);
        if let Some(old) = kept.replace(Pool { process, threads, pool: Arc::clone(&pool) })
            && old.process != process
        {
            // A process that was forked has the memory of its parent's pool, but none of its threads. Ending them could wait for a
            // lock that one of them held when the process was forked, so the memory is left alone.
            std::mem::forget(old);
        }
        Ok(pool)
    }
}

/// Gives back the memory that calls keep for the next one.
#[pyfunction]
pub fn release_memory() {
    WORKSPACES.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// Addresses of the first elements of q and p, as a call reads them: what shows that nothing was copied.
#[pyfunction]
pub fn addresses(query: &Bound<'_, PyCapsule>, passage: &Bound<'_, PyCapsule>) -> PyResult<(usize, usize)> {
    Ok((Tensor::import("query", query)?.address(), Tensor::import("passage", passage)?.address()))
}

/// One call. `gradients` are matrices that receive ∂L/∂q and ∂L/∂p, or None for a frozen tower; without `differentiate` there are
/// none, nor a derivative of the temperature. `row_losses` is a vector of float64.
///
/// Gives loss, P@1 and MRR of query → passage and those of passage → query, then the same five numbers for each prefix of weight above 0,
/// if there are prefixes; and the derivative of what the temperature was given as.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // it is a call across a language border; its one caller passes them by name
pub fn cpu_step(
    py: Python<'_>,
    settings: &Bound<'_, Settings>,
    query: &Bound<'_, PyCapsule>,
    passage: &Bound<'_, PyCapsule>,
    gradients: (Option<Bound<'_, PyCapsule>>, Option<Bound<'_, PyCapsule>>),
    differentiate: bool,
    annotations: Capsules<'_>,
    row_losses: &Bound<'_, PyCapsule>,
    threads: usize,
) -> PyResult<(Vec<f64>, f64)> {
    let settings = settings.get();
    let (query, passage) = (Tensor::import("query", query)?, Tensor::import("passage", passage)?);
    let call = annotations.call(settings)?;
    let mut row_losses = Tensor::import("row_losses", row_losses)?;
    let output = |argument, capsule: &Option<Bound<'_, PyCapsule>>| {
        capsule.as_ref().map(|capsule| Tensor::import(argument, capsule)).transpose()
    };
    let mut grad_query = output("query_gradient", &gradients.0)?;
    let mut grad_passage = output("passage_gradient", &gradients.1)?;
    {
        let outputs: Vec<_> =
            [grad_query.as_ref(), grad_passage.as_ref(), Some(&row_losses)].into_iter().flatten().collect();
        expect_apart(&[&query, &passage], &outputs)?;
    }

    // The managed tensors stay in this frame, so their memory stays while the interpreter is released.
    let batch = Batch::new(&call, query.embeddings()?, passage.embeddings()?).map_err(Refusal)?;
    let losses = row_losses.vector_mut::<f64>()?;
    if losses.len() != batch.rows() {
        let allowed = format!("{}, one for each query", batch.rows());
        return Err(invalid("row_losses", format!("a vector of {}", losses.len()), allowed).into());
    }
    let buffers = GradientBuffers {
        query: grad_query.as_mut().map(Tensor::embeddings_mut).transpose()?,
        passage: grad_passage.as_mut().map(Tensor::embeddings_mut).transpose()?,
    };
    let pool = POOL.of(threads)?;
    let computed = py.detach(|| {
        catch_unwind(AssertUnwindSafe(|| pool.install(|| compute(settings, &batch, differentiate.then_some(buffers)))))
    });
    let (evaluation, derivative) = computed.map_err(|panic| defect(&*panic))??;
    losses.copy_from_slice(&evaluation.row_losses);
    Ok((results(&evaluation), derivative))
}

/// Five numbers of the whole loss, and of each prefix.
pub fn results(evaluation: &Evaluation) -> Vec<f64> {
    let five =
        |loss, there: Metrics, back: Metrics| [loss, there.precision_at_1, there.mrr, back.precision_at_1, back.mrr];
    let whole = five(evaluation.loss, evaluation.query_to_passage, evaluation.passage_to_query);
    let prefixes = evaluation.prefixes.iter().map(|x| five(x.loss, x.query_to_passage, x.passage_to_query));
    std::iter::once(whole).chain(prefixes).flatten().collect()
}

fn compute(
    settings: &Settings,
    batch: &Batch<'_>,
    buffers: Option<GradientBuffers<'_>>,
) -> Result<(Evaluation, f64), Refusal> {
    let Some(buffers) = buffers else {
        return Ok((samtone::cpu::forward(batch)?.evaluation().clone(), 0.0));
    };
    let mut workspace = WORKSPACES.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
    let result = workspace.loss_and_gradients_into(batch, 1.0, buffers);
    WORKSPACES.lock().unwrap_or_else(PoisonError::into_inner).push(workspace);
    let (evaluation, temperature) = result?;
    Ok((evaluation, settings.derivative(temperature)))
}

/// A panic is a defect of this library, and still no reason to end the interpreter.
pub fn defect(panic: &(dyn std::any::Any + Send)) -> PyErr {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    PyRuntimeError::new_err(format!(
        "samtone has a defect, please report it: {}",
        text.unwrap_or("a panic without words")
    ))
}
