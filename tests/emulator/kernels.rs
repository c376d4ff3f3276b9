//! Whole kernels. They are right in every order of their threads, and every planted defect is noticed.

use crate::emulator::{Device, Launch};
use crate::{Check, Emulators};
use half::{bf16, f16};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

/// Launches the kernel on a problem of its own and compares; `adjust` sets seed, defects and so on.
type Run = fn(&mut Device, &dyn Fn(Launch) -> Launch) -> Result<(), String>;

struct Kernel {
    name: &'static str,
    file: &'static str,
    source: &'static str,
    run: Run,
    /// Defect, and parts of the sentences that it may give: which comes first depends on the order of the threads.
    mutants: &'static [(&'static str, &'static [&'static str])],
}

const RACE: &str = "with no barrier between them";
const MESSAGE: &str = "with no barrier between them, nor a message";
const UNWAITED: &str = "has not been waited for";
const OUT_OF_BOUNDS: &str = "out of bounds";
const MISALIGNED: &str = "not a multiple of";
const DIVERGENCE: &str = "diverge";
const UNWRITTEN: &str = "which nobody has written";
const ENDED: &str = "it has ended";
pub const WRONG: &str = "wrong result";

macro_rules! kernel {
    ($name:literal, $file:literal, $run:expr, $mutants:expr) => {
        Kernel {
            name: $name,
            file: $file,
            source: include_str!(concat!("../../kernels/emulator/tests/", $file)),
            run: $run,
            mutants: $mutants,
        }
    };
}

const PRODUCT_MUTANTS: &[(&str, &[&str])] = &[
    ("rows_not_guarded", &[OUT_OF_BOUNDS]),
    ("stores_not_guarded", &[OUT_OF_BOUNDS]),
    ("stage_in_use", &[RACE, UNWAITED]),
    ("misaligned", &[MISALIGNED]),
    ("no_swizzle", &[WRONG]),
    ("registers_swapped", &[WRONG]),
];

const KERNELS: &[Kernel] = &[
    kernel!(
        "block_reduction",
        "block_reduction.cu",
        block_reduction,
        &[
            ("early_end", &[ENDED]),
            ("out_of_bounds", &[OUT_OF_BOUNDS]),
            ("divergent_shuffle", &[DIVERGENCE]),
            ("wrong_mask", &["do not include its own"]),
            ("barrier_in_branch", &[ENDED, RACE]),
        ]
    ),
    kernel!("warp_exchange", "warp_exchange.cu", warp_exchange, &[("half_mask", &[RACE])]),
    kernel!(
        "transpose",
        "transpose.cu",
        transpose,
        &[
            ("overlapping_rows", &[RACE]),
            ("shared_too_small", &[OUT_OF_BOUNDS]),
            ("read_past_end", &[OUT_OF_BOUNDS]),
            ("misaligned", &[MISALIGNED]),
            ("barrier_in_branch", &[DIVERGENCE]),
            ("unwritten", &[UNWRITTEN]),
            ("same_place", &[RACE]),
        ]
    ),
    kernel!(
        "last_block",
        "last_block.cu",
        last_block,
        &[
            ("no_barrier", &[MESSAGE]),
            ("no_release", &[MESSAGE]),
            ("no_acquire", &[MESSAGE]),
            ("fences_too_early", &[MESSAGE]),
            ("another_draws", &[MESSAGE]),
            ("no_ticket", &[MESSAGE, UNWRITTEN]),
            ("tickets_of_their_own", &[MESSAGE, UNWRITTEN]),
        ]
    ),
    kernel!(
        "double_buffered_copy",
        "double_buffered_copy.cu",
        double_buffered_copy,
        &[
            ("no_zero_fill", &[OUT_OF_BOUNDS]),
            ("misaligned_source", &[MISALIGNED]),
            ("misaligned_target", &[MISALIGNED]),
            ("same_stage", &[UNWAITED]),
            ("no_commit", &[UNWAITED]),
            ("waits_too_little", &[UNWAITED]),
        ]
    ),
    kernel!(
        "matrix_product_bf16",
        "matrix_product.cu",
        |device, adjust| matrix_product(device, adjust, true, false),
        PRODUCT_MUTANTS
    ),
    kernel!(
        "matrix_product_f16",
        "matrix_product.cu",
        |device, adjust| matrix_product(device, adjust, false, false),
        PRODUCT_MUTANTS
    ),
    kernel!(
        "matrix_product_rows_bf16",
        "matrix_product.cu",
        |device, adjust| matrix_product(device, adjust, true, true),
        &[("not_transposed", &[WRONG]), ("rows_not_guarded", &[OUT_OF_BOUNDS])]
    ),
    kernel!(
        "matrix_product_rows_f16",
        "matrix_product.cu",
        |device, adjust| matrix_product(device, adjust, false, true),
        &[("not_transposed", &[WRONG]), ("rows_not_guarded", &[OUT_OF_BOUNDS])]
    ),
];

