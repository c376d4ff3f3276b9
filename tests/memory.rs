//! What a call allocates, what it writes, and what happens when the allocator refuses. This binary has a single test, because the allocator
//! counts for the whole process.

mod support;

use samtone::cpu::{self, Plan, Workspace};
use samtone::{DType, EmbeddingsMut, Error, GradientBuffers, Loss};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use support::data::{Kind, problem};
use support::problem::{Buffer, Problem};

/// Bytes allocated now and at the most, and the size from which allocations fail.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static REFUSED_FROM: AtomicUsize = AtomicUsize::new(usize::MAX);

// SAFETY: every block comes from the system allocator, with the caller's layout; a null pointer is how an allocator refuses.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= REFUSED_FROM.load(SeqCst) {
            return std::ptr::null_mut();
        }
        let now = NOW.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(now, SeqCst);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that `f` held at its peak beyond what was held before.
fn peak<R>(f: impl FnOnce() -> R) -> (R, usize) {
    let before = NOW.load(SeqCst);
    PEAK.store(before, SeqCst);
    let result = f();
    (result, PEAK.load(SeqCst) - before)
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[test]
fn memory() -> Outcome {
    peak_is_bounded()?;
    nothing_grows_with_the_square()?;
    a_kept_workspace_allocates_little()?;
    every_output_is_written_and_nothing_else()?;
    refused_allocations_are_errors()
}

fn buffers<'a>(p: &Problem, dq: &'a mut [f32], dp: &'a mut [f32]) -> samtone::Result<GradientBuffers<'a>> {
    Ok(GradientBuffers {
        query: Some(EmbeddingsMut::new(dq, p.rows, p.dim)?),
        passage: Some(EmbeddingsMut::new(dp, p.passages, p.dim)?),
    })
}

/// Peak of a fused call into buffers of the caller, and its plan; up to four calls, until one stays within what is allowed
/// for the workspace of the plan. The matrix library keeps a buffer as large as the second-level cache (1 MiB where this was
/// measured) for each thread that has ever multiplied, so calls that meet a fresh thread look larger; a leak is in every call.
fn fused(p: &Problem, dtype: DType, pool: &rayon::ThreadPool) -> samtone::Result<(Plan, usize)> {
    let (query, passage) = (Buffer::new(dtype, &p.query), Buffer::new(dtype, &p.passage));
    let batch = p.batch(&query, &passage)?;
    let plan = pool.install(|| Plan::new(&batch))?;
    let mut bytes = 0;
    for _ in 0..4 {
        let (mut dq, mut dp) = (vec![f32::NAN; p.query.len()], vec![f32::NAN; p.passage.len()]);
        let (result, peak) =
            peak(|| pool.install(|| cpu::loss_and_gradients_into(&batch, 1.0, buffers(p, &mut dq, &mut dp)?)));
        result?;
        assert!(dq.iter().chain(&dp).all(|v| v.is_finite()), "{plan}: something was not written");
        bytes = peak;
        if bytes <= allowed(p, plan.workspace_bytes()) {
            break;
        }
    }
    Ok((plan, bytes))
}

/// Bytes for each row and passage that do not depend on d: two sides of keys and thresholds, norms, partial sums in four
/// blocks, coefficients.
const PER_INDEX: usize = 300;
/// What each further prefix adds to that.
const PER_PREFIX: usize = 200;
/// Sums of one wave of tiles, lists of tiles.
const CONSTANT: usize = 3 << 19;

/// The bound, beside the workspace: sums of the gradients as f32, and what a row or a passage costs otherwise.
fn allowed(p: &Problem, workspace: usize) -> usize {
    let further = p.call.prefixes().map_or(0, |dims| dims.len() - 1);
    workspace + (p.rows + p.passages) * (4 * p.dim + PER_INDEX + further * PER_PREFIX) + CONSTANT
}

fn peak_is_bounded() -> Outcome {
    // One dense matrix would take 144 MB, the workspace is 4 to 32.
    let (rows, dim) = (6000, 32);
    let plain = problem(Loss::samtone_both(), Kind::Random, (rows, rows, dim), 0.05, 1, 0.0)?;
    let nested = plain.clone().with(|call| call.with_prefixes([8, 16, 24, 32]));
    let dense = rows * rows * size_of::<f32>();
    for (base, dtype) in [(&plain, DType::F32), (&plain, DType::BF16), (&nested, DType::F32), (&nested, DType::BF16)] {
        let (query, passage) = (Buffer::new(dtype, &base.query), Buffer::new(dtype, &base.passage));
        for (threads, workspace) in [(2, 4 << 20), (7, 4 << 20), (2, 300 << 10), (4, 32 << 20)] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let p = base.rounded(dtype).with(|call| call.with_workspace_bytes(workspace));
            let (plan, bytes) = fused(&p, dtype, &pool)?;
            assert!(!plan.stores_logits() && plan.workspace_bytes() <= workspace, "{plan}");
            let allowed = allowed(&p, plan.workspace_bytes());
            assert!(allowed < dense / 2 && bytes <= allowed, "{dtype}, {plan}: {bytes} bytes, allowed {allowed}");

            // Split, the state between the calls is a few numbers for each row.
            let batch = p.batch(&query, &passage)?;
            let (forward, bytes) = peak(|| pool.install(|| cpu::forward(&batch)));
            let forward = forward?;
            assert!(bytes <= allowed, "{dtype}, forward of {plan}: {bytes} bytes, allowed {allowed}");
            let before = NOW.load(SeqCst);
            drop(forward);
            let state = before - NOW.load(SeqCst);
            assert!(state <= 2 * rows * PER_INDEX, "{dtype}: {state} bytes of state");
        }
    }

    // Stored: everything within the bound, and the plan says how much.
    for dtype in [DType::F32, DType::BF16] {
        let p = problem(Loss::samtone_both(), Kind::Random, (1500, 1500, dim), 0.05, 1, 0.0)?.rounded(dtype);
        let p = p.with(|call| call.with_workspace_bytes(64 << 20));
        for threads in [1, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let (plan, bytes) = fused(&p, dtype, &pool)?;
            assert!(plan.stores_logits(), "{plan}");
            let allowed = allowed(&p, plan.workspace_bytes());
            assert!(bytes <= allowed, "{dtype}, {plan}: {bytes} bytes, allowed {allowed}");
        }
    }
    Ok(())
}

