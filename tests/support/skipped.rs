//! What tile skipping left out of a call on the emulator, compared with the definition in f64.

use super::cuda_emulated::Emulated;
use super::problem::{Outputs, Problem};
use samtone::cuda::abi::{SKIPPED, SQUARES};
use samtone::{Block, Result};
use std::ops::Range;

/// Results of a call, and what it skipped.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub outputs: Outputs,
    /// A word for each square of every super-block with coefficients, row-major; empty without the option.
    pub skipped: Vec<u32>,
    /// Squares, and how many of them were skipped.
    pub squares: f64,
    pub count: f64,
    /// ∂L/∂(β s⁺ᵢ), of the forward call.
    pub diagonal: Vec<f64>,
}

impl Outcome {
    pub fn read(device: &mut Emulated) -> Result<Self> {
        let has = device.plan().array("skipped").is_some();
        let gradient = |device: &mut Emulated, name: &str| -> Result<Vec<f64>> {
            let frozen = device.plan().array(name).is_none();
            let values: Vec<f32> = if frozen { Vec::new() } else { device.download(name)? };
            Ok(values.into_iter().map(f64::from).collect())
        };
        let outputs = Outputs {
            evaluation: device.evaluation(&[])?,
            grad_query: gradient(device, "query_gradient")?,
            grad_passage: gradient(device, "passage_gradient")?,
            temperature: device.temperature()?,
        };
        let results: Vec<f64> = device.download("results")?;
        let skipped = if has { device.download("skipped")? } else { Vec::new() };
        let [squares, count] = if has { [results[SQUARES], results[SKIPPED]] } else { [0.0; 2] };
        Ok(Self { outputs, skipped, squares, count, diagonal: device.download("diagonal")? })
    }
}

/// ∂L/∂(β s) of every negative of every row, by the definition; without owners, margin and shared positives.
pub struct Shares<'a> {
    problem: &'a Problem,
    /// By block: rows x candidates.
    derivatives: [Vec<f64>; 4],
    /// Σ over all negatives of a row.
    totals: Vec<f64>,
}

/// False for NaN.
fn within(x: f64, allowed: f64) -> bool {
    x <= allowed
}

/// Ranges of rows and columns, the block of the rows' anchors and of the columns', if these anchor, and whether it is a triangle.
type SuperBlock = ([Range<usize>; 2], Block, Option<Block>, bool);

fn candidates(problem: &Problem, block: Block) -> usize {
    if matches!(block, Block::QP | Block::PP) { problem.passages } else { problem.rows }
}

impl<'a> Shares<'a> {
    pub fn new(problem: &'a Problem) -> Self {
        let pairs = problem.pairs().expect("a valid problem");
        assert!((0..problem.rows).all(|i| pairs.positive(i) == i));
        assert!(pairs.exclusive_owners().is_none() && problem.call.margin().is_none());
        let (m, beta) = (problem.rows, problem.call.beta());
        let unit = |x: &[f64]| -> Vec<Vec<f64>> {
            x.chunks(problem.dim)
                .map(|row| {
                    let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
                    row.iter().map(|v| v / norm).collect()
                })
                .collect()
        };
        let (query, passage) = (unit(&problem.query), unit(&problem.passage));
        let query_id = |i: usize| pairs.query_ids().map_or(i as i64, |ids| ids[i]);
        let passage_id = |j: usize| pairs.passage_ids().map_or(j as i64, |ids| ids[j]);
        // That of the row that owns it, or of the lowest whose positive it is a copy of.
        let lowest = |j: usize| (0..m).find(|&i| passage_id(i) == passage_id(j));
        let query_key = |j: usize| if j < m { Some(j) } else { lowest(j) }.map(query_id);
        let query_keys: Vec<Option<i64>> = (0..problem.passages).map(query_key).collect();
        let weights = pairs.normalized_weights();
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
        let mut derivatives = Block::ALL.map(|block| vec![0.0; m * candidates(problem, block)]);
        let mut totals = vec![0.0; m];
        for i in 0..m {
            let positive = dot(&query[i], &passage[i]);
            // Relative to the positive's exponential.
            let exponentials = Block::ALL.map(|block| -> Vec<f64> {
                let anchor = if matches!(block, Block::QP | Block::QQ) { &query[i] } else { &passage[i] };
                let passages = matches!(block, Block::QP | Block::PP);
                (0..candidates(problem, block))
                    .map(|j| {
                        let same_query = if passages { query_keys[j] } else { Some(query_id(j)) } == Some(query_id(i));
                        let same_passage = passage_id(i) == passage_id(j);
                        let crossed =
                            if passages { passage_id(j) == query_id(i) } else { query_id(j) == passage_id(i) };
                        let s = dot(anchor, if passages { &passage[j] } else { &query[j] });
                        if same_query || same_passage || problem.call.shared_ids() && crossed {
                            0.0
                        } else {
                            (beta * (s - positive)).exp()
                        }
                    })
                    .collect()
            });
            for group in problem.call.loss().groups().iter().filter(|g| g.coefficient() > 0.0) {
                let blocks = || group.blocks().iter().map(|b| b.index());
                let negatives: f64 = blocks().map(|b| exponentials[b].iter().sum::<f64>()).sum();
                let denominator = f64::from(group.positive_copies()) + negatives;
                let factor = group.coefficient() * weights[i] / denominator;
                for b in blocks() {
                    let row = derivatives[b].chunks_mut(exponentials[b].len()).nth(i).unwrap();
                    row.iter_mut().zip(&exponentials[b]).for_each(|(to, e)| *to += factor * e);
                }
                totals[i] += factor * negatives;
            }
        }
        Self { problem, derivatives, totals }
    }

