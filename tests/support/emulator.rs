//! Kernels of `kernels/`, compiled as C++ and run without a GPU. kernels/README.md says what is modelled.
//!
//! The emulator is a process of its own. So a crash of emulated code comes back as a sentence.

use bytemuck::Pod;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use xxhash_rust::xxh3::Xxh3;

/// Compiles kernel files with the C++ compiler of this machine (`CXX`, or g++) and keeps what it built.
pub struct Compiler {
    program: String,
    version: Vec<u8>,
    kernels: PathBuf,
    built: PathBuf,
}

impl Compiler {
    /// `Err` says why no kernel can be emulated on this machine.
    pub fn find() -> Result<Self, String> {
        if !cfg!(target_os = "linux") {
            return Err("the emulator's threads need Linux".into());
        }
        let program = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        let version = Command::new(&program).arg("--version").output();
        let version = version.map_err(|e| format!("there is no C++ compiler: `{program}`: {e}"))?.stdout;
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        // Cargo names a folder to tests, and none to examples.
        let temporary =
            option_env!("CARGO_TARGET_TMPDIR").unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/target/tmp"));
        Ok(Self { program, version, kernels, built: Path::new(temporary).join("emulator") })
    }

    /// The executable that emulates the kernels of `file`, a path below `kernels/`.
    pub fn build(&self, file: &str) -> Result<PathBuf, String> {
        let name = Path::new(file).file_stem().map_or(file.into(), |stem| stem.to_string_lossy());
        self.build_all(&name, &[file])
    }

    /// The executable `name` that emulates the kernels of all these files together, on the same buffers.
    pub fn build_all(&self, name: &str, files: &[&str]) -> Result<PathBuf, String> {
        std::fs::create_dir_all(&self.built).map_err(|e| format!("{}: {e}", self.built.display()))?;
        let shared = self.files_of(&["common", "emulator"])?;
        let stem = |path: &PathBuf| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let parts = shared.iter().filter(|path| path.extension().is_some_and(|extension| extension == "cpp"));
        // Sanitised, because an overflowing index or a register array left at its end is a defect of the kernel.
        let kernel = ["-c", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-x", "c++"];
        let sources = (parts.filter_map(stem).map(|part| (format!("emulator/{part}.cpp"), &["-c", "-O3"][..])))
            .chain(files.iter().map(|file| (file.to_string(), &kernel[..])));
        let objects: Result<Vec<_>, String> = std::thread::scope(|scope| {
            let builds: Vec<_> = sources
                .map(|(file, arguments)| {
                    let (source, shared) = (self.kernels.join(&file), &shared);
                    scope.spawn(move || {
                        let name = source.file_stem().map_or(file.clone(), |stem| stem.to_string_lossy().into_owned());
                        self.make(&name, "o", std::slice::from_ref(&source), arguments, shared)
                    })
                })
                .collect();
            builds.into_iter().map(|build| build.join().map_err(|_| "a build panicked".to_string())?).collect()
        });
        self.make(name, "emulated", &objects?, &["-fsanitize=undefined"], &[])
    }

    /// Whether this text, which includes a kernel file, compiles as that does; `Err` is what the compiler says.
    #[allow(dead_code)] // for one of the binaries that include this
    pub fn check(&self, name: &str, text: &str, kernel: &Path) -> Result<(), String> {
        std::fs::create_dir_all(&self.built).map_err(|e| format!("{}: {e}", self.built.display()))?;
        let source = self.built.join(format!("{name}.cpp"));
        std::fs::write(&source, text).map_err(|e| format!("{}: {e}", source.display()))?;
        let includes = [self.files_of(&["common", "emulator"])?, vec![kernel.to_owned()]].concat();
        self.make(name, "o", &[source], &["-c", "-O0"], &includes).map(drop)
    }

    /// Every header and source in these folders of `kernels/`, without the folders in them.
    fn files_of(&self, folders: &[&str]) -> Result<Vec<PathBuf>, String> {
        let mut files = Vec::new();
        for folder in folders {
            let folder = self.kernels.join(folder);
            let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
            files.extend(entries.filter_map(Result::ok).map(|entry| entry.path()).filter(|path| path.is_file()));
        }
        files.sort();
        Ok(files)
    }

    /// Runs the compiler on `sources`, unless the same was built before from the same texts.
    fn make(
        &self,
        name: &str,
        kind: &str,
        sources: &[PathBuf],
        arguments: &[&str],
        includes: &[PathBuf],
    ) -> Result<PathBuf, String> {
        // Kernels keep plain products and sums apart from fused ones by name, so the compiler must not fuse them.
        let always =
            ["-std=c++20", "-g", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-DSAMTONE_EMULATED", "-Wall", "-Wextra"];
        let mut hash = Xxh3::new();
        hash.update(&self.version);
        for argument in always.iter().chain(arguments) {
            hash.update(argument.as_bytes());
            hash.update(&[0]);
        }
        for file in includes.iter().chain(sources) {
            hash.update(&std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?);
        }
        let target = self.built.join(format!("{name}-{:016x}.{kind}", hash.digest()));
        if target.exists() {
            return Ok(target);
        }
        // Another process may build the same: each writes a file of its own, and the last to rename wins.
        let draft = self.built.join(format!("{name}-{}-{:?}", std::process::id(), std::thread::current().id()));
        let mut command = Command::new(&self.program);
        command.args(always).args(arguments).args(sources);
        let output = command.arg("-o").arg(&draft).output().map_err(|e| format!("`{}`: {e}", self.program))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("{name} does not compile:\n{errors}"));
        }
        if !errors.is_empty() {
            eprintln!("{name}: {errors}");
        }
        std::fs::rename(&draft, &target).map_err(|e| format!("{}: {e}", target.display()))?;
        Ok(target)
    }
}

