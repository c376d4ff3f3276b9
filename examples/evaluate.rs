//! Checks a backend, or another framework's numbers, against the definition.
//!
//!     cargo run --release --example evaluate -- CASE.json|FOLDER [--backend NAME] [--dtype f64|f32|f16|bf16]
//!
//! Reads golden files (docs/golden-format.md), computes each on the backend, and prints the relative error of every output
//! beside its tolerance. Where the type cannot hold a file's embeddings they are rounded. The file's outputs then belong to
//! other embeddings, and the f64 reference on the rounded ones judges the backend instead; the backend `reference` has no other
//! judge, so it computes with the embeddings as the file has them. Exit code: 0 if all pass, 1 if one fails, 2 for bad usage or
//! a file that cannot be read or computed.

#[path = "../tests/support/mod.rs"]
mod support;

use clap::Parser;
use samtone::DType;
use samtone::backend::Backend;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use support::backends;
use support::case::{Case, files};
use support::compare::{Check, against_definition};
use support::problem::Problem;

/// Computes golden files on a backend and compares every output.
#[derive(Parser)]
struct Arguments {
    /// A file in the golden format, or a folder of such files.
    path: PathBuf,
    /// What computes: `reference`, `cpu`, …
    #[arg(long, default_value = "reference", value_parser = backend_of)]
    backend: BackendArgument,
    /// Type that embeddings are rounded to: f64, f32, f16, bf16. Default: the widest that the backend takes.
    #[arg(long, value_parser = dtype_of)]
    dtype: Option<DType>,
}

