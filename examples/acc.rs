#[path = "../tests/support/mod.rs"]
mod support;
use samtone::*;
use support::data::{Kind, problem};
fn fro(a: &[f64], b: &[f64]) -> f64 {
    let n: f64 = b.iter().map(|x| x * x).sum::<f64>();
    (a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum::<f64>() / n).sqrt()
}
fn main() {
    let a: Vec<usize> = std::env::args().skip(1).map(|x| x.parse().unwrap()).collect();
    for name in ["samtone_query", "samtone_both", "gte"] {
        for k in Kind::ALL {
            for dt in [DType::F32, DType::BF16] {
                let pr =
                    problem(Loss::by_name(name).unwrap(), k, (a[0], a[1], a[2]), 0.01, 5, 3.0).unwrap().rounded(dt);
                let c = pr.run(backend::by_name("cpu").unwrap(), dt, 1.0).unwrap();
                let r = pr.run(backend::by_name("reference").unwrap(), DType::F64, 1.0).unwrap();
                println!(
                    "{name:14} {:12} {dt} loss {:.1e} rows {:.1e} dq {:.1e} dp {:.1e} dtau {:.1e}  P@1 {} {} mrr {:.1e} {:.1e} |dq| {:.1e}",
                    k.name(),
                    (c.evaluation.loss - r.evaluation.loss).abs() / r.evaluation.loss.abs(),
                    fro(&c.evaluation.row_losses, &r.evaluation.row_losses),
                    fro(&c.grad_query, &r.grad_query),
                    fro(&c.grad_passage, &r.grad_passage),
                    (c.temperature.tau - r.temperature.tau).abs() / r.temperature.tau.abs(),
                    c.evaluation.query_to_passage.precision_at_1,
                    r.evaluation.query_to_passage.precision_at_1,
                    (c.evaluation.query_to_passage.mrr - r.evaluation.query_to_passage.mrr).abs(),
                    (c.evaluation.passage_to_query.mrr - r.evaluation.passage_to_query.mrr).abs(),
                    r.grad_query.iter().map(|x| x * x).sum::<f64>().sqrt()
                );
            }
        }
    }
}
