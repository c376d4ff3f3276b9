//! The plan of a call: its tile, super-blocks and waves, and where everything lies. It follows from the problem alone, and needs no GPU.
//!
//! Regions (src/regions.rs) are cut into super-blocks whose gradients of logits fit the workspace. As many super-blocks as fit together
//! form a wave. Each pass has a launch for each wave. In it, a thread block computes one tile, or clusters take squares of tiles in turn.

use super::DEFAULT_WORKSPACE_BYTES;
use super::arrays::{Arrays, Parts};
use super::launches::Launches;
use super::problem::{Arithmetic, Problem, Tile};
use super::schedule::{ARRAY_ALIGNMENT, Array, Launch, Slot};
use super::waves::{Division, bounded_bytes};
use crate::error::{Error, Result};
use crate::order::Order;
use crate::super_blocks::least_edge;
use std::fmt;

/// A plan uses no more of the workspace, whatever the call allows. It is more than any device has, and keeps the numbers of tiles and
/// squares of a wave below 2³².
const MOST_WORKSPACE_BYTES: usize = 1 << 40;

/// What a call launches, and on what memory. A plan can be printed.
#[derive(Debug, Clone)]
pub struct Plan {
    arrays: Vec<Array>,
    slot_bytes: [u64; Slot::ALL.len()],
    slot_alignment: [u64; Slot::ALL.len()],
    side: Vec<u8>,
    partials: Vec<Launch>,
    combine: Vec<Launch>,
    forward: Vec<Launch>,
    backward: Vec<Launch>,
    backward_alone: Vec<Launch>,
    tile: Tile,
    arithmetic: Arithmetic,
    bounded_bytes: usize,
    waves: [usize; 2],
    kept_squares: [usize; 2],
    flops: f64,
    title: String,
}

/// An error for what the kernels of prefixes do not do.
fn check_prefixes(problem: &Problem<'_>) -> Result<()> {
    const MOST: usize = (1 << 16) - 1; // thread blocks along y
    let Some(prefixes) = problem.several() else { return Ok(()) };
    if prefixes.len() > MOST {
        return Err(Error::invalid(
            "prefixes",
            format!("{} prefixes", prefixes.len()),
            format!("at most {MOST} on CUDA"),
        ));
    }
    if let Some(share) = problem.call().tile_skipping() {
        let allowed = "no tile skipping with prefixes on CUDA";
        return Err(Error::invalid("tile_skipping", share.to_string(), allowed));
    }
    Ok(())
}

