//! The order of the passages: which index stands for which passage, and for whose anchor.
//!
//! Passages are visited as [anchors | others | extras]. First come the positives of the rows, in the order of the lowest row of
//! each. Then come all other passages. Last comes a repetition of a positive for every further row that shares it. So every index anchors
//! at most one row, the anchors are one range, and with π(i) = i the order is the identity.

use crate::pairs::Pairs;
use std::ops::Range;

/// The index space of a tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// Indices are rows.
    Query,
    /// Indices are places in the [`Order`].
    Passage,
}

/// The order of the passages.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    /// Passage behind each index; `None` for the identity.
    pub(crate) passage: Option<Vec<u32>>,
    /// Row that each index anchors; `u32::MAX` for the others, which anchor none.
    pub(crate) anchor_row: Vec<u32>,
    /// Number of anchors A: indices 0..A.
    pub(crate) anchors: usize,
    /// N: others are A..N, extras N..len.
    pub(crate) passages: usize,
}

impl Order {
    /// The order that the positives of a batch ask for.
    pub(crate) fn new(pairs: &Pairs<'_>) -> Self {
        let (m, n) = (pairs.rows(), pairs.passages());
        let mut owned = vec![false; n];
        let (mut primary, mut extra) = (Vec::new(), Vec::new());
        for i in 0..m {
            let first = !std::mem::replace(&mut owned[pairs.positive(i)], true);
            if first { &mut primary } else { &mut extra }.push(i as u32);
        }
        let anchors = primary.len();
        let passage_of = |rows: &[u32]| rows.iter().map(|&i| pairs.positive(i as usize) as u32).collect::<Vec<_>>();
        let mut passage = passage_of(&primary);
        passage.extend((0..n as u32).filter(|&p| !owned[p as usize]));
        passage.extend(passage_of(&extra));
        let mut anchor_row = primary;
        anchor_row.resize(n, u32::MAX);
        anchor_row.extend(extra);
        let identity = passage.iter().enumerate().all(|(k, &p)| k == p as usize);
        Self { passage: (!identity).then_some(passage), anchor_row, anchors, passages: n }
    }

    /// Number of indices: N, and one more for every extra.
    pub(crate) fn len(&self) -> usize {
        self.anchor_row.len()
    }

    /// Passage behind an index.
    pub(crate) fn passage(&self, index: usize) -> usize {
        self.passage.as_ref().map_or(index, |p| p[index] as usize)
    }

    /// Indices among the anchors that anchor one of `rows`. Their rows ascend, so this is a range.
    pub(crate) fn anchors_of(&self, rows: &Range<usize>) -> Range<usize> {
        let below = |bound: usize| self.anchor_row[..self.anchors].partition_point(|&r| (r as usize) < bound);
        below(rows.start)..below(rows.end)
    }

    /// The same among the extras.
    pub(crate) fn extras_of(&self, rows: &Range<usize>) -> Range<usize> {
        let below = |bound: usize| self.anchor_row[self.passages..].partition_point(|&r| (r as usize) < bound);
        self.passages + below(rows.start)..self.passages + below(rows.end)
    }

    /// For each of the batch's `rows` rows, the index that anchors it, whether among the anchors or the extras. Every row has exactly
    /// one. The inverse of `anchor_row`.
    pub(crate) fn anchor_index(&self, rows: usize) -> Vec<u32> {
        let mut index = vec![u32::MAX; rows];
        for k in (0..self.anchors).chain(self.passages..self.len()) {
            index[self.anchor_row[k] as usize] = k as u32;
        }
        index
    }
}

/// The indices of each passage: one, and one more for every further row whose positive it is.
#[derive(Debug, Clone)]
pub(crate) struct Occurrences {
    /// Where the indices of each passage begin in `index`, and where those of the last one end: N + 1 numbers.
    pub(crate) start: Vec<u32>,
    /// Indices, passage by passage, ascending within each.
    pub(crate) index: Vec<u32>,
}

