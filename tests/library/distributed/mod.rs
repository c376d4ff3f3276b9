//! Batches spread over ranks, which are threads here.

mod engines;
mod failures;
mod results;
mod spread;
mod traffic;
