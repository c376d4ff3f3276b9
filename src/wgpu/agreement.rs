//! Tests that shaders and host agree: on `Params`, on sizes and places of what lies in buffers, on codes and constants. The compiler of
//! wgpu (naga) reads those of the shaders.
#![allow(clippy::panic)] // a check that cannot be made counts as a failure

use super::dispatches::PARTIAL_WORDS;
use super::layout::{LANES, RESULT_WORDS, SEGMENT_WORDS, STAGE, STATUS_BYTES};
use super::plan::Plan;
use super::uniforms::{Combine, Prefixes, Prepare, Product, Project, Tiles};
use super::{Capabilities, Module, Variant, readout, results};
use crate::Problem;
use crate::call::Call;
use crate::candidates::NONE;
use crate::dtype::DType;
use crate::loss::{Block, Loss};
use crate::mask::COSINE_TIE;
use naga::{Literal, ScalarKind, TypeInner};

/// Every variant that a plan may choose for some device.
fn variants() -> impl Iterator<Item = Variant> {
    let device = |bits: u32| Capabilities {
        f16: bits & 1 != 0,
        workgroup_bytes: 16 << (10 + (bits >> 1 & 1)),
        subgroups: bits & 4 != 0,
        ..Capabilities::default()
    };
    (0..8).map(move |bits| device(bits).variant(DType::F16))
}

/// A module with `more` behind it, compiled.
fn parse(module: Module, variant: Variant, more: &str) -> naga::Module {
    let source = module.source(variant, false) + more;
    naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)))
}

/// A constant of a module as a number, whatever its type.
fn constant(module: Module, variant: Variant, name: &str) -> f64 {
    let ir = parse(module, variant, &format!("\nconst ASKED_FOR = f32({name});\n"));
    let of_name = ir.constants.iter().find(|(_, c)| c.name.as_deref() == Some("ASKED_FOR"));
    match of_name.map(|(_, c)| &ir.global_expressions[c.init]) {
        Some(naga::Expression::Literal(Literal::F32(x))) => f64::from(*x),
        other => panic!("{name} of {} is {other:?}", module.name()),
    }
}

/// Members of a struct: name, type, offset.
fn members(ir: &naga::Module, name: &str) -> Vec<(String, &'static str, u32)> {
    let of_name = ir.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(name));
    let Some((_, naga::Type { inner: TypeInner::Struct { members, .. }, .. })) = of_name else {
        panic!("no struct `{name}`");
    };
    let member = |m: &naga::StructMember| {
        let ty = match ir.types[m.ty].inner {
            TypeInner::Scalar(scalar) if scalar.width == 4 => match scalar.kind {
                ScalarKind::Uint => "u32",
                ScalarKind::Sint => "i32",
                ScalarKind::Float => "f32",
                _ => "another scalar",
            },
            _ => "no scalar",
        };
        (m.name.clone().unwrap_or_default(), ty, m.offset)
    };
    members.iter().map(member).collect()
}

#[test]
fn parameters_lie_where_the_host_writes_them() {
    for variant in variants() {
        for module in Module::ALL {
            let host = match module {
                Module::Prepare | Module::PreparePrefixes => Prepare::MEMBERS,
                Module::LogSumExp | Module::GradientTile | Module::LogSumExpPrefixes | Module::GradientTilePrefixes => {
                    Tiles::MEMBERS
                }
                Module::Prefixes => Prefixes::MEMBERS,
                Module::Combine => Combine::MEMBERS,
                Module::GradientProduct => Product::MEMBERS,
                Module::Project | Module::ProjectInPlace | Module::ProjectPrefixes | Module::ProjectPrefixesInPlace => {
                    Project::MEMBERS
                }
            };
            let want: Vec<_> = host.iter().zip(0..).map(|((name, ty), k)| (name.to_string(), *ty, 4 * k)).collect();
            assert_eq!(members(&parse(module, variant, ""), "Params"), want, "{} for {variant}", module.name());
        }
    }
}

