//! Every check on every device. One that is not there is shown as ignored, with the reason, unless `SAMTONE_REQUIRE` names it.

mod curve;
mod encoder;
mod errors;
mod gradients;
mod support;
mod tensors;

use burn::tensor::Device;
use libtest_mimic::{Arguments, Failed, Trial};

/// Fails with a sentence.
pub type Outcome = Result<(), Failed>;

type Check = (&'static str, fn(&Device) -> Outcome);

const CHECKS: &[Check] = &[
    ("gradients_are_those_of_the_reference", gradients::presets),
    ("several_tiles_and_parts", gradients::tiles),
    ("golden_files", gradients::golden),
    ("frozen_towers_get_no_gradient_and_change_no_other", tensors::frozen),
    ("strided_and_transposed_tensors_give_the_same_bits", tensors::strided),
    ("repeated_calls_give_the_same_bits", tensors::repeated),
    ("tile_skipping_changes_no_bit", tensors::skipping),
    ("tensors_without_autodiff_and_constants_beside_tracked_ones", tensors::constants),
    ("bad_input_gets_a_sentence", errors::sentences),
    ("rows_that_are_wrong_are_named", errors::rows),
    ("finite_differences_through_modules", encoder::finite_differences),
    ("training_follows_the_common_curve", curve::follows),
    ("chunks_encoded_apart_give_the_gradients_of_the_batch", encoder::chunks),
];

/// Name and device, or why there is none.
fn places() -> Vec<(&'static str, Result<Device, String>)> {
    vec![
        ("flex", Ok(Device::flex())),
        #[cfg(feature = "wgpu")]
        ("wgpu", wgpu()),
    ]
}

/// The first device that burn finds, be it software.
#[cfg(feature = "wgpu")]
fn wgpu() -> Result<Device, String> {
    Device::wgpu_options().init().map_err(|error| error.to_string())
}

fn main() {
    let arguments = Arguments::from_args();
    let required = std::env::var("SAMTONE_REQUIRE").unwrap_or_default();
    let mut trials = Vec::new();
    for (place, device) in places() {
        let is_required = required.split(',').any(|name| name == format!("burn-{place}"));
        for (name, check) in CHECKS {
            let name = format!("{place}::{name}");
            trials.push(match device.clone() {
                Ok(device) => Trial::test(name, move || check(&device)),
                Err(reason) if is_required => Trial::test(name, move || Err(reason.into())),
                Err(reason) => Trial::test(name, || Ok(())).with_kind(reason).with_ignored_flag(true),
            });
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}
