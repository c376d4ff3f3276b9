//! Single instructions, compared with the same computation in Rust.

use crate::emulator::Launch;
use crate::{Check, Emulators};
use half::{bf16, f16};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

const FILE: &str = "instructions.cu";

pub fn checks() -> Vec<(String, Check)> {
    vec![
        ("instruction: conversions".into(), Box::new(conversions)),
        ("instruction: arithmetic".into(), Box::new(arithmetic)),
        ("instruction: exchanges".into(), Box::new(exchanges)),
        ("instruction: ldmatrix".into(), Box::new(matrix_loads)),
        ("instruction: mma.sync".into(), Box::new(matrix_product)),
        ("instruction: mma.sync of uneven terms".into(), Box::new(uneven_matrix_product)),
        ("instruction: loads and stores".into(), Box::new(loads_and_stores)),
        ("instruction: cp.async with zero fill".into(), Box::new(copies)),
        ("instruction: atomics".into(), Box::new(atomics)),
    ]
}

/// Powers of two and their neighbours over the whole range of f32, halves between 16-bit floats, and random bits.
fn numbers() -> Vec<f32> {
    let mut bits = vec![0, 1, 0x7f800000, 0x7f800001, 0x7fc00000, 0x7f7fffff];
    bits.extend((0..=255).flat_map(|exponent| [0u32, 1, 0x1000, 0x1001, 0x8000, 0x18000].map(|f| exponent << 23 | f)));
    bits.extend((0..=0x7fffu16).step_by(31).flat_map(|h| {
        let (low, high) = (f16::from_bits(h).to_f32(), f16::from_bits(h + 1).to_f32());
        let middle = ((low + high) / 2.0).to_bits();
        [low.to_bits(), middle, middle.saturating_sub(1), middle + 1]
    }));
    let mut random = ChaCha8Rng::seed_from_u64(6);
    bits.extend((0..4000).map(|_| random.random::<u32>() >> 1));
    bits.iter().flat_map(|&b| [f32::from_bits(b), f32::from_bits(b | 1 << 31)]).collect()
}

fn expect(what: &str, right: bool, got: impl std::fmt::Debug, want: impl std::fmt::Debug) -> Result<(), String> {
    if right { Ok(()) } else { Err(format!("{what} is {got:?}, not {want:?}")) }
}

fn conversions(emulators: &Emulators) -> Result<(), String> {
    let (mut device, x) = (emulators.device(FILE)?, numbers());
    let n = x.len();
    let input = device.upload("x", &x)?;
    let sizes = [2, 2, 4, 4, 4, 4];
    let outputs: Result<Vec<u64>, String> = sizes.iter().map(|bytes| device.allocate("y", n * bytes)).collect();
    let outputs = outputs?;
    let launch = Launch::new("conversions", 256).grid(2, 1, 1).argument(input);
    let launch = outputs.iter().fold(launch, |launch, &output| launch.argument(output)).argument(n as u32);
    device.launch(&launch)?;
    let (to_bf16, to_f16) = (device.download::<u16>(outputs[0], n)?, device.download::<u16>(outputs[1], n)?);
    let (pairs_bf16, pairs_f16) = (device.download::<u32>(outputs[2], n)?, device.download::<u32>(outputs[3], n)?);
    let (from_bf16, from_f16) = (device.download::<f32>(outputs[4], n)?, device.download::<f32>(outputs[5], n)?);
    let want_bf16 = |x: f32| if x.is_nan() { 0x7fff } else { bf16::from_f32(x).to_bits() };
    let want_f16 = |x: f32| if x.is_nan() { 0x7fff } else { f16::from_f32(x).to_bits() };
    let pair = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
    for (i, &x_i) in x.iter().enumerate() {
        let (b, h, next) = (want_bf16(x_i), want_f16(x_i), x[(i + 1) % n]);
        expect(&format!("bf16 of {x_i:e}"), to_bf16[i] == b, to_bf16[i], b)?;
        expect(&format!("f16 of {x_i:e}"), to_f16[i] == h, to_f16[i], h)?;
        expect("a pair of bf16", pairs_bf16[i] == pair(b, want_bf16(next)), pairs_bf16[i], (x_i, next))?;
        expect("a pair of f16", pairs_f16[i] == pair(h, want_f16(next)), pairs_f16[i], (x_i, next))?;
        let (b, h) = (bf16::from_bits(b).to_f32(), f16::from_bits(h).to_f32());
        expect("f32 of a bf16", from_bf16[i].to_bits() == b.to_bits() || b.is_nan(), from_bf16[i], b)?;
        expect(
            "f32 of an f16",
            from_f16[i].to_bits() == h.to_bits() || h.is_nan() && from_f16[i].is_nan(),
            from_f16[i],
            h,
        )?;
    }
    Ok(())
}

