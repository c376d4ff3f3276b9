//! Instructions of compute capability 9.0, compared with the same computation in Rust.

use crate::emulator::Launch;
use crate::instructions::{fused_sum, uneven};
use crate::{Check, Emulators};
use half::f16;
use rand::{SeedableRng, rngs::ChaCha8Rng};

const FILE: &str = "hopper.cu";
/// Every order of threads, early and late copies.
const SEEDS: u64 = 18;

pub fn checks() -> Vec<(String, Check)> {
    let mut checks: Vec<(String, Check)> = vec![
        ("instruction: stmatrix".into(), Box::new(matrix_stores)),
        ("instruction: bar.sync of pairs, setmaxnreg".into(), Box::new(pairs)),
        ("instruction: cp.async.bulk to a cluster".into(), Box::new(exchange_halves)),
        ("instruction: cp.async.bulk in and out".into(), Box::new(copies)),
    ];
    for columns in [128, 256] {
        for (form, a_transposed, b_transposed) in
            [("", false, false), ("_a", true, false), ("_b", false, true), ("_ab", true, true)]
        {
            let name = format!("product_{columns}{form}");
            let check: Check = Box::new(move |emulators| product(emulators, &name, columns));
            let transposed = |transposed| if transposed { " transposed" } else { "" };
            checks.push((
                format!("instruction: wgmma n{columns}, a{}, b{}", transposed(a_transposed), transposed(b_transposed)),
                check,
            ));
        }
    }
    checks
}

fn expect<T: PartialEq + std::fmt::Debug>(got: &[T], want: &[T]) -> Result<(), String> {
    match got.iter().zip(want).position(|(got, want)| got != want) {
        Some(i) => Err(format!("element {i} is {:?}, not {:?}", got[i], want[i])),
        None if got.len() != want.len() => Err(format!("{} elements, not {}", got.len(), want.len())),
        None => Ok(()),
    }
}

/// Products of sixteen and the sum so far, as tensor cores add them.
fn product(emulators: &Emulators, name: &str, columns: usize) -> Result<(), String> {
    const DEPTH: usize = 64;
    let mut random = ChaCha8Rng::seed_from_u64(12);
    let mut numbers = |count: usize| uneven(&mut random, count);
    let (a, b) = (numbers(64 * DEPTH), numbers(DEPTH * columns));
    let bits = |x: &[f16]| -> Vec<u16> { x.iter().map(|x| x.to_bits()).collect() };
    let element = |i: usize, j: usize| {
        let factors = |k: usize| [a[i * DEPTH + k % DEPTH], b[k % DEPTH * columns + j]];
        let sixteen = |k: usize| -> Vec<_> { (k..k + 16).map(factors).collect() };
        (0..2 * DEPTH).step_by(16).fold(0.0, |sum, k| fused_sum(sum, &sixteen(k), 25))
    };
    let want: Vec<f32> = (0..64).flat_map(|i| (0..columns).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect();
    let mut device = emulators.device(FILE)?;
    for seed in 0..SEEDS {
        let (input_a, input_b) = (device.upload("a", &bits(&a))?, device.upload("b", &bits(&b))?);
        let output = device.allocate("d", 64 * columns * 4)?;
        let launch = Launch::new(name, 128).shared_bytes(128 * (64 + columns as u32)).seed(seed);
        device.launch(&launch.argument(input_a).argument(input_b).argument(output))?;
        expect(&device.download::<f32>(output, want.len())?, &want).map_err(|e| format!("seed {seed}: {e}"))?;
        device.release_all()?;
    }
    Ok(())
}

/// Launches on `x` as `prepare` says, under every seed.
fn gives(
    emulators: &Emulators,
    x: &[u32],
    want: &[u32],
    prepare: impl Fn(Launch) -> Launch,
    kernel: &str,
    threads: u32,
) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    for seed in 0..SEEDS {
        let (input, output) = (device.upload("x", x)?, device.allocate("y", want.len() * 4)?);
        let launch = prepare(Launch::new(kernel, threads).seed(seed)).argument(input).argument(output);
        device.launch(&launch).map_err(|e| format!("seed {seed}: {e}"))?;
        expect(&device.download::<u32>(output, want.len())?, want).map_err(|e| format!("seed {seed}: {e}"))?;
        device.release_all()?;
    }
    Ok(())
}

fn matrix_stores(emulators: &Emulators) -> Result<(), String> {
    // Lane, register and half of every 16-bit element say where it comes from.
    let element = |lane: usize, r: usize, half: usize| (lane * 8 + r * 2 + half) as u32;
    let x: Vec<u32> = (0..128).map(|i| element(i / 4, i % 4, 0) | element(i / 4, i % 4, 1) << 16).collect();
    let mut want = Vec::new();
    for transposed in [false, true] {
        for (i, row, pair) in (0..4).flat_map(|i| (0..8).flat_map(move |row| (0..4).map(move |pair| (i, row, pair)))) {
            let at = |column: usize| {
                let (g, along) = if transposed { (column, row) } else { (row, column) };
                element(4 * g + along / 2, i, along % 2)
            };
            want.push(at(2 * pair) | at(2 * pair + 1) << 16);
        }
    }
    gives(emulators, &x, &want, |launch| launch.shared_bytes(1024), "matrix_stores", 32)
}

fn pairs(emulators: &Emulators) -> Result<(), String> {
    let x: Vec<u32> = (0..256).map(|i| i * i + 3).collect();
    let want: Vec<u32> = (0..256).map(|i| x[i ^ 63]).collect();
    gives(emulators, &x, &want, |launch| launch.shared_bytes(1024), "pairs", 256)
}

fn exchange_halves(emulators: &Emulators) -> Result<(), String> {
    let x: Vec<u32> = (0..2 * 512).map(|i| i * 7 + 1).collect();
    let want: Vec<u32> = (0..4).flat_map(|block| x[block / 2 * 512..][..512].iter().rev().copied()).collect();
    gives(emulators, &x, &want, |launch| launch.grid(4, 1, 1).shared_bytes(4112), "exchange_halves", 64)
}

fn copies(emulators: &Emulators) -> Result<(), String> {
    let x: Vec<u32> = (0..1024).map(|i| i * 5 + 2).collect();
    let want: Vec<u32> = x.iter().copied().chain([x[1023]]).collect();
    gives(emulators, &x, &want, |launch| launch.shared_bytes(1032), "copies_in_and_out", 32)
}
