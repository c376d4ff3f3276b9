//! The plan of a call: its super-blocks, buffers and dispatches. It follows from the problem and from what the device allows alone.

use super::bindings::beyond;
use super::capabilities::Capabilities;
use super::dispatches::Dispatches;
use super::layout::Layout;
use super::parts::{Parts, Segment};
use super::schedule::{ALIGNMENT, Dispatch, Slot};
use super::shaders::{Products, Variant};
use crate::Problem;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::identity::Identity;
use crate::order::{Occurrences, Order};
use crate::prefix::Prefix;
use crate::regions;
use crate::super_blocks::{SuperBlock, least_edge, super_blocks};
use std::fmt;

/// What a call dispatches, and on which buffers. A plan can be printed.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(super) slot_bytes: [u64; Slot::ALL.len()],
    pub(super) side: Vec<u8>,
    pub(super) uniforms: Vec<u8>,
    pub(super) partials: Vec<Dispatch>,
    pub(super) combine: Vec<Dispatch>,
    pub(super) backward: Vec<Dispatch>,
    pub(super) layout: Layout,
    pub(super) variant: Variant,
    pub(super) bounded_bytes: u64,
    pub(super) flops: f64,
    pub(super) facts: Facts,
    title: String,
}

/// What the host needs of the problem to read results.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub weights: Vec<f64>,
    pub loss: String,
    pub beta: f64,
    pub upstream: f64,
    pub zero_is_error: bool,
    pub identity: Identity,
    pub rows: std::ops::Range<usize>,
    pub uses: [bool; 4],
    /// Those of weight above 0, and whether the call names any.
    pub prefixes: Vec<Prefix>,
    pub named: bool,
    /// Type and row stride of the embeddings of each tower, and how many entries of a row are read.
    pub raw: [(DType, usize, usize); 2],
}

impl Plan {
    /// The plan of one call, with the variant that suits the device, the batch and the bound on the workspace.
    ///
    /// # Errors
    /// As [`Plan::with_variant`].
    pub fn new(problem: &Problem<'_>, capabilities: &Capabilities) -> Result<Self> {
        let mut variant = capabilities.variant(problem.dtype);
        let tile = variant.tile();
        let (m, n, _) = problem.shape();
        variant.large_tiles &= m.max(n) >= capabilities.large_tile_rows;
        let needed = needed(problem, &Order::new(&problem.pairs), tile);
        variant.large_tiles &= needed <= bound(problem, capabilities, needed);
        Self::with_variant(problem, capabilities, variant)
    }

