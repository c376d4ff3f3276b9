//! A problem in parts, and the ranks that compute it.

use crate::support::data::{Kind, Source, towers};
use crate::support::problem::{Buffer, Outputs, Problem};
use samtone::distributed::{Distributed, Group, Part, Reduction, Threads};
use samtone::{Call, DType, Error, Evaluation, GradientBuffers, Loss, Result, Scope, TemperatureGradient};

/// Queries and passages of a rank.
pub type Shape = (usize, usize);

/// Ways to spread 12 queries and 17 passages: evenly, unevenly, with ranks that have nothing or no queries.
pub const SHAPES: [&[Shape]; 7] = [
    &[(12, 17)],
    &[(6, 9), (6, 8)],
    &[(11, 12), (1, 5)],
    &[(0, 0), (7, 7), (5, 10)],
    &[(3, 4), (3, 4), (3, 5), (3, 4)],
    &[(4, 4), (0, 5), (8, 8), (0, 0)],
    &[(1, 1), (2, 2), (3, 3), (0, 1), (2, 5), (1, 1), (3, 4)],
];

/// What the parts carry beside embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Lists {
    pub shared_positives: bool,
    pub ids: bool,
    pub weights: bool,
    pub owners: Option<Scope>,
}

/// A rank's part of a problem.
#[derive(Debug, Clone)]
pub struct Local {
    pub call: Call,
    pub shape: Shape,
    pub dim: usize,
    pub query: Vec<f64>,
    pub passage: Vec<f64>,
}

/// A problem as one process has it, and in parts.
#[derive(Debug, Clone)]
pub struct Spread {
    pub whole: Problem,
    pub parts: Vec<Local>,
}

impl Spread {
    /// The parts of `call` have these `shapes`.
    pub fn new(call: &Call, kind: Kind, shapes: &[Shape], dim: usize, seed: u64, lists: Lists) -> Self {
        let mut source = Source::new(seed);
        let (m, n) = shapes.iter().fold((0, 0), |(m, n), shape| (m + shape.0, n + shape.1));
        let mut all = All::default();
        let mut calls = Vec::new();
        for &(rows, passages) in shapes {
            let first = (all.positives.len(), all.passage_ids.len());
            let mut call = call.clone();
            let positives: Vec<u32> = (0..rows)
                .map(|i| if lists.shared_positives { source.below(passages) as u32 } else { i as u32 })
                .collect();
            let mut ids = |count: usize| (0..count).map(|_| source.below(m + n / 2) as i64).collect::<Vec<_>>();
            let (query_ids, passage_ids) = (ids(rows), ids(passages));
            let weights: Vec<f32> = (0..rows).map(|_| source.below(4) as f32 / 2.0).collect();
            let owner = |n: usize| if rows == 0 || n < rows { -1 } else { source.below(rows + 1) as i32 - 1 };
            let owners: Vec<i32> = (0..passages).map(owner).collect();
            all.positives.extend(positives.iter().map(|&n| n + first.1 as u32));
            all.owners.extend(owners.iter().map(|&o| if o < 0 { o } else { o + first.0 as i32 }));
            all.query_ids.extend(&query_ids);
            all.passage_ids.extend(&passage_ids);
            all.weights.extend(&weights);
            if lists.shared_positives {
                call = call.with_positives(positives);
            }
            if lists.ids {
                call = call.with_query_ids(query_ids).with_passage_ids(passage_ids);
            }
            if lists.weights {
                call = call.with_weights(weights);
            }
            if let Some(scope) = lists.owners {
                call = call.with_hard_negative_owners(owners, scope);
            }
            calls.push(call);
        }
        let (query, passage) = towers(kind, &mut source, (m, n, dim), &all.positives, 3.0);
        let call = all.call(call, lists);
        let whole = Problem { name: "spread".into(), call, rows: m, passages: n, dim, query, passage };
        Self { parts: parts_of(&whole, shapes, calls), whole }
    }

    /// Of a preset at τ = 0.05.
    pub fn preset(name: &str, kind: Kind, shapes: &[Shape], lists: Lists) -> Self {
        let loss = Loss::by_name(name).unwrap();
        Self::new(&Call::new(loss, 0.05), kind, shapes, 9, 7, lists)
    }

    /// Every rank's results, in threads.
    pub fn run(&self, dtype: DType, upstream: f64, reduction: Reduction) -> Vec<Result<Outputs>> {
        let ranks = Threads::group(self.parts.len());
        each(ranks, &self.parts, |end, part| {
            part.run(&mut Distributed::new(end).with_reduction(reduction), dtype, upstream)
        })
    }
}

/// Lists of all ranks.
#[derive(Default)]
struct All {
    positives: Vec<u32>,
    query_ids: Vec<i64>,
    passage_ids: Vec<i64>,
    weights: Vec<f32>,
    owners: Vec<i32>,
}

impl All {
    fn call(&self, call: &Call, lists: Lists) -> Call {
        let mut call = call.clone().with_positives(&*self.positives);
        if lists.ids {
            call = call.with_query_ids(&*self.query_ids).with_passage_ids(&*self.passage_ids);
        }
        if lists.weights {
            call = call.with_weights(&*self.weights);
        }
        match lists.owners {
            Some(scope) => call.with_hard_negative_owners(&*self.owners, scope),
            None => call,
        }
    }
}

