//! The driver layer of the CUDA backend. It is tested on this machine's GPU if there is one, on a driver that emulates one
//! (tests/cuda_driver/driver.cpp), and without any driver.
//!
//! Checks that need a GPU are reported as ignored without one. With `cuda` in the variable `SAMTONE_REQUIRE` they fail instead. Checks on
//! the emulated driver need a C++ compiler and Linux, and `emulator` in the variable makes them fail without. All checks run in child
//! processes of this executable, in which a panic ends the process at once, as with `panic = "abort"`.

mod support;

#[path = "cuda_driver/changed.rs"]
mod changed;
#[path = "cuda_driver/emulated.rs"]
mod emulated;
#[cfg(feature = "cudarc")]
#[path = "cuda_driver/graphs.rs"]
mod graphs;
#[path = "cuda_driver/kernels.rs"]
mod kernels;
#[path = "cuda_driver/memory.rs"]
mod memory;
#[path = "cuda_driver/prefixes.rs"]
mod prefixes;
#[path = "cuda_driver/raw.rs"]
mod raw;
#[cfg(feature = "cudarc")]
#[path = "cuda_driver/slices.rs"]
mod slices;
#[path = "cuda_driver/stand_ins.rs"]
mod stand_ins;

use libtest_mimic::Arguments;
use samtone::cuda::{self, Device};
use samtone::{Error, backend};
use stand_ins::Driver;
use std::process::ExitCode;
use support::report::{self, Listed, is_required};

/// In place of a filter, has the folder of the emulated driver printed, for programs that are to find it on the loader's path.
const PRINT_EMULATED: &str = "print-emulated-driver";

/// What a check does; an error says what it found.
pub type Body = fn() -> Result<(), String>;
/// A check by name.
pub type Check = (&'static str, Body);

/// Checks of drivers that lack something: also what the emulated driver is told.
const LACKING: &[(&str, &str, Body)] = &[
    ("a driver that does not start", "init=999", || refused("999 (CUDA_ERROR_UNKNOWN)")),
    ("a driver that sees no device", "init=100", || refused("no device is visible")),
    ("a driver that counts no device", "devices=0", || refused("no device is visible")),
    ("a driver that is too old", "version=11040", || refused("supports CUDA 11.4, but the kernels are PTX")),
    ("a device that is too old", "devices=1 capability=75", || refused("Test Device 0) has compute capability 7.5")),
    ("an ordinal beyond the devices", "devices=1", || {
        let sentence = Device::new(1).err().map(text).unwrap_or_default();
        demand(sentence.contains("`ordinal` is 1") && sentence.contains("0 to 0"), &sentence)
    }),
    ("PTX that the driver does not take", "load=222", || {
        let sentence = load_sample().err().unwrap_or_default();
        demand(sentence.contains("222 (CUDA_ERROR_UNSUPPORTED_PTX_VERSION)"), &sentence)?;
        demand(sentence.contains("planted by the test") && sentence.contains("loading prepare.ptx"), &sentence)
    }),
    ("a device without memory", "allocations=3", || match run_backend() {
        Some(Err(Error::OutOfMemory { bytes, .. })) if bytes > 0 => Ok(()),
        None => Ok(()),
        other => Err(format!("{other:?}")),
    }),
    ("a kernel that faults", "launches=4", || {
        for _ in 0..2 {
            match run_backend() {
                Some(Err(Error::Cuda { code: 700, hint, .. })) if hint.contains("no later call") => {}
                None => {}
                other => return Err(format!("{other:?}")),
            }
        }
        Ok(())
    }),
];

/// Checks without a usable library.
const ABSENT: &[Check] = &[
    ("without a driver every call is a sentence", || {
        refused("no driver library was found")?;
        refused("libcuda.so.1: ") // the loader's reason
    }),
    ("a driver without a function is a sentence", || refused("has no function `cuDriverGetVersion`")),
];

fn main() -> ExitCode {
    if let Some(name) = std::env::var_os(stand_ins::CHILD) {
        return run_child(&name.to_string_lossy());
    }
    let arguments = Arguments::from_args();
    if arguments.filter.as_deref() == Some(PRINT_EMULATED) {
        return match Driver::emulated() {
            Ok(driver) => {
                println!("{}", driver.folder().display());
                ExitCode::SUCCESS
            }
            Err(sentence) => {
                eprintln!("{sentence}");
                ExitCode::FAILURE
            }
        };
    }
    report::run(&arguments, trials())
}

/// Panics end the process, also where somebody would catch them.
fn run_child(name: &str) -> ExitCode {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let told = told().map(|(name, _, run)| (name, run));
    match ABSENT.iter().copied().chain(told).chain(on_devices()).find(|(other, _)| *other == name) {
        Some((_, run)) => match run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(sentence) => {
                eprintln!("{sentence}");
                ExitCode::FAILURE
            }
        },
        None => {
            eprintln!("no check `{name}`");
            ExitCode::FAILURE
        }
    }
}

