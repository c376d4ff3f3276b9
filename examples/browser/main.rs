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
mod server;
mod site;

use anyhow::{Context, Result, bail};
use chromium::Chromium;
use clap::Parser;
use server::{Event, Server};
use site::Site;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
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
        Err(error) => {
            // One sentence; anyhow's own way would add a backtrace wherever RUST_BACKTRACE is set.
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether every run passes.
fn run(arguments: &Arguments) -> Result<bool> {
    let chromium = match (arguments.serve || arguments.out.is_some(), &arguments.chromium) {
        (true, _) => None,
        (false, Some(path)) => Some(path.clone()),
        (false, None) => Some(chromium::find()?),
    };
    let site = Site::new(&arguments.path)?;
    if let Some(folder) = &arguments.out {
        site.write(folder)?;
        println!("{} runs in {}: to be opened through a web server", site.runs.len(), folder.display());
        return Ok(true);
    }
    let site = Arc::new(site);
    let server = Server::start(site.clone(), arguments.port)?;
    println!("{} runs at {}", site.runs.len(), server.address);
    let Some(chromium) = chromium else {
        println!("open it in a browser with WebGPU; interrupt to end");
        loop {
            // Pages may come and go; each prints its own summary.
            follow(&server, &site, None, Duration::from_secs(u64::MAX / 4))?;
        }
    };
    let mut chromium = Chromium::start(&chromium, &server.address, &[])?;
    let timeout = Duration::from_secs(arguments.timeout);
    let outcome = follow(&server, &site, Some(&mut chromium), timeout);
    let passed = outcome.with_context(|| format!("what Chromium printed last:\n{}", chromium.last_words()))?;
    if let Some(picture) = &arguments.screenshot {
        chromium.photograph(&format!("{}?shown", server.address), picture, timeout)?;
        println!("{}", picture.display());
    }
    Ok(passed)
}

/// Prints what the page reports until it has finished, and says whether everything passed.
fn follow(server: &Server, site: &Site, mut chromium: Option<&mut Chromium>, timeout: Duration) -> Result<bool> {
    const TICK: Duration = Duration::from_millis(100);
    let (mut started, mut heard) = (Instant::now(), Instant::now());
    let (mut passed, mut failed) = (0, 0);
    loop {
        let event = match server.events.recv_timeout(TICK) {
            Ok(event) => event,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => bail!("the server of the page ended"),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                if let Some(status) = chromium.as_mut().map(|c| c.ended()).transpose()?.flatten() {
                    bail!("Chromium ended before the page had finished ({status})");
                }
                if heard.elapsed() > timeout {
                    bail!(
                        "no news from the page for {} s, after {} of {} runs; a slow machine may need a higher --timeout",
                        timeout.as_secs(),
                        passed + failed,
                        site.runs.len()
                    );
                }
                continue;
            }
        };
        heard = Instant::now();
        match event {
            Event::Started(adapter) => {
                println!("{adapter}");
                (started, passed, failed) = (heard, 0, 0);
            }
            Event::Skipped(device, reason) => println!("SKIP  {device}: {reason}"),
            Event::Judged(verdict) => {
                println!("{verdict}");
                if verdict.passed { passed += 1 } else { failed += 1 }
            }
            Event::Failed(reason) if chromium.is_some() => bail!("the page gave up: {reason}"),
            Event::Failed(reason) => {
                println!("the page gave up: {reason}");
                return Ok(false);
            }
            Event::Finished => {
                let left = site.runs.len() - passed - failed;
                let seconds = started.elapsed().as_secs_f64();
                println!("{passed} passed, {failed} failed, {left} skipped, in {seconds:.1} s");
                if passed + failed == 0 {
                    bail!("the page ran nothing");
                }
                return Ok(failed == 0);
            }
        }
    }
}
