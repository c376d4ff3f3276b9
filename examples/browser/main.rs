//! The WGSL backend in a browser: plans are exported as data, a page replays their dispatches on WebGPU, and the crate judges what
//! comes back.
//!
//! ```text
//! cargo run --release --example browser -- tests/golden                  in a Chromium without a window, on its software adapter
//! cargo run --release --example browser -- tests/golden --serve          prints an address for a browser and a GPU of yours
//! cargo run --release --example browser -- tests/golden --out FOLDER     writes the page and its data, for any web server
//! ```
//!
//! ```text
//! case ─→ Plan ─ export ─→ JSON, bytes ─ server ─→ page: buffers, dispatches ─→ bytes ─→ judge: Plan::evaluation, tolerances
//!                                                    └ table ←─ verdicts ←────────────────┘
//! ```
//!
//! The page decides nothing: shaders, sizes, contents, bindings and workgroups are those of the plan, and results are read and
//! compared as those of the native driver are. Exit code: 0 if every run passes, 1 if one fails, 2 for bad usage, a file that
//! cannot be read, or a browser that does not run.

#[path = "../../tests/support/mod.rs"]
mod support;

mod chromium;
mod export;
mod judge;
#[path = "../shared/output.rs"]
mod output;
mod server;
mod site;

use anyhow::{Context, Result, anyhow, bail};
use chromium::Chromium;
use clap::Parser;
use output::{whole_file, writable_place};
use server::{Event, Server};
use site::Site;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// Runs golden files in a browser and compares every output with the definition.
#[derive(Parser)]
struct Arguments {
    /// A file in the golden format, or a folder of such files.
    path: PathBuf,
    /// Starts no browser: prints the address of the page and serves it until interrupted.
    #[arg(long, conflicts_with_all = ["out", "chromium", "screenshot"])]
    serve: bool,
    /// Writes the page and its data to this folder, new or empty, and runs nothing.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["chromium", "screenshot"])]
    out: Option<PathBuf>,
    /// The Chromium or Chrome to start. Default: the first in PATH.
    #[arg(long, value_name = "PATH")]
    chromium: Option<PathBuf>,
    /// Writes a picture of the page with its results, as PNG.
    #[arg(long, value_name = "FILE")]
    screenshot: Option<PathBuf>,
    /// Seconds without news from the page after which it is given up.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Port of the page. Default: a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) if nobody_reads(&error) => ExitCode::from(2),
        Err(error) => {
            // One sentence; anyhow's own way would add a backtrace wherever RUST_BACKTRACE is set.
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Prints a line. An error, where its reader has left, ends the program in order, and Chromium with it.
fn print(line: impl Display) -> Result<()> {
    Ok(writeln!(io::stdout(), "{line}")?)
}

/// As in `… | head`.
fn nobody_reads(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Whether every run passes.
fn run(arguments: &Arguments) -> Result<bool> {
    let chromium = match (arguments.serve || arguments.out.is_some(), &arguments.chromium) {
        (true, _) => None,
        (false, Some(path)) => Some(path.clone()),
        (false, None) => Some(chromium::find()?),
    };
    // Before the work, which takes a while.
    arguments.out.iter().try_for_each(|folder| site::check_folder(folder))?;
    arguments.screenshot.iter().try_for_each(|picture| writable_place(picture))?;
    let site = Site::new(&arguments.path)?;
    if let Some(folder) = &arguments.out {
        site.write(folder)?;
        print(format!("{} runs in {}: to be opened through a web server", site.runs.len(), folder.display()))?;
        return Ok(true);
    }
    let site = Arc::new(site);
    let server = Server::start(site.clone(), arguments.port)?;
    print(format!("{} runs at {}", site.runs.len(), server.address))?;
    let Some(program) = chromium else {
        print("open it in a browser with WebGPU; interrupt to end")?;
        loop {
            // Pages may come and go; one that fails is no reason to end.
            if let Err(error) = follow(&site, || Ok(server.events.recv()?)) {
                print(format!("{error:#}"))?;
            }
        }
    };
    let mut chromium = Chromium::start(&program, &server.address, &[])?;
    let timeout = Duration::from_secs(arguments.timeout);
    let passed =
        follow(&site, || news(&server, &mut chromium, timeout)).map_err(|error| match nobody_reads(&error) {
            true => error,
            false => anyhow!("{error:#}\nChromium printed last:\n{}", chromium.last_words()),
        })?;
    if let Some(picture) = &arguments.screenshot {
        let address = format!("{}?shown", server.address);
        whole_file(picture, |draft| chromium.photograph(&address, draft, timeout))?;
        print(picture.display())?;
    }
    Ok(passed)
}

/// What the page reports next; an error if it cannot any more, or does not in time.
fn news(server: &Server, chromium: &mut Chromium, timeout: Duration) -> Result<Event> {
    const TICK: Duration = Duration::from_millis(100);
    let start = Instant::now();
    loop {
        match server.events.recv_timeout(TICK) {
            Ok(event) => return Ok(event),
            Err(RecvTimeoutError::Disconnected) => bail!("the server of the page ended"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(status) = chromium.ended()? {
            bail!("Chromium ended before the page had finished ({status})");
        }
        if start.elapsed() > timeout {
            bail!("no news from the page for {} s; a slow machine may need a higher --timeout", timeout.as_secs());
        }
    }
}

/// Prints what a page reports until it has finished, and says whether everything passed.
fn follow(site: &Site, mut next: impl FnMut() -> Result<Event>) -> Result<bool> {
    let mut started = Instant::now();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let all = site.runs.len();
    loop {
        match next().with_context(|| format!("after {} of {all} runs", passed + failed + skipped))? {
            Event::Started(adapter) => {
                print(adapter)?;
                (started, passed, failed, skipped) = (Instant::now(), 0, 0, 0);
            }
            Event::Skipped(device, lacks) => {
                print(format!("SKIP  {device}: this browser or its adapter lacks {lacks}"))?;
                skipped += site.runs.iter().filter(|run| run.device == device).count();
            }
            Event::Judged(verdict) => {
                print(&verdict)?;
                if verdict.passed { passed += 1 } else { failed += 1 }
            }
            Event::Failed(reason) => bail!("the page gave up: {reason}"),
            Event::Finished => {
                let seconds = started.elapsed().as_secs_f64();
                print(format!("{passed} passed, {failed} failed, {skipped} skipped, in {seconds:.1} s"))?;
                let rounded = site.runs.iter().filter(|run| !run.judged_by_file).count();
                if rounded > 0 {
                    print(format!(
                        "{rounded} runs are of embeddings that were rounded to the type: the reference judged them, and what a file \
                         holds was not compared"
                    ))?;
                }
                // What is neither run nor skipped must not count as passed.
                if passed + failed == 0 || passed + failed + skipped != all {
                    bail!("the page finished, but not with all of {all} runs");
                }
                return Ok(failed == 0);
            }
        }
    }
}
