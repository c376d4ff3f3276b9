//! What users read: the summary of a test run, and the errors that the documentation quotes.

use crate::support::report::{self, Listed};
use libtest_mimic::{Arguments, Failed};
use samtone::wgpu::{Capabilities, Plan};
use samtone::{Call, DType, Error, GradientOutput, Loss, Problem};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const REASON: &str = "no device: the driver is not there";

/// 60 trials that pass and one that fails, 3000 of a backend that is absent, and one that panics.
fn listed() -> Vec<Listed> {
    let cpu = |k: usize| Listed::new("cpu", format!("cpu f32: case {k}"), || Ok(()));
    let gpu = |k: usize| Listed::new("gpu", format!("gpu f32: case {k}"), || Ok(())).ignored(Some(REASON.into()));
    let mut all: Vec<_> = (0..60).map(cpu).chain((0..3000).map(gpu)).collect();
    all.push(Listed::new("cpu", "cpu f32: a wrong case", || Err(Failed::from("loss is off by 1"))));
    all.push(Listed::new("wgpu", "wgpu f32: a broken case", || panic!("index out of bounds")));
    all
}

/// Whoever adds a loss is reminded of the two tables that users read.
#[test]
fn every_preset_is_in_the_tables() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in ["README.md", "docs/loss.md"] {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        for (name, ..) in Loss::PRESETS {
            let shown = [format!("`{name}`"), format!("`{name}(")];
            assert!(shown.iter().any(|name| text.contains(name)), "{file} has no `{name}`");
        }
    }
}

/// No line of numbers is longer than a screen is wide.
#[test]
fn many_groups_are_on_several_lines() {
    let group = |k: usize| Listed::new(format!("group-of-number-{k}"), format!("{k}"), || Ok(()));
    let text = printed(Arguments { quiet: true, ..Arguments::default() }, (0..30).map(group).collect());
    assert!(text.lines().filter(|line| line.starts_with("  passed: ")).count() > 3, "{text}");
    assert!((0..30).all(|k| text.contains(&format!("group-of-number-{k} 1"))), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");
}

/// What is printed beside what libtest-mimic prints.
fn printed(arguments: Arguments, listed: Vec<Listed>) -> String {
    let out = Arc::new(Mutex::new(Vec::new()));
    report::run_to(&arguments, listed, out.clone());
    String::from_utf8(out.lock().unwrap().clone()).unwrap()
}

#[test]
fn many_trials_fit_one_screen_with_every_reason_and_failure() {
    let text = printed(Arguments::default(), listed());
    assert!(text.contains("running 62 of 3062 trials"), "{text}");
    assert!(text.contains("  passed: cpu 60\n  FAILED: cpu 1, wgpu 1\n"), "{text}");
    assert!(text.contains(&format!("  3000 ignored of gpu: {REASON}\n")), "{text}");
    assert!(text.contains("---- cpu f32: a wrong case ----\nloss is off by 1\n"), "{text}");
    assert!(text.contains("---- wgpu f32: a broken case ----\nit panicked: index out of bounds\n"), "{text}");
    assert!(
        text.contains("test result: FAILED. 60 passed; 2 failed; 3000 ignored; 0 measured; 0 filtered out;"),
        "{text}"
    );
    assert!(text.lines().count() < 25, "{text}");
}

#[test]
fn filters_and_flags_choose_as_ever() {
    let filtered = Arguments { filter: Some("cpu f32: case".into()), ..Arguments::default() };
    let text = printed(filtered, listed());
    assert!(text.contains("running 60 of 60 trials") && text.contains("test result: ok. 60 passed;"), "{text}");
    assert!(text.contains("0 ignored; 0 measured; 3002 filtered out"), "{text}");
    let included = Arguments { filter: Some("gpu".into()), include_ignored: true, ..Arguments::default() };
    let text = printed(included, listed());
    assert!(text.contains("  passed: gpu 3000\n") && !text.contains(REASON), "{text}");
    // Each has a line of libtest-mimic's own; the reason is ours.
    let few = Arguments { filter: Some("gpu f32: case 12".into()), exact: true, ..Arguments::default() };
    let one_by_one = Arguments { logfile: Some(report::NOWHERE.into()), ..few.clone() };
    assert_eq!(printed(one_by_one, listed()), format!("  1 ignored of gpu: {REASON}\n"));
    let quiet = printed(Arguments { quiet: true, ..few }, listed());
    assert!(quiet.starts_with("running 0 of 1 trials") && quiet.ends_with("s\n"), "{quiet}");
    assert_eq!(quiet.lines().count(), 3, "{quiet}");
    assert_eq!(printed(Arguments { list: true, ..Arguments::default() }, Vec::new()), "");
}

/// Every Markdown file of the repository that is not a record.
fn documents(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !matches!(&*name, "target" | "record" | "node_modules") && !name.starts_with('.') {
            documents(&path, found);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// Errors in code spans: what says what is allowed, or that something is not there or not supported.
fn quoted(text: &str) -> Vec<String> {
    let code = text.split("```").step_by(2).collect::<Vec<_>>().join("\n");
    let mut spans = Vec::new();
    for line in code.lines() {
        let (double, single): (Vec<_>, Vec<_>) = line.split("``").enumerate().partition(|(k, _)| k % 2 == 1);
        spans.extend(double.into_iter().map(|(_, span)| span.to_string()));
        let single = single.into_iter().flat_map(|(_, part)| part.split('`').skip(1).step_by(2));
        spans.extend(single.map(str::to_string));
    }
    spans.retain(|s| {
        ["; allowed: ", "does not support", "is not available: ", "option `"].iter().any(|part| s.contains(part))
    });
    spans
}

/// Whether `sentence` has the parts of `quote` between its ellipses, in their order, from its beginning on.
fn agrees(quote: &str, sentence: &str) -> bool {
    let mut rest = sentence;
    quote.split('…').enumerate().all(|(k, part)| match rest.find(part) {
        Some(at) if k > 0 || at == 0 => {
            rest = &rest[at + part.len()..];
            true
        }
        _ => false,
    })
}

#[test]
fn documents_quote_what_the_code_says() {
    let call = Call::new(Loss::samtone_query(), 0.05);
    let bounded = call.clone().with_workspace_bytes(100);
    let [problem, bounded] =
        [&call, &bounded].map(|call| Problem::new(call.pairs(100, 120).unwrap(), DType::F32, 700).unwrap());
    let odd = Some(GradientOutput { dtype: DType::F16, row_stride: 701 });
    let device = Capabilities::default();
    let plan = |problem: &Problem, device| Plan::new(problem, &device).unwrap_err();
    let sentences = [
        Problem::new(call.pairs(100, 120).unwrap(), DType::F64, 700).unwrap_err(),
        plan(&problem, Capabilities { max_buffer_bytes: 300_000, ..device }),
        plan(&problem.clone().with_gradients(odd, None).unwrap(), device),
        plan(&bounded, device),
        Error::WgpuUnavailable { reason: "no adapter".into() },
    ]
    .map(|error| error.to_string());

    let mut files = Vec::new();
    documents(Path::new(env!("CARGO_MANIFEST_DIR")), &mut files);
    let mut count = 0;
    for file in files {
        for quote in quoted(&std::fs::read_to_string(&file).unwrap()) {
            let known = sentences.iter().any(|sentence| agrees(&quote, sentence));
            assert!(known, "{} quotes {quote:?}, but the code says one of {sentences:#?}", file.display());
            count += 1;
        }
    }
    assert_eq!(count, 5, "a quote was added or removed: add what the code says, too");
}
