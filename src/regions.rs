//! Regions: the three matrices of cosines, cut into rectangles and triangles in which every tile has the same purpose.
//!
//! The matrices are S (queries with passages, for QP and PQ), QQ and PP. Whose sums are taken, which coefficients apply, and whose
//! gradients are added is the same in every tile of a region. Ranges are of indices. A backend cuts them into tiles as it likes, as long
//! as no tile straddles a cut. A shard differs from the whole batch in its regions alone.

use crate::loss::{Block, Loss};
use crate::order::{Order, Space};
use std::ops::Range;

/// A rectangle or triangle of one matrix of cosines, with what happens along its two axes. Pairs are of the rows and of the columns.
#[derive(Debug, Clone)]
pub(crate) struct Region {
    /// Spaces of the row and column indices.
    pub(crate) spaces: [Space; 2],
    /// Row indices; both ends are cuts of their space (see [`cuts`]).
    pub(crate) rows: Range<usize>,
    /// Column indices, likewise.
    pub(crate) cols: Range<usize>,
    /// Blocks of the softmaxes of the row anchors and of the column anchors.
    pub(crate) blocks: [Block; 2],
    /// Whether rows and columns are the same range of the same space. Tiles below the diagonal are mirror images then, and not visited.
    pub(crate) triangle: bool,
    /// Whether the sums of the column anchors are taken here. Those of the row anchors always are.
    pub(crate) sum_cols: bool,
    /// Whether the row indices, and the column indices, are anchors here.
    pub(crate) anchors: [bool; 2],
    /// Whether gradients of the row embeddings, and of the column embeddings, are added here.
    pub(crate) gradients: [bool; 2],
}

/// Where regions of a shard may begin and end: ascending indices of the query space, and of the passage space. The first is 0, the last
/// is the length of the space.
pub(crate) fn cuts(rows: &Range<usize>, order: &Order, m: usize) -> [Vec<usize>; 2] {
    let (own, extras) = (order.anchors_of(rows), order.extras_of(rows));
    let query = vec![0, rows.start, rows.end, m];
    let passage = vec![0, own.start, own.end, order.anchors, order.passages, extras.start, extras.end, order.len()];
    [query, passage].map(|mut cuts| {
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    })
}

