//! A defect of a kernel ends as a sentence, and the process that runs the tests goes on.

use crate::emulator::{Device, Launch};
use crate::{Check, Emulators};

const FILE: &str = "faults.cu";

/// Launches on buffers `x` of 32 numbers and `y` of 32 unwritten ones.
type Make = fn(x: u64, y: u64) -> Launch;

fn of(kernel: &str) -> Launch {
    Launch::new(kernel, 32)
}

/// Name of the test, launch, and what its sentence must contain.
const FAULTS: &[(&str, Make, &[&str])] = &[
    (
        "plain use of a pointer",
        |x, y| of("plain_use_of_a_pointer").argument(x).argument(y),
        &["`plain_use_of_a_pointer`, block (0, 0, 0), thread ", "other than by instructions.cuh"],
    ),
    (
        "unwritten global memory",
        |_, y| of("reads_unwritten_global").argument(y).argument(y),
        &["ld.global.f32 reads 4 bytes at offset ", " of `y` (faults.cu:", "which nobody has written"],
    ),
    (
        "unwritten shared memory",
        |_, y| of("reads_unwritten_shared").argument(y).shared_bytes(128),
        &["ld.shared.f32 reads 4 bytes at offset ", " of shared memory", "which nobody has written"],
    ),
    ("null pointer", |_, y| of("address_of_no_buffer").argument(y), &["ld.global.f32 reads an address of no buffer"]),
    (
        "two blocks write one place",
        |_, y| of("blocks_write_one_place").argument(y).grid(2, 1, 1),
        &["st.global.f32 writes 4 bytes", "which another block wrote"],
    ),
    (
        "read-only load of what was written",
        |_, y| of("read_only_after_a_write").argument(y),
        &["ld.global.nc.f32", "which this launch wrote", "not read-only memory"],
    ),
    (
        "memory before earlier launches are complete",
        |x, y| of("touches_before_it_waits").argument(x).argument(y).overlaps(true),
        &["ld.global.f32 reads 4 bytes", "before griddepcontrol.wait"],
    ),
    (
        "a launch of which a thread does not wait",
        |x, y| of("ends_without_waiting").argument(x).argument(y).overlaps(true),
        &["thread 5: ends without griddepcontrol.wait"],
    ),
    (
        "a wait that is left out",
        |x, y| of("reads_only_what_a_launch_wrote").argument(x).argument(y).overlaps(true).mutant("D1"),
        &["ld.global.nc.f32 reads 4 bytes", "before griddepcontrol.wait"],
    ),
    (
        "copy that nobody awaits",
        |x, _| of("copy_that_nobody_awaits").argument(x).shared_bytes(128),
        &["ends without having waited for its cp.async.ca 4"],
    ),
    (
        "shuffle from outside the mask",
        |x, y| of("shuffle_of_half_a_warp").argument(x).argument(y),
        &["thread 15: shfl.sync.idx reads lane 16, which is not in its mask"],
    ),
    ("product of half a warp", |_, y| of("product_of_half_a_warp").argument(y), &["mma.sync.m16n8k16.bf16", " end"]),
    (
        "overflow of an index",
        |_, y| of("overflows_an_index").argument(y).argument(i32::MAX),
        &["the emulator ended", "faults.cu:", "signed integer overflow"],
    ),
    (
        "local array left at its end",
        |_, y| of("leaves_a_local_array").argument(y).argument(5u32),
        &["the emulator ended", "faults.cu:", "out of bounds"],
    ),
    (
        "endless loop",
        |x, _| of("never_ends").argument(x).seconds(1),
        &["`never_ends`", "still running at the end of its time"],
    ),
    ("no such kernel", |_, _| of("nonsense"), &["there is no kernel `nonsense` here"]),
    (
        "too few arguments",
        |_, y| of("reads_unwritten_global").argument(y),
        &["`reads_unwritten_global` takes 2 arguments; got 1"],
    ),
    (
        "argument of the wrong size",
        |_, _| of("reads_unwritten_shared").argument(1u32),
        &["takes 8 bytes as argument 0; got 4"],
    ),
    (
        "part of a warp",
        |_, y| Launch::new("reads_unwritten_shared", 33).argument(y),
        &["up to 32 threads, in whole warps; got 33"],
    ),
    (
        "more threads than promised to the compiler",
        |_, y| Launch::new("reads_unwritten_shared", 64).argument(y),
        &["up to 32 threads, in whole warps; got 64"],
    ),
    ("empty grid", |_, y| of("reads_unwritten_shared").argument(y).grid(1, 0, 1), &["a grid of 1 x 0 x 1"]),
    (
        "too much shared memory",
        |_, y| of("reads_unwritten_shared").argument(y).shared_bytes(1 << 20),
        &["asks for 1048576 bytes of shared memory"],
    ),
    (
        "defect that is never reached",
        |_, y| of("blocks_write_one_place").argument(y).mutant("S9"),
        &["never reaches `S9`"],
    ),
];

