//! Plans of calls with prefixes.

use super::fallbacks::uneven;
use super::{Labels, Run, compare, expect_needed, frozen_of, outputs_of, run_with, shards_of, shared, sized};
use crate::support::cuda_emulated::{CudaEmulated, Emulated, clusters};
use crate::support::data::{Kind, problem};
use crate::support::problem::{Buffer, Outputs, Problem};
use libtest_mimic::Failed;
use samtone::cuda::{Arithmetic, Cosines, Plan, Problem as Planned, Tile};
use samtone::{Call, DType, Error, Loss, ZeroNorm};

/// The prefixes of these lengths, which weigh 0.5, 1, 1.5 and so on.
fn with(dims: &'static [usize]) -> impl Fn(Call) -> Call {
    move |call| {
        let weights: Vec<_> = (1..=dims.len()).map(|k| k as f64 / 2.0).collect();
        call.with_prefixes(dims).with_prefix_weights(weights)
    }
}

/// Rows whose prefixes have norms of their own, some far below that of the whole row.
fn uneven_norms(mut problem: Problem) -> Problem {
    let d = problem.dim;
    for x in [&mut problem.query, &mut problem.passage] {
        for (i, row) in x.chunks_mut(d).enumerate() {
            row[..d / 3].iter_mut().for_each(|v| *v *= [1.0, 0.05, 30.0, 0.3][i % 4]);
        }
    }
    problem
}