/// One launch. Starts with one block, seed 0, no shared memory, no arguments, races detected.
#[derive(Clone)]
pub struct Launch {
    kernel: String,
    threads: u32,
    grid: [u32; 3],
    shared_bytes: u32,
    seed: u64,
    detect_races: bool,
    overlaps: bool,
    seconds: u32,
    mutant: String,
    arguments: Vec<Vec<u8>>,
}

impl Launch {
    pub fn new(kernel: &str, threads: u32) -> Self {
        Self {
            kernel: kernel.into(),
            threads,
            grid: [1; 3],
            shared_bytes: 0,
            seed: 0,
            detect_races: true,
            overlaps: false,
            seconds: 120,
            mutant: String::new(),
            arguments: Vec::new(),
        }
    }
    pub fn grid(mut self, x: u32, y: u32, z: u32) -> Self {
        self.grid = [x, y, z];
        self
    }
    pub fn shared_bytes(mut self, bytes: u32) -> Self {
        self.shared_bytes = bytes;
        self
    }
    /// A parameter of the kernel: a number, or the address of a buffer.
    pub fn argument<T: Pod>(mut self, value: T) -> Self {
        self.arguments.push(bytemuck::bytes_of(&value).to_vec());
        self
    }
    /// A parameter of the kernel, as bytes.
    pub fn argument_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.arguments.push(bytes);
        self
    }
    /// Chooses the order of blocks and threads, and when asynchronous copies land.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
    /// Leaves out the barriers with this label, or plants this defect. Fails if the kernel never gets there.
    pub fn mutant(mut self, name: &str) -> Self {
        self.mutant = name.into();
        self
    }
    /// Likewise, but no failure if the kernel never gets there; for a sequence of launches of which one does.
    pub fn mutant_if_reached(mut self, name: &str) -> Self {
        self.mutant = if name.is_empty() { String::new() } else { format!("?{name}") };
        self
    }
    /// Without detection a missing barrier shows as a wrong result, in some order of the threads.
    pub fn detect_races(mut self, detect: bool) -> Self {
        self.detect_races = detect;
        self
    }
    /// It may begin before earlier launches are complete, so that it must wait before it touches global memory.
    pub fn overlaps(mut self, overlaps: bool) -> Self {
        self.overlaps = overlaps;
        self
    }
    /// The launch fails if it takes longer.
    pub fn seconds(mut self, seconds: u32) -> Self {
        self.seconds = seconds;
        self
    }
}

/// An emulated device: buffers that live as long as it, and launches one after the other.
pub struct Device {
    child: Child,
    requests: Option<BufWriter<ChildStdin>>,
    answers: BufReader<ChildStdout>,
    buffers: Vec<u64>,
    allocated: usize,
}

impl Device {
    /// Buffers that a device can number, with some to spare: an address is never used again.
    const LIMIT: usize = 16_000;