impl Plan {
    /// The plan of one call.
    ///
    /// # Errors
    /// [`Error::WorkspaceTooSmall`] if the workspace of the call does not hold one tile, or cuts the work into more than 16,384
    /// super-blocks. [`Error::InvalidArgument`] for [`Tile::Cluster`] without
    /// [`Architecture::Sm90a`](super::Architecture::Sm90a), for tile skipping with prefixes or in a batch of more than 2³² squares, and for
    /// more than 65,535 prefixes.
    pub fn new(problem: &Problem<'_>) -> Result<Self> {
        let (m, n, d) = problem.shape();
        check_prefixes(problem)?;
        let order = Order::new(&problem.pairs);
        let needed = |tile: Tile| {
            let edge = least_edge(problem, &order, tile.step());
            bounded_bytes(edge, edge, problem.contents())
        };
        let given = problem.workspace_bytes.unwrap_or(DEFAULT_WORKSPACE_BYTES);
        let tile = problem.tile(|tile| needed(tile) <= given)?;
        let needed = needed(tile);
        // If the caller sets no bound, batches of more than a million pairs take more than the default, as much as they need.
        let bound = problem.workspace_bytes.unwrap_or(given.max(needed)).min(MOST_WORKSPACE_BYTES);
        if needed > bound {
            return Err(Error::WorkspaceTooSmall { given, needed, rows: m, passages: n, dim: d });
        }
        let division = Division::best(problem, &order, tile, bound, needed);
        if problem.call().tile_skipping().is_some() {
            let squares: usize = division.backward.iter().flatten().map(|s| s.squares(tile.tiling())).sum();
            if u32::try_from(squares).is_err() {
                let value = format!("given for a batch of {squares} squares of cosines");
                return Err(Error::invalid("tile_skipping", value, format!("at most {} squares", u32::MAX)));
            }
        }
        let parts = Parts { problem, order: &order, tile, division: &division };
        let arrays = Arrays::new(parts);
        let launches = Launches::new(&arrays);
        let backward_alone = launches.backward_alone();
        let alignment = |slot: Slot| match slot {
            Slot::Query | Slot::Passage => problem.dtype.bytes() as u64,
            Slot::Upstream => 4,
            Slot::QueryGradient => arrays.gradient_alignment(0),
            Slot::PassageGradient => arrays.gradient_alignment(1),
            Slot::Side | Slot::State | Slot::Workspace => ARRAY_ALIGNMENT,
        };
        Ok(Self {
            slot_alignment: Slot::ALL.map(alignment),
            forward: launches.forward,
            partials: launches.partials,
            combine: launches.combine,
            backward_alone,
            backward: launches.backward,
            tile,
            arithmetic: problem.arithmetic(),
            waves: [&division.forward, &division.backward].map(Vec::len),
            kept_squares: division.squares(tile),
            flops: division.flops(problem.entries()),
            bounded_bytes: arrays.bounded_bytes,
            slot_bytes: arrays.layout.ends,
            arrays: arrays.layout.arrays,
            side: arrays.layout.side,
            title: format!(
                "cuda {}, {} queries x {} passages of dimension {}, {}",
                problem.call().loss().name(),
                m,
                n,
                d,
                problem.dtype
            ),
        })
    }

    /// Everything the kernels read and write.
    pub fn arrays(&self) -> &[Array] {
        &self.arrays
    }

    /// The array of that name.
    pub fn array(&self, name: &str) -> Option<&Array> {
        self.arrays.iter().find(|a| a.name == name)
    }

    /// Loss, metrics and coefficients: what [`Plan::partials`] and then [`Plan::combine`] give, in one launch less.
    pub fn forward(&self) -> &[Launch] {
        &self.forward
    }

    /// The partial sums of the shard, and which embeddings are refused. A shard merges the sums of the others into the array `sums` before
    /// [`Plan::combine`].
    pub fn partials(&self) -> &[Launch] {
        &self.partials
    }

    /// Loss, metrics and coefficients from the sums.
    pub fn combine(&self) -> &[Launch] {
        &self.combine
    }

    /// Gradients. They follow [`Plan::forward`] with the same state and the same workspace. Nothing may touch the workspace in between,
    /// because it holds packed embeddings and stored cosines.
    pub fn backward(&self) -> &[Launch] {
        &self.backward
    }

    /// Gradients. They follow [`Plan::forward`] with the same state and any workspace, because they pack the embeddings again and compute
    /// every cosine again. The bits are those of [`Plan::backward`].
    pub fn backward_alone(&self) -> &[Launch] {
        &self.backward_alone
    }

    /// Bytes that a slot needs at the least.
    pub fn slot_bytes(&self, slot: Slot) -> u64 {
        self.slot_bytes[slot as usize]
    }

    /// What a slot's address must be a multiple of.
    pub fn slot_alignment(&self, slot: Slot) -> u64 {
        self.slot_alignment[slot as usize]
    }

    /// What the slot `Side` holds: keys, weights, the order of the passages. The caller copies it to the device once for each plan.
    pub fn side_data(&self) -> &[u8] {
        &self.side
    }

    /// Bytes of the workspace that the caller bounds: all but packed embeddings and sums of gradients. Stored cosines are among them.
    pub fn bounded_bytes(&self) -> usize {
        self.bounded_bytes
    }

    /// The tile that the kernels multiply at once.
    pub fn tile(&self) -> Tile {
        self.tile
    }

