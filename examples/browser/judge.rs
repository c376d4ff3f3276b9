//! From a run's bytes to a verdict, as `evaluate` judges the backends of this machine.

use super::export::Run;
use super::support::compare::{Check, against_definition, entrywise, verdict};
use super::support::problem::Outputs;
use anyhow::{Result, bail};
use samtone::Error;
use samtone::wgpu::results;
use serde::Serialize;
use std::fmt;

/// Of the f32 results at byte 256 of the state, which pages and shaders read, relative to those that the host reads there.
const OF_DEVICE: f64 = 2e-6;

/// What the page shows of a run; numbers as text, so that both tables read alike.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    pub case: String,
    pub device: &'static str,
    pub dtype: &'static str,
    pub loss: String,
    pub expected_loss: String,
    /// Relative, of the gradient that uses most of its tolerance.
    pub gradient_error: String,
    pub tolerance: String,
    pub passed: bool,
    /// Every check that failed, or why nothing was checked.
    pub reason: String,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.passed { "PASS" } else { "FAIL" };
        write!(f, "{word}  {:<11} {:<4} {:<42}", self.device, self.dtype, self.case)?;
        if self.loss.is_empty() {
            return write!(f, " {}", self.reason);
        }
        write!(f, " loss {:<12} gradients {:>8} of {:>8}", self.loss, self.gradient_error, self.tolerance)?;
        if self.passed { Ok(()) } else { write!(f, "\n      {}", self.reason.replace('\n', "\n      ")) }
    }
}

/// Eight digits, without hiding how small a loss is.
fn shown(loss: f64) -> String {
    if loss != 0.0 && loss.abs() < 1e-3 { format!("{loss:.7e}") } else { format!("{loss:.7}") }
}

/// The verdict on what the page sent: the bytes of [`Run::RESULTS`], or what went wrong there.
pub fn judge(run: &Run, answer: Result<&[u8], String>) -> Verdict {
    let mut verdict = Verdict {
        case: run.problem.name.clone(),
        device: run.device,
        dtype: run.dtype.name(),
        loss: String::new(),
        expected_loss: shown(run.expected.loss),
        gradient_error: String::new(),
        tolerance: String::new(),
        passed: false,
        reason: String::new(),
    };
    match answer.map_err(anyhow::Error::msg).and_then(|bytes| outputs(run, bytes)) {
        Ok((outputs, of_device)) => verdict.compare(run, &outputs, of_device),
        Err(error) => verdict.reason = format!("{error:#}"),
    }
    verdict
}

impl Verdict {
    fn compare(&mut self, run: &Run, outputs: &Outputs, of_device: Vec<Check>) {
        let mut checks = against_definition(outputs, &run.expected, &run.problem, run.dtype, 1.0);
        let used = |check: &Check| match check.difference / check.allowed {
            used if used.is_nan() && check.passed() => 0.0, // 0 of 0
            used if used.is_nan() => f64::INFINITY,
            used => used,
        };
        let gradients = checks.iter().filter(|check| check.output.starts_with("grad"));
        if let Some(worst) = gradients.max_by(|a, b| used(a).total_cmp(&used(b))) {
            self.gradient_error = format!("{:.1e}", worst.relative());
            self.tolerance = format!("{:.1e}", worst.tolerance());
        }
        checks.extend(of_device);
        self.loss = shown(outputs.evaluation.loss);
        match verdict(&checks) {
            Ok(()) => self.passed = true,
            Err(reason) => self.reason = reason,
        }
    }
}

/// What the host reads, and how the f32 results compare with it.
fn outputs(run: &Run, bytes: &[u8]) -> Result<(Outputs, Vec<Check>)> {
    let plan = &run.plan;
    let [state, query, passage] = Run::RESULTS.map(|slot| plan.slot_bytes(slot) as usize);
    if bytes.len() != state + query + passage {
        bail!("the page sent {} bytes; allowed: {}", bytes.len(), state + query + passage);
    }
    let (state, gradients) = bytes.split_at(state);
    let (query, passage) = gradients.split_at(query);
    if let Some(refusal) = plan.refusal(state)? {
        let found =
            |_, _| Err(Error::StateMismatch { saved: format!("{refusal:?}"), given: "a case of finite rows".into() });
        return Err(plan.error_of(refusal, found).into());
    }
    // Slots are whole words; gradients are f32.
    let floats = |bytes: &[u8], count: usize| -> Vec<f64> {
        bytes.chunks_exact(4).take(count).map(|x| f64::from(bytemuck::pod_read_unaligned::<f32>(x))).collect()
    };
    let outputs = Outputs {
        evaluation: plan.evaluation(state)?,
        grad_query: floats(query, run.problem.query.len()),
        grad_passage: floats(passage, run.problem.passage.len()),
        temperature: plan.temperature(state)?,
    };
    let [qp, qp_mrr, pq, pq_mrr] = outputs.metrics();
    let results = floats(state.get(results::FIRST_BYTE as usize..).unwrap_or_default(), 7);
    let host = [outputs.evaluation.loss, qp, qp_mrr, pq, pq_mrr, outputs.temperature.tau, outputs.temperature.log_beta];
    let check = |output, k: std::ops::Range<usize>| {
        entrywise(output, results.get(k.clone()).unwrap_or_default(), &host[k], OF_DEVICE)
    };
    let of_device = vec![
        check("loss as f32", 0..1),
        check("metrics as f32", 1..5),
        check("grad_temperature as f32", 5..6),
        check("grad_log_beta as f32", 6..7),
    ];
    Ok((outputs, of_device))
}