#[derive(Clone)]
struct BackendArgument(&'static dyn Backend);

fn backend_of(name: &str) -> Result<BackendArgument, String> {
    backends::by_name(name).map(BackendArgument).map_err(|e| e.to_string())
}

fn dtype_of(name: &str) -> Result<DType, String> {
    DType::ALL.into_iter().find(|d| d.name() == name).ok_or_else(|| {
        let names = DType::ALL.map(DType::name).join(", ");
        format!("argument `dtype` is {name:?}; allowed: {names}")
    })
}

/// Why there is no verdict.
enum Failure {
    /// A sentence for the user.
    Sentence(String),
    /// Nobody reads the output any more, as in `evaluate … | head`.
    Output(io::Error),
}

impl From<String> for Failure {
    fn from(sentence: String) -> Self {
        Self::Sentence(sentence)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

fn main() -> ExitCode {
    let Arguments { path, backend: BackendArgument(backend), dtype } = Arguments::parse();
    match evaluate(&path, backend, dtype, &mut io::stdout()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(2),
        Err(Failure::Output(e)) => {
            eprintln!("the results cannot be printed: {e}");
            ExitCode::from(2)
        }
        Err(Failure::Sentence(e)) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}

/// Whether every file passes. A file that cannot be read or computed does not keep the others from being shown.
fn evaluate(path: &Path, backend: &dyn Backend, dtype: Option<DType>, out: &mut dyn Write) -> Result<bool, Failure> {
    backend.available().map_err(|e| e.to_string())?;
    let dtypes = backend.dtypes();
    let dtype = dtype.unwrap_or(dtypes[0]);
    if !dtypes.contains(&dtype) {
        let names: Vec<_> = dtypes.iter().map(|d| d.name()).collect();
        let name = backend.name();
        let sentence =
            format!("backend `{name}` does not take embeddings of type {dtype}; allowed: {}", names.join(", "));
        return Err(sentence.into());
    }

    let files = files(path)?;
    let (mut passed, mut failed, mut unjudged, mut errors) = (0, 0, 0, Vec::new());
    for file in &files {
        match evaluate_file(file, backend, dtype) {
            Ok(result) => {
                result.print(out)?;
                unjudged += usize::from(result.judge == Judge::Reference);
                if result.passed() { passed += 1 } else { failed += 1 }
            }
            Err(e) => errors.push(e),
        }
    }
    if unjudged > 0 {
        writeln!(
            out,
            "the outputs that {unjudged} of these files hold were not compared with anything; `--backend reference` compares them"
        )?;
    }
    writeln!(out, "{} files: {passed} passed, {failed} failed, {} not computed", files.len(), errors.len())?;
    if errors.is_empty() { Ok(failed == 0) } else { Err(errors.join("\n").into()) }
}

/// What a backend's outputs are compared with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Judge {
    /// The outputs that the file holds.
    File,
    /// The f64 reference, on the rounded embeddings.
    Reference,
}

/// A file, computed and compared.
struct Evaluated {
    /// Case, backend, type, judge, as a line.
    title: String,
    judge: Judge,
    checks: Vec<Check>,
    /// What the backend launches, if anything failed.
    plan: Option<String>,
}

impl Evaluated {
    fn passed(&self) -> bool {
        self.checks.iter().all(Check::passed)
    }

    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.title)?;
        for check in &self.checks {
            print_check(check, out)?;
        }
        if let Some(plan) = &self.plan {
            writeln!(out, "  {plan}")?;
        }
        writeln!(out)
    }
}

fn evaluate_file(file: &Path, backend: &dyn Backend, dtype: DType) -> Result<Evaluated, String> {
    let case = Case::read(file)?;
    let in_file = |e: samtone::Error| format!("{}: {e}", file.display());
    let run = |problem: &Problem, backend: &dyn Backend, dtype| problem.run(backend, dtype, 1.0).map_err(in_file);
    let rounded = case.problem.rounded(dtype);
    let (name, on) = (&case.problem.name, format!("{} in {dtype}", backend.name()));
    let definition = backends::by_name("reference").map_err(in_file)?;
    let is_reference = backend.name() == definition.name();
    let (judge, title, problem, got, want) = match case.problem.inexact_in(dtype) {
        None => {
            let got = run(&rounded, backend, dtype)?;
            (Judge::File, format!("{name} on {on}, judged by the file"), rounded, got, case.expected)
        }
        // On rounded embeddings the reference would judge itself.
        Some(entry) if is_reference => {
            let title = format!("{name} on {on}, on the embeddings as they are ({entry}), judged by the file");
            let got = run(&case.problem, definition, DType::F64)?;
            (Judge::File, title, case.problem, got, case.expected)
        }
        Some(entry) => {
            let title = format!(
                "{name} on {on}, judged by the reference in f64 on the rounded embeddings ({entry}); the file's outputs are not compared"
            );
            let (got, want) = (run(&rounded, backend, dtype)?, run(&rounded, definition, DType::F64)?);
            (Judge::Reference, title, rounded, got, want.into())
        }
    };
    let checks = against_definition(&got, &want, &problem, dtype, 1.0);
    let plan = backends::plan(backend, &problem, dtype).filter(|_| !checks.iter().all(Check::passed));
    Ok(Evaluated { title, judge, checks, plan })
}

fn print_check(check: &Check, out: &mut dyn Write) -> io::Result<()> {
    let (error, tolerance) = (check.relative(), check.tolerance());
    let output = check.output;
    if check.passed() {
        writeln!(out, "  PASS  {output:<17} error {error:8.1e}  tolerance {tolerance:8.1e}")
    } else {
        let (index, got, want) = check.worst;
        writeln!(
            out,
            "  FAIL  {output:<17} error {error:8.1e}  tolerance {tolerance:8.1e}  index {index}: got {got:e}, want {want:e}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const EXAMPLE: &str = include_str!("../tests/golden/samtone_query_plain.json");

    /// What is printed about a file with this content, and whether it passes.
    fn judged(file: &Value, backend: &str, dtype: DType) -> (String, bool) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("case.json");
        std::fs::write(&path, file.to_string()).unwrap();
        let mut printed = Vec::new();
        let passed = evaluate(&path, backends::by_name(backend).unwrap(), Some(dtype), &mut printed);
        let passed = passed.unwrap_or_else(|failure| match failure {
            Failure::Sentence(sentence) => panic!("{sentence}"),
            Failure::Output(error) => panic!("{error}"),
        });
        (String::from_utf8(printed).unwrap(), passed)
    }

    /// The example with f32 embeddings, written as a framework does; with outputs that are right, or nonsense.
    fn from_framework(right: bool) -> Value {
        let mut file: Value = serde_json::from_str(EXAMPLE).unwrap();
        for field in ["q", "p"] {
            for x in file[field].as_array_mut().unwrap().iter_mut().flat_map(|row| row.as_array_mut().unwrap()) {
                *x = json!(f64::from(x.as_f64().unwrap() as f32));
            }
        }
        if right {
            let case = Case::parse(&file.to_string()).unwrap();
            let got = case.problem.run(backends::by_name("reference").unwrap(), DType::F64, 1.0).unwrap();
            let rows = |x: &[f64]| json!(x.chunks(case.problem.dim).collect::<Vec<_>>());
            file["loss"] = json!(got.evaluation.loss);
            file["row_losses"] = json!(got.evaluation.row_losses);
            file["grad_q"] = rows(&got.grad_query);
            file["grad_p"] = rows(&got.grad_passage);
            file["grad_temperature"] = json!(got.temperature.tau);
        } else {
            file["loss"] = json!(123);
            for x in file["grad_q"].as_array_mut().unwrap().iter_mut().flat_map(|row| row.as_array_mut().unwrap()) {
                *x = json!(0.75);
            }
        }
        file
    }

    #[test]
    fn numbers_of_a_framework_are_compared() {
        for backend in ["reference", "cpu"] {
            let (printed, passed) = judged(&from_framework(true), backend, DType::F32);
            assert!(passed && printed.contains("judged by the file"), "{printed}");
            let (printed, passed) = judged(&from_framework(false), backend, DType::F32);
            assert!(!passed && printed.contains("FAIL  loss ") && printed.contains("FAIL  grad_q "), "{printed}");
        }
    }

    /// The file's embeddings are no bf16 numbers, so the reference on rounded ones could only be compared with itself.
    #[test]
    fn the_reference_never_judges_itself() {
        let (printed, passed) = judged(&from_framework(true), "reference", DType::BF16);
        assert!(passed && printed.contains("as they are (q[0][0] is 0."), "{printed}");
        let (printed, passed) = judged(&from_framework(false), "reference", DType::BF16);
        assert!(!passed && printed.contains("FAIL  loss "), "{printed}");
    }

    #[test]
    fn outputs_that_cannot_judge_are_said_to_be_not_compared() {
        let (printed, passed) = judged(&from_framework(false), "cpu", DType::BF16);
        assert!(passed && printed.contains("the file's outputs are not compared"), "{printed}");
        assert!(printed.contains("the outputs that 1 of these files hold were not compared"), "{printed}");
        let (printed, _) = judged(&from_framework(true), "cpu", DType::F32);
        assert!(!printed.contains("not compared"), "{printed}");
    }

    /// `evaluate … | head`.
    #[test]
    fn a_reader_may_leave() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/samtone_query_plain.json");
        let failure = evaluate(&file, backends::by_name("reference").unwrap(), None, &mut Closed);
        assert!(matches!(failure, Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe));
    }
}
