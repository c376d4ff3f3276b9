//! The emulator of `kernels/emulator`, on test kernels whose results are known and whose defects are planted. Also what host and kernels
//! share, of which its build is a witness.
//!
//! Without a C++ compiler the trials are reported as ignored. With `emulator` in the environment variable `SAMTONE_REQUIRE` they fail
//! instead.

mod cuda_abi;
#[path = "../support/emulator.rs"]
mod emulator;
mod faults;
mod hopper;
mod hopper_faults;
mod instructions;
mod kernels;
mod pipeline;
#[path = "../support/report.rs"]
#[allow(dead_code)]
mod report;

use emulator::{Compiler, Device};
use libtest_mimic::Arguments;
use report::{Listed, is_required};
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock};

type Built = Arc<OnceLock<Result<PathBuf, String>>>;

/// Executables by kernel file, each built by the first trial that asks.
pub struct Emulators {
    compiler: Result<Compiler, String>,
    built: Mutex<HashMap<&'static str, Built>>,
}

impl Emulators {
    /// A device that knows the kernels of `kernels/emulator/tests/<file>`.
    pub fn device(&self, file: &'static str) -> Result<Device, String> {
        let cell = self.built.lock().map_err(|e| e.to_string())?.entry(file).or_default().clone();
        let compiler = self.compiler.as_ref()?;
        let executable = cell.get_or_init(|| compiler.build(&format!("emulator/tests/{file}")));
        Device::start(executable.as_ref()?)
    }
}

type Check = Box<dyn FnOnce(&Emulators) -> Result<(), String> + Send>;

fn main() -> ExitCode {
    let emulators = Arc::new(Emulators { compiler: Compiler::find(), built: Mutex::default() });
    let absent = emulators.compiler.as_ref().err().filter(|_| !is_required("emulator")).cloned();
    let checks = [
        kernels::checks(),
        instructions::checks(),
        faults::checks(),
        hopper::checks(),
        hopper_faults::checks(),
        pipeline::checks(),
    ];
    let checks = checks.into_iter().flatten();
    let listed = checks.map(|(name, check): (String, Check)| {
        let emulators = emulators.clone();
        Listed::new("emulator", name, move || Ok(check(&emulators)?)).ignored(absent.clone())
    });
    report::run(&Arguments::from_args(), cuda_abi::trials().into_iter().chain(listed).collect())
}
