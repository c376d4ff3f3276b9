//! What a device is told of the indices of a space as candidates.

use crate::mask::Keys;
use crate::order::{Order, Space};
use crate::problem::Problem;

/// In place of a row, an owner or a place in an array: there is none.
pub(crate) const NONE: u32 = u32::MAX;

/// For each index of a space: its query key, its passage key, the row whose hard negative it is ([`NONE`]: everyone's), and the
/// row that it anchors, or [`NONE`]. Keys of queries are swapped ([`Key::swapped`](crate::mask::Key::swapped)), as kernels
/// swap those of the anchors that they meet.
pub(crate) fn candidates(problem: &Problem<'_>, order: &Order, keys: &Keys, space: Space) -> Vec<[u32; 4]> {
    match space {
        Space::Query => {
            keys.rows.iter().map(|k| k.swapped()).zip(0..).map(|(k, row)| [k.query, k.passage, NONE, row]).collect()
        }
        Space::Passage => {
            let owners = problem.pairs.exclusive_owners();
            let owner = |n: usize| owners.map_or(NONE, |o| u32::try_from(o[n]).unwrap_or(NONE));
            let of = |k: usize| {
                let n = order.passage(k);
                [keys.passages[n].query, keys.passages[n].passage, owner(n), order.anchor_row[k]]
            };
            (0..order.len()).map(of).collect()
        }
    }
}