/// Subnormal numbers as zeros.
fn flushed(x: f64) -> f64 {
    if x.abs() < f64::from(f32::MIN_POSITIVE) { 0.0_f64.copysign(x) } else { x }
}

/// Within `relative` of `want` or `absolute` of it; NaN where it is NaN; infinite where it is out of the range of f32.
fn close(got: f32, want: f64, relative: f64, absolute: f64) -> bool {
    let (got, want) = (f64::from(got), f64::from(want as f32));
    got == want || got.is_nan() && want.is_nan() || (got - want).abs() <= (relative * want.abs()).max(absolute)
}

fn arithmetic(emulators: &Emulators) -> Result<(), String> {
    let (mut device, x) = (emulators.device(FILE)?, numbers());
    let n = x.len();
    let (input, output, doubles) =
        (device.upload("x", &x)?, device.allocate("results", n * 32)?, device.allocate("doubles", n * 16)?);
    let launch = Launch::new("arithmetic", 256).grid(2, 1, 1).argument(input).argument(output).argument(doubles);
    device.launch(&launch.argument(n as u32))?;
    let results = device.download::<f32>(output, 8 * n)?;
    let doubles = device.download::<f64>(doubles, 2 * n)?;
    let same = |got: f32, want: f32| got == want || got.is_nan() && want.is_nan();
    for (i, (got, doubles)) in results.chunks(8).zip(doubles.chunks(2)).enumerate() {
        let (x_i, next) = (x[i], x[(i + 1) % n]);
        let exact = flushed(f64::from(x_i));
        let smallest = f64::from(f32::MIN_POSITIVE);
        let relative = 0.25f64.powi(11); // 2^-22
        expect(
            &format!("ex2({x_i:e})"),
            close(got[0], flushed(exact.exp2()), relative, smallest),
            got[0],
            exact.exp2(),
        )?;
        expect(&format!("lg2({x_i:e})"), close(got[1], exact.log2(), relative, relative), got[1], exact.log2())?;
        let reciprocal = flushed(1.0 / exact);
        expect(&format!("rcp({x_i:e})"), close(got[2], reciprocal, relative / 2.0, smallest), got[2], reciprocal)?;
        expect("sqrt", same(got[3], x_i.sqrt()), got[3], x_i.sqrt())?;
        let fused = x_i.mul_add(next, -x_i);
        expect("fma", same(got[4], fused), got[4], fused)?;
        let (largest, smallest) = match (x_i.is_nan(), next.is_nan()) {
            (true, _) => (next, next),
            (_, true) => (x_i, x_i),
            _ if x_i < next => (next, x_i),
            _ => (x_i, next),
        };
        expect("max", same(got[5], largest), got[5], (x_i, next))?;
        expect("min", same(got[6], smallest), got[6], (x_i, next))?;
        expect("mul", same(got[7], x_i * next), got[7], (x_i, next))?;
        let (root, fused) = (f64::from(x_i).sqrt(), f64::from(x_i).mul_add(f64::from(next), 1.0));
        expect("sqrt in f64", doubles[0] == root || root.is_nan() && doubles[0].is_nan(), doubles[0], root)?;
        expect("fma in f64", doubles[1] == fused || fused.is_nan() && doubles[1].is_nan(), doubles[1], fused)?;
    }
    let of = |value: f32| x.iter().position(|&x| x == value).map(|i| results[8 * i]);
    expect("2 to the powers of two", (of(1.0), of(-2.0), of(0.0)) == (Some(2.0), Some(0.25), Some(1.0)), of(1.0), 2.0)
}

fn exchanges(emulators: &Emulators) -> Result<(), String> {
    let x: Vec<u32> = (0..32).map(|i| ((i * 2654435761u64) >> 7) as u32).collect();
    let mut device = emulators.device(FILE)?;
    let (input, output) = (device.upload("x", &x)?, device.allocate("results", 512)?);
    device.launch(&Launch::new("exchanges", 32).argument(input).argument(output).seed(9))?;
    let odd = x.iter().enumerate().fold(0, |bits, (lane, value)| bits | (value % 2) << lane);
    for (lane, got) in device.download::<u32>(output, 128)?.chunks(4).enumerate() {
        let down = if lane + 3 < 32 { lane + 3 } else { lane };
        let want = [x[5 * lane % 32], x[lane ^ 9], x[down], odd];
        expect(&format!("lane {lane}"), got == want, got, want)?;
    }
    Ok(())
}