fn parts_of(whole: &Problem, shapes: &[Shape], calls: Vec<Call>) -> Vec<Local> {
    let (mut query, mut passage) = (whole.query.as_slice(), whole.passage.as_slice());
    let mut take = |shape: Shape| {
        let (q, rest) = query.split_at(shape.0 * whole.dim);
        query = rest;
        let (p, rest) = passage.split_at(shape.1 * whole.dim);
        passage = rest;
        (q.to_vec(), p.to_vec())
    };
    let local = |(&shape, call): (&Shape, Call)| {
        let (query, passage) = take(shape);
        Local { call, shape, dim: whole.dim, query, passage }
    };
    shapes.iter().zip(calls).map(local).collect()
}

/// What every rank returns, each in a thread of its own.
pub fn each<G: Send, P: Sync, R: Send>(ends: Vec<G>, parts: &[P], run: impl Fn(G, &P) -> R + Sync) -> Vec<R> {
    let run = &run;
    std::thread::scope(|scope| {
        let ranks: Vec<_> =
            ends.into_iter().zip(parts).map(|(end, part)| scope.spawn(move || run(end, part))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

impl Local {
    /// This rank's embeddings, rounded.
    pub fn buffers(&self, dtype: DType) -> [Buffer; 2] {
        [Buffer::new(dtype, &self.query), Buffer::new(dtype, &self.passage)]
    }

    /// The part over these buffers.
    pub fn part<'a>(&'a self, [query, passage]: &'a [Buffer; 2]) -> Result<Part<'a>> {
        let (m, n) = self.shape;
        let of = |x: &'a Buffer, rows: usize| (rows > 0).then(|| x.embeddings(rows, self.dim)).transpose();
        Ok(Part { call: &self.call, query: of(query, m)?, passage: of(passage, n)? })
    }

    /// This rank's results. Gradients are in f32 and start as NaN.
    pub fn run(&self, rank: &mut Distributed<impl Group>, dtype: DType, upstream: f64) -> Result<Outputs> {
        let nan = |x: &[f64]| Buffer::new(DType::F32, &vec![f64::NAN; x.len()]);
        let mut gradients = [nan(&self.query), nan(&self.passage)];
        let (evaluation, temperature) = self.run_into(rank, dtype, upstream, &mut gradients, [true; 2])?;
        let [grad_query, grad_passage] = gradients.map(|x| x.to_f64());
        Ok(Outputs { evaluation, grad_query, grad_passage, temperature })
    }

    /// Into buffers of any type, of the towers that are `wanted`.
    pub fn run_into(
        &self,
        rank: &mut Distributed<impl Group>,
        dtype: DType,
        upstream: f64,
        [query, passage]: &mut [Buffer; 2],
        wanted: [bool; 2],
    ) -> Result<(Evaluation, TemperatureGradient)> {
        let ((m, n), embeddings) = (self.shape, self.buffers(dtype));
        let buffers = GradientBuffers {
            query: (wanted[0] && m > 0).then(|| query.embeddings_mut(m, self.dim)).transpose()?,
            passage: (wanted[1] && n > 0).then(|| passage.embeddings_mut(n, self.dim)).transpose()?,
        };
        rank.loss_and_gradients_into(&self.part(&embeddings)?, upstream, buffers)
    }
}

/// An end of a group that notes how many bytes it is asked to send, and whose network may be cut.
pub struct Tapped {
    inner: Threads,
    pub sent: Vec<usize>,
    cut: Option<(usize, Error)>,
}

impl Tapped {
    pub fn new(inner: Threads) -> Self {
        Self { inner, sent: Vec::new(), cut: None }
    }

    /// After `left` exchanges every further one fails with `error`.
    pub fn cut(self, left: usize, error: Error) -> Self {
        Self { cut: Some((left, error)), ..self }
    }
}

impl Group for Tapped {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn exchange(&mut self, to: usize, out: &[u8], from: usize, into: &mut [u8]) -> Result<()> {
        assert!(to != self.rank() && from != self.rank() && self.size() > 1);
        self.sent.push(out.len());
        match &self.cut {
            Some((left, error)) if self.sent.len() > *left => Err(error.clone()),
            _ => self.inner.exchange(to, out, from, into),
        }
    }
}

/// What all ranks have together: gradients behind one another, temperature gradients added up.
pub fn joined(ranks: &[Outputs]) -> Outputs {
    let sum = |of: fn(&Outputs) -> f64| ranks.iter().map(of).sum();
    Outputs {
        evaluation: ranks[0].evaluation.clone(),
        grad_query: ranks.iter().flat_map(|r| r.grad_query.clone()).collect(),
        grad_passage: ranks.iter().flat_map(|r| r.grad_passage.clone()).collect(),
        temperature: TemperatureGradient { tau: sum(|r| r.temperature.tau), log_beta: sum(|r| r.temperature.log_beta) },
    }
}

/// The error that every rank has got.
pub fn same_error<T: std::fmt::Debug>(results: Vec<Result<T>>) -> Error {
    let errors: Vec<_> = results.into_iter().map(Result::unwrap_err).collect();
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    errors[0].clone()
}
