//! Defects in the use of instructions of compute capability 9.0 end as a sentence. Each kernel has one defect.

use crate::emulator::{Device, Launch};
use crate::{Check, Emulators};

const FILE: &str = "hopper_faults.cu";
const SOURCE: &str = include_str!("../../kernels/emulator/tests/hopper_faults.cu");
/// Late and early copies, and every order of the threads: the sentence does not depend on them.
const SEEDS: u64 = 6;

/// Kernel, and what its sentence must contain.
const FAULTS: &[(&str, &[&str])] = &[
    (
        "arrives_at_nothing",
        &["mbarrier.arrive reaches 8 bytes at offset 8192 of shared memory", "no mbarrier has been made"],
    ),
    ("makes_one_twice", &["mbarrier.init", "there is already an mbarrier at offset 8192"]),
    ("mbarrier_off_its_place", &["mbarrier.init writes 8 bytes at offset 8196", "not a multiple of 8"]),
    ("mbarrier_for_nobody", &["mbarrier.init", "for 0 arrivals"]),
    ("mbarrier_made_just_now", &["thread 1: mbarrier.arrive", "which thread 0 made", "with no barrier between them"]),
    ("reads_an_mbarrier", &["ld.shared.u32 reads 4 bytes at offset 8192", "which is an mbarrier"]),
    ("writes_an_mbarrier", &["st.shared.u16 writes 2 bytes at offset 8198", "which is an mbarrier"]),
    ("arrives_too_often", &["is one more arrival at the mbarrier at offset 8192 than the 1 of its phase"]),
    ("expects_a_megabyte", &["cannot count so many bytes: 1048576"]),
    ("more_than_expected", &["cp.async.bulk", "got 32 bytes more than were expected"]),
    (
        "waits_for_ever",
        &[
            "is deadlocked: thread 0 is at mbarrier.try_wait.parity 0 of the mbarrier at offset 8192",
            "lacks 1 of 2 arrivals",
        ],
    ),
    ("waits_for_a_phase_too_late", &["is deadlocked", "whose phase 2 lacks 1 of 1 arrivals and 0 bytes"]),
    ("waits_for_no_parity", &["for parity 2"]),
    ("ends_within_a_phase", &["is the last of its block to end, within a phase", "2 of 3 have arrived"]),
    ("tells_of_one_lane", &["ld.shared.u32 reads 4 bytes", "with no barrier between them"]),
    ("arrives_at_a_third_block", &["mbarrier.arrive.shared::cluster", "for block 2 of a cluster of 2"]),
    ("arrives_without_the_fence", &["mbarrier.arrive.shared::cluster", "there was no fence.mbarrier_init"]),
    ("copies_to_a_third_block", &["cp.async.bulk", "for a block that its cluster of 2 has not"]),
    (
        "arrives_at_an_ended_block",
        &["block (0, 0, 0), thread 0: mbarrier.arrive", "is for block (1, 0, 0), which has ended"],
    ),
    ("one_block_goes_elsewhere", &["diverge", "barrier.cluster"]),
    ("one_block_ends", &["end", "barrier.cluster"]),
    (
        "tells_another_block_of_loads",
        &[
            "block (1, 0, 0), thread 0: cp.async.bulk copies 128 bytes",
            "of block (0, 0, 0) reads",
            "with no barrier between them",
        ],
    ),
    ("loads_eight_bytes", &["cp.async.bulk", "of 8 bytes: not a multiple of 16"]),
    ("loads_from_between", &["cp.async.bulk reads 64 bytes at offset 8 of `x`", "not a multiple of 16"]),
    ("loads_to_between", &["cp.async.bulk copies 64 bytes at offset 8 of shared memory", "not a multiple of 16"]),
    ("loads_past_the_source", &["cp.async.bulk reads 64 bytes at offset 4064 of `x`", "out of bounds"]),
    ("loads_past_the_end", &["cp.async.bulk copies 64 bytes at offset 24544", "out of bounds"]),
    ("loads_without_the_fence", &["there was no fence.mbarrier_init"]),
    ("reads_what_is_under_way", &["ld.shared.u32 reads 4 bytes", "has not been waited for"]),
    ("reads_what_another_waited_for", &["ld.shared.u32 reads 4 bytes", "has not been waited for"]),
    ("loads_over_readers", &["cp.async.bulk copies 64 bytes", "which thread 1 reads", "with no barrier between them"]),
    ("rewrites_a_source", &["st.global.u32 writes 4 bytes at offset 0 of `x`", "has not been waited for"]),
    (
        "loads_what_was_just_stored",
        &["cp.async.bulk reads 64 bytes at offset 0 of `y`", "which thread 0 wrote", "does not make it a source"],
    ),
    ("ends_with_a_copy_under_way", &["is the last of its block to end"]),
    ("stores_without_the_fence", &["cp.async.bulk.global reads 64 bytes", "with no fence.proxy.async of that thread"]),
    ("fences_for_others", &["cp.async.bulk.global reads 64 bytes", "with no fence.proxy.async of that thread"]),
    ("fences_without_a_barrier", &["cp.async.bulk.global reads 64 bytes", "wrote", "with no barrier between them"]),
    ("fences_before_it_stores", &["with no fence.proxy.async of that thread"]),
    (
        "rewrites_what_is_stored",
        &["st.shared.u32 writes", "which a bulk copy of thread 0 reads", "with no wait and no barrier"],
    ),
    (
        "reads_what_is_being_stored",
        &["ld.global.u32 reads", "which a bulk copy of thread 0 wrote", "with no wait and no barrier"],
    ),
    ("ends_before_its_stores", &["ends without having waited until its cp.async.bulk.global has read"]),
    ("barrier_0_by_name", &["bar.sync 0, 64", "named barriers are 1 to 15"]),
    ("barrier_16", &["bar.sync 16, 64", "named barriers are 1 to 15"]),
    ("barrier_of_a_part", &["bar.sync 1, 48", "not a number of whole warps"]),
    ("barrier_of_two_sizes", &["bar.sync 1, ", " threads ("]),
    ("barrier_of_half_a_warp", &["bar.sync", " end"]),
    ("barrier_at_two_lines", &["the lanes of the warp diverge"]),
    ("barrier_of_one_warp_too_few", &["is deadlocked: thread 0 is at bar.sync 3 of 64 threads"]),
    ("few_registers", &["setmaxnreg", "to 16 registers: not a multiple of 8 from 24 to 256"]),
    ("registers_of_a_warp", &["setmaxnreg"]),
    ("registers_of_two_sizes", &["the threads of the warpgroup diverge"]),
    ("more_registers_than_there_are", &["setmaxnreg", "would have 67584 registers, of 64512"]),
    ("increase_to_fewer", &["setmaxnreg.inc", "to 232 registers, of 256"]),
    ("decrease_to_more", &["setmaxnreg.dec", "to 176 registers, of 168"]),
    ("half_a_warpgroup", &["setmaxnreg", "is of whole warpgroups of 128 threads; the block has 64"]),
    (
        "product_of_nothing",
        &["wgmma.mma_async reads 16 bytes at offset 0 of shared memory", "which nobody has written"],
    ),
    ("product_without_the_fence", &["wgmma.mma_async reads 16 bytes", "with no fence.proxy.async of that thread"]),
    ("product_without_a_barrier", &["wgmma.mma_async reads 16 bytes", "with no barrier between them"]),
    ("product_past_the_end", &["wgmma.mma_async reads 16 bytes at offset 24576", "out of bounds"]),
    ("product_of_plain_rows", &["of an operand a that is not in rows of 128 bytes with their swizzle"]),
    ("product_within_an_atom", &["of an operand b that starts within an atom of 1024 bytes: at 128"]),
    ("product_across_rows", &["of an operand a that leaves its rows of 128 bytes: it starts at byte 112"]),
    ("product_of_one_panel", &["of an operand b that has a leading stride of 0 bytes"]),
    ("product_by_half", &["wgmma"]),
    ("products_at_two_lines", &["the threads of the warpgroup diverge"]),
    ("products_of_two_operands", &["the threads of the warpgroup diverge", "with another operand"]),
    ("products_in_two_groups", &["the threads of the warpgroup diverge", "in another group"]),
    ("product_into_other_sums", &["gets other registers than other threads of the warpgroup give it"]),
    ("no_fence_at_first", &["with no wgmma.fence since the thread began"]),
    ("no_fence_after_a_wait", &["with no wgmma.fence since the last wgmma.wait_group"]),
    (
        "overwrites_an_operand",
        &["st.shared.u32 writes 4 bytes", "which wgmma of warpgroup 0 reads", "with no wait and no barrier"],
    ),
    ("overwrites_what_others_multiply", &["which wgmma of warpgroup 0 reads", "with no wait and no barrier"]),
    ("ends_before_its_product", &["ends without having waited for its wgmma.mma_async"]),
    ("ends_with_an_open_group", &["ends without having waited for its wgmma.mma_async"]),
];

