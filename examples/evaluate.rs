//! Checks a backend, or another framework's numbers, against the definition.
//!
//!     cargo run --release --example evaluate -- CASE.json|FOLDER [--backend NAME] [--dtype f64|f32|f16|bf16]
//!
//! Reads golden files (docs/golden-format.md), computes each on the backend, and prints the relative error of every output
//! beside its tolerance. Where the type cannot hold a file's embeddings they are rounded, and the f64 reference on the
//! rounded ones judges instead of the file. Exit code: 0 if all pass, 1 if one fails, 2 for bad usage or a file that cannot be read or
//! computed.

#[path = "../tests/support/mod.rs"]
mod support;

use clap::Parser;
use samtone::DType;
use samtone::backend::Backend;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use support::backends;
use support::case::{Case, files};
use support::compare::{Check, against_definition};

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

fn main() -> ExitCode {
    let Arguments { path, backend: BackendArgument(backend), dtype } = Arguments::parse();
    match evaluate(&path, backend, dtype) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}

/// Whether every file passes. A file that cannot be read or computed does not keep the others from being shown.
fn evaluate(path: &Path, backend: &dyn Backend, dtype: Option<DType>) -> Result<bool, String> {
    backend.available().map_err(|e| e.to_string())?;
    let dtypes = backend.dtypes();
    let dtype = dtype.unwrap_or(dtypes[0]);
    if !dtypes.contains(&dtype) {
        let names: Vec<_> = dtypes.iter().map(|d| d.name()).collect();
        let name = backend.name();
        return Err(format!(
            "backend `{name}` does not take embeddings of type {dtype}; allowed: {}",
            names.join(", ")
        ));
    }

    let files = files(path)?;
    let (mut passed, mut failed, mut errors) = (0, 0, Vec::new());
    for file in &files {
        match evaluate_file(file, backend, dtype) {
            Ok(true) => passed += 1,
            Ok(false) => failed += 1,
            Err(e) => errors.push(e),
        }
    }
    println!("{} files: {passed} passed, {failed} failed, {} not computed", files.len(), errors.len());
    if errors.is_empty() { Ok(failed == 0) } else { Err(errors.join("\n")) }
}

fn evaluate_file(file: &Path, backend: &dyn Backend, dtype: DType) -> Result<bool, String> {
    let case = Case::read(file)?;
    let in_file = |e: samtone::Error| format!("{}: {e}", file.display());
    let problem = case.problem.rounded(dtype);
    let got = problem.run(backend, dtype, 1.0).map_err(in_file)?;
    let (judge, want) = if case.problem.is_exact_in(dtype) {
        ("the file", case.expected)
    } else {
        // The file's outputs belong to embeddings that this type cannot hold.
        let definition = backends::by_name("reference").map_err(in_file)?;
        let want = problem.run(definition, DType::F64, 1.0).map_err(in_file)?;
        ("the reference in f64 on the rounded embeddings", want.into())
    };
    let checks = against_definition(&got, &want, &problem, dtype, 1.0);
    println!("{} on {} in {dtype}, judged by {judge}", problem.name, backend.name());
    for check in &checks {
        print_check(check);
    }
    if let Some(plan) = backends::plan(backend, &problem, dtype).filter(|_| !checks.iter().all(Check::passed)) {
        println!("  {plan}");
    }
    println!();
    Ok(checks.iter().all(Check::passed))
}

fn print_check(check: &Check) {
    let (error, tolerance) = (check.relative(), check.tolerance());
    let output = check.output;
    if check.passed() {
        println!("  PASS  {output:<17} error {error:8.1e}  tolerance {tolerance:8.1e}");
    } else {
        let (index, got, want) = check.worst;
        println!(
            "  FAIL  {output:<17} error {error:8.1e}  tolerance {tolerance:8.1e}  index {index}: got {got:e}, want {want:e}"
        );
    }
}
