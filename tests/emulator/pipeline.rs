//! A whole pipeline of compute capability 9.0. It is right in every order of its threads, and every planted defect is noticed.

use crate::emulator::{Device, Launch};
use crate::kernels::{WRONG, compare_to, named_in, random};
use crate::{Check, Emulators};
use half::f16;

const FILE: &str = "ring_pipeline.cu";
const SOURCE: &str = include_str!("../../kernels/emulator/tests/ring_pipeline.cu");

const RACE: &str = "barrier between them";
const UNWAITED: &str = "has not been waited for";
const ENDED: &str = "has ended";
const DEADLOCK: &str = "is deadlocked";

/// Label or defect; parts of the sentences that it may give; and those without detection of conflicts, where it shows.
type Defect = (&'static str, &'static [&'static str], &'static [&'static str]);
const DEFECTS: &[Defect] = &[
    ("S1", &[RACE, UNWAITED, "one more arrival"], &[WRONG, "one more arrival", DEADLOCK]),
    ("S2", &[RACE, UNWAITED, "which nobody has written"], &[WRONG, "one more arrival"]),
    ("S3", &[DEADLOCK], &[DEADLOCK]),
    (
        "S4",
        &[RACE, "where no mbarrier has been made", "last of its block"],
        &["where no mbarrier has been made", ENDED],
    ),
    ("S5", &[ENDED, "is the last of its block to end"], &[ENDED]),
    ("S6", &["no fence.proxy.async"], &[]),
    ("S7", &[RACE, "no fence.proxy.async", "which nobody has written"], &[WRONG]),
    ("S8", &["no wait and no barrier between them"], &[WRONG]),
    ("S9", &["no wait and no barrier between them"], &[WRONG]),
    ("S10", &["which wgmma of warpgroup 1"], &[WRONG]),
    ("S11", &["which wgmma of warpgroup 1", "without having waited"], &[WRONG]),
    ("expects_too_much", &[DEADLOCK, UNWAITED], &[DEADLOCK]),
    ("expects_too_little", &["16 bytes more than were expected"], &["bytes more than were expected"]),
    ("same_half", &[UNWAITED, "no wait and no barrier between them", RACE], &[WRONG]),
    ("no_multicast", &[DEADLOCK], &[DEADLOCK]),
    ("one_lane_waits", &[UNWAITED], &[]),
    ("wrong_parity", &[UNWAITED, RACE, DEADLOCK, "one more arrival"], &[WRONG, DEADLOCK, "one more arrival"]),
    ("early_release", &["which wgmma of warpgroup 1"], &[WRONG]),
    ("every_lane_releases", &["one more arrival", RACE, UNWAITED, "last of its block"], &[WRONG, "one more arrival"]),
    ("no_wgmma_fence", &["with no wgmma.fence since the thread began"], &["with no wgmma.fence"]),
    ("wrong_stride", &["has a stride of 512 bytes"], &["has a stride of 512 bytes"]),
    ("not_advanced", &[WRONG], &[WRONG]),
    ("forgets", &[WRONG], &[WRONG]),
    ("no_commit", &["without having waited for its wgmma", RACE, UNWAITED], &[WRONG]),
    ("over_mbarriers", &["which is an mbarrier"], &[]),
    ("half_a_barrier", &[RACE, "no fence.proxy.async", "which nobody has written"], &[WRONG]),
    ("stores_not_committed", &["until its cp.async.bulk.global has read", RACE, "no wait and no barrier"], &[WRONG]),
    ("own_warps_only", &[RACE, UNWAITED, "one more arrival"], &[WRONG, "one more arrival"]),
    ("no_init_fence", &["there was no fence.mbarrier_init"], &[]),
    ("early_end", &["it has ended", "ends without", "ends while"], &["it has ended", "ends without", "ends while"]),
    ("ends_before_its_stores", &["until its cp.async.bulk.global has read"], &[]),
];

/// Orders of the threads in which it must be right; within which a defect must be noticed where every access is checked, and where
/// only results are.
const SEEDS: u64 = 36;
const SEEDS_CHECKED: u64 = 6;
const SEEDS_BY_RESULT: u64 = 60;

pub fn checks() -> Vec<(String, Check)> {
    let mut checks: Vec<(String, Check)> = vec![
        ("ring_pipeline: every planted defect is tested".into(), Box::new(|_| every_defect_is_tested())),
        (format!("ring_pipeline: right for {SEEDS} seeds"), Box::new(right)),
    ];
    for &(name, checked, by_result) in DEFECTS {
        let noticed_by = |sentences, seeds, detect| -> Check {
            Box::new(move |emulators: &Emulators| noticed(emulators, name, sentences, seeds, detect))
        };
        checks.push((format!("ring_pipeline: {name} is noticed"), noticed_by(checked, SEEDS_CHECKED, true)));
        if !by_result.is_empty() {
            let check = noticed_by(by_result, SEEDS_BY_RESULT, false);
            checks.push((format!("ring_pipeline: {name} goes wrong"), check));
        }
    }
    checks
}

fn every_defect_is_tested() -> Result<(), String> {
    let tested: Vec<&str> = DEFECTS.iter().map(|(name, ..)| *name).collect();
    let planted = [named_in(SOURCE, "SYNC("), named_in(SOURCE, "MUTANT(")].concat();
    if let Some(name) = planted.iter().find(|name| !tested.contains(&name.as_str())) {
        return Err(format!("{FILE} plants `{name}`, which no test looks for"));
    }
    match named_in(SOURCE, "SYNC(").iter().find(|label| !SOURCE.contains(&format!("  {label} "))) {
        Some(label) => Err(format!("the header of {FILE} does not explain {label}")),
        None => Ok(()),
    }
}

fn right(emulators: &Emulators) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    for seed in 0..SEEDS {
        for detect in [true, false] {
            run(&mut device, &|launch| launch.seed(seed).detect_races(detect))
                .map_err(|e| format!("seed {seed}, conflicts detected: {detect}: {e}"))?;
        }
    }
    Ok(())
}

fn noticed(emulators: &Emulators, defect: &str, sentences: &[&str], seeds: u64, detect: bool) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    for seed in 0..seeds {
        match run(&mut device, &|launch| launch.seed(seed).detect_races(detect).mutant(defect)) {
            Ok(()) => {}
            Err(e) if sentences.iter().any(|sentence| e.contains(sentence)) => return Ok(()),
            Err(e) => return Err(format!("seed {seed}: expected one of {sentences:?}, got: {e}")),
        }
    }
    Err(format!("not noticed in {seeds} orders of the threads"))
}

/// Byte of element (row, k) of a packed operand.
fn packed_at(row: usize, k: usize, depth: usize) -> usize {
    let within = row % 64 * 128 + k % 64 * 2;
    (row / 64 * (depth / 64) + k / 64) * 8192 + (within ^ (within >> 7 & 7) << 4)
}

fn run(device: &mut Device, adjust: &dyn Fn(Launch) -> Launch) -> Result<(), String> {
    let (m, n, k) = (384usize, 128usize, 320usize); // three squares for two clusters, five steps around three slots
    let rounded = |seed, rows: usize| -> (Vec<u8>, Vec<f64>) {
        let values: Vec<f16> = random(seed, rows * k).into_iter().map(f16::from_f32).collect();
        let mut packed = vec![0; rows * k * 2];
        for (i, value) in values.iter().enumerate() {
            let at = packed_at(i / k, i % k, k);
            packed[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        (packed, values.iter().map(|x| x.to_f64()).collect())
    };
    let ((packed_a, a), (packed_b, b)) = (rounded(7, m), rounded(8, n));
    let (input_a, input_b) = (device.upload("A", &packed_a)?, device.upload("B", &packed_b)?);
    let output = device.allocate("C", m * n * 2)?;
    let launch = Launch::new("ring_pipeline", 256).grid(4, 1, 1).shared_bytes(3 * 24576 + 16384 + 48);
    let launch = launch.argument(input_a).argument(input_b).argument(output);
    device.launch(&adjust(launch.argument(m as u32).argument(n as u32).argument(k as u32)))?;
    let product = |i: usize, j: usize| {
        let terms = (0..k).map(|l| a[i * k + l] * b[j * k + l]);
        terms.fold((0.0, 0.0), |(sum, scale), term| (sum + term, scale + term.abs()))
    };
    let want: Vec<_> = (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| product(i, j)).collect();
    let got: Vec<f32> =
        device.download::<u16>(output, m * n)?.into_iter().map(|x| f16::from_bits(x).to_f32()).collect();
    device.release_all()?;
    compare_to(&got, &want, 1e-3)
}