/// Where a copy must be late.
const SOMETIMES: &[&str] = &["arrives_at_an_ended_block"];

pub fn checks() -> Vec<(String, Check)> {
    let check = |&(name, sentences): &(&'static str, &'static [&str])| {
        let check: Check = Box::new(move |emulators| gives(emulators, name, sentences));
        (format!("fault of 9.0: {name}"), check)
    };
    let mut checks: Vec<_> = FAULTS.iter().map(check).collect();
    checks.push(("fault of 9.0: every one is tested".into(), Box::new(|_| all_tested())));
    checks.push(("fault of 9.0: half a cluster".into(), Box::new(half_a_cluster)));
    checks.push(("instruction: sums of wgmma until they have been waited for".into(), Box::new(sums)));
    checks
}

fn buffers(device: &mut Device) -> Result<(u64, u64), String> {
    let x: Vec<u32> = (0..1024).collect();
    Ok((device.upload("x", &x)?, device.allocate("y", 4096)?))
}

fn declared() -> impl Iterator<Item = (&'static str, u32, u32)> {
    SOURCE.lines().filter_map(|line| {
        let two = line.starts_with("FAULT_OF_TWO(");
        let rest = line.strip_prefix("FAULT_OF_TWO(").or_else(|| line.strip_prefix("FAULT("))?;
        let (name, threads) = rest[..rest.find(')')?].split_once(", ")?;
        Some((name, threads.parse().ok()?, if two { 2 } else { 1 }))
    })
}

