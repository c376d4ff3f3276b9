#[path = "../tests/support/mod.rs"]
mod support;
use samtone::*;
use std::time::Instant;
use support::data::Kind;
fn main() {
    let a: Vec<usize> = std::env::args().skip(1).map(|x| x.parse().unwrap()).collect();
    let (b, d) = (a[0], a[1]);
    let mut src = support::data::Source::new(1);
    let q: Vec<f32> = src.normal(b * d).iter().map(|&x| x as f32).collect();
    let p: Vec<f32> = src.normal(b * d).iter().map(|&x| x as f32).collect();
    let batch = Batch::new(Embeddings::new(&q, b, d).unwrap(), Embeddings::new(&p, b, d).unwrap()).unwrap();
    let loss = Loss::samtone_query();
    let o = Options::new(0.01).unwrap();
    println!("{}", cpu::Plan::new(&loss, &batch, &o).unwrap());
    let cpu = || {
        let s = std::fs::read_to_string("/proc/self/stat").unwrap();
        let v: Vec<&str> = s.split_whitespace().collect();
        (v[13].parse::<f64>().unwrap(), v[14].parse::<f64>().unwrap())
    };
    let mut ws = cpu::Workspace::new();
    let mut dq = vec![0f32; b * d];
    let mut dp = vec![0f32; b * d];
    let c0 = cpu();
    let reps = 10;
    let mut best = f64::MAX;
    for _ in 0..reps {
        let t = Instant::now();
        let r = ws
            .loss_and_gradients_into(
                &loss,
                &batch,
                &o,
                1.0,
                GradientBuffers {
                    query: Some(EmbeddingsMut::new(&mut dq, b, d).unwrap()),
                    passage: Some(EmbeddingsMut::new(&mut dp, b, d).unwrap()),
                },
            )
            .unwrap();
        let e = t.elapsed().as_secs_f64();
        best = best.min(e);
        println!("{:.1} ms {}", e * 1e3, r.0.loss);
    }
    let c1 = cpu();
    println!(
        "cpu user {:.1} sys {:.1} ms per call",
        (c1.0 - c0.0) * 10. / reps as f64,
        (c1.1 - c0.1) * 10. / reps as f64
    );
    println!(
        "best {:.1} ms = {:.1} GF/s of {:.1}",
        best * 1e3,
        9.0 * (b * b * d) as f64 / best / 1e9,
        cpu::Plan::new(&loss, &batch, &o).unwrap().flops() / 1e9
    );
    let _ = Kind::ALL;
}
