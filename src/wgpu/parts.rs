//! What layout, bindings and dispatches of a plan are made from.

use super::capabilities::Capabilities;
use super::shaders::Variant;
use crate::Problem;
use crate::order::{Occurrences, Order};
use crate::super_blocks::SuperBlock;

/// What a plan is made from.
pub(super) struct Parts<'a> {
    pub problem: &'a Problem<'a>,
    pub order: Order,
    pub occurrences: Occurrences,
    pub capabilities: Capabilities,
    pub variant: Variant,
    pub blocks: Vec<SuperBlock>,
    /// For each super-block, whether it has coefficients, and so gradients.
    pub graded: Vec<bool>,
}