/// Orders of the threads in which a kernel must be right.
const SEEDS: u64 = 36;
/// Orders within which a defect must be noticed where every access is checked, and where only results are.
const SEEDS_CHECKED: u64 = 6;
const SEEDS_BY_RESULT: u64 = 60;

pub fn checks() -> Vec<(String, Check)> {
    let mut checks: Vec<(String, Check)> = vec![
        ("every planted defect is tested".into(), Box::new(|_| every_defect_is_tested())),
        ("a seed repeats".into(), Box::new(a_seed_repeats)),
    ];
    let mut add = |name: String, check: Check| checks.push((name, check));
    for kernel in KERNELS {
        add(format!("{}: right for {SEEDS} seeds", kernel.name), Box::new(|emulators| right(emulators, kernel)));
        for label in named_in(kernel.source, "SYNC(") {
            let (name, missing) = (kernel.name, label.clone());
            add(
                format!("{name}: without {label} accesses conflict"),
                Box::new(move |emulators| {
                    noticed(emulators, kernel, &missing, &[RACE, UNWAITED, UNWRITTEN], SEEDS_CHECKED, true)
                }),
            );
            add(
                format!("{name}: without {label} results are wrong"),
                Box::new(move |emulators| noticed(emulators, kernel, &label, &[WRONG], SEEDS_BY_RESULT, false)),
            );
        }
        for &(mutant, sentences) in kernel.mutants {
            add(
                format!("{}: {mutant} is noticed", kernel.name),
                Box::new(move |emulators| noticed(emulators, kernel, mutant, sentences, SEEDS_CHECKED, true)),
            );
        }
    }
    checks
}

fn right(emulators: &Emulators, kernel: &Kernel) -> Result<(), String> {
    let mut device = emulators.device(kernel.file)?;
    for seed in 0..SEEDS {
        for detect in [true, false] {
            let run = (kernel.run)(&mut device, &|launch| launch.seed(seed).detect_races(detect));
            run.map_err(|e| format!("seed {seed}, races detected: {detect}: {e}"))?;
            device.release_all()?;
        }
    }
    Ok(())
}

/// The first sentence that the defect gives must be the one expected: a defect noticed as something else is not understood.
fn noticed(
    emulators: &Emulators,
    kernel: &Kernel,
    mutant: &str,
    sentences: &[&str],
    seeds: u64,
    detect: bool,
) -> Result<(), String> {
    let mut device = emulators.device(kernel.file)?;
    for seed in 0..seeds {
        match (kernel.run)(&mut device, &|launch| launch.seed(seed).detect_races(detect).mutant(mutant)) {
            Ok(()) => device.release_all()?,
            Err(e) if sentences.iter().any(|sentence| e.contains(sentence)) => return Ok(()),
            Err(e) => return Err(format!("seed {seed}: expected one of {sentences:?}, got: {e}")),
        }
    }
    Err(format!("not noticed in {seeds} orders of the threads"))
}

