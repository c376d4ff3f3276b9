//! The WGSL backend: its shaders without a device, and with the feature `wgpu` its driver layer on the device that is there.

#[cfg(feature = "wgpu")]
mod driver;
mod shaders;
#[path = "../support/mod.rs"]
mod support;

use libtest_mimic::Arguments;
use std::process::ExitCode;
use support::report;

fn main() -> ExitCode {
    let trials = shaders::trials();
    #[cfg(feature = "wgpu")]
    let trials = trials.into_iter().chain(driver::trials()).collect();
    report::run(&Arguments::from_args(), trials)
}