/// Larger batches stay within the same bound, which is linear in the rows. Peaks of two sizes are not compared with each other: how
/// much of the workspace is in use at one moment depends on which thread came when.
fn nothing_grows_with_the_square() -> Outcome {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    for rows in [4000, 8000, 16_000] {
        let p = problem(Loss::samtone_both(), Kind::Random, (rows, rows, 8), 0.05, 1, 0.0)?.rounded(DType::F32);
        let p = p.with(|call| call.with_workspace_bytes(4 << 20));
        let (plan, bytes) = fused(&p, DType::F32, &pool)?;
        let (allowed, dense) = (allowed(&p, plan.workspace_bytes()), rows * rows * size_of::<f32>());
        assert!(bytes <= allowed && allowed < dense / 6, "{plan}: {bytes} bytes, allowed {allowed}, dense {dense}");
    }
    Ok(())
}

/// The second step of a trainer maps no tile and no sum again.
fn a_kept_workspace_allocates_little() -> Outcome {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    let base = problem(Loss::samtone_query(), Kind::Random, (1500, 1500, 64), 0.05, 1, 0.0)?.rounded(DType::F32);
    let (query, passage) = (Buffer::new(DType::F32, &base.query), Buffer::new(DType::F32, &base.passage));
    for (bound, stored) in [(64 << 20, true), (3 << 20, false)] {
        let mut workspace = Workspace::new();
        let p = base.clone().with(|call| call.with_workspace_bytes(bound));
        let batch = p.batch(&query, &passage)?;
        assert_eq!(pool.install(|| Plan::new(&batch))?.stores_logits(), stored);
        let mut held = 0;
        for step in 0..3 {
            let (mut dq, mut dp) = (vec![f32::NAN; p.query.len()], vec![f32::NAN; p.passage.len()]);
            let before = NOW.load(SeqCst);
            let (result, bytes) = peak(|| {
                let buffers = buffers(&p, &mut dq, &mut dp)?;
                pool.install(|| workspace.loss_and_gradients_into(&batch, 1.0, buffers))
            });
            drop(result?);
            if step == 0 {
                held = NOW.load(SeqCst) - before;
                assert!(held <= bound + 2 * p.query.len() * 4 + (64 << 10), "{held} bytes are kept");
            } else {
                assert!(bytes <= (p.rows + p.passages) * PER_INDEX + (3 << 20), "step {step} took {bytes} bytes again");
            }
        }
        assert!(held > 0);
    }
    Ok(())
}

