//! What the tests and the `evaluate` example share: golden files, problems, seeded data, comparison, tolerances.
#![allow(dead_code)] // every binary that includes this uses another part of it

pub mod backends;
pub mod case;
pub mod compare;
pub mod cuda_emulated;
pub mod data;
pub mod emulator;
pub mod foreign;
pub mod problem;
pub mod report;
pub mod skipped;
pub mod tolerance;
