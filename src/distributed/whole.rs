//! The whole batch, gathered from what each rank has of it.

use super::group::{Calls, Group, WORDS, agree, agree_on, gather, gather_texts, ranges};
use super::{Part, Reduction};
use crate::batch::{Batch, Data, Embeddings, for_each_dtype};
use crate::call::{Call, Scope, expect_as_many};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::identity::{digest, option_texts};
use crate::output::GradientBuffers;
use crate::tower::Tower;
use half::{bf16, f16};
use std::ops::Range;

/// What every rank says first, of one size.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Head {
    rows: usize,
    passages: usize,
    /// Dimension and type; `None` without any embedding.
    kind: Option<(usize, DType)>,
    lists: Lists,
    /// Whether the rank wants gradients of its passages.
    passage_gradient: bool,
    /// Of what the rank is asked for, and its options.
    options: [u64; 2],
}

/// Which lists a rank gives.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Lists {
    query_ids: bool,
    passage_ids: bool,
    weights: bool,
    owners: Option<Scope>,
}

impl Head {
    fn of(part: &Part<'_>, buffers: &GradientBuffers<'_>, options: &str) -> Result<Self> {
        let (query, passage) = (part.query, part.passage);
        let rows = query.map_or(0, |x| x.rows());
        let passages = passage.map_or(0, |x| x.rows());
        let mut towers = query.iter().chain(&passage).map(|x| (x.dim(), x.dtype()));
        let kind = towers.next();
        if let (Some(query), Some(passage)) = (query, passage) {
            Batch::expect_like(&query, &passage)?;
        }
        // A row without a passage of its own rank would take one of the next rank for its positive.
        expect_as_many(rows, passages)?;
        part.call.check_options()?;
        part.call.check_lists(rows, passages)?;
        let dim = kind.map_or(0, |(dim, _)| dim);
        if kind.is_some() {
            crate::prefix::of(part.call, dim)?;
        }
        let towers = [(Tower::Query, rows, &buffers.query), (Tower::Passage, passages, &buffers.passage)];
        for (tower, rows, buffer) in towers {
            if let Some(buffer) = buffer.as_ref().filter(|_| rows == 0) {
                let (argument, value) = ("gradients", format!("a buffer of {} {tower} rows", buffer.rows()));
                return Err(Error::invalid(argument, value, format!("none, for the rank has no {tower}")));
            }
            buffers.expect_shape_of(tower, rows, dim)?;
        }
        let call = part.call;
        let lists = Lists {
            query_ids: call.query_ids.is_some(),
            passage_ids: call.passage_ids.is_some(),
            weights: call.weights.is_some(),
            owners: call.owners.as_ref().map(|(_, scope)| *scope),
        };
        Ok(Self { rows, passages, kind, lists, passage_gradient: buffers.passage.is_some(), options: digest(options) })
    }

    fn encode(&self) -> [u64; WORDS] {
        let (dim, dtype) = self.kind.map_or((0, 0), |(dim, dtype)| (dim, 1 + place(dtype)));
        let Lists { query_ids, passage_ids, weights, owners } = self.lists;
        let owners = [owners.is_some(), owners == Some(Scope::Own)];
        let flags = [query_ids, passage_ids, weights, owners[0], owners[1], self.passage_gradient];
        let flags = flags.iter().fold(0, |bits, &flag| 2 * bits + u64::from(flag));
        let [first, second] = self.options;
        Calls::Loss.with([self.rows as u64, self.passages as u64, dim as u64, dtype, flags, first, second])
    }

    fn decode([_, rows, passages, dim, dtype, flags, first, second]: [u64; WORDS]) -> Self {
        let [query_ids, passage_ids, weights, owners, own, passage_gradient] =
            std::array::from_fn(|place| flags >> (5 - place) & 1 == 1);
        let owners = owners.then_some(if own { Scope::Own } else { Scope::All });
        let kind = DType::ALL.get((dtype as usize).wrapping_sub(1)).map(|&dtype| (dim as usize, dtype));
        let lists = Lists { query_ids, passage_ids, weights, owners };
        let (rows, passages) = (rows as usize, passages as usize);
        Self { rows, passages, kind, lists, passage_gradient, options: [first, second] }
    }
}

fn place(dtype: DType) -> u64 {
    DType::ALL.iter().position(|&other| other == dtype).unwrap_or(0) as u64 // all types are in the list
}