    pub fn start(executable: &Path) -> Result<Self, String> {
        let about = |e| format!("{}: {e}", executable.display());
        let mut command = Command::new(executable);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(about)?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("the emulator has no pipes".into());
        };
        Ok(Self {
            child,
            requests: Some(BufWriter::new(requests)),
            answers: BufReader::new(answers),
            buffers: Vec::new(),
            allocated: 0,
        })
    }

    /// Address of a new buffer. What is never written stays NaN, and a kernel that reads it fails.
    pub fn allocate(&mut self, name: &str, bytes: usize) -> Result<u64, String> {
        let address = self.request(1, &[&text(name), &(bytes as u64).to_le_bytes()])?;
        let address = address.try_into().map(u64::from_le_bytes).map_err(|_| "the emulator gave no address")?;
        self.buffers.push(address);
        self.allocated += 1;
        Ok(address)
    }

    /// Whether so many more buffers can be allocated.
    pub fn has_room(&self, buffers: usize) -> bool {
        self.allocated + buffers <= Self::LIMIT
    }

    /// Frees every buffer; their addresses stay invalid.
    pub fn release_all(&mut self) -> Result<(), String> {
        for address in std::mem::take(&mut self.buffers) {
            self.request(2, &[&address.to_le_bytes()])?;
        }
        Ok(())
    }

    pub fn write<T: Pod>(&mut self, address: u64, values: &[T]) -> Result<(), String> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.request(3, &[&address.to_le_bytes(), &(bytes.len() as u64).to_le_bytes(), bytes]).map(drop)
    }

    /// A new buffer with these values.
    pub fn upload<T: Pod>(&mut self, name: &str, values: &[T]) -> Result<u64, String> {
        let address = self.allocate(name, size_of_val(values))?;
        self.write(address, values)?;
        Ok(address)
    }

    pub fn download<T: Pod>(&mut self, address: u64, count: usize) -> Result<Vec<T>, String> {
        let bytes = self.request(4, &[&address.to_le_bytes(), &((count * size_of::<T>()) as u64).to_le_bytes()])?;
        let mut values = vec![T::zeroed(); count];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(&bytes);
        Ok(values)
    }

    /// `Err` is a sentence with kernel, block, thread, operation and line. The buffers stay, as the kernel left them.
    pub fn launch(&mut self, launch: &Launch) -> Result<(), String> {
        let number = |n: u32| n.to_le_bytes().to_vec();
        let mut parts = vec![text(&launch.kernel)];
        parts.extend(launch.grid.map(number));
        parts.extend([number(launch.threads), number(launch.shared_bytes), launch.seed.to_le_bytes().to_vec()]);
        parts.extend([number(launch.detect_races.into()), number(launch.overlaps.into()), number(launch.seconds)]);
        parts.push(text(&launch.mutant));
        parts.push(number(launch.arguments.len() as u32));
        parts.extend(launch.arguments.iter().map(|argument| blob(argument)));
        self.request(5, &parts.iter().map(Vec::as_slice).collect::<Vec<_>>()).map(drop)
    }

    fn request(&mut self, what: u8, parts: &[&[u8]]) -> Result<Vec<u8>, String> {
        match self.exchange(what, parts) {
            Ok((0, payload)) => Ok(payload),
            Ok((_, sentence)) => Err(String::from_utf8_lossy(&sentence).into_owned()),
            Err(_) => Err(self.obituary()),
        }
    }

    fn exchange(&mut self, what: u8, parts: &[&[u8]]) -> std::io::Result<(u8, Vec<u8>)> {
        let requests = self.requests.as_mut().ok_or(std::io::ErrorKind::BrokenPipe)?;
        requests.write_all(&[what])?;
        for part in parts {
            requests.write_all(part)?;
        }
        requests.flush()?;
        let mut status = [0; 1];
        self.answers.read_exact(&mut status)?;
        let mut length = [0; 8];
        self.answers.read_exact(&mut length)?;
        let mut payload = vec![0; u64::from_le_bytes(length) as usize];
        self.answers.read_exact(&mut payload)?;
        Ok((status[0], payload))
    }

    /// What the process left behind.
    fn obituary(&mut self) -> String {
        self.requests = None;
        let mut last_words = String::new();
        if let Some(mut errors) = self.child.stderr.take() {
            let _ = errors.read_to_string(&mut last_words);
        }
        match self.child.wait() {
            Ok(status) => format!("the emulator ended ({status}): {}", last_words.trim()),
            Err(e) => format!("the emulator ended, nobody knows how: {e}"),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.requests = None; // it ends when nobody asks any more
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn blob(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

fn text(text: &str) -> Vec<u8> {
    blob(text.as_bytes())
}