impl Occurrences {
    /// The indices of every passage.
    pub(crate) fn new(order: &Order) -> Self {
        let mut start = vec![0_u32; order.passages + 1];
        (0..order.len()).for_each(|k| start[order.passage(k) + 1] += 1);
        (0..order.passages).for_each(|n| start[n + 1] += start[n]);
        let mut next = start.clone();
        let mut index = vec![0; order.len()];
        for k in 0..order.len() {
            let at = &mut next[order.passage(k)];
            index[*at as usize] = k as u32;
            *at += 1;
        }
        Self { start, index }
    }

    /// The indices of one passage.
    pub(crate) fn of(&self, passage: usize) -> &[u32] {
        &self.index[self.start[passage] as usize..self.start[passage + 1] as usize]
    }
}

#[cfg(test)]
impl Order {
    /// The order for row i with passage `positives[i]` of `passages`.
    pub(crate) fn of_positives(positives: &[u32], passages: usize) -> Self {
        let call = crate::Call::new(crate::Loss::info_nce(), 1.0).with_positives(positives);
        Self::new(&call.pairs(positives.len(), passages).unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks everything that must hold for any positives.
    fn check(positives: &[u32], passages: usize) -> Order {
        let order = Order::of_positives(positives, passages);
        let m = positives.len();
        assert_eq!(order.passages, passages);
        assert_eq!(order.len(), passages + m - order.anchors);
        let mut seen: Vec<usize> = (0..passages).map(|k| order.passage(k)).collect();
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..passages), "anchors and others are every passage once");

        let index = order.anchor_index(m);
        for (i, (&k, &positive)) in index.iter().zip(positives).enumerate() {
            let k = k as usize;
            assert!(k < order.anchors || (passages..order.len()).contains(&k), "row {i} at an index of the others");
            assert_eq!((order.anchor_row[k] as usize, order.passage(k)), (i, positive as usize), "row {i}");
            let lowest = positives.iter().position(|&p| p == positive).unwrap();
            assert_eq!(k < order.anchors, lowest == i, "the lowest row owns the passage, further ones are extras");
        }
        for rows in (0..=m).flat_map(|start| (start..=m).map(move |end| start..end)) {
            let of_rows = order.anchors_of(&rows).chain(order.extras_of(&rows));
            let mut of_rows: Vec<usize> = of_rows.map(|k| order.anchor_row[k] as usize).collect();
            of_rows.sort_unstable();
            assert!(of_rows.into_iter().eq(rows));
        }

        let occurrences = Occurrences::new(&order);
        for n in 0..passages {
            let want: Vec<u32> = (0..order.len() as u32).filter(|&k| order.passage(k as usize) == n).collect();
            assert_eq!(occurrences.of(n), want, "passage {n}");
        }
        order
    }

    #[test]
    fn identity() {
        for passages in [3, 5] {
            let order = check(&[0, 1, 2], passages);
            assert_eq!((order.passage, order.anchors, order.anchor_row.len()), (None, 3, passages));
        }
    }

    #[test]
    fn permuted_with_others() {
        let order = check(&[4, 0, 3], 6);
        assert_eq!(order.passage, Some(vec![4, 0, 3, 1, 2, 5]));
        assert_eq!(order.anchor_row[..3], [0, 1, 2]);
    }

    #[test]
    fn shared() {
        let order = check(&[5, 1, 5, 0, 1, 5], 7);
        assert_eq!(order.passage, Some(vec![5, 1, 0, 2, 3, 4, 6, 5, 1, 5]));
        assert_eq!((order.anchors, &order.anchor_row[7..]), (3, &[2, 4, 5][..]));
        assert_eq!(order.anchor_index(6), [0, 1, 7, 2, 8, 9]);
        assert_eq!(check(&[0; 4], 4).anchors, 1);
    }
}