fn kernels(how: &'static CudaEmulated) -> &'static [(Arithmetic, DType, Tile)] {
    use Arithmetic::{Exact, F16, F16x2, F16x3};
    match clusters(how) {
        true => {
            &[(F16, DType::BF16, Tile::Cluster), (F16x2, DType::F16, Tile::Cluster), (F16x3, DType::F32, Tile::Cluster)]
        }
        false => &[
            (F16, DType::BF16, Tile::Small),
            (F16, DType::BF16, Tile::Large),
            (F16x2, DType::F16, Tile::Small),
            (F16x2, DType::F16, Tile::Large),
            (F16x3, DType::F32, Tile::Small),
            (F16x3, DType::F32, Tile::Large),
            (Exact, DType::F32, Tile::Small),
        ],
    }
}

/// A problem in which no rounding decides a rank.
fn decided(shape: (usize, usize, usize), dtype: DType, dims: &'static [usize]) -> Result<Problem, Failed> {
    for seed in 11..30 {
        let problem = problem(Loss::samtone_both(), Kind::Random, shape, 0.05, seed, 0.0)?;
        let problem = uneven_norms(problem).rounded(dtype).with(with(dims));
        if problem.is_decided(4e-7) {
            return Ok(problem);
        }
    }
    Err("every seed puts a cosine on the edge of a tie".into())
}

pub fn arithmetics(how: &'static CudaEmulated) -> Result<(), Failed> {
    for &(arithmetic, dtype, tile) in kernels(how) {
        for (shape, dims) in [
            ((129, 300, 200), &[1, 64, 65, 199][..]),
            ((140, 151, 96), &[33, 64, 96]),
            ((64, 64, 64), &[64]), // one prefix, whose weight is not 1
            ((1, 3, 5), &[2, 4]),
        ] {
            let problem = decided(shape, dtype, dims)?;
            let got = run_with(&problem, dtype, Run::default(), |p| {
                Ok(how.problem(p).with_arithmetic(arithmetic).with_tile(tile))
            })?;
            compare(&got, &problem, dtype).map_err(|e| format!("{arithmetic:?} {tile:?} {dims:?}: {e:?}"))?;
        }
    }
    Ok(())
}

pub fn fallbacks(how: &'static CudaEmulated) -> Result<(), Failed> {
    let shape = if clusters(how) { (256, 256, 24) } else { (140, 160, 24) };
    for &(arithmetic, dtype, tile) in kernels(how) {
        let problem = uneven(Loss::samtone_both(), shape)?.rounded(dtype).with(with(&[8, 24]));
        let got = run_with(&problem, dtype, Run::default(), |p| {
            Ok(how.problem(p).with_arithmetic(arithmetic).with_tile(tile))
        })?;
        compare(&got, &problem, dtype).map_err(|e| format!("{arithmetic:?} {tile:?}: {e:?}"))?;
    }
    Ok(())
}

/// The results of a plan, with gradients by one of its parts. What a forward call leaves in the workspace is spoilt if it `spoils`.
fn outcome(
    how: &CudaEmulated,
    problem: &Problem,
    cosines: Cosines,
    part: fn(&Plan) -> &[samtone::cuda::Launch],
    spoils: bool,
) -> Result<(Outputs, [usize; 2], usize), Failed> {
    let (query, passage) = (Buffer::new(DType::BF16, &problem.query), Buffer::new(DType::BF16, &problem.passage));
    let batch = problem.batch(&query, &passage)?;
    let planned = Planned::new(*batch.pairs(), DType::BF16, problem.dim)?.with_cosines(cosines);
    let plan = Plan::new(&how.problem(planned))?;
    let waves = plan.backward().iter().filter(|l| l.module.starts_with("gradient_product")).count();
    let kept = plan.kept_squares();
    let mut device = Emulated::new(plan, Run::default())?;
    device.upload_embeddings("query", batch.query())?;
    device.upload_embeddings("passage", batch.passage())?;
    device.launch(Plan::forward)?;
    let arrays = ["cosines", "query_packed", "passage_packed", "query_inverse", "passage_inverse", "query_scales"];
    for name in arrays.into_iter().filter(|_| spoils) {
        if let Some(bytes) = device.plan().array(name).map(|a| a.bytes as usize) {
            device.upload(name, &vec![0xff_u8; bytes])?;
        }
    }
    device.launch(part)?;
    let gradient = |device: &mut Emulated, name: &str| -> Result<Vec<f64>, Failed> {
        Ok(device.download::<f32>(name)?.into_iter().map(f64::from).collect())
    };
    let outputs = Outputs {
        evaluation: device.evaluation(&batch.prefixes())?,
        grad_query: gradient(&mut device, "query_gradient")?,
        grad_passage: gradient(&mut device, "passage_gradient")?,
        temperature: device.temperature()?,
    };
    Ok((outputs, kept, waves))
}

/// Bits do not depend on which cosines are stored, in one wave or in several.
pub fn cosines(how: &'static CudaEmulated) -> Result<(), Failed> {
    let (shape, bounds) = match clusters(how) {
        true => ((300, 400, 70), [40 << 20, 7 << 20, 4 << 20]),
        false => ((200, 270, 70), [40 << 20, 1_600_000, 500_000]),
    };
    let positive = |i| ((i * 7 + 3) % (shape.0 * 3 / 4)) as u32; // rows that share, and passages that are nobody's
    let positives: Vec<_> = (0..shape.0).map(positive).collect();
    let problem = sized(Kind::Random, Loss::gte(), shape)?.rounded(DType::BF16).with(with(&[16, 40, 70]));
    let (mut partly, mut in_waves) = (false, false);
    for bytes in bounds {
        let problem = problem.clone().with(|call| call.with_positives(positives.clone()).with_workspace_bytes(bytes));
        let (kept, [stored, all], waves) = outcome(how, &problem, Cosines::Kept, Plan::backward, false)?;
        compare(&kept, &problem, DType::BF16)?;
        partly |= stored > 0 && stored < all;
        in_waves |= waves > 1;
        // A plan for other bounds may add in another order, so both parts are of one plan.
        let (alone, ..) = outcome(how, &problem, Cosines::Kept, Plan::backward_alone, true)?;
        if alone != kept {
            return Err(format!("{bytes} bytes: recomputed cosines give other bits").into());
        }
        if bytes == bounds[0] {
            let (recomputed, [none, _], _) = outcome(how, &problem, Cosines::Recomputed, Plan::backward, false)?;
            if stored != all || none != 0 || recomputed != kept {
                return Err(format!("{stored} and {none} of {all} squares; or other bits").into());
            }
        }
    }
    if partly && in_waves { Ok(()) } else { Err(format!("stored in part: {partly}; waves: {in_waves}").into()) }
}

pub fn shards(how: &'static CudaEmulated) -> Result<(), Failed> {
    let problem = sized(Kind::Random, Loss::samtone_both(), (70, 90, 24))?.rounded(DType::F16);
    shards_of(how, &problem.with(shared).with(with(&[5, 11, 24])))
}

pub fn outputs(how: &'static CudaEmulated) -> Result<(), Failed> {
    // The last prefix ends before the embedding, whose other columns are written, too.
    let problem = sized(Kind::Random, Loss::samtone_both(), (20, 33, 19))?.rounded(DType::F32).with(with(&[7, 17]));
    outputs_of(how, &problem)?;
    let first = run_with(&problem, DType::F32, Run::default(), |p| Ok(how.problem(p)))?;
    for seed in 1..6 {
        if run_with(&problem, DType::F32, Run { seed, ..Run::default() }, |p| Ok(how.problem(p)))? != first {
            return Err(format!("seed {seed} gives other bits").into());
        }
    }
    Ok(())
}

pub fn frozen(how: &'static CudaEmulated) -> Result<(), Failed> {
    let problem = sized(Kind::Random, Loss::samtone_both(), (30, 33, 16))?.rounded(DType::F16);
    frozen_of(how, &problem.with(with(&[3, 16])))
}

pub fn refused(how: &'static CudaEmulated) -> Result<(), Failed> {
    let problem = sized(Kind::Random, Loss::decoupled(), (9, 9, 8))?.rounded(DType::F32).with(with(&[3, 8]));
    let with = |change: fn(&mut Problem)| {
        let mut changed = problem.clone();
        change(&mut changed);
        run_with(&changed, DType::F32, Run::default(), |p| Ok(how.problem(p)))
    };
    match with(|p| p.query[5 * 8 + 6] = f64::NAN) {
        Err(Error::NonFinite { row: 5, column: 6, .. }) => {}
        other => return Err(format!("NaN behind the first prefix gave {other:?}").into()),
    }
    match with(|p| p.passage[2 * 8..2 * 8 + 3].fill(0.0)) {
        Err(Error::ZeroNorm { row: 2, prefix: Some(3), .. }) => {}
        other => return Err(format!("a prefix of norm zero gave {other:?}").into()),
    }
    // A margin that leaves row 4 no negative in the longer prefix alone.
    match with(|p| {
        let row = |k: usize| if k < 3 { 0.1 } else { 0.0 };
        p.passage.chunks_mut(8).for_each(|x| x.copy_from_slice(&[0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0]));
        p.query.chunks_mut(8).for_each(|x| x.copy_from_slice(&[0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0]));
        (0..8).for_each(|k| p.passage[4 * 8 + k] = row(k));
        p.call = p.call.clone().with_margin(-0.5);
    }) {
        Err(Error::NoNegative { prefix: Some(_), .. }) => {}
        other => return Err(format!("no negative gave {other:?}").into()),
    }
    // A direction of 0 in the short prefix is none, and the long one goes on.
    let zero = with(|p| {
        p.passage[2 * 8..2 * 8 + 3].fill(0.0);
        p.call = p.call.clone().with_zero_norm(ZeroNorm::ZeroGradient);
    })?;
    let mut same = problem.clone();
    same.passage[2 * 8..2 * 8 + 3].fill(0.0);
    same.call = same.call.clone().with_zero_norm(ZeroNorm::ZeroGradient);
    compare(&zero, &same, DType::F32)?;
    let skipping = problem.clone().with(|call| call.with_tile_skipping(1e-3));
    match run_with(&skipping, DType::F32, Run::default(), |p| Ok(how.problem(p))) {
        Err(Error::InvalidArgument { argument: "tile_skipping", .. }) => Ok(()),
        other => Err(format!("tile skipping gave {other:?}").into()),
    }
}

pub fn barriers(how: &'static CudaEmulated) -> Result<(), Failed> {
    const SM80: &[Labels] = &[
        ("logsumexp_prefixes_sm80", &["P1", "P2", "P3", "E1", "L1", "L2"]),
        ("gradient_tile_prefixes_sm80", &["E1", "G1", "G2"]),
        ("project_prefixes", &["R1"]),
    ];
    const WAITS: &[Labels] = &[
        ("prepare_prefixes", &["D1"]),
        ("logsumexp_prefixes_sm80", &["D1"]),
        ("prefixes", &["D1"]),
        ("gradient_tile_prefixes_sm80", &["D1"]),
        ("project_prefixes", &["D1"]),
    ];
    const SM90A: &[Labels] = &[
        ("logsumexp_prefixes_sm90a", &["D1", "P1", "P2", "P3", "P4", "P5", "E1", "E2", "E3", "L1", "L2"]),
        // Not P5: nothing is written to another block. Not E3: the warpgroup's barriers order its reads already.
        ("gradient_tile_prefixes_sm90a", &["D1", "P1", "P2", "P3", "P4", "E1", "E2", "G1", "G2", "G3", "G4", "G5"]),
        ("gradient_product_sm90a", &["D1", "P1", "P2", "P3", "P4", "P5"]),
    ];
    let labels = if clusters(how) { SM90A.to_vec() } else { [SM80, WAITS].concat() };
    let (shape, dims) = match clusters(how) {
        true => ((257, 300, 450), &[192, 448][..]),
        false => ((66, 70, 450), &[192, 448][..]),
    };
    let problem = sized(Kind::Random, Loss::samtone_both(), shape)?.rounded(DType::BF16).with(with(dims));
    let problem = problem.with(|call| call.with_workspace_bytes(if clusters(how) { 8 << 20 } else { 400_000 }));
    expect_needed(how, &problem, &labels, WAITS)
}