/// Memory for a tower of any type, used again from step to step. Words of eight bytes, so that it is aligned for every type.
#[derive(Debug, Default)]
pub(super) struct Memory(Vec<u64>);

impl Memory {
    /// Exactly `len` elements, of any value.
    fn resize(&mut self, len: usize, dtype: DType) -> Result<()> {
        let words = len.saturating_mul(dtype.bytes()).div_ceil(8);
        if self.0.len() < words {
            self.0.clear();
            let refused = |_| Error::OutOfMemory { bytes: words * 8, purpose: "the embeddings of all ranks" };
            self.0.try_reserve_exact(words).map_err(refused)?;
        }
        self.0.resize(words, 0);
        Ok(())
    }

    fn bytes(&mut self, len: usize, dtype: DType) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len * dtype.bytes()]
    }

    fn data(&self, len: usize, dtype: DType) -> Data<'_> {
        let bytes = &bytemuck::cast_slice::<_, u8>(&self.0)[..len * dtype.bytes()];
        match dtype {
            DType::F64 => Data::F64(bytemuck::cast_slice(bytes)),
            DType::F32 => Data::F32(bytemuck::cast_slice::<_, f32>(bytes)),
            DType::F16 => Data::F16(bytemuck::cast_slice::<_, f16>(bytes)),
            DType::BF16 => Data::BF16(bytemuck::cast_slice::<_, bf16>(bytes)),
        }
    }
}

/// Copies the rows without what is between them.
fn pack(x: Embeddings<'_>, into: &mut [u8]) {
    let (dim, stride) = (x.dim(), x.row_stride());
    for_each_dtype!(Data, x.data(), data => {
        let bytes = dim * size_of_val(&data[0]);
        for (row, to) in into.chunks_exact_mut(bytes).enumerate() {
            to.copy_from_slice(bytemuck::cast_slice(&data[row * stride..][..dim]));
        }
    });
}

/// What all ranks know of the batch before they know its embeddings.
#[derive(Debug)]
pub(super) struct Whole {
    pub call: Call,
    /// Of each rank, its queries and its passages among those of all.
    pub rows: Vec<Range<usize>>,
    pub passages: Vec<Range<usize>>,
    pub dim: usize,
    pub dtype: DType,
    /// Whether some rank wants gradients of its passages.
    pub passage_gradient: bool,
}

impl Whole {
    /// M and N.
    pub fn shape(&self) -> [usize; 2] {
        [&self.rows, &self.passages].map(|ranges| ranges.last().map_or(0, |range| range.end))
    }

