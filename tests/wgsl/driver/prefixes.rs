//! What only calls with prefixes have: prefixes far smaller than the rest, errors that name a prefix, entries that nobody reads.

use super::call::{Call, Spec, engine};
use super::steps::expect_on_device;
use super::{Check, compare, demand, nested, sample, sized, text};
use crate::support::problem::Problem;
use samtone::wgpu::{Capabilities, Products};
use samtone::{DType, Error, Loss, backend};
use std::collections::BTreeSet;

pub const CHECKS: &[Check] = &[
    ("a prefix far smaller than the rest keeps its digits", far_smaller),
    ("the prefix in which a row has no negative is named", no_negative),
    ("entries behind the longest prefix are not read", behind),
    ("results of prefixes on the device are those of the host", results_on_device),
];

/// Each segment of a packed row has a power of two of its own. f16 storage alone could hold no such prefix.
fn far_smaller() -> Result<(), String> {
    let device = *engine()?.capabilities();
    let emulated = Capabilities { products: Products::Emulated, ..device };
    let types =
        [(DType::F32, device), (DType::BF16, device), (DType::BF16, emulated), (DType::F32, Default::default())];
    for power in [-20, -39, -60] {
        let shrunk = |seed: u64| -> Result<Problem, String> {
            let mut problem = nested(sized(Loss::samtone_both(), (20, 27, 37), seed)?);
            let d = problem.dim;
            for (row, x) in problem.query.chunks_mut(d).chain(problem.passage.chunks_mut(d)).enumerate() {
                x[..[0, 5, 18][row % 3]].iter_mut().for_each(|x| *x *= 2_f64.powi(power));
            }
            Ok(problem)
        };
        for (dtype, capabilities) in types {
            let problems = (0..100).map(|seed| shrunk(seed).map(|p| p.rounded(dtype)));
            // Others have two right answers: see tests/conformance.rs.
            let mut decided = problems.filter(|p| p.as_ref().map_or(true, |p| p.is_decided(4e-7)));
            let problem = decided.next().ok_or("every seed puts a cosine on the edge of a tie")??;
            let spec = Spec { capabilities: Some(capabilities), ..Spec::new(&problem, dtype) };
            let got = Call::outputs_of(&problem, spec)?;
            compare(&got, &problem, dtype, 1.0).map_err(|e| format!("2^{power} in {dtype}: {e}"))?;
        }
    }
    Ok(())
}

/// A margin leaves some rows nothing in one prefix or in both. The shortest such prefix is named, and its lowest row.
fn no_negative() -> Result<(), String> {
    let reference = backend::by_name("reference").map_err(text)?;
    let mut named = BTreeSet::new();
    for seed in 0..60 {
        let problem = sized(Loss::decoupled(), (4, 4, 6), seed)?;
        let problem = problem.with(|call| call.with_prefixes([2, 6]).with_margin(-0.4)).rounded(DType::F32);
        if !problem.is_decided(4e-7) {
            continue;
        }
        let call = Call::new(&problem, Spec::new(&problem, DType::F32))?;
        call.run()?;
        let (got, want) = (call.outputs(), problem.run(reference, DType::F64, 1.0));
        match want {
            Err(want) => {
                let Error::NoNegative { row, prefix, .. } = &want else { return Err(format!("{want}")) };
                named.insert((*prefix, *row > 0));
                demand(got.as_ref().err() == Some(&text(&want)), || format!("{got:?} for {want}"))?;
            }
            Ok(_) => compare(&got?, &problem, DType::F32, 1.0)?,
        }
    }
    let every = [2, 6].into_iter().flat_map(|dim| [(Some(dim), false), (Some(dim), true)]).collect();
    demand(named == every, || format!("not every prefix was named: {named:?}"))
}

fn behind() -> Result<(), String> {
    for (dtype, dims) in [(DType::F32, vec![5, 9, 30]), (DType::BF16, vec![5, 9, 31]), (DType::F16, vec![19])] {
        let last = dims[dims.len() - 1];
        let problem = sample(Loss::samtone_both(), 60)?.with(|call| call.with_prefixes(dims)).rounded(dtype);
        let whole = Call::outputs_of(&problem, Spec::new(&problem, dtype))?;
        let d = problem.dim;
        let mut nothing = problem.clone();
        for x in nothing.query.chunks_mut(d).chain(nothing.passage.chunks_mut(d)) {
            x[last..].fill(f64::NAN);
        }
        let got = Call::outputs_of(&nothing, Spec::new(&nothing, dtype))?;
        demand(got == whole, || format!("{dtype}: other bits"))?;
        let rows = got.grad_query.chunks(d).chain(got.grad_passage.chunks(d));
        demand(rows.flat_map(|x| &x[last..]).all(|x| *x == 0.0), || {
            format!("{dtype}: a gradient of what is not read")
        })?;
        // The first number that is read and not finite is named.
        nothing.passage[7 * d + last - 1] = f64::INFINITY;
        let call = Call::new(&nothing, Spec::new(&nothing, dtype))?;
        call.run()?;
        let said = call.outputs().err().unwrap_or_default();
        let column = format!("column {}", last - 1);
        demand(["passage embedding in row 7", &column].iter().all(|part| said.contains(part)), || said.clone())?;
    }
    Ok(())
}

fn results_on_device() -> Result<(), String> {
    expect_on_device(&nested(sized(Loss::samtone_both(), (150, 190, 22), 14)?))
}
