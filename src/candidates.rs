//! The table that tells a GPU what each index of a space is as a candidate, and which row it anchors.

use crate::mask::Keys;
use crate::order::{Order, Space};
use crate::problem::Problem;

/// Says that there is none, in place of a row, an owner or an index of an array.
pub(crate) const NONE: u32 = u32::MAX;

/// For each index of a space: its query key, its passage key, its owner, and the row that it anchors.
///
/// The owner is the row whose hard negative it is, or [`NONE`] if it is everyone's. The row is [`NONE`] if it anchors none. The two keys
/// of a query are exchanged ([`Key::swapped`](crate::mask::Key::swapped)). Kernels exchange the keys of an anchor that meets queries, too,
/// so one comparison serves queries and passages.
pub(crate) fn candidates<C>(problem: &Problem<'_, C>, order: &Order, keys: &Keys, space: Space) -> Vec<[u32; 4]> {
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
