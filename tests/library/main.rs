//! What holds of the crate without a device, and of what it ships. Also the unit tests of the examples, which so need no binary of their
//! own. An example that is a module here names its own modules by `super`, not by `crate`.
#![allow(clippy::duplicate_mod)] // examples have what they share with tests as modules of their own

mod artefacts;
mod bad_input;
#[path = "../../examples/browser/main.rs"]
#[allow(dead_code)]
mod browser;
mod determinism;
mod distributed;
#[path = "../../examples/evaluate.rs"]
#[allow(dead_code)]
mod evaluate;
mod golden_format;
mod properties;
mod reference;
mod shapes;
#[path = "../support/mod.rs"]
mod support;
mod texts;
#[path = "../../examples/train/main.rs"]
#[allow(dead_code)]
mod train;
