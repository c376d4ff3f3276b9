//! Runs trials and says in a few lines what came out: how many of each group passed, the reason for whatever was ignored, and every
//! failure. If few trials are chosen, each has a line of its own, unless `--quiet` is given.

use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Up to so many trials have a line each.
const FEW: usize = 40;
/// After this time a run says how far it is, then after twice the time, and so on.
const NEWS: Duration = Duration::from_secs(60);
/// A file that swallows what is written.
pub const NOWHERE: &str = if cfg!(windows) { "NUL" } else { "/dev/null" };
/// Characters of a line of numbers by group.
const LINE: usize = 120;
/// Characters of a reason in the summary.
const REASON: usize = 180;

/// A trial before it runs.
pub struct Listed {
    /// What the summary counts together.
    group: String,
    name: String,
    /// Why it is ignored, unless all are asked for.
    ignored: Option<String>,
    run: Box<dyn FnOnce() -> Result<(), Failed> + Send>,
}

impl Listed {
    pub fn new(
        group: impl Into<String>,
        name: impl Into<String>,
        run: impl FnOnce() -> Result<(), Failed> + Send + 'static,
    ) -> Self {
        Self { group: group.into(), name: name.into(), ignored: None, run: Box::new(run) }
    }

    /// Ignored for this reason, if there is one.
    pub fn ignored(self, reason: Option<String>) -> Self {
        Self { ignored: reason, ..self }
    }
}

/// Whether the environment variable `SAMTONE_REQUIRE`, names separated by commas, demands this.
pub fn is_required(name: &str) -> bool {
    std::env::var("SAMTONE_REQUIRE").unwrap_or_default().split(',').any(|required| required.trim() == name)
}

/// Prints a figure that some reader may want, if `--nocapture` is given.
pub fn note(figure: std::fmt::Arguments<'_>) {
    if std::env::args().any(|argument| argument == "--nocapture") {
        println!("{figure}");
    }
}

/// Of one group.
#[derive(Default)]
struct Count {
    passed: usize,
    failed: usize,
    /// Reason and number.
    ignored: BTreeMap<String, usize>,
}

/// Of one run.
#[derive(Default)]
struct Results {
    /// In the order in which groups first occur.
    groups: Vec<(String, Count)>,
    /// Name and message.
    failures: Vec<(String, String)>,
    done: usize,
}

impl Results {
    fn group(&mut self, name: &str) -> &mut Count {
        let at = self.groups.iter().position(|(group, _)| group == name).unwrap_or_else(|| {
            self.groups.push((name.into(), Count::default()));
            self.groups.len() - 1
        });
        &mut self.groups[at].1
    }
}

/// Runs what the command line chooses. With `SAMTONE_TRACE`, `--format` or `--logfile` each trial has a line, whatever their number.
pub fn run(arguments: &Arguments, listed: Vec<Listed>) -> ExitCode {
    run_to(arguments, listed, Arc::new(Mutex::new(std::io::stdout())))
}

