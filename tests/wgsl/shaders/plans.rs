//! Plans of many kinds of calls, to check what must hold of every dispatch.

use samtone::wgpu::{Capabilities, Plan, Products};
use samtone::{Call, DType, GradientOutput, Loss, Problem, Scope};

/// A plan by what is special about it, with what it was allowed.
pub struct Planned {
    pub name: String,
    pub plan: Plan,
    pub capabilities: Capabilities,
}

type Change = for<'a> fn(Problem<'a>) -> samtone::Result<Problem<'a>>;

/// M, N, d of the plans.
pub const SHAPES: [(usize, usize, usize); 5] = [(1, 1, 1), (1, 300, 5), (100, 150, 33), (300, 300, 64), (131, 700, 48)];

fn output(dtype: DType, row_stride: usize) -> Option<GradientOutput> {
    Some(GradientOutput { dtype, row_stride })
}

const CHANGES: [(&str, Change); 9] = [
    ("plain", |p| Ok(p)),
    ("an upstream gradient on the device", |p| p.with_upstream(0.5).map(Problem::with_device_upstream)),
    ("gradients of 16 bits", |p| {
        let stride = p.shape().2.next_multiple_of(2) + 2;
        p.with_gradients(output(DType::F16, stride), output(DType::BF16, stride))
    }),
    ("row strides", |p| {
        let d = p.shape().2;
        p.with_row_strides(d + 1, d + 7)?.with_gradients(output(DType::F32, d + 3), output(DType::F32, d + 2))
    }),
    ("frozen queries", |p| {
        let d = p.shape().2;
        p.with_gradients(None, output(DType::F32, d))
    }),
    ("frozen passages", |p| {
        let d = p.shape().2;
        p.with_gradients(output(DType::F32, d), None)
    }),
    ("everything frozen", |p| p.with_gradients(None, None)),
    ("first shard", |p| {
        let m = p.shape().0;
        p.with_rows(0..m.div_ceil(3))
    }),
    ("last shard", |p| {
        let m = p.shape().0;
        p.with_rows(m / 2..m)
    }),
];

/// The smallest device, one with everything, also with matrix units, and one that binds little at once.
pub fn devices() -> [(&'static str, Capabilities); 4] {
    let baseline = Capabilities::default();
    let large = Capabilities {
        max_binding_bytes: 1 << 31,
        max_buffer_bytes: 1 << 32,
        workgroup_bytes: 32 << 10,
        f16: true,
        subgroups: true,
        large_tile_rows: 0,
        ..baseline
    };
    let cooperative = Capabilities { products: Products::Cooperative, ..large };
    let small = Capabilities { max_binding_bytes: 40 << 10, max_buffer_bytes: 4 << 20, ..baseline };
    [("baseline", baseline), ("large", large), ("cooperative", cooperative), ("small bindings", small)]
}

/// Every change on every shape, with positives in order, permuted and shared, without prefixes and with some, for every device; those that
/// a device cannot bind are left out.
pub fn all() -> Result<Vec<Planned>, String> {
    let mut plans = Vec::new();
    for (m, n, d) in SHAPES {
        let permuted: Vec<u32> = (0..m as u32).rev().collect();
        let shared: Vec<u32> = (0..m).map(|i| (i % n.div_ceil(3)) as u32).collect();
        let one = vec![n as u32 - 1; m];
        let owners: Vec<i32> = (0..n).map(|j| if j < m { -1 } else { (j % m) as i32 }).collect();
        let mut prefixes = vec![d.div_ceil(3), d.div_ceil(2), d - d / 10];
        prefixes.dedup();
        let orders = [None, Some(&permuted), Some(&shared), Some(&one)].into_iter().enumerate();
        for ((k, positives), nested) in orders.flat_map(|order| [(order, false), (order, true)]) {
            let mut call = Call::new(Loss::samtone_both(), 0.05);
            if nested {
                call = call.with_prefixes(&*prefixes);
            }
            if let Some(positives) = positives {
                call = call.with_positives(&**positives);
            }
            if k == 1 {
                call = call.with_hard_negative_owners(&*owners, Scope::Own);
            }
            for (change_name, change) in CHANGES {
                for (device, capabilities) in devices() {
                    for (loss, dtype) in [(Loss::samtone_both(), DType::F32), (Loss::info_nce(), DType::BF16)] {
                        let name = format!(
                            "{} {m}x{n}x{d} {dtype}, order {k}, {change_name}, prefixes {nested}, {device}",
                            loss.name()
                        );
                        let call = call.clone().with_loss(loss);
                        let problem = call.pairs(m, n).and_then(|pairs| Problem::new(pairs, dtype, d)).and_then(change);
                        let problem = problem.map_err(|e| format!("{name}: {e}"))?;
                        match Plan::new(&problem, &capabilities) {
                            Ok(plan) => plans.push(Planned { name, plan, capabilities }),
                            Err(_) if device == "small bindings" => {}
                            Err(error) => return Err(format!("{name}: {error}")),
                        }
                    }
                }
            }
        }
    }
    Ok(plans)
}