/// Checks for which the emulated driver is told something.
fn told() -> impl Iterator<Item = (&'static str, &'static str, Body)> {
    #[cfg(feature = "cudarc")]
    let more = graphs::TOLD;
    #[cfg(not(feature = "cudarc"))]
    let more: &[(&str, &str, Body)] = &[];
    LACKING.iter().chain(emulated::CHECKS).chain(emulated::SLICES).chain(more).copied()
}

fn on_devices() -> impl Iterator<Item = Check> {
    #[cfg(feature = "cudarc")]
    let more = [slices::CHECKS, graphs::CHECKS, changed::SLICES, prefixes::SLICES];
    #[cfg(not(feature = "cudarc"))]
    let more: [&[Check]; 0] = [];
    let own = [raw::CHECKS, kernels::CHECKS, changed::CHECKS, prefixes::CHECKS];
    own.into_iter().flatten().chain(more.into_iter().flatten()).copied()
}

fn trials() -> Vec<Listed> {
    let mut trials = Vec::new();
    let mut add =
        |name: String, missing: Option<String>, required: bool, run: Box<dyn FnOnce() -> Result<(), String> + Send>| {
            let group = name.split_once(": ").map_or("no driver", |(group, _)| group).to_string();
            trials.push(match missing {
                None => Listed::new(group, name, move || Ok(run()?)),
                Some(reason) if required => {
                    Listed::new(group, name, move || Err(format!("it is required, but {reason}").into()))
                }
                Some(reason) => Listed::new(group, name, || Ok(())).ignored(Some(reason)),
            });
        };
    let no_gpu = cuda::available().err().map(text);
    for (name, run) in on_devices().chain(kernels::ON_GPUS.iter().copied()) {
        add(format!("gpu: {name}"), no_gpu.clone(), is_required("cuda"), Box::new(run));
    }
    let emulated = Driver::emulated();
    let no_emulator = emulated.as_ref().err().cloned();
    let child = |name: &'static str, settings: &'static str, driver: Result<Driver, String>| {
        Box::new(move || driver?.run(name, settings)) as Box<dyn FnOnce() -> Result<(), String> + Send>
    };
    for (name, _) in on_devices() {
        let run = child(name, "", emulated.clone());
        add(format!("emulated: {name}"), no_emulator.clone(), is_required("emulator"), run);
    }
    for (name, settings, _) in told() {
        let run = child(name, settings, emulated.clone());
        add(format!("emulated: {name}"), no_emulator.clone(), is_required("emulator"), run);
    }
    let elsewhere = (!cfg!(target_os = "linux")).then(|| "the loader's path needs Linux".to_string());
    add(ABSENT[0].0.into(), elsewhere, false, child(ABSENT[0].0, "", Driver::broken()));
    add(ABSENT[1].0.into(), no_emulator, is_required("emulator"), child(ABSENT[1].0, "", Driver::partial()));
    // In this process, whatever it finds.
    add(
        "the probe answers".into(),
        None,
        false,
        Box::new(|| demand(cuda::is_available() == cuda::available().is_ok(), "two answers")),
    );
    trials
}

/// An error with this text, unless the condition holds.
pub fn demand(condition: bool, otherwise: &str) -> Result<(), String> {
    if condition { Ok(()) } else { Err(format!("not as demanded: {otherwise}")) }
}

pub fn text(value: impl ToString) -> String {
    value.to_string()
}

/// Every way to get at a device says `part`, and the backend is not available.
fn refused(part: &str) -> Result<(), String> {
    let says = |what: &str, result: Result<(), Error>| match result {
        Ok(()) => Err(format!("{what} succeeded")),
        Err(error) => demand(error.to_string().contains(part), &format!("{what}: {error}")),
    };
    demand(!cuda::is_available(), "it is available")?;
    says("available", cuda::available())?;
    says("Device::new", Device::new(0).map(drop))?;
    says("Device::first", Device::first().map(drop))?;
    if !part.contains("capability") {
        says("device_count", cuda::device_count().map(drop))?;
    }
    if let Ok(cuda) = backend::by_name("cuda") {
        says("the backend", cuda.available())?;
    }
    match run_backend() {
        Some(result) => says("a call", result),
        None => Ok(()),
    }
}

/// A call of the backend `cuda`, if this build has it.
fn run_backend() -> Option<Result<(), Error>> {
    let cuda = backend::by_name("cuda").ok()?;
    let problem = raw::sample(samtone::Loss::samtone_both(), 1).ok()?;
    Some(problem.run(cuda, samtone::DType::F32, 1.0).map(drop))
}

fn load_sample() -> Result<(), String> {
    let problem = raw::sample(samtone::Loss::samtone_both(), 1)?;
    let plain = problem.pairs().and_then(|pairs| cuda::Problem::new(pairs, samtone::DType::F32, problem.dim));
    let plan = plain.and_then(|p| cuda::Plan::new(&p)).map_err(text)?;
    Device::first().and_then(|device| device.load(&plan)).map_err(text)
}