/// What stands as the first argument of `macro_call` in a kernel's text, each once.
pub fn named_in(source: &str, macro_call: &str) -> Vec<String> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut names = Vec::new();
    for (line, start) in
        code.flat_map(|line| line.match_indices(macro_call).map(move |(at, call)| (line, at + call.len())))
    {
        let name: String = line[start..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn every_defect_is_tested() -> Result<(), String> {
    for kernel in KERNELS {
        let same_file = KERNELS.iter().filter(|other| other.file == kernel.file);
        let tested: Vec<_> = same_file.flat_map(|other| other.mutants).map(|(name, _)| *name).collect();
        let planted = named_in(kernel.source, "MUTANT(");
        if let Some(name) = planted.iter().find(|name| !tested.contains(&name.as_str())) {
            return Err(format!("{} plants `{name}`, which no test looks for", kernel.file));
        }
        let labels = named_in(kernel.source, "SYNC(");
        if let Some(label) = labels.iter().find(|label| !kernel.source.contains(&format!("  {label} "))) {
            return Err(format!("the header of {} does not explain {label}", kernel.file));
        }
        if labels.is_empty() {
            return Err(format!("{} has no barrier to leave out", kernel.file));
        }
    }
    Ok(())
}

fn a_seed_repeats(emulators: &Emulators) -> Result<(), String> {
    let kernel = &KERNELS[0];
    let mut sentences = Vec::new();
    for seed in [3, 3, 3, 4, 5, 6] {
        let mut device = emulators.device(kernel.file)?;
        let run = (kernel.run)(&mut device, &|launch| launch.seed(seed).mutant("S1"));
        sentences.push(run.err().ok_or("a missing barrier was not noticed")?);
    }
    if sentences[0] != sentences[1] || sentences[0] != sentences[2] {
        return Err(format!("one seed, different runs: {:?}", &sentences[..3]));
    }
    if sentences[3..].iter().all(|sentence| *sentence == sentences[0]) {
        return Err(format!("four seeds, one run: {}", sentences[0]));
    }
    Ok(())
}

pub fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(-1.0f32..1.0)).collect()
}

fn compare<T: PartialEq + std::fmt::Debug>(got: &[T], want: &[T]) -> Result<(), String> {
    match got.iter().zip(want).position(|(got, want)| got != want) {
        Some(i) => Err(format!("{WRONG}: element {i} is {:?}, not {:?}", got[i], want[i])),
        None if got.len() != want.len() => Err(format!("{WRONG}: {} elements, not {}", got.len(), want.len())),
        None => Ok(()),
    }
}

/// Numbers whose error is more than `slack` times their scale; a NaN is wrong.
pub fn compare_to(got: &[f32], want: &[(f64, f64)], slack: f64) -> Result<(), String> {
    let right = |(got, (want, scale)): (&f32, &(f64, f64))| (f64::from(*got) - want).abs() <= slack * scale;
    match got.iter().zip(want).position(|pair| !right(pair)) {
        Some(i) => Err(format!("{WRONG}: element {i} is {}, not {}", got[i], want[i].0)),
        None => Ok(()),
    }
}

fn last_block(device: &mut Device, adjust: &dyn Fn(Launch) -> Launch) -> Result<(), String> {
    let (blocks, threads) = (5u32, 64usize);
    let x = random(3, blocks as usize * threads);
    let from = device.upload("x", &x)?;
    let (parts, sum) = (device.allocate("parts", 4 * x.len())?, device.allocate("sum", 4)?);
    let ticket = device.upload("ticket", &[0u32; 6])?;
    let launch = Launch::new("last_block", threads as u32).grid(blocks, 1, 1).shared_bytes(4);
    let launch = adjust(launch.argument(from).argument(parts).argument(sum).argument(ticket));
    for _ in 0..2 {
        device.launch(&launch)?; // the ticket is as it was
        compare(&device.download::<f32>(sum, 1)?, &[x.iter().fold(0.0, |all, x| all + 2.0 * x)])?;
    }
    compare(&device.download::<u32>(ticket, 1)?, &[0])
}

fn block_reduction(device: &mut Device, adjust: &dyn Fn(Launch) -> Launch) -> Result<(), String> {
    let (rows, columns) = (7usize, 300usize);
    let x = random(1, rows * columns);
    let (input, output) = (device.upload("x", &x)?, device.allocate("sums", rows * 4)?);
    let launch = Launch::new("block_reduction", 128).grid(2, 1, 1).shared_bytes(16);
    let launch = launch.argument(input).argument(output).argument(rows as u32).argument(columns as u32);
    device.launch(&adjust(launch))?;
    let sum = |row: &[f32]| (row.iter().map(|&x| f64::from(x)).sum(), row.iter().map(|&x| f64::from(x.abs())).sum());
    let want: Vec<(f64, f64)> = x.chunks(columns).map(sum).collect();
    compare_to(&device.download(output, rows)?, &want, 1e-6)
}