fn matrix_loads(emulators: &Emulators) -> Result<(), String> {
    // Element (row, column) of matrix i is 64 i + 8 row + column: the four lie one after the other.
    let x: Vec<u16> = (0..256).collect();
    let mut device = emulators.device(FILE)?;
    let (input, output) = (device.upload("x", &x)?, device.allocate("results", 32 * 14 * 4)?);
    device.launch(&Launch::new("matrix_loads", 32).argument(input).argument(output).shared_bytes(512).seed(4))?;
    for (lane, got) in device.download::<u32>(output, 32 * 14)?.chunks(14).enumerate() {
        let (g, t) = (lane as u32 / 4, lane as u32 % 4);
        let plain = |i: u32| (64 * i + 8 * g + 2 * t) | (64 * i + 8 * g + 2 * t + 1) << 16;
        let transposed = |i: u32| (64 * i + 8 * (2 * t) + g) | (64 * i + 8 * (2 * t + 1) + g) << 16;
        let matrices = [0, 0, 1, 0, 1, 2, 3];
        let want: Vec<u32> = matrices.map(plain).into_iter().chain(matrices.map(transposed)).collect();
        expect(&format!("lane {lane}"), got == want, got, &want)?;
    }
    Ok(())
}

/// Numbers of very different sizes, among them zeros and subnormal ones.
pub fn uneven(random: &mut ChaCha8Rng, count: usize) -> Vec<f16> {
    let mut number = || {
        let power: i32 = random.random_range(-24..=4);
        let x = if power < -23 { 0.0 } else { random.random_range(-1.0f32..1.0) * (power as f32).exp2() };
        f16::from_f32(x)
    };
    (0..count).map(|_| number()).collect()
}

/// The sum and the products of factors as tensor cores add them: every term is cut `fraction_bits` below the power of two of the
/// largest, that of a product being the sum of its factors'; the whole is cut to f32.
pub fn fused_sum(sum: f32, factors: &[[f16; 2]], fraction_bits: i32) -> f32 {
    let exponent = |x: f64| (x.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    let power = |x: f64, least: i32| if x == 0.0 { i32::MIN / 4 } else { exponent(x).max(least) };
    let terms = factors.iter().map(|f| f.map(f16::to_f64)).map(|[x, y]| (x * y, power(x, -14) + power(y, -14)));
    let terms: Vec<_> = terms.chain([(f64::from(sum), power(f64::from(sum), -126))]).collect();
    let highest = terms.iter().map(|term| term.1).max().unwrap_or(0).max(-400);
    let unit = f64::from(highest - fraction_bits).exp2();
    let all = terms.iter().map(|term| (term.0 / unit).trunc()).sum::<f64>() * unit;
    let nearest = all as f32;
    if f64::from(nearest).abs() > all.abs() { f32::from_bits(nearest.to_bits() - 1) } else { nearest }
}

/// Accumulator and eight products, then the next eight.
fn uneven_matrix_product(emulators: &Emulators) -> Result<(), String> {
    let mut random = ChaCha8Rng::seed_from_u64(13);
    let mut device = emulators.device(FILE)?;
    for _ in 0..8 {
        let (a, b) = (uneven(&mut random, 16 * 16), uneven(&mut random, 16 * 8));
        let c: Vec<f32> = uneven(&mut random, 16 * 8).into_iter().map(|x| x.to_f32() / 3.0).collect();
        let (mut words_a, mut words_b, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        let pair = |low: f16, high: f16| u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        let of_lane = |lane: usize| [0, 1, 8, 9].map(|at| (lane / 4 + at / 8 * 8, lane % 4 * 2 + at % 2));
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            let a_at = |row: usize, k: usize| pair(a[16 * row + k], a[16 * row + k + 1]);
            let b_at = |k: usize| pair(b[8 * k + g], b[8 * (k + 1) + g]);
            words_a.extend([a_at(g, 2 * t), a_at(g + 8, 2 * t), a_at(g, 2 * t + 8), a_at(g + 8, 2 * t + 8)]);
            words_b.extend([b_at(2 * t), b_at(2 * t + 8)]);
            sums.extend(of_lane(lane).map(|(i, j)| c[8 * i + j]));
        }
        let (input_a, input_b) = (device.upload("a", &words_a)?, device.upload("b", &words_b)?);
        let output = device.upload("d", &sums)?;
        let launch = Launch::new("matrix_product", 32).argument(input_a).argument(input_b).argument(output);
        device.launch(&launch.argument(0u32))?;
        for (lane, got) in device.download::<f32>(output, 128)?.chunks(4).enumerate() {
            let want = of_lane(lane).map(|(i, j)| {
                let eight = |k: usize| -> Vec<_> { (k..k + 8).map(|k| [a[16 * i + k], b[8 * k + j]]).collect() };
                fused_sum(fused_sum(c[8 * i + j], &eight(0), 24), &eight(8), 24)
            });
            expect(&format!("lane {lane}"), got == want, got, want)?;
        }
        device.release_all()?;
    }
    Ok(())
}

/// d = a · b + c from matrices laid out by hand; small integers, so that every order of addition gives the same.
fn matrix_product(emulators: &Emulators) -> Result<(), String> {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let mut integers = |count: usize| -> Vec<f32> { (0..count).map(|_| random.random_range(-9..=9) as f32).collect() };
    let (a, b, c) = (integers(16 * 16), integers(16 * 8), integers(16 * 8));
    for is_bf16 in [true, false] {
        let bits = |x: f32| u32::from(if is_bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() });
        let (mut words_a, mut words_b, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            let a_at = |row: usize, k: usize| bits(a[16 * row + k]) | bits(a[16 * row + k + 1]) << 16;
            let b_at = |k: usize| bits(b[8 * k + g]) | bits(b[8 * (k + 1) + g]) << 16;
            words_a.extend([a_at(g, 2 * t), a_at(g + 8, 2 * t), a_at(g, 2 * t + 8), a_at(g + 8, 2 * t + 8)]);
            words_b.extend([b_at(2 * t), b_at(2 * t + 8)]);
            sums.extend([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)].map(|(i, j)| c[8 * i + j]));
        }
        let mut device = emulators.device(FILE)?;
        let (input_a, input_b) = (device.upload("a", &words_a)?, device.upload("b", &words_b)?);
        let output = device.upload("d", &sums)?;
        let launch = Launch::new("matrix_product", 32).argument(input_a).argument(input_b).argument(output);
        device.launch(&launch.argument(u32::from(is_bf16)))?;
        for (lane, got) in device.download::<f32>(output, 128)?.chunks(4).enumerate() {
            let (g, t) = (lane / 4, lane % 4);
            let want = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
                .map(|(i, j)| (0..16).fold(c[8 * i + j], |sum, k| sum + a[16 * i + k] * b[8 * k + j]));
            expect(&format!("lane {lane}"), got == want, got, want)?;
        }
    }
    Ok(())
}

