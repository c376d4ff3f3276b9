//! Drivers for tests, and child processes that find these drivers in place of the machine's own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use xxhash_rust::xxh3::Xxh3;

/// Names a check to the child process that runs it.
pub const CHILD: &str = "SAMTONE_CUDA_DRIVER_CHILD";

/// The names under which the crate and cudarc look for the driver.
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// A folder that holds a driver.
#[derive(Debug, Clone)]
pub struct Driver(PathBuf);

impl Driver {
    /// driver.cpp with the emulator and all kernels; built once, and again when a source has changed.
    pub fn emulated() -> Result<Self, String> {
        static BUILT: OnceLock<Result<Driver, String>> = OnceLock::new();
        BUILT.get_or_init(|| build_emulated().map(Self)).clone()
    }

    /// What goes to the loader's path.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// A file that no loader takes for a library, which hides the machine's own driver.
    pub fn broken() -> Result<Self, String> {
        let folder = temporary().join("cuda_driver-broken");
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        for name in LIBRARIES {
            std::fs::write(folder.join(name), "no library").map_err(|e| e.to_string())?;
        }
        Ok(Self(folder))
    }

    /// A library that has one of the driver's functions, and not the others.
    pub fn partial() -> Result<Self, String> {
        let folder = temporary().join("cuda_driver-partial");
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        let source = folder.join("partial.cpp");
        std::fs::write(&source, "extern \"C\" int cuInit(unsigned) { return 0; }\n").map_err(|e| e.to_string())?;
        run(Command::new(compiler()?)
            .args(["-shared", "-fPIC"])
            .arg(&source)
            .arg("-o")
            .arg(folder.join(LIBRARIES[0])))?;
        Ok(Self(folder))
    }

    /// The same driver without one of its functions: under another name, none finds it.
    fn without(&self, function: &str) -> Result<Self, String> {
        let hidden = [b"no", &function.as_bytes()[2..]].concat();
        let mut library = std::fs::read(self.0.join(LIBRARIES[0])).map_err(|e| e.to_string())?;
        let found =
            memmem(&library, format!("\0{function}\0").as_bytes()).ok_or("the driver does not have it anyway")?;
        library[found + 1..][..hidden.len()].copy_from_slice(&hidden);
        let folder = self.0.with_extension(format!("without-{function}"));
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        let draft = folder.join(format!("{}.draft", std::process::id()));
        std::fs::write(&draft, library).map_err(|e| e.to_string())?;
        std::fs::rename(&draft, folder.join(LIBRARIES[0])).map_err(|e| e.to_string())?;
        Ok(Self(folder))
    }

    /// Runs a check in a child process of this executable, with this driver, where a panic ends the process at once, as with
    /// `panic = "abort"`. `without=NAME` among the settings, the first of them, hides a function.
    pub fn run(&self, check: &str, settings: &str) -> Result<(), String> {
        if let Some(rest) = settings.strip_prefix("without=") {
            let (function, rest) = rest.split_once(' ').unwrap_or((rest, ""));
            return self.without(function)?.run(check, rest);
        }
        let executable = std::env::current_exe().map_err(|e| e.to_string())?;
        let mut path = OsString::from(&self.0);
        if let Some(rest) = std::env::var_os("LD_LIBRARY_PATH") {
            path.push(":");
            path.push(rest);
        }
        let mut command = Command::new(executable);
        command.env(CHILD, check).env("LD_LIBRARY_PATH", path).env("SAMTONE_TEST_DRIVER", settings);
        run(command.env_remove("RUST_BACKTRACE").stdin(Stdio::null()))
    }
}

/// An error with what the command wrote, unless it succeeds.
fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}

fn memmem(all: &[u8], part: &[u8]) -> Option<usize> {
    all.windows(part.len()).position(|window| window == part)
}

fn temporary() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn compiler() -> Result<String, String> {
    if !cfg!(target_os = "linux") {
        return Err("the emulator's threads and the loader's path need Linux".into());
    }
    let program = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let found = Command::new(&program).arg("--version").output();
    found.map(|_| program.clone()).map_err(|e| format!("there is no C++ compiler: `{program}`: {e}"))
}

fn build_emulated() -> Result<PathBuf, String> {
    let compiler = compiler()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = |folder: &str, suffix: &str| -> Result<Vec<PathBuf>, String> {
        let entries = std::fs::read_dir(root.join(folder)).map_err(|e| format!("{folder}: {e}"))?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut paths: Vec<_> = paths.filter(|path| path.to_string_lossy().ends_with(suffix)).collect();
        paths.sort();
        Ok(paths)
    };
    // The emulator's own process, which speaks to tests by pipes, is not part of it.
    let mut sources = files("kernels/emulator", ".cpp")?;
    sources.retain(|path| !path.ends_with("server.cpp"));
    sources.extend(files("kernels", ".cu")?);
    sources.extend(files("tests/cuda_driver", ".cpp")?);
    let own = files("tests/cuda_driver", ".hpp")?;
    let headers = [files("kernels/common", ".cuh")?, files("kernels/emulator", ".hpp")?, own].concat();

    let text = |path: &PathBuf| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
    let headers = headers.iter().map(text).collect::<Result<Vec<_>, _>>()?.concat();
    let build = temporary().join("cuda_driver-objects");
    std::fs::create_dir_all(&build).map_err(|e| e.to_string())?;
    let options = ["-std=c++20", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-DSAMTONE_EMULATED"];
    let object = |source: &PathBuf| -> Result<PathBuf, String> {
        let mut hash = Xxh3::new();
        [&headers, &text(source)?, &options.concat().into_bytes()].into_iter().for_each(|part| hash.update(part));
        let name = source.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        let target = build.join(format!("{name}-{:016x}.o", hash.digest()));
        if !target.exists() {
            // Another process may build the same: the last to rename wins.
            let draft = target.with_extension(format!("{}.draft", std::process::id()));
            run(Command::new(&compiler).args(options).args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(&draft))?;
            std::fs::rename(&draft, &target).map_err(|e| e.to_string())?;
        }
        Ok(target)
    };
    let objects = std::thread::scope(|scope| {
        let builds: Vec<_> = sources.iter().map(|source| scope.spawn(|| object(source))).collect();
        builds.into_iter().map(|b| b.join().map_err(|_| "a build panicked".to_string())?).collect::<Result<Vec<_>, _>>()
    })?;

    let mut hash = Xxh3::new();
    objects.iter().for_each(|path| hash.update(path.as_os_str().as_encoded_bytes()));
    let folder = temporary().join(format!("cuda_driver-{:016x}", hash.digest()));
    if !folder.join(LIBRARIES[1]).exists() {
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        let draft = folder.join(format!("{}.draft", std::process::id()));
        run(Command::new(&compiler).args(["-shared", "-Wl,-Bsymbolic"]).args(&objects).arg("-o").arg(&draft))?;
        // One file under both names, as a driver is installed, so that it is loaded once.
        std::fs::rename(&draft, folder.join(LIBRARIES[0])).map_err(|e| e.to_string())?;
        let linked = std::fs::hard_link(folder.join(LIBRARIES[0]), folder.join(LIBRARIES[1]));
        linked.or_else(|e| if folder.join(LIBRARIES[1]).exists() { Ok(()) } else { Err(e.to_string()) })?;
    }
    Ok(folder)
}