/// Every region of the shard that has `rows` of `m` rows, but for empty ones. If one shard has all rows and no two rows share a positive,
/// these are: S with the anchors, S with the others, the triangle of QQ, the triangle of PP, and PP with the others.
pub(crate) fn regions(loss: &Loss, rows: &Range<usize>, order: &Order, m: usize) -> Vec<Region> {
    use Block::{PP, PQ, QP, QQ};
    use Space::{Passage, Query};
    let (own, own_extras) = (order.anchors_of(rows), order.extras_of(rows));
    let (anchors, others) = (0..order.anchors, order.anchors..order.passages);
    let extras = order.passages..order.len();
    let mut regions = Vec::new();
    let mut add = |spaces: [Space; 2], rows: &Range<usize>, cols: Range<usize>, region: Region| {
        if !rows.is_empty() && !cols.is_empty() {
            regions.push(Region { spaces, rows: rows.clone(), cols, ..region });
        }
    };
    let template = |blocks: [Block; 2]| Region {
        spaces: [Query, Query],
        rows: 0..0,
        cols: 0..0,
        blocks,
        triangle: false,
        sum_cols: true,
        anchors: [true, true],
        gradients: [true, true],
    };

    // S is visited whatever the loss, because the metrics are made from its ranks.
    let s = || template([QP, PQ]);
    add([Query, Passage], rows, anchors.clone(), s());
    add([Query, Passage], rows, others.clone(), Region { sum_cols: false, anchors: [true, false], ..s() });
    add([Query, Passage], rows, extras, Region { anchors: [false, true], ..s() });

    // Where a matrix is symmetric and its columns are rows of other shards, the cosines are visited for this shard's rows only. Both parts
    // of their gradient are added here: as anchors, and as candidates of the column anchors.
    let one_sided = |blocks| Region { sum_cols: false, gradients: [true, false], ..template(blocks) };
    if loss.uses(QQ) {
        add([Query, Query], rows, rows.clone(), Region { triangle: true, ..template([QQ, QQ]) });
        add([Query, Query], rows, 0..rows.start, one_sided([QQ, QQ]));
        add([Query, Query], rows, rows.end..m, one_sided([QQ, QQ]));
    }
    if loss.uses(PP) {
        let space = [Passage, Passage];
        add(space, &own, own.clone(), Region { triangle: true, ..template([PP, PP]) });
        add(space, &own, 0..own.start, one_sided([PP, PP]));
        add(space, &own, own.end..order.anchors, one_sided([PP, PP]));
        let candidates = || Region { sum_cols: false, anchors: [true, false], ..template([PP, PP]) };
        add(space, &own, others.clone(), candidates());
        add(space, &own_extras, anchors, candidates());
        add(space, &own_extras, others, candidates());
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: usize = 6;
    const N: usize = 9;

    fn orders() -> Vec<Order> {
        let injective = [[0, 1, 2, 3, 4, 5], [7, 2, 5, 0, 8, 1]];
        let shared = [[5, 1, 5, 0, 1, 5], [3; M], [0, 0, 1, 1, 2, 8]];
        let mut orders: Vec<_> = injective.iter().chain(&shared).map(|p| Order::of_positives(p, N)).collect();
        orders.extend([[0, 1, 2, 3, 4, 5], [5, 3, 5, 0, 3, 5]].map(|p| Order::of_positives(&p, M)));
        orders
    }

    fn losses() -> impl Iterator<Item = Loss> {
        Loss::PRESETS.iter().map(|(name, ..)| Loss::by_name(name).unwrap())
    }

    /// A pair of indices of a region: an anchor on one axis, and its candidate on the other.
    struct Pair {
        /// Axes of the anchor and of the candidate.
        axes: [usize; 2],
        block: Block,
        /// Row of the anchor.
        row: usize,
        /// The query or the passage.
        candidate: usize,
    }

    /// Every pair of a region, once for each of its two indices that is an anchor. On the diagonal of a triangle both are the same index,
    /// so the pair counts once, for the row.
    fn pairs(region: &Region, order: &Order) -> Vec<Pair> {
        let behind = |space: Space, k: usize| if space == Space::Query { k } else { order.passage(k) };
        let anchor = |space: Space, k: usize| if space == Space::Query { k } else { order.anchor_row[k] as usize };
        let mut pairs = Vec::new();
        for r in region.rows.clone() {
            for c in region.cols.clone().filter(|&c| !region.triangle || c >= r) {
                let diagonal = region.triangle && r == c;
                for axis in (0..2).filter(|&a| region.anchors[a] && !(diagonal && a == 1)) {
                    let (own, other) = ([r, c][axis], [r, c][1 - axis]);
                    let row = anchor(region.spaces[axis], own);
                    assert!(row < M, "index {own} anchors no row");
                    let candidate = behind(region.spaces[1 - axis], other);
                    let axes = [axis, if diagonal { axis } else { 1 - axis }];
                    pairs.push(Pair { axes, block: region.blocks[axis], row, candidate });
                }
            }
        }
        pairs
    }

    /// How often something happened to each (block, row, candidate).
    struct Counts(Vec<usize>);

    impl Counts {
        fn new() -> Self {
            Self(vec![0; Block::ALL.len() * M * N])
        }

        fn at(&mut self, block: Block, row: usize, candidate: usize) -> &mut usize {
            &mut self.0[(block.index() * M + row) * N + candidate]
        }

        /// Fails unless it happened once for every pair of every block that the shard of `rows` must see, and never for another.
        fn expect(mut self, what: &str, loss: &Loss, order: &Order, rows: &Range<usize>) {
            for block in Block::ALL {
                for row in 0..M {
                    for candidate in 0..N {
                        let among = if matches!(block, Block::QP | Block::PP) { order.passages } else { M };
                        let used = matches!(block, Block::QP | Block::PQ) || loss.uses(block);
                        // A shard visits its own rows of every matrix. In S these are queries, which in PQ are the candidates.
                        let own = rows.contains(if block == Block::PQ { &candidate } else { &row });
                        let want = usize::from(used && own && candidate < among);
                        let got = *self.at(block, row, candidate);
                        assert_eq!(got, want, "{what}: {loss}, {rows:?}, {block:?}, row {row}, {candidate}, {order:?}");
                    }
                }
            }
        }
    }

    fn shards() -> impl Iterator<Item = Range<usize>> {
        (0..M).flat_map(|start| (start + 1..=M).map(move |end| start..end))
    }

    #[test]
    fn regions_begin_and_end_at_cuts() {
        for (order, loss) in orders().iter().flat_map(|o| losses().map(move |l| (o, l))) {
            for rows in shards() {
                let cuts = cuts(&rows, order, M);
                for (cuts, end) in cuts.iter().zip([M, order.len()]) {
                    assert!(cuts.is_sorted_by(|a, b| a < b));
                    assert_eq!((cuts.first(), cuts.last()), (Some(&0), Some(&end)));
                }
                for region in regions(&loss, &rows, order, M) {
                    assert!(!region.rows.is_empty() && !region.cols.is_empty());
                    assert!(!region.triangle || (region.spaces[0] == region.spaces[1] && region.rows == region.cols));
                    for (space, range) in region.spaces.into_iter().zip([&region.rows, &region.cols]) {
                        let cuts = &cuts[space as usize];
                        assert!(cuts.contains(&range.start) && cuts.contains(&range.end), "{region:?}, {cuts:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn sums_see_every_pair_once() {
        for (order, loss) in orders().iter().flat_map(|o| losses().map(move |l| (o, l))) {
            for rows in shards() {
                let mut sums = Counts::new();
                for region in regions(&loss, &rows, order, M) {
                    let summed = pairs(&region, order).into_iter().filter(|p| p.axes[0] == 0 || region.sum_cols);
                    summed.for_each(|p| *sums.at(p.block, p.row, p.candidate) += 1);
                }
                sums.expect("sums", &loss, order, &rows);
            }
        }
    }

    /// All shards together add the derivative of every pair once to its anchor and once to its candidate. Each shard adds to the queries
    /// of its own rows only.
    #[test]
    fn gradients_of_shards_see_both_sides_of_every_pair_once() {
        for (order, loss) in orders().iter().flat_map(|o| losses().map(move |l| (o, l))) {
            for shards in [&[0, M][..], &[0, 1, M], &[0, 2, 3, M], &[0, 1, 2, 3, 4, 5, M]] {
                let (mut of_anchors, mut of_candidates) = (Counts::new(), Counts::new());
                for rows in shards.windows(2).map(|w| w[0]..w[1]) {
                    for region in regions(&loss, &rows, order, M) {
                        for (axis, range) in [&region.rows, &region.cols].into_iter().enumerate() {
                            let queries = region.gradients[axis] && region.spaces[axis] == Space::Query;
                            assert!(!queries || (rows.start <= range.start && range.end <= rows.end));
                        }
                        for p in pairs(&region, order) {
                            let added = p.axes.map(|axis| usize::from(region.gradients[axis]));
                            *of_anchors.at(p.block, p.row, p.candidate) += added[0];
                            *of_candidates.at(p.block, p.row, p.candidate) += added[1];
                        }
                    }
                }
                of_anchors.expect("anchors", &loss, order, &(0..M));
                of_candidates.expect("candidates", &loss, order, &(0..M));
            }
        }
    }
}