fn loads_and_stores(emulators: &Emulators) -> Result<(), String> {
    let mut random = ChaCha8Rng::seed_from_u64(10);
    let x: Vec<u8> = (0..12 * 32 * 32).map(|_| random.random()).collect();
    let mut device = emulators.device(FILE)?;
    let (input, output) = (device.upload("x", &x)?, device.allocate("y", x.len())?);
    device.launch(&Launch::new("loads_and_stores", 32).argument(input).argument(output).shared_bytes(1024))?;
    let y = device.download::<u8>(output, x.len())?;
    expect("what went through every type", x == y, "changed", "the same")
}

fn copies(emulators: &Emulators) -> Result<(), String> {
    let x: Vec<u8> = (0..512).map(|i| (i % 251 + 1) as u8).collect();
    // Bytes copied and bytes of the source, in the order of the kernel.
    let kinds = [4usize, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16].into_iter().zip([0usize, 2, 4, 0, 4, 8, 0, 4, 8, 12, 16]);
    let kinds: Vec<_> = kinds.collect();
    for seed in 0..8 {
        let mut device = emulators.device(FILE)?;
        let (input, output) = (device.upload("x", &x)?, device.allocate("y", 32 * 11 * 16)?);
        let launch = Launch::new("copies", 32).argument(input).argument(output).shared_bytes(32 * 256);
        device.launch(&launch.seed(seed))?;
        let y = device.download::<u8>(output, 32 * 11 * 16)?;
        for (i, got) in y.chunks(16).enumerate() {
            let (lane, (bytes, source)) = (i / 11, kinds[i % 11]);
            let mut want = x[16 * lane..16 * lane + source].to_vec();
            want.resize(bytes, 0);
            expect(&format!("lane {lane}, {source} of {bytes}"), got[..bytes] == want, &got[..bytes], &want)?;
        }
    }
    Ok(())
}

fn atomics(emulators: &Emulators) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    let words = device.upload("words", &[5u32, 2000, 0])?;
    device.launch(&Launch::new("atomics", 64).grid(5, 1, 1).argument(words).seed(2))?;
    let (got, want) = (device.download::<u32>(words, 3)?, [5 + 319 * 320 / 2, 1000 - 319, u32::MAX]);
    expect("sum, minimum and bits", got == want, &got, want)
}