    /// The plan of one call, with a variant of the caller's choice.
    ///
    /// # Errors
    /// [`Error::WorkspaceTooSmall`] if the bound of the call does not hold one tile, or cuts the work into more than 16,384 super-blocks.
    /// [`Error::Unsupported`] for f16 storage of embeddings of 32 bits, for gradients of 16 bits with an odd row stride, and for a buffer
    /// that is larger than the device can bind or allocate.
    pub fn with_variant(problem: &Problem<'_>, capabilities: &Capabilities, variant: Variant) -> Result<Self> {
        // Shaders count bytes in u32, so plans bind no more than that counts, although some devices could.
        let max_binding_bytes = capabilities.max_binding_bytes.min(u64::from(u32::MAX) / ALIGNMENT * ALIGNMENT);
        let capabilities = &Capabilities { max_binding_bytes, ..*capabilities };
        let (m, n, d) = problem.shape();
        let unsupported =
            |what: String, allowed: &str| Err(Error::Unsupported { backend: "wgpu", what, allowed: allowed.into() });
        if variant.f16 && problem.dtype == DType::F32 {
            return unsupported("f16 storage of f32 embeddings".into(), "f16 storage of f16 and bf16 embeddings");
        }
        if variant.products != Products::Fma && !(variant.f16 && variant.subgroups && !variant.large_tiles) {
            let allowed = "cooperative matrices with f16 storage, subgroups and small tiles";
            return unsupported(format!("the variant {variant}"), allowed);
        }
        for (argument, output) in ["query", "passage"].into_iter().zip(problem.gradients) {
            if let Some(output) = output
                && output.dtype.bytes() == 2
                && output.row_stride % 2 == 1
            {
                let what =
                    format!("`gradients.{argument}` of {} with a row stride of {}", output.dtype, output.row_stride);
                return unsupported(what, "even row strides for 16 bits, any for f32");
            }
        }

        let tile = variant.tile();
        let order = Order::new(&problem.pairs);
        let needed = needed(problem, &order, tile);
        let bound = bound(problem, capabilities, needed);
        if needed > bound {
            return Err(match problem.workspace_bytes {
                Some(given) if needed > given as u64 => {
                    Error::WorkspaceTooSmall { given, needed: needed as usize, rows: m, passages: n, dim: d }
                }
                _ => beyond(Slot::Scratch, needed, "bindings and buffers", bound),
            });
        }
        // Beside its matrix of gradients, the packed rows and columns of a super-block are each bound at once, and so are their sums.
        let segments = Segment::of(&problem.prefixes);
        let packed = segments.last().map_or(0, |s| 4 * s.vectors.end);
        let row_bytes = (packed * if variant.f16 { 2 } else { 4 }) as u64;
        let bindable = capabilities.max_binding_bytes.saturating_sub(ALIGNMENT) / row_bytes;
        let sums_row_bytes =
            problem.gradients.iter().flatten().map(|g| g.row_stride.max(d) as u64 * 4).max().unwrap_or(4);
        let bindable = bindable.min(capabilities.max_binding_bytes.saturating_sub(ALIGNMENT) / sums_row_bytes);
        let mut longest = tile as u64;
        let bytes = |edge: u64| bounded_bytes(edge, edge, segments.len() as u64);
        while bytes(2 * longest) <= bound {
            longest *= 2;
        }
        while bytes(longest + tile as u64) <= bound {
            longest += tile as u64;
        }
        let longest = (longest.min(bindable) as usize / tile).max(1) * tile;

        let regions = regions::regions(problem.call().loss(), &problem.rows, &order, m);
        let blocks = super_blocks(problem, &regions, &regions::cuts(&problem.rows, &order, m), tile, longest);
        let graded = blocks.iter().map(|s| s.has_coefficients(problem.call().loss())).collect();
        let parts = Parts {
            problem,
            occurrences: Occurrences::new(&order),
            order,
            capabilities: *capabilities,
            variant,
            blocks,
            graded,
            segments,
        };
        let dispatches = Dispatches::new(&parts)?;
        let title = format!(
            "wgpu {}, {m} queries x {n} passages of dimension {d}{}, {}",
            problem.call().loss().name(),
            named_prefixes(problem),
            problem.dtype
        );
        let facts = Facts {
            weights: problem.pairs.normalized_weights(),
            loss: problem.call().loss().name().into(),
            beta: problem.call().beta(),
            upstream: problem.upstream,
            zero_is_error: problem.call().zero_norm() == crate::call::ZeroNorm::Error,
            identity: problem.identity(),
            rows: problem.rows.clone(),
            uses: crate::loss::Block::ALL.map(|b| problem.call().loss().uses(b)),
            raw: problem.row_strides.map(|stride| (problem.dtype, stride, parts.dim())),
            prefixes: problem.prefixes.clone(),
            named: problem.call().prefixes().is_some(),
        };
        let Dispatches { recorder, layout, side, partials, combine, backward, .. } = dispatches;
        let mut slot_bytes = recorder.slot_bytes;
        slot_bytes[Slot::Uniforms as usize] = recorder.uniforms.len() as u64;
        Ok(Self {
            slot_bytes,
            bounded_bytes: slot_bytes[Slot::Scratch as usize],
            uniforms: recorder.uniforms,
            flops: flops(&parts),
            side,
            partials,
            combine,
            backward,
            layout,
            variant,
            facts,
            title,
        })
    }

    /// Loss, metrics and coefficients: [`Plan::partials`], then [`Plan::combine`].
    pub fn forward(&self) -> impl Iterator<Item = &Dispatch> {
        self.partials.iter().chain(&self.combine)
    }

    /// The partial sums of the shard. A shard merges those of the others before [`Plan::combine`].
    pub fn partials(&self) -> &[Dispatch] {
        &self.partials
    }

    /// Loss, metrics and coefficients from the sums.
    pub fn combine(&self) -> &[Dispatch] {
        &self.combine
    }

    /// Gradients. They follow [`Plan::forward`] with the same state and packed embeddings. The slot `Scratch` may hold anything.
    pub fn backward(&self) -> &[Dispatch] {
        &self.backward
    }

    /// Bytes that a slot needs at the least; 0 for a slot that the call does not use.
    pub fn slot_bytes(&self, slot: Slot) -> u64 {
        self.slot_bytes[slot as usize]
    }

    /// What the slot `Side` holds. The caller writes it once for each plan.
    pub fn side_data(&self) -> &[u8] {
        &self.side
    }

    /// What the slot `Uniforms` holds. The caller writes it once for each plan.
    pub fn uniforms(&self) -> &[u8] {
        &self.uniforms
    }

    /// Bytes of the slot `Scratch`, which the caller bounds. Beyond it there are packed embeddings, sums of gradients and O(M + N)
    /// numbers.
    pub fn bounded_bytes(&self) -> u64 {
        self.bounded_bytes
    }

    /// Type and row stride of a tower's embeddings, and how many entries of a row are read.
    #[cfg(feature = "wgpu")]
    pub(super) fn raw(&self, tower: crate::tower::Tower) -> (DType, usize, usize) {
        self.facts.raw[usize::from(tower == crate::tower::Tower::Passage)]
    }