pub fn checks() -> Vec<(String, Check)> {
    let check = |&(name, make, sentences): &(&str, Make, &'static [&str])| {
        let check: Check = Box::new(move |emulators| gives(emulators, make, sentences));
        (format!("fault: {name}"), check)
    };
    let mut checks: Vec<_> = FAULTS.iter().map(check).collect();
    checks.push(("fault: read-only load of what an earlier launch wrote".into(), Box::new(earlier_launch)));
    checks.push(("fault: a device goes on after a kernel's error".into(), Box::new(goes_on)));
    checks.push(("fault: host copies stay in bounds".into(), Box::new(host_copies)));
    checks
}

fn earlier_launch(emulators: &Emulators) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    let (x, y) = buffers(&mut device)?;
    let launch =
        |from, to, overlaps| of("reads_only_what_a_launch_wrote").argument(from).argument(to).overlaps(overlaps);
    device.launch(&launch(x, y, true))?; // the host wrote x
    device.launch(&launch(y, x, false))?; // the launch that wrote y is complete
    let error = device.launch(&launch(x, y, true)).err().ok_or("not noticed")?;
    let wanted = "which an earlier launch wrote, and that launch may end within this one";
    if error.contains(wanted) { Ok(()) } else { Err(error) }
}

fn buffers(device: &mut Device) -> Result<(u64, u64), String> {
    Ok((device.upload("x", &[0f32; 32])?, device.allocate("y", 128)?))
}

fn gives(emulators: &Emulators, make: Make, sentences: &[&str]) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    let (x, y) = buffers(&mut device)?;
    let got = device.launch(&make(x, y)).err().ok_or("no error")?;
    match sentences.iter().find(|sentence| !got.contains(**sentence)) {
        Some(missing) => Err(format!("`{missing}` is not in: {got}")),
        None => Ok(()),
    }
}

fn goes_on(emulators: &Emulators) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    let (x, y) = buffers(&mut device)?;
    let broken = of("reads_unwritten_global").argument(y).argument(y);
    device.launch(&broken).err().ok_or("no error")?;
    device.launch(&of("reads_unwritten_global").argument(x).argument(y))?;
    match device.download::<f32>(y, 32)? {
        zeros if zeros == [0.0; 32] => Ok(()),
        other => Err(format!("expected zeros: {other:?}")),
    }
}

fn host_copies(emulators: &Emulators) -> Result<(), String> {
    let mut device = emulators.device(FILE)?;
    let (x, _) = buffers(&mut device)?;
    let too_long = device.download::<f32>(x, 33).err().ok_or("read past the end")?;
    let before = device.write(x - 4, &[1f32]).err().ok_or("wrote before the start")?;
    device.release_all()?;
    let gone = device.download::<f32>(x, 1).err().ok_or("read what was released")?;
    let nowhere = device.write(0, &[1f32]).err().ok_or("wrote to a null pointer")?;
    let expected = ["132 bytes at offset 0 of `x`", "4 bytes at offset -4 of `x`", "not an address", "not an address"];
    for (got, want) in [too_long, before, gone, nowhere].iter().zip(expected) {
        if !got.contains(want) {
            return Err(format!("`{want}` is not in: {got}"));
        }
    }
    Ok(())
}