    /// Compares what the ranks say, and gathers their lists. Every rank gets the same, or the same error.
    ///
    /// `buffers` are those of this rank, or why it has none.
    pub fn agree<'b>(
        group: &mut impl Group,
        part: &Part<'_>,
        buffers: Result<GradientBuffers<'b>>,
        what: &str,
        reduction: Reduction,
    ) -> Result<(Self, GradientBuffers<'b>)> {
        let options = option_texts(part.call).into_iter().map(|(name, value)| format!("{name} {value}"));
        let own: Vec<_> = [what.into(), reduction.to_string()].into_iter().chain(options).collect();
        let own = own.join("\n");
        let head = buffers.and_then(|buffers| Ok((Head::of(part, &buffers, &own)?, buffers)));
        let (buffers, said) = agree_on(group, head.map(|(head, buffers)| (buffers, head.encode())))?;
        Calls::expect_one(&said)?;
        let heads: Vec<_> = said.into_iter().map(Head::decode).collect();
        if heads.iter().any(|head| head.options != heads[0].options) {
            return Err(differing(&gather_texts(group, &own)?));
        }
        let kind = heads.iter().find_map(|head| head.kind);
        let Some((dim, dtype)) = kind.filter(|_| heads.iter().any(|head| head.rows > 0)) else {
            return Err(Error::invalid("query", "without a row on every rank", "rows on at least one rank"));
        };
        for (rank, head) in heads.iter().enumerate() {
            if let Some((other, its)) = head.kind.filter(|kind| *kind != (dim, dtype)) {
                let value = format!("of dimension {other} and type {its} on rank {rank}");
                return Err(Error::invalid("embeddings", value, format!("the same on all ranks, {dim} and {dtype}")));
            }
        }
        if dtype == DType::F64 {
            return Err(Error::dtype("cpu", dtype, "f32, f16 and bf16; the reference takes f64"));
        }
        let with = |given: fn(&Lists) -> bool, count: fn(&Head) -> usize| given_by_all(&heads, given, count);
        let query_ids = with(|lists| lists.query_ids, |head| head.rows).map_err(|ranks| uneven("query_ids", ranks))?;
        let passage_ids =
            with(|lists| lists.passage_ids, |head| head.passages).map_err(|ranks| uneven("passage_ids", ranks))?;
        let scopes: Vec<_> =
            heads.iter().enumerate().filter_map(|(rank, head)| Some((rank, head.lists.owners?))).collect();
        if let Some((rank, other)) = scopes.iter().find(|(_, scope)| *scope != scopes[0].1) {
            let (first, scope) = scopes[0];
            let value = format!("of scope {other:?} on rank {rank} and of scope {scope:?} on rank {first}");
            return Err(Error::invalid("owners", value, "one scope on all ranks"));
        }
        let rows = ranges(heads.iter().map(|head| head.rows));
        let passages = ranges(heads.iter().map(|head| head.passages));
        let [m, n] = [&rows, &passages].map(|ranges| ranges.last().map_or(0, |range| range.end));
        let most = i32::MAX as usize;
        if m > most || n > most {
            return Err(Error::invalid(
                "rows",
                format!("{m} queries and {n} passages on all ranks"),
                format!("up to {most}"),
            ));
        }
        let weights = heads.iter().any(|head| head.lists.weights);
        let lists = Lists { query_ids, passage_ids, weights, owners: scopes.first().map(|(_, scope)| *scope) };
        let call = lists.gather(group, part.call, [&rows, &passages])?;
        let passage_gradient = heads.iter().any(|head| head.passage_gradient);
        Ok((Self { call, rows, passages, dim, dtype, passage_gradient }, buffers))
    }

    /// Gathers the embeddings of both towers.
    pub fn embeddings(&self, group: &mut impl Group, part: &Part<'_>, memory: &mut [Memory; 2]) -> Result<()> {
        let rank = group.rank();
        let room = [&self.rows, &self.passages].into_iter().zip(&mut *memory).try_for_each(|(parts, memory)| {
            memory.resize(parts.last().map_or(0, |part| part.end) * self.dim, self.dtype)
        });
        agree(group, room)?;
        for ((own, parts), memory) in
            [part.query, part.passage].into_iter().zip([&self.rows, &self.passages]).zip(memory)
        {
            let bytes = memory.bytes(parts.last().map_or(0, |part| part.end) * self.dim, self.dtype);
            let parts = ranges(parts.iter().map(|part| part.len() * self.dim * self.dtype.bytes()));
            if let Some(own) = own {
                pack(own, &mut bytes[parts[rank].clone()]);
            }
            gather(group, bytes, &parts)?;
        }
        Ok(())
    }

    /// The batch over the embeddings of all ranks.
    pub fn batch<'a>(&'a self, memory: &'a [Memory; 2]) -> Result<Batch<'a>> {
        let tower = |tower: usize| {
            let rows = self.shape()[tower];
            Embeddings::new(memory[tower].data(rows * self.dim, self.dtype), rows, self.dim)
        };
        Batch::new(&self.call, tower(0)?, tower(1)?)
    }

    /// The rank whose row it is, and the number of the row there.
    pub fn owner(&self, tower: Tower, row: usize) -> Option<(usize, usize)> {
        let ranges = match tower {
            Tower::Query => &self.rows,
            Tower::Passage => &self.passages,
        };
        let rank = ranges.iter().position(|range| range.contains(&row))?;
        Some((rank, row - ranges[rank].start))
    }
}

/// Whether every rank that has something gives the list of it. An error names one that does and one that does not.
fn given_by_all(
    heads: &[Head],
    given: fn(&Lists) -> bool,
    count: fn(&Head) -> usize,
) -> std::result::Result<bool, [usize; 2]> {
    let mut ranks = heads.iter().enumerate().filter(|(_, head)| count(head) > 0);
    let find = |wanted: bool| {
        let mut ranks = heads.iter().enumerate().filter(|(_, head)| count(head) > 0);
        ranks.find(|(_, head)| given(&head.lists) == wanted).map(|(rank, _)| rank)
    };
    match (find(true), find(false)) {
        (Some(with), Some(without)) => Err([with, without]),
        (with, _) => Ok(with.is_some() && ranks.next().is_some()),
    }
}

