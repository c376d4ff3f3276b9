//! What a rank sends is what docs/distributed.md says.

use super::spread::{Lists, SHAPES, Spread, Tapped, each};
use crate::support::data::Kind;
use samtone::distributed::{Distributed, Threads};
use samtone::{Call, DType, Loss, Scope};

/// What a rank with m of M queries and n of N passages sends, in bytes: (W − 1)·(m + n)·d elements, which each of the others needs; (N − n)·d
/// numbers of f32, gradients of the others' passages; K·(M − m) times 24 and (W − 1)·K·m times 80, sums; (W − 1) times 8 for each entry of a
/// list; and four times (W − 1)·72, whether the rank has failed and what it has.
#[test]
fn a_rank_sends_what_the_formula_says() {
    let lists =
        [Lists::default(), Lists { shared_positives: true, ids: true, weights: true, owners: Some(Scope::Own) }];
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for (at, shapes) in SHAPES.into_iter().enumerate() {
        let (dtype, lists) = (dtypes[at % 3], lists[at % 2]);
        let call = Call::new(Loss::samtone_both(), 0.1).with_prefixes([20, 64]);
        let spread = Spread::new(&call, Kind::Random, shapes, 64, 5, lists);
        let (w, d, k) = (shapes.len(), 64, 2);
        let [m, n] = [spread.whole.rows, spread.whole.passages];
        let sent = each(Threads::group(w), &spread.parts, |inner, part| {
            let mut rank = Distributed::new(Tapped::new(inner));
            part.run(&mut rank, dtype, 1.0).unwrap();
            rank.into_group().sent
        });
        for (sent, &(own_m, own_n)) in sent.iter().zip(shapes) {
            let embeddings = (w - 1) * (own_m + own_n) * d * dtype.bytes();
            let gradients = (n - own_n) * d * 4;
            let sums = k * (m - own_m) * 24 + (w - 1) * k * own_m * 80;
            let [of_rows, of_passages] = if lists.ids { [3, 2] } else { [1, 0] };
            let entries = (w - 1) * (of_rows * own_m + of_passages * own_n) * 8;
            let agreements = (w - 1) * 4 * 72;
            let all: usize = sent.iter().sum();
            assert_eq!(all, embeddings + gradients + sums + entries + agreements, "{shapes:?}");
            assert_eq!(sent.len(), (w - 1) * 10, "exchanges");
        }
    }
}
