//! What a rank sends is what docs/distributed.md says.

use super::spread::{Lists, SHAPES, Spread, each};
use crate::support::data::Kind;
use samtone::distributed::{Distributed, Group, Threads};
use samtone::{Call, DType, Loss, Result};

/// Counts what its rank sends.
struct Counting {
    inner: Threads,
    sent: Vec<usize>,
}

impl Group for Counting {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn exchange(&mut self, to: usize, out: &[u8], from: usize, into: &mut [u8]) -> Result<()> {
        assert!(to != self.rank() && from != self.rank() && self.size() > 1);
        self.sent.push(out.len());
        self.inner.exchange(to, out, from, into)
    }
}

/// The large messages of a rank with m of M queries and n of N passages, in bytes: (W − 1)·(m + n)·d elements, which each of the others
/// needs; (N − n)·d numbers of f32, gradients of the others' passages; K·(M − m) times 24 bytes and (W − 1)·K·m times 80, sums. All else
/// has a size of its own: lists, and what the ranks say of themselves.
#[test]
fn a_rank_sends_what_the_formula_says() {
    for (shapes, dtype) in SHAPES.into_iter().zip([DType::F32, DType::F16, DType::BF16].into_iter().cycle()) {
        let call = Call::new(Loss::samtone_both(), 0.1).with_prefixes([20, 64]);
        let spread = Spread::new(&call, Kind::Random, shapes, 64, 5, Lists::default());
        let (w, d, k) = (shapes.len(), 64, 2);
        let [m, n] = [spread.whole.rows, spread.whole.passages];
        let sent = each(Threads::group(w), &spread.parts, |inner, part| {
            let mut rank = Distributed::new(Counting { inner, sent: Vec::new() });
            part.run(&mut rank, dtype, 1.0).unwrap();
            rank.into_group().sent
        });
        for ((sent, &(own_m, own_n)), texts) in
            sent.iter().zip(shapes).zip(spread.parts.iter().map(|p| options(&p.call)))
        {
            let embeddings = (w - 1) * (own_m + own_n) * d * dtype.bytes();
            let gradients = (n - own_n) * d * 4;
            let sums = k * (m - own_m) * 24 + (w - 1) * k * own_m * 80;
            let positives = (w - 1) * own_m * 4;
            // Heads, the length of the options, and four times whether the rank has failed.
            let words = (w - 1) * (8 + 1 + 4) * 8;
            let all: usize = sent.iter().sum();
            assert_eq!(all - embeddings - gradients - sums - positives - words, (w - 1) * texts, "{shapes:?}");
        }
    }
}

/// Bytes of the options as the ranks send them; they do not grow with the batch.
fn options(call: &Call) -> usize {
    let sizes: Vec<_> = [2, 3].map(|rows| text_bytes(call, rows)).into();
    assert_eq!(sizes[0], sizes[1]);
    sizes[0]
}

/// The one message of two ranks whose size is none of the others: from a call of `rows` pairs.
fn text_bytes(call: &Call, rows: usize) -> usize {
    let spread = Spread::new(call, Kind::Random, &[(rows, rows); 2], 64, 5, Lists::default());
    let sent = each(Threads::group(2), &spread.parts, |inner, part| {
        let mut rank = Distributed::new(Counting { inner, sent: Vec::new() });
        part.run(&mut rank, DType::F32, 1.0).unwrap();
        rank.into_group().sent
    });
    // Agreement, head, length of the text, text.
    sent[0][3]
}
