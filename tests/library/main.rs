//! What holds of the crate without a device, and of what it ships.

mod artefacts;
mod bad_input;
mod determinism;
mod golden_format;
mod properties;
mod reference;
mod shapes;
#[path = "../support/mod.rs"]
mod support;
mod texts;