/// [`run`], with a summary that goes to `out`.
pub fn run_to<W: std::io::Write + Send + 'static>(
    arguments: &Arguments,
    listed: Vec<Listed>,
    out: Arc<Mutex<W>>,
) -> ExitCode {
    let start = Instant::now();
    let results = Arc::new(Mutex::new(Results::default()));
    let mut trials = Vec::new();
    let (mut chosen, mut to_run, all) = (0, 0, listed.len());
    let news = Arc::new(Mutex::new(NEWS));
    let counted = Arc::new(std::sync::OnceLock::new());
    let traced = std::env::var_os("SAMTONE_TRACE").is_some();
    for Listed { group, name, ignored, run } in listed {
        let wrapped = {
            let (results, group, name) = (results.clone(), group.clone(), name.clone());
            let (out, news, counted) = (out.clone(), news.clone(), counted.clone());
            move || {
                if traced {
                    let line = format!("begins: {name}\n"); // written at once, whatever other threads write
                    eprint!("{line}");
                }
                let outcome =
                    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(message_of(&*panic).into()));
                let mut results = lock(&results);
                results.done += 1;
                match &outcome {
                    Ok(()) => results.group(&group).passed += 1,
                    Err(error) => {
                        results.group(&group).failed += 1;
                        results.failures.push((name, error.message().unwrap_or("no message").into()));
                    }
                }
                let mut next = lock(&news);
                if let Some(to_run) = counted.get().filter(|_| start.elapsed() > *next) {
                    *next = 2 * start.elapsed();
                    let seconds = start.elapsed().as_secs();
                    let failed = results.failures.len();
                    let _ = writeln!(lock(&out), "{} of {to_run} after {seconds} s, {failed} failed", results.done);
                }
                outcome
            }
        };
        let trial = Trial::test(name, wrapped).with_ignored_flag(ignored.is_some());
        if !arguments.is_filtered_out(&trial) {
            chosen += 1;
            let count = &mut lock(&results);
            let count = count.group(&group);
            match ignored.filter(|_| arguments.is_ignored(&trial)) {
                Some(reason) => *count.ignored.entry(reason).or_default() += 1,
                None => to_run += 1,
            }
        }
        trials.push(trial);
    }
    let few = chosen <= FEW && !arguments.quiet;
    let one_by_one = few || arguments.list || arguments.format.is_some() || arguments.logfile.is_some() || traced;
    let mut arguments = arguments.clone();
    if !one_by_one {
        let _ = writeln!(lock(&out), "running {to_run} of {chosen} trials; `-- --format pretty` shows each");
        let _ = counted.set(to_run);
        arguments.logfile = Some(NOWHERE.into());
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list && arguments.format.is_none_or(|format| format == libtest_mimic::FormatSetting::Pretty) {
        let results = lock(&results);
        let summary = if one_by_one {
            reasons(&results.groups)
        } else {
            let groups = &results.groups;
            format!("{}{}{}", summary(groups), reasons(groups), verdict(&results, all - chosen, start.elapsed()))
        };
        // A reader that has left must not hide the exit code.
        let _ = lock(&out).write_all(summary.as_bytes());
    }
    conclusion.exit_code()
}

/// How many of each group passed and failed.
fn summary(groups: &[(String, Count)]) -> String {
    numbers("passed", groups, |count| count.passed) + &numbers("FAILED", groups, |count| count.failed)
}

/// Lines of at most [`LINE`] characters, if there is anything to say.
fn numbers(word: &str, groups: &[(String, Count)], of: fn(&Count) -> usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    for (name, count) in groups.iter().filter(|(_, count)| of(count) > 0) {
        let part = format!("{name} {}", of(count));
        match lines.last_mut().filter(|line| line.chars().count() + 2 + part.chars().count() <= LINE) {
            Some(line) => *line += &format!(", {part}"),
            None => lines.push(format!("  {word}: {part}")),
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// A line for each reason, with the groups that it ignores.
fn reasons(groups: &[(String, Count)]) -> String {
    let mut reasons: Vec<(&String, usize, Vec<&str>)> = Vec::new();
    for (name, count) in groups {
        for (reason, number) in &count.ignored {
            match reasons.iter_mut().find(|(other, ..)| *other == reason) {
                Some((_, all, names)) => {
                    *all += number;
                    names.push(name);
                }
                None => reasons.push((reason, *number, vec![name])),
            }
        }
    }
    let line = |(reason, number, names): (&String, usize, Vec<&str>)| {
        format!("  {number} ignored of {}: {}\n", names.join(", "), shortened(reason))
    };
    reasons.into_iter().map(line).collect()
}

/// Failures, and the last line, as cargo's own tests have them.
fn verdict(results: &Results, filtered_out: usize, elapsed: Duration) -> String {
    let mut text = String::new();
    if !results.failures.is_empty() {
        text += "\nfailures:\n";
        for (name, message) in &results.failures {
            let _ = writeln!(text, "\n---- {name} ----\n{message}");
        }
        text += "\nfailures:\n";
        results.failures.iter().for_each(|(name, _)| text += &format!("    {name}\n"));
        text += "\n";
    }
    let sum = |of: fn(&Count) -> usize| results.groups.iter().map(|(_, count)| of(count)).sum::<usize>();
    let (passed, failed, ignored) = (sum(|c| c.passed), sum(|c| c.failed), sum(|c| c.ignored.values().sum()));
    let word = if failed == 0 { "ok" } else { "FAILED" };
    let seconds = elapsed.as_secs_f64();
    let _ = writeln!(
        text,
        "test result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; {filtered_out} filtered out; finished \
         in {seconds:.2}s"
    );
    text
}

fn shortened(reason: &str) -> String {
    let line = reason.lines().next().unwrap_or_default();
    match line.char_indices().nth(REASON) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.into(),
    }
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", text.unwrap_or_else(|| "without a message".into()))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
