//! Every check on every device. One that is not there is shown as ignored, with the reason, unless `SAMTONE_REQUIRE` names it.

mod curve;
mod encoder;
mod errors;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod extension;
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
    ("prefixes_are_those_of_the_reference", gradients::prefixes),
    ("several_tiles_and_parts", gradients::tiles),
    ("golden_files", gradients::golden),
    ("frozen_towers_get_no_gradient_and_change_no_other", tensors::frozen),
    ("strided_and_transposed_tensors_give_the_same_bits", tensors::strided),
    ("repeated_calls_give_the_same_bits", tensors::repeated),
    ("tile_skipping_changes_no_bit_of_the_loss", tensors::skipping),
    ("tensors_without_autodiff_and_constants_beside_tracked_ones", tensors::constants),
    ("a_tensor_replaces_the_temperature_of_the_call", tensors::temperature),
    ("bad_input_gets_a_sentence", errors::sentences),
    ("rows_that_are_wrong_are_named", errors::rows),
    ("finite_differences_through_modules", encoder::finite_differences),
    ("training_follows_the_common_curve", curve::follows),
    ("training_with_prefixes_follows_its_curve", curve::with_prefixes),
    ("chunks_encoded_apart_give_the_gradients_of_the_batch", encoder::chunks),
];

#[cfg(any(feature = "wgpu", feature = "cuda"))]
type ExtensionCheck = (&'static str, fn(&burn::cubecl::Device) -> Outcome);

/// On the devices of cubecl.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
const EXTENSION_CHECKS: &[ExtensionCheck] = &[
    ("gradients_are_those_of_the_reference", extension::presets),
    ("prefixes_are_those_of_the_reference", extension::prefixes),
    ("golden_files_and_several_tiles", extension::golden),
    ("what_is_not_wanted_is_not_there", extension::wanted),
    ("what_is_refused_leaves_the_device_usable", extension::refused),
    ("calls_of_several_threads_give_the_same_bits", extension::threads),
    ("tile_skipping_stays_within_its_bound", extension::skipping),
];

/// A device, as burn and as cubecl have it.
#[derive(Clone)]
struct Place {
    device: Device,
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    extension: Option<burn::cubecl::Device>,
}

/// Name and device, or why there is none.
fn places() -> Vec<(&'static str, Result<Place, String>)> {
    vec![
        (
            "flex",
            Ok(Place {
                device: Device::flex(),
                #[cfg(any(feature = "wgpu", feature = "cuda"))]
                extension: None,
            }),
        ),
        #[cfg(feature = "wgpu")]
        ("wgpu", wgpu()),
        #[cfg(feature = "cuda")]
        ("cuda", cuda()),
    ]
}

/// The first device that burn finds, be it software.
#[cfg(feature = "wgpu")]
fn wgpu() -> Result<Place, String> {
    let device = Device::wgpu_options().init().map_err(|error| error.to_string())?;
    Ok(Place { device, extension: Some(burn::cubecl::Device::Wgpu(Default::default())) })
}

/// The first device. burn itself panics where there is no driver.
#[cfg(feature = "cuda")]
fn cuda() -> Result<Place, String> {
    samtone_burn::samtone::cuda::Device::new(0).map_err(|error| error.to_string())?;
    Ok(Place { device: Device::cuda(0), extension: Some(burn::cubecl::Device::Cuda(Default::default())) })
}

fn main() {
    let arguments = Arguments::from_args();
    let required = std::env::var("SAMTONE_REQUIRE").unwrap_or_default();
    let mut trials = Vec::new();
    for (place, found) in places() {
        let is_required = required.split(',').any(|name| name == format!("burn-{place}"));
        let mut add = |name: String, check: Result<Box<dyn FnOnce() -> Outcome + Send>, String>| {
            trials.push(match check {
                Ok(check) => Trial::test(name, check),
                Err(reason) if is_required => Trial::test(name, move || Err(reason.into())),
                Err(reason) => Trial::test(name, || Ok(())).with_kind(reason).with_ignored_flag(true),
            });
        };
        for (name, check) in CHECKS {
            let device = found.clone().map(|place| place.device);
            add(format!("{place}::{name}"), device.map(|device| Box::new(move || check(&device)) as _));
        }
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        for (name, check) in EXTENSION_CHECKS {
            let device = match found.clone().map(|place| place.extension) {
                Ok(None) => continue,
                Ok(Some(device)) => Ok(device),
                Err(reason) => Err(reason),
            };
            add(format!("{place}::extension::{name}"), device.map(|device| Box::new(move || check(&device)) as _));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}