fn uneven(argument: &'static str, [with, without]: [usize; 2]) -> Error {
    Error::invalid(
        argument,
        format!("given by rank {with} and not by rank {without}"),
        "on all ranks that have rows, or on none",
    )
}

/// Where ranks differ, of which each says its options.
fn differing(said: &[String]) -> Error {
    let of_rank = |(rank, text): (usize, &String)| {
        let mut lines = said[0].lines().zip(text.lines());
        lines.find(|(here, there)| here != there).map(|(here, there)| (rank, here.to_string(), there.to_string()))
    };
    let (rank, here, there) = said.iter().enumerate().find_map(of_rank).unwrap_or_default();
    let value = format!("another on rank {rank}, which has {}", there.trim());
    Error::invalid("call", value, format!("the same on all ranks; rank 0 has {}", here.trim()))
}

impl Lists {
    /// The call of all ranks, with these lists. Rows and passages that a rank's own lists name are the rank's, and are renamed.
    fn gather(&self, group: &mut impl Group, own: &Call, [rows, passages]: [&[Range<usize>]; 2]) -> Result<Call> {
        let each_row = 1 + usize::from(self.query_ids) + usize::from(self.weights);
        let each_passage = usize::from(self.passage_ids) + usize::from(self.owners.is_some());
        let lengths = rows.iter().zip(passages).map(|(m, n)| m.len() * each_row + n.len() * each_passage);
        let places = ranges(lengths);
        let mut all = vec![0; places.last().map_or(0, |place| place.end)];
        let rank = group.rank();
        let words = self.words(own, &rows[rank], &passages[rank]);
        all[places[rank].clone()].copy_from_slice(&words);
        gather(group, &mut all, &places)?;

        let mut call = own.without_lists();
        let (mut query_ids, mut passage_ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let (mut owners, mut positives) = (Vec::new(), Vec::new());
        for (place, (m, n)) in places.into_iter().zip(rows.iter().zip(passages)) {
            let mut words = all[place].iter().copied();
            let mut take = |wanted: bool, count: usize| -> Vec<u64> {
                words.by_ref().take(if wanted { count } else { 0 }).collect()
            };
            positives.extend(take(true, m.len()).into_iter().map(|n| n as u32));
            query_ids.extend(take(self.query_ids, m.len()).into_iter().map(|id| id as i64));
            weights.extend(take(self.weights, m.len()).into_iter().map(|bits| f32::from_bits(bits as u32)));
            passage_ids.extend(take(self.passage_ids, n.len()).into_iter().map(|id| id as i64));
            owners.extend(take(self.owners.is_some(), n.len()).into_iter().map(|owner| owner as i64 as i32));
        }
        call.positives = Some(positives);
        call.query_ids = self.query_ids.then_some(query_ids);
        call.passage_ids = self.passage_ids.then_some(passage_ids);
        call.weights = self.weights.then_some(weights);
        call.owners = self.owners.map(|scope| (owners, scope));
        Ok(call)
    }

    /// This rank's lists, one behind the other, in the order in which [`Lists::gather`] takes them.
    fn words(&self, own: &Call, rows: &Range<usize>, passages: &Range<usize>) -> Vec<u64> {
        let positive = |i: usize| own.positives.as_ref().map_or(i, |positives| positives[i] as usize);
        let mut words: Vec<u64> = (0..rows.len()).map(|i| (passages.start + positive(i)) as u64).collect();
        let ids = |given: &Option<Vec<i64>>| given.clone().unwrap_or_default().into_iter().map(|id| id as u64);
        if self.query_ids {
            words.extend(ids(&own.query_ids));
        }
        if self.weights {
            let weight = |i: usize| own.weights.as_ref().map_or(1.0, |weights| weights[i]);
            words.extend((0..rows.len()).map(|i| u64::from(weight(i).to_bits())));
        }
        if self.passage_ids {
            words.extend(ids(&own.passage_ids));
        }
        if self.owners.is_some() {
            let owner = |n: usize| match own.owners.as_ref().map_or(-1, |(owners, _)| i64::from(owners[n])) {
                -1 => -1,
                owner => owner + rows.start as i64,
            };
            words.extend((0..passages.len()).map(|n| owner(n) as u64));
        }
        words
    }
}