#[test]
fn constants_are_the_same() {
    let (prepare, combine) = (Module::Prepare, Module::Combine);
    let code = |dtype: DType| f64::from(dtype.code());
    for variant in variants() {
        let same = |module: Module, name: &str, want: f64| {
            assert_eq!(constant(module, variant, name), want, "{name} of {} for {variant}", module.name());
        };
        let projections =
            [Module::Project, Module::ProjectInPlace, Module::ProjectPrefixes, Module::ProjectPrefixesInPlace];
        for module in [prepare, combine].into_iter().chain(projections) {
            same(module, "LANES", LANES as f64);
            same(module, "NONE", f64::from(NONE as f32));
        }
        for module in [prepare].into_iter().chain(projections) {
            same(module, "TYPE_F32", code(DType::F32));
            same(module, "TYPE_F16", code(DType::F16));
        }
        same(prepare, "TYPE_BF16", code(DType::BF16));
        same(prepare, "COSINE_TIE", f64::from(COSINE_TIE as f32));
        for (name, want) in [
            ("SHIFT", readout::SHIFT),
            ("ACCEPTED", readout::ACCEPTED),
            ("UPSTREAM", readout::UPSTREAM),
            ("BETA_SUM", readout::BETA_SUM),
            ("SUM_WORDS", readout::SUM_WORDS),
            ("NON_FINITE", readout::NON_FINITE),
            ("ZERO_NORM", readout::ZERO_NORM),
            ("NO_NEGATIVE", readout::NO_NEGATIVE),
            ("NO_NEGATIVE_GROUP", readout::NO_NEGATIVE_GROUP),
            ("NO_NEGATIVE_PREFIX", readout::NO_NEGATIVE_PREFIX),
            ("RAN", readout::RAN),
            ("PARTIAL_WORDS", PARTIAL_WORDS),
            ("BLOCKS", Block::ALL.len()),
            ("QP", Block::QP.index()),
            ("PQ", Block::PQ.index()),
            ("QQ", Block::QQ.index()),
            ("PP", Block::PP.index()),
        ] {
            same(combine, name, want as f64);
        }
        for module in [Module::LogSumExp, Module::LogSumExpPrefixes] {
            same(module, "PARTIAL_WORDS", PARTIAL_WORDS as f64);
        }
        for module in [Module::PreparePrefixes, Module::ProjectPrefixes, Module::ProjectPrefixesInPlace] {
            same(module, "SEGMENT_WORDS", SEGMENT_WORDS as f64);
        }
        let tiles = [Module::LogSumExp, Module::GradientTile, Module::LogSumExpPrefixes, Module::GradientTilePrefixes];
        for module in tiles {
            same(module, "TILE", variant.tile() as f64);
            same(module, "4 * STEP", STAGE as f64);
        }
        same(Module::GradientProduct, "EDGE", variant.tile() as f64);
        assert!(4.0 * constant(combine, variant, "STATUS_WORDS") <= STATUS_BYTES as f64);
        // `Step::state` promises callers these places.
        assert_eq!(results::FIRST_BYTE, 256);
        for (name, k, word) in [
            ("LOSS", 0, results::LOSS),
            ("PRECISION_QP", 1, results::PRECISION_QP),
            ("MRR_QP", 2, results::MRR_QP),
            ("PRECISION_PQ", 3, results::PRECISION_PQ),
            ("MRR_PQ", 4, results::MRR_PQ),
            ("GRAD_TAU", 5, results::GRAD_TAU),
            ("GRAD_LOG_BETA", 6, results::GRAD_LOG_BETA),
        ] {
            assert_eq!(k, word, "{name}");
            same(combine, name, word as f64);
        }
        assert!(constant(combine, variant, "LOSS_SUM + 2") <= RESULT_WORDS as f64);
        assert!(constant(combine, variant, "UPSTREAM + SCALED_WORDS") <= constant(combine, variant, "BETA_SUM"));
        assert!(constant(combine, variant, "BETA_SUM + 2") <= constant(combine, variant, "LOSS_SUM"));
    }
}

/// Arrays of the state and of the side data follow each other. So from the start of one to the start of the next is its length times the
/// size of an element in the shaders.
#[test]
fn arrays_have_the_sizes_that_shaders_count_in() {
    let (m, n) = (70, 90);
    let call = Call::new(Loss::samtone_both(), 0.05);
    for (prefixes, several, call) in [(1, 0, call.clone()), (2, 1, call.with_prefixes([3, 8]))] {
        let problem = Problem::new(call.pairs(m, n).unwrap(), DType::F32, 8).unwrap();
        let plan = Plan::new(&problem, &Capabilities::default()).unwrap();
        let layout = &plan.layout;
        let words = |name: &str| constant(Module::Combine, plan.variant(), name) as usize;
        let block_end = layout.norms[0] + layout.prefix_words;
        for (name, count, start, end) in [
            ("SUM_WORDS", 4 * m * prefixes, layout.sums, layout.norms[0]),
            ("NORM_WORDS", m, layout.norms[0], layout.norms[1]),
            ("NORM_WORDS", n, layout.norms[1], layout.anchors),
            ("ANCHOR_WORDS", m, layout.anchors, layout.positive),
            ("POSITIVE_WORDS", m, layout.positive, layout.coefficients),
            ("SCALED_WORDS", 4 * m, layout.coefficients, layout.diagonal),
            ("SCALED_WORDS", m, layout.diagonal, layout.row_losses),
            ("SCALED_WORDS", m, layout.row_losses, layout.group_results),
            ("RESULT_WORDS", m.div_ceil(LANES), layout.group_results, layout.radials[0]),
            ("RADIAL_WORDS", several * m, layout.radials[0], layout.radials[1]),
            ("RADIAL_WORDS", several * n, layout.radials[1], layout.radial),
            ("SCALED_WORDS", several * 2 * m, layout.radial, block_end),
            ("CANDIDATE_WORDS", m, layout.candidates[0] as usize, layout.candidates[1] as usize),
            ("CANDIDATE_WORDS", n, layout.candidates[1] as usize, layout.row_keys as usize),
            ("GROUP_WORDS", call.loss().groups().len(), layout.groups as usize, plan.side.len() / 4),
        ] {
            assert_eq!(words(name) * count, end - start, "{name}");
        }
        assert_eq!(layout.sums, RESULT_WORDS);
        assert_eq!(layout.state_words, layout.norms[0] + prefixes * layout.prefix_words);
        assert_eq!(plan.state_bytes(), STATUS_BYTES + 4 * layout.state_words as u64);
    }
}