    fn derivative(&self, block: Block, row: usize, candidate: usize) -> f64 {
        self.derivatives[block.index()][row * candidates(self.problem, block) + candidate]
    }

    /// Super-blocks with coefficients in the order of a plan that is one wave.
    fn super_blocks(&self) -> Vec<SuperBlock> {
        let (m, n, loss) = (self.problem.rows, self.problem.passages, self.problem.call.loss());
        let (rows, others) = (0..m, m..n);
        let mut all = Vec::new();
        if loss.uses(Block::QP) || loss.uses(Block::PQ) {
            all.push(([rows.clone(), rows.clone()], Block::QP, Some(Block::PQ), false));
        }
        if loss.uses(Block::QP) {
            all.push(([rows.clone(), others.clone()], Block::QP, None, false));
        }
        if loss.uses(Block::QQ) {
            all.push(([rows.clone(), rows.clone()], Block::QQ, Some(Block::QQ), true));
        }
        if loss.uses(Block::PP) {
            all.push(([rows.clone(), rows.clone()], Block::PP, Some(Block::PP), true));
            all.push(([rows, others], Block::PP, None, false));
        }
        all.retain(|(ranges, ..)| ranges.iter().all(|r| !r.is_empty()));
        all
    }

    /// Whether a square is below the diagonal of a triangle.
    fn is_mirrored(&self, step: usize, square: usize) -> bool {
        let mut first = 0;
        for ([rows, cols], _, _, triangle) in self.super_blocks() {
            let (rows, cols) = (rows.len().div_ceil(step), cols.len().div_ceil(step));
            let place = square.wrapping_sub(first);
            if place < rows * cols {
                return triangle && place / cols > place % cols;
            }
            first += rows * cols;
        }
        false
    }

    /// Sums of derivatives by row over each square: `visit(square, row, sum, candidates)`, the square by its place among all, and
    /// how many words there are.
    fn for_each_square(&self, step: usize, mut visit: impl FnMut(usize, usize, f64, usize)) -> usize {
        let mut first = 0;
        for ([rows, cols], of_rows, of_cols, triangle) in self.super_blocks() {
            let squares = [&rows, &cols].map(|range| range.len().div_ceil(step));
            for (r, c) in (0..squares[0]).flat_map(|r| (0..squares[1]).map(move |c| (r, c))) {
                let part = |range: &Range<usize>, k: usize| {
                    range.start + k * step..range.end.min(range.start + (k + 1) * step)
                };
                let (own, other, square) = (part(&rows, r), part(&cols, c), first + r * squares[1] + c);
                for i in own.clone() {
                    let sum = other.clone().map(|j| self.derivative(of_rows, i, j)).sum();
                    visit(square, i, sum, other.len());
                }
                // The other triangle's rows are these columns.
                if let Some(block) = of_cols.filter(|_| !triangle) {
                    for j in other.clone() {
                        visit(square, j, own.clone().map(|i| self.derivative(block, j, i)).sum(), own.len());
                    }
                }
            }
            first += squares[0] * squares[1];
        }
        first
    }

    /// An error unless what was left out of each row is at most `share` of all; the largest part of that which was used.
    pub fn expect_bound(&self, outcome: &Outcome, step: usize, share: f64) -> std::result::Result<f64, String> {
        let mut left_out = vec![0.0; self.problem.rows];
        let words = self.for_each_square(step, |square, row, sum, _| {
            left_out[row] += if outcome.skipped[square] != 0 { sum } else { 0.0 };
        });
        if words != outcome.skipped.len() {
            return Err(format!("{words} squares by the definition, {} on the device", outcome.skipped.len()));
        }
        let mut used = 0.0_f64;
        for (row, (left, total)) in left_out.iter().zip(&self.totals).enumerate() {
            if !within(*left, share * total) {
                return Err(format!("row {row} lost {left:e} of {total:e}, allowed the share {share:e}"));
            }
            used = used.max(if *total > 0.0 { left / (share * total) } else { 0.0 });
        }
        Ok(used)
    }