    /// The variant of the shaders that run.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// Floating-point operations of the matrix products of forward and backward: 12 B²d for `samtone_query`.
    pub fn flops(&self) -> f64 {
        self.flops
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let own = Slot::ALL.iter().filter(|s| !s.is_callers()).map(|s| self.slot_bytes(*s)).sum();
        writeln!(
            f,
            "{}: {}, {} + {} dispatches, {:.1} MiB beside inputs and outputs ({:.1} MiB bounded), {:.1} GFLOP",
            self.title,
            self.variant,
            self.partials.len() + self.combine.len(),
            self.backward.len(),
            mib(own),
            mib(self.bounded_bytes),
            self.flops / 1e9,
        )?;
        self.forward().chain(&self.backward).try_for_each(|dispatch| writeln!(f, "  {dispatch}"))
    }
}

/// Bytes that the slot `Scratch` may take: the caller's bound, or else the default, or what is `needed` if that is more. It is never more
/// than can be bound at once.
fn bound(problem: &Problem<'_>, capabilities: &Capabilities, needed: u64) -> u64 {
    let default = needed.max(super::DEFAULT_WORKSPACE_BYTES as u64);
    let bound = problem.workspace_bytes.map_or(default, |b| b as u64);
    bound.min(capabilities.max_binding_bytes).min(capabilities.max_buffer_bytes)
}

/// The least that the slot `Scratch` may take: room for a tile, or for super-blocks so large that there are not too many of them.
fn needed(problem: &Problem<'_>, order: &Order, tile: usize) -> u64 {
    let edge = least_edge(problem, order, tile) as u64;
    bounded_bytes(edge, edge, problem.prefixes.len() as u64)
}

/// Scratch of a super-block in the gradient pass: gradients of logits of each prefix, a number for each tile, and for each prefix but the
/// longest one along each axis for every 64 cosines. The first pass takes a tenth of that: three words along each axis for every 64
/// cosines.
pub(super) fn bounded_bytes(rows: u64, cols: u64, prefixes: u64) -> u64 {
    4 * prefixes * rows * cols + 4 * (rows / 64 + 1) * (cols / 64 + 1) + (prefixes - 1) * rows * cols / 8 + ALIGNMENT
}

/// The prefixes in a title; nothing for a call that names none.
fn named_prefixes(problem: &Problem<'_>) -> String {
    let dims: Vec<_> = problem.prefixes.iter().map(|p| p.dim.to_string()).collect();
    if problem.call().prefixes().is_some() { format!(", prefixes {}", dims.join(", ")) } else { String::new() }
}

fn flops(parts: &Parts<'_>) -> f64 {
    let dim = parts.dim();
    let of =
        |(s, graded): (&SuperBlock, &bool)| s.forward_flops(dim) + if *graded { s.backward_flops(dim) } else { 0.0 };
    parts.blocks.iter().zip(&parts.graded).map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;
    use crate::loss::Loss;

    /// A bound that would mean more super-blocks than a plan may have is refused, and the error names the least bound that works.
    #[test]
    fn dispatches_are_bounded() {
        for device in [Capabilities::default(), Capabilities { workgroup_bytes: 32 << 10, ..Capabilities::default() }] {
            let plan = |bytes: usize| {
                let call = Call::new(Loss::samtone_query(), 0.05).with_workspace_bytes(bytes);
                Plan::new(&Problem::new(call.pairs(65_536, 65_536).unwrap(), DType::F32, 1).unwrap(), &device)
            };
            let Err(Error::WorkspaceTooSmall { needed, rows: 65_536, .. }) = plan(100 << 10) else {
                panic!("a million super-blocks were accepted")
            };
            assert!(plan(needed - 1).is_err());
            let plan = plan(needed).unwrap();
            let dispatches = plan.forward().chain(plan.backward()).count();
            assert!((1 << 14..8 << 14).contains(&dispatches), "{dispatches} dispatches");
        }
    }

    #[test]
    fn small_batches_take_small_tiles() {
        let device = Capabilities { workgroup_bytes: 32 << 10, ..Capabilities::default() };
        let tile = |m, n, device| {
            let call = Call::new(Loss::info_nce(), 0.05);
            let problem = Problem::new(call.pairs(m, n).unwrap(), DType::F32, 16).unwrap();
            Plan::new(&problem, &device).unwrap().variant().tile()
        };
        assert_eq!([tile(2047, 2047, device), tile(2048, 2048, device), tile(512, 2048, device)], [64, 128, 128]);
        assert_eq!(tile(2048, 2048, Capabilities::default()), 64);
        assert_eq!(tile(1, 2, Capabilities { large_tile_rows: 0, ..device }), 128);
    }
}