fn all_tested() -> Result<(), String> {
    match declared().find(|(name, ..)| !FAULTS.iter().any(|(tested, _)| tested == name)) {
        Some((name, ..)) => Err(format!("{FILE} has `{name}`, which no test launches")),
        None => Ok(()),
    }
}

fn gives(emulators: &Emulators, kernel: &str, sentences: &[&str]) -> Result<(), String> {
    let (_, threads, blocks) = declared().find(|(name, ..)| *name == kernel).ok_or("no such kernel")?;
    let mut device = emulators.device(FILE)?;
    for seed in 0..SEEDS {
        let (x, y) = buffers(&mut device)?;
        let launch = Launch::new(kernel, threads).grid(blocks, 1, 1).shared_bytes(24576).argument(x).argument(y);
        let got = match device.launch(&launch.seed(seed)) {
            Ok(()) if seed > 0 && SOMETIMES.contains(&kernel) => continue,
            Ok(()) => return Err(format!("seed {seed}: no error")),
            Err(got) => got,
        };
        if let Some(missing) = sentences.iter().find(|sentence| !got.contains(**sentence)) {
            return Err(format!("seed {seed}: `{missing}` is not in: {got}"));
        }
        device.release_all()?;
    }
    Ok(())
}

fn half_a_cluster(emulators: &Emulators) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    let (x, y) = buffers(&mut device)?;
    let launch = Launch::new("one_block_ends", 32).grid(3, 1, 1).shared_bytes(24576).argument(x).argument(y);
    match device.launch(&launch) {
        Err(e) if e.contains("clusters of 2 blocks, and cannot be launched on a grid of 3 across") => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// Until the wait they are NaNs.
fn sums(emulators: &Emulators) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    for seed in 0..SEEDS {
        let y = device.allocate("y", 1024)?;
        device.launch(&Launch::new("sums_before_and_after", 128).shared_bytes(24576).argument(y).seed(seed))?;
        let y = device.download::<f32>(y, 256)?;
        if !y[..128].iter().all(|x| x.is_nan()) || y[128..].iter().any(|&x| x != 0.0) {
            return Err(format!("seed {seed}: {y:?}"));
        }
    }
    Ok(())
}