/// Outputs in the middle of larger memory, rows apart: every element of a row is written, nothing around it.
fn every_output_is_written_and_nothing_else() -> Outcome {
    const GUARD: f32 = 31.0e7;
    for (rows, passages, dim, pad) in
        [(1, 1, 1, 1), (3, 5, 7, 1), (64, 65, 16, 3), (130, 131, 33, 15), (17, 90, 600, 2)]
    {
        for dtype in [DType::F32, DType::BF16] {
            let base = problem(Loss::samtone_both(), Kind::Random, (rows, passages, dim), 0.1, 1, 0.0)?.rounded(dtype);
            let (query, passage) = (Buffer::new(dtype, &base.query), Buffer::new(dtype, &base.passage));
            for bytes in [120 << 10, 64 << 20] {
                let p = base.clone().with(|call| call.with_workspace_bytes(bytes));
                let stride = dim + pad;
                let (margin, span) = (100, |rows: usize| (rows - 1) * stride + dim);
                let mut memory = [rows, passages].map(|rows| vec![GUARD; margin + span(rows) + margin]);
                for (memory, rows) in memory.iter_mut().zip([rows, passages]) {
                    (0..rows).for_each(|r| memory[margin + r * stride..][..dim].fill(f32::NAN));
                }
                let [dq, dp] = &mut memory;
                let buffers = GradientBuffers {
                    query: Some(EmbeddingsMut::with_row_stride(&mut dq[margin..][..span(rows)], rows, dim, stride)?),
                    passage: Some(EmbeddingsMut::with_row_stride(
                        &mut dp[margin..][..span(passages)],
                        passages,
                        dim,
                        stride,
                    )?),
                };
                cpu::loss_and_gradients_into(&p.batch(&query, &passage)?, 1.0, buffers)?;
                for (memory, rows) in memory.iter().zip([rows, passages]) {
                    for (k, v) in memory.iter().enumerate() {
                        let inside = k.checked_sub(margin).is_some_and(|k| k / stride < rows && k % stride < dim);
                        let right = if inside { v.is_finite() && *v != GUARD } else { *v == GUARD };
                        assert!(right, "{v} at {k} of {rows} x {dim}, stride {stride}, inside: {inside}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// An allocator that refuses large blocks makes a named error; the outputs stay, and the next call works.
fn refused_allocations_are_errors() -> Outcome {
    const PATTERN: f32 = -77.0;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    let mut purposes = std::collections::BTreeSet::new();
    // The larger batch wants more for its rows than for a panel, the smaller one less.
    let sizes = [(400, 500), (100, 130)];
    for (dtype, (rows, passages)) in [DType::F32, DType::BF16].into_iter().flat_map(|t| sizes.map(|s| (t, s))) {
        let base = problem(Loss::samtone_query(), Kind::Random, (rows, passages, 1100), 0.05, 1, 0.0)?.rounded(dtype);
        let (query, passage) = (Buffer::new(dtype, &base.query), Buffer::new(dtype, &base.passage));
        for bound in [64 << 20, 1 << 20, 325 << 10] {
            let p = base.clone().with(|call| call.with_workspace_bytes(bound));
            let batch = p.batch(&query, &passage)?;
            let step = |workspace: &mut Workspace, refused_from: usize| {
                let (mut dq, mut dp) = (vec![PATTERN; p.query.len()], vec![PATTERN; p.passage.len()]);
                let outputs = buffers(&p, &mut dq, &mut dp)?;
                REFUSED_FROM.store(refused_from, SeqCst);
                let result = pool.install(|| workspace.loss_and_gradients_into(&batch, 1.0, outputs));
                REFUSED_FROM.store(usize::MAX, SeqCst);
                if result.is_err() {
                    assert!(dq.iter().chain(&dp).all(|v| *v == PATTERN), "written before it was refused");
                }
                result
            };
            let mut used = Workspace::new();
            for limit in [40 << 10, 80 << 10, 200 << 10, 500 << 10, 1 << 20, 2 << 20, 3 << 20] {
                // The matrix library cannot say no: only panels of 16-bit rows come before its buffers and are larger.
                if limit == 80 << 10 && dtype == DType::F32 {
                    continue;
                }
                used = Workspace::new();
                if let Err(error) = step(&mut used, limit) {
                    let Error::OutOfMemory { bytes, purpose } = &error else { panic!("{error}") };
                    assert!(*bytes >= limit, "{error}");
                    let sentence = error.to_string();
                    assert!(sentence.contains(&bytes.to_string()) && sentence.contains(purpose), "{sentence}");
                    purposes.insert(*purpose);
                }
            }
            let got = step(&mut used, usize::MAX)?;
            let want = samtone::loss_and_gradients(&batch, 1.0)?;
            assert_eq!(got, (want.evaluation, want.gradients.temperature));

            // What grows with the rows alone.
            REFUSED_FROM.store((rows + passages) * PER_INDEX, SeqCst);
            let result = cpu::forward(&batch);
            REFUSED_FROM.store(usize::MAX, SeqCst);
            let Err(Error::OutOfMemory { bytes, purpose }) = result else { panic!("{:?}", result.err()) };
            assert_eq!(bytes, (rows + passages) * PER_INDEX);
            purposes.insert(purpose);

            REFUSED_FROM.store(1 << 20, SeqCst);
            let result = pool.install(|| samtone::loss_and_gradients(&batch, 1.0));
            REFUSED_FROM.store(usize::MAX, SeqCst);
            if let Err(Error::OutOfMemory { purpose, .. }) = result {
                purposes.insert(purpose);
            }
        }
    }
    let all = [
        "keys and sums of the rows",
        "panels of embeddings",
        "the gradients",
        "the sums of the gradients",
        "tiles of logits",
    ];
    assert!(purposes.iter().eq(&all), "{purposes:?}");
    Ok(())
}