    /// What multiplies.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// Numbers of squares of cosines, of which a thread block or a cluster computes one at a time: those that the first pass stores for
    /// [`Plan::backward`], and all that have gradients.
    pub fn kept_squares(&self) -> [usize; 2] {
        self.kept_squares
    }

    /// Floating-point operations of the matrix products of forward and backward. A product of several planes counts once. For
    /// `samtone_query` there are 12 B²d, or 9 if all cosines are stored.
    pub fn flops(&self) -> f64 {
        self.flops
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        writeln!(
            f,
            "{}: tiles of {t} x {t}{}, {}, {} + {} waves, {} of {} squares kept, workspace {:.1} MiB ({:.1} MiB bounded), {:.1} GFLOP",
            self.title,
            if self.tile == Tile::Cluster { " by clusters" } else { "" },
            self.arithmetic.suffix(),
            self.waves[0],
            self.waves[1],
            self.kept_squares[0],
            self.kept_squares[1],
            mib(self.slot_bytes(Slot::Workspace)),
            mib(self.bounded_bytes as u64),
            self.flops / 1e9,
            t = self.tile.edge(),
        )?;
        self.forward.iter().chain(&self.backward).try_for_each(|launch| writeln!(f, "  {launch}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;
    use crate::cuda::{Architecture, Cosines};
    use crate::dtype::DType;
    use crate::loss::Loss;

    fn plan(rows: usize, dtype: DType, change: fn(Problem<'_>) -> Problem<'_>) -> Plan {
        plan_with(&call(), rows, dtype, change)
    }

    fn call() -> Call {
        Call::new(Loss::samtone_query(), 0.01)
    }

    fn plan_with(call: &Call, rows: usize, dtype: DType, change: fn(Problem<'_>) -> Problem<'_>) -> Plan {
        Plan::new(&change(Problem::new(call.pairs(rows, rows).unwrap(), dtype, 768).unwrap())).unwrap()
    }

    /// The number of launches decides how long small batches take.
    #[test]
    fn a_wave_is_six_launches_and_each_further_one_five() {
        let launches = |plan: &Plan| {
            let kernel = |launch: &Launch| launch.kernel.split("_f16").next().unwrap().replace("_kept", "");
            plan.forward().iter().chain(plan.backward()).map(kernel).collect::<Vec<_>>()
        };
        let one = ["prepare", "logsumexp", "combine", "gradient_tile", "gradient_product", "project"];
        for (rows, change) in [
            (256, (|p| p) as fn(Problem<'_>) -> Problem<'_>),
            (2048, |p| p),
            (2048, |p| p.with_architecture(Architecture::Sm90a { multiprocessors: 132 })),
        ] {
            let plan = plan(rows, DType::BF16, change);
            assert_eq!((plan.waves, launches(&plan)), ([1, 1], one.map(String::from).to_vec()), "{plan}");
            // Shards exchange sums between `partials` and `combine`, which takes one more launch. Packing again takes one, too.
            assert_eq!(plan.partials().len() + plan.combine().len(), plan.forward().len() + 1);
            assert_eq!(plan.backward_alone().len(), plan.backward().len() + 1);
        }
        // docs/cuda.md says this.
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let rows = if dtype == DType::F32 { 6000 } else { 8000 };
            assert_eq!(plan(rows, dtype, |p| p).waves, [1, 1], "{dtype}");
            assert!(plan(16_384, dtype, |p| p).waves > [1, 1], "{dtype}");
        }
        let tight = call().with_workspace_bytes(5 << 20);
        let two = plan_with(&tight, 1024, DType::BF16, |p| p);
        assert_eq!(two.waves, [2, 2], "{two}");
        assert_eq!(
            launches(&two),
            [
                "prepare",
                "logsumexp",
                "combine",
                "logsumexp",
                "combine",
                "gradient_tile",
                "sum_dots",
                "gradient_product",
                "gradient_tile",
                "gradient_product",
                "project"
            ]
        );
        let skipping = call().with_tile_skipping(1e-3);
        assert_eq!(launches(&plan_with(&skipping, 1024, DType::BF16, |p| p)).len(), 9);
    }

    /// A bound that would mean more super-blocks than a plan may have is refused, and the error names the least bound that works.
    #[test]
    fn launches_are_bounded() {
        for (dtype, change) in [
            (DType::F32, (|p| p.with_arithmetic(Arithmetic::Exact)) as fn(Problem<'_>) -> Problem<'_>),
            (DType::BF16, |p| p.with_cosines(Cosines::Kept)),
            (DType::BF16, |p| p.with_architecture(Architecture::Sm90a { multiprocessors: 132 })),
        ] {
            let plan = |bytes: usize| {
                let call = call().with_workspace_bytes(bytes);
                Plan::new(&change(Problem::new(call.pairs(65_536, 65_536).unwrap(), dtype, 1).unwrap()))
            };
            let Err(Error::WorkspaceTooSmall { needed, rows: 65_536, .. }) = plan(100 << 10) else {
                panic!("a million super-blocks were accepted")
            };
            assert!(plan(needed - 1).is_err());
            let plan = plan(needed).unwrap();
            // Every super-block is a wave of its own: a launch for sums, one for merging them, one for gradients, one for their products.
            let launches = plan.forward().len() + plan.backward().len();
            assert!((1 << 14..6 << 14).contains(&launches), "{launches} launches");
        }
    }

    /// Kernels count tiles and squares in 32 bits.
    #[test]
    fn what_kernels_count_is_bounded() {
        let rows = 1 << 20; // all cosines have gradients of 6.6 TB
        let plan = |call: &Call| {
            Plan::new(&Problem::new(call.pairs(rows, rows).unwrap(), DType::BF16, 1).unwrap().with_tile(Tile::Small))
        };
        let unbounded = plan(&call().with_workspace_bytes(usize::MAX)).unwrap();
        assert!(
            unbounded.bounded_bytes() <= MOST_WORKSPACE_BYTES && unbounded.waves > [1, 1],
            "{}",
            unbounded.waves[0]
        );
        assert!(plan(&call().with_tile_skipping(1e-3)).is_ok());
        let call = Call::new(Loss::info_nce(), 0.01);
        let wide = call.pairs(1, 1 << 26).unwrap();
        assert!(Problem::new(wide, DType::F16, 1 << 14).is_ok());
        let error = Problem::new(wide, DType::F16, (1 << 14) + 1).unwrap_err().to_string();
        assert!(error.contains("`dim` is 16385") && error.contains("at most 16384"), "{error}");
    }

    #[test]
    fn memory_is_linear_in_the_batch_beyond_the_bound() {
        // The aim is less than 1 GiB beyond inputs and outputs for 131,072 pairs of dimension 768.
        let extra =
            |plan: &Plan| [Slot::Workspace, Slot::State, Slot::Side].map(|s| plan.slot_bytes(s)).iter().sum::<u64>();
        let (large, half) = (plan(131_072, DType::BF16, |p| p), plan(65_536, DType::BF16, |p| p));
        assert!(extra(&large) < 1 << 30, "{}", extra(&large));
        assert!(large.bounded_bytes() <= DEFAULT_WORKSPACE_BYTES);
        let unbounded = |plan: &Plan| extra(plan) - plan.bounded_bytes() as u64;
        let per_pair = (unbounded(&large) - unbounded(&half)) / 65_536;
        assert!((2 * 2 * 768..2 * 2 * 768 + 400).contains(&per_pair), "{per_pair} bytes for each pair");
    }

    #[test]
    fn skipping_costs_nothing_unless_asked_for_and_little_then() {
        let skipping = call().with_tile_skipping(1e-3);
        for (change, edge) in [((|p| p) as fn(Problem<'_>) -> Problem<'_>, 128), (|p| p.with_tile(Tile::Small), 64)] {
            let (without, with) = (plan(4096, DType::BF16, change), plan_with(&skipping, 4096, DType::BF16, change));
            assert!(without.array("skipped").is_none() && without.array("square_masses").is_none());
            assert!(without.forward().iter().all(|launch| launch.module != "skip_squares"), "{without}");
            // These are the squares of S, and those of the square around the triangle of QQ. Each takes 20 bytes.
            let squares = 2 * (4096 / edge) * (4096 / edge);
            assert_eq!(with.array("skipped").unwrap().bytes, 4 * squares);
            let more = with.slot_bytes(Slot::State) - without.slot_bytes(Slot::State);
            assert!((20 * squares..20 * squares + 3 * ARRAY_ALIGNMENT).contains(&more), "{more}");
            for slot in [Slot::Workspace, Slot::Side] {
                assert_eq!(with.slot_bytes(slot), without.slot_bytes(slot));
            }
        }
        let skipping = Call::new(Loss::info_nce(), 0.01).with_tile_skipping(1e-3);
        let problem = Problem::new(skipping.pairs(4096, 5000).unwrap(), DType::BF16, 64).unwrap();
        let clusters = problem.with_architecture(Architecture::Sm90a { multiprocessors: 132 });
        assert_eq!(Plan::new(&clusters).unwrap().array("skipped").unwrap().bytes, 4 * 16 * (16 + 4));
    }

    #[test]
    fn operations_are_twelve_for_each_pair_and_dimension() {
        let (rows, plan) = (16_384_f64, plan(16_384, DType::BF16, |p| p.with_cosines(Cosines::Recomputed)));
        approx::assert_relative_eq!(plan.flops(), 12.0 * rows * rows * 768.0, max_relative = 1e-3);
        assert!(plan.to_string().contains("gradient_product_f16x2_128"), "{plan}");
    }

    /// Five prefixes take the products of one loss, and one launch more for each step that only prefixes have.
    #[test]
    fn prefixes_take_the_products_of_one_loss() {
        let with = call().with_prefixes([64, 128, 256, 512, 768]);
        let recomputed: fn(Problem<'_>) -> Problem<'_> = |p| p.with_cosines(Cosines::Recomputed);
        let clusters: fn(Problem<'_>) -> Problem<'_> =
            |p| p.with_architecture(Architecture::Sm90a { multiprocessors: 132 }).with_cosines(Cosines::Recomputed);
        for change in [recomputed, clusters] {
            for dtype in [DType::BF16, DType::F32] {
                let (plain, five) = (plan(4096, dtype, change), plan_with(&with, 4096, dtype, change));
                assert_eq!(five.flops(), plain.flops(), "{five}");
                assert!(five.bounded_bytes() <= DEFAULT_WORKSPACE_BYTES, "{five}");
            }
        }
        let launches =
            |plan: &Plan| plan.forward().iter().chain(plan.backward()).map(|l| l.kernel.clone()).collect::<Vec<_>>();
        let small = launches(&plan_with(&with, 512, DType::BF16, |p| p));
        let expected = [
            "prepare_prefixes",
            "logsumexp_prefixes_f16_64",
            "combine",
            "join_prefixes",
            "gradient_tile_prefixes_f16x2_64",
            "merge_radials",
            "gradient_product_f16x2_64",
            "join_radials",
            "project_prefixes",
        ];
        assert_eq!(small, expected);
        // The whole embedding alone, with weight 1, is no prefix.
        let whole = call().with_prefixes([768]);
        assert_eq!(launches(&plan_with(&whole, 512, DType::BF16, |p| p)), launches(&plan(512, DType::BF16, |p| p)));
    }

    /// Launches count prefixes along y.
    #[test]
    fn the_number_of_prefixes_is_bounded() {
        let plan = |count: usize| {
            let call = call().with_prefixes((1..=count).collect::<Vec<_>>());
            Plan::new(&Problem::new(call.pairs(1, 2).unwrap(), DType::BF16, count).unwrap()).map(|plan| plan.flops())
        };
        assert!(plan(1000).is_ok());
        let error = plan(65_536).unwrap_err().to_string();
        assert_eq!(error, "argument `prefixes` is 65536 prefixes; allowed: at most 65535 on CUDA");
    }
}
