//! A Chromium without a window, with a profile of its own.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const NAMES: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];

/// Nothing but the page: no updates, no first-run pages. WebGPU without a GPU is Chromium's own software adapter. Without the
/// sandbox, because it needs a kernel and a user that containers rarely have; the only page is ours.
const FLAGS: [&str; 10] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
];

/// The first of the usual names in PATH.
pub fn find() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .find_map(|folder| NAMES.iter().map(|name| folder.join(name)).find(|file| file.is_file()));
    found.with_context(|| {
        format!(
            "no Chromium in PATH ({}): install one (Debian: apt-get install chromium), name one with --chromium, or open the \
             page in a browser of yours with --serve",
            NAMES.join(", ")
        )
    })
}

/// A running Chromium; ends with this value.
pub struct Chromium {
    program: PathBuf,
    child: Child,
    /// Profile, and what the program prints.
    folder: Option<TempDir>,
}

impl Chromium {
    /// Opens `address`.
    pub fn start(program: &Path, address: &str, more: &[String]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("samtone-browser-").tempdir()?;
        let log = File::create(folder.path().join("stderr"))?;
        let child = Command::new(program)
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
            .args(more)
            .arg(address)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("Chromium does not start as {}", program.display()))?;
        Ok(Self { program: program.into(), child, folder: Some(folder) })
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("Chromium cannot be waited for")
    }

    /// The end of what it printed.
    pub fn last_words(&self) -> String {
        const LINES: usize = 20;
        let text = self.folder.as_ref().and_then(|folder| std::fs::read(folder.path().join("stderr")).ok());
        let text = text.map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        if lines.is_empty() {
            return "  nothing\n".into();
        }
        lines[lines.len().saturating_sub(LINES)..].iter().map(|line| format!("  {line}\n")).collect()
    }

    /// Another one with the same program takes a picture of `address`.
    pub fn photograph(&self, address: &str, picture: &Path, timeout: Duration) -> Result<()> {
        let options = [
            "--window-size=1100,1000",
            "--hide-scrollbars",
            "--force-device-scale-factor=1.25",
            "--virtual-time-budget=5000",
        ];
        let mut more: Vec<String> = options.iter().map(|option| option.to_string()).collect();
        more.push(format!("--screenshot={}", std::path::absolute(picture)?.display()));
        let mut photographer = Self::start(&self.program, address, &more)?;
        let start = Instant::now();
        while photographer.ended()?.is_none() {
            if start.elapsed() > timeout {
                bail!("no picture after {} s; Chromium printed\n{}", timeout.as_secs(), photographer.last_words());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if !picture.is_file() {
            bail!("no picture at {}; Chromium printed\n{}", picture.display(), photographer.last_words());
        }
        Ok(())
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Its helpers end when they miss it, and until then may write to the profile.
        if let Some(path) = self.folder.take().map(TempDir::keep) {
            for _ in 0..50 {
                if std::fs::remove_dir_all(&path).is_ok() && !path.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}