fn warp_exchange(device: &mut Device, adjust: &dyn Fn(Launch) -> Launch) -> Result<(), String> {
    let x: Vec<u32> = (0..192).map(|i| i * i + 7).collect();
    let (input, output) = (device.upload("x", &x)?, device.allocate("y", x.len() * 4)?);
    let launch = Launch::new("warp_exchange", 64).grid(3, 1, 1).shared_bytes(256);
    device.launch(&adjust(launch.argument(input).argument(output).argument(3u32)))?;
    let want: Vec<u32> = x.chunks(32).flat_map(|warp| warp.iter().rev().copied()).collect();
    compare(&device.download::<u32>(output, x.len())?, &want)
}

fn transpose(device: &mut Device, adjust: &dyn Fn(Launch) -> Launch) -> Result<(), String> {
    let (rows, columns) = (70usize, 45usize); // 3 x 2 tiles, the last ones ragged
    let x = random(2, rows * columns);
    let (input, output) = (device.upload("x", &x)?, device.allocate("y", x.len() * 4)?);
    let launch = Launch::new("transpose", 256).grid(4, 1, 1).shared_bytes(32 * 33 * 4);
    let launch = launch.argument(input).argument(output).argument(rows as u32).argument(columns as u32);
    device.launch(&adjust(launch))?;
    let want: Vec<f32> = (0..columns).flat_map(|j| (0..rows).map(move |i| i * columns + j)).map(|at| x[at]).collect();
    compare(&device.download::<f32>(output, x.len())?, &want)
}

fn double_buffered_copy(device: &mut Device, adjust: &dyn Fn(Launch) -> Launch) -> Result<(), String> {
    let (n, segments) = (3300usize, 7usize); // 6.4 segments
    let x = random(3, n);
    let (input, output) = (device.upload("x", &x)?, device.allocate("y", segments * 512 * 4)?);
    let launch = Launch::new("double_buffered_copy", 128).grid(2, 1, 1).shared_bytes(4096);
    let launch = launch.argument(input).argument(output).argument(n as u32).argument(segments as u32);
    device.launch(&adjust(launch))?;
    let mut padded = x;
    padded.resize(segments * 512, 0.0);
    let want: Vec<f32> = padded.chunks(512).flat_map(|segment| segment.iter().rev().copied()).collect();
    compare(&device.download::<f32>(output, want.len())?, &want)
}

fn matrix_product(
    device: &mut Device,
    adjust: &dyn Fn(Launch) -> Launch,
    is_bf16: bool,
    by_rows: bool,
) -> Result<(), String> {
    let (m, n, k) = (100usize, 72usize, 168usize); // 2 x 2 tiles, 5.25 steps
    let rounded = |values: Vec<f32>| -> (Vec<u16>, Vec<f64>) {
        let bits = |&x: &f32| if is_bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() };
        let value = |&b: &u16| if is_bf16 { bf16::from_bits(b).to_f64() } else { f16::from_bits(b).to_f64() };
        let bits: Vec<u16> = values.iter().map(bits).collect();
        let values = bits.iter().map(value).collect();
        (bits, values)
    };
    let ((a_bits, a), (b_bits, b)) = (rounded(random(4, m * k)), rounded(random(5, n * k)));
    let (input_a, input_b) = (device.upload("A", &a_bits)?, device.upload("B", &b_bits)?);
    let output = device.allocate("C", m * n * 4)?;
    let name = format!("matrix_product_{}{}", if by_rows { "rows_" } else { "" }, if is_bf16 { "bf16" } else { "f16" });
    let launch = Launch::new(&name, 128).grid(2, 2, 1).shared_bytes(3 * 8192).argument(input_a).argument(input_b);
    let launch = launch.argument(output).argument(m as u32).argument(n as u32).argument(k as u32);
    device.launch(&adjust(launch))?;
    let product = |i: usize, j: usize| {
        let terms = (0..k).map(|l| a[i * k + l] * if by_rows { b[l * n + j] } else { b[j * k + l] });
        terms.fold((0.0, 0.0), |(sum, scale), term| (sum + term, scale + term.abs()))
    };
    let want: Vec<_> = (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| product(i, j)).collect();
    compare_to(&device.download(output, m * n)?, &want, 1e-6)
}