    /// How many squares rows would spare one by one, mirror images counted once: an upper bound of what can be skipped.
    pub fn spared(&self, step: usize, share: f64) -> usize {
        let used = Block::ALL.into_iter().filter(|b| self.problem.call.loss().uses(*b));
        let met: usize = used.map(|b| candidates(self.problem, b)).sum();
        let mut kept = std::collections::HashSet::new();
        let mut all = std::collections::HashSet::new();
        self.for_each_square(step, |square, row, sum, candidates| {
            all.insert(square);
            if sum > share * self.totals[row] * candidates as f64 / met as f64 {
                kept.insert(square);
            }
        });
        all.iter().filter(|square| !kept.contains(*square) && !self.is_mirrored(step, **square)).count()
    }

    /// The smallest η at which a square can be skipped, when all rows of a square are alike.
    pub fn smallest_threshold(&self, step: usize) -> f64 {
        let used = Block::ALL.into_iter().filter(|b| self.problem.call.loss().uses(*b));
        let met: usize = used.map(|b| candidates(self.problem, b)).sum();
        let mut thresholds: Vec<(usize, f64)> = Vec::new();
        self.for_each_square(step, |square, row, sum, candidates| {
            let threshold = sum / self.totals[row] * met as f64 / candidates as f64;
            match thresholds.iter_mut().find(|(s, _)| *s == square) {
                Some((_, t)) => *t = t.max(threshold),
                None => thresholds.push((square, threshold)),
            }
        });
        thresholds.into_iter().map(|(_, t)| t).fold(f64::INFINITY, f64::min)
    }
}

/// An error unless loss and metrics are the same bits as without skipping, and gradients as near as docs/skipping.md derives from
/// the bound: Σ ‖x‖·‖Δ ∂L/∂x‖ <= 2ηβ Σ|Dᵢ|, |Δ ∂L/∂β| <= 2η Σ|Dᵢ|; and of a loss with block QP alone, ηβ|Dᵢ| for each query.
pub fn expect_near(problem: &Problem, got: &Outcome, full: &Outcome, share: f64) -> std::result::Result<(), String> {
    if got.outputs.evaluation != full.outputs.evaluation {
        return Err("skipping changed loss or metrics".into());
    }
    let (beta, dim) = (problem.call.beta(), problem.dim);
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let derivatives: f64 = full.diagonal.iter().map(|d| d.abs()).sum();
    // Sums of f32 in another order: skipped terms no longer round what comes after them.
    let rounding = 2e-5;
    let queries_only_anchor = Block::ALL.iter().all(|b| problem.call.loss().uses(*b) == (*b == Block::QP));
    let (diagonal, mut error, mut noise) = (&full.diagonal, 0.0, 0.0);
    for (tower, x, got, full) in [
        (0, &problem.query, &got.outputs.grad_query, &full.outputs.grad_query),
        (1, &problem.passage, &got.outputs.grad_passage, &full.outputs.grad_passage),
    ] {
        for (row, ((x, got), full)) in x.chunks(dim).zip(got.chunks(dim)).zip(full.chunks(dim)).enumerate() {
            let norm = length(&mut x.iter().copied());
            let difference = norm * length(&mut got.iter().zip(full).map(|(a, b)| a - b));
            let size = norm * length(&mut full.iter().copied());
            error += difference;
            noise += rounding * size;
            let allowed = share * beta * diagonal[row % diagonal.len()].abs() + rounding * size;
            if tower == 0 && queries_only_anchor && !within(difference, allowed) {
                return Err(format!("query {row}: off by {difference:e}, allowed {allowed:e}"));
            }
        }
    }
    let allowed = 2.0 * share * beta * derivatives + noise;
    if !within(error, allowed) {
        return Err(format!("gradients are off by {error:e}, allowed {allowed:e}"));
    }
    let [a, b] = [got, full].map(|o| o.outputs.temperature.log_beta);
    let allowed = beta * 2.0 * share * derivatives + rounding * b.abs();
    if !within((a - b).abs(), allowed) {
        return Err(format!("the gradient of log β is off by {:e}, allowed {allowed:e}", a - b));
    }
    Ok(())
}
