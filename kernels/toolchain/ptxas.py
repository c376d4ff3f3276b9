"""Makes machine code of PTX, to see what a kernel takes. ptxas says some things of every kernel. Anything else that it says is a problem:
a spill, a stack frame, a warning, a directive that it ignores, a note that it serialised instructions."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from toolchain import install

EXPECTED = re.compile(
    r"ptxas info +: (\d+ bytes gmem|Compiling entry function|Function properties for|Used \d+ registers|Compile time =)"
    r"|    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads$|$"
)
ENTRY = re.compile(r"^(?:\.visible )?\.entry (\w+)\(", re.MULTILINE)


@dataclass
class Usage:
    registers: int = 0
    static_shared: int = 0
    stack: int = 0
    spilled: int = 0


def entries(ptx):
    """The most threads of a thread block, by entry. It is None where the kernel does not say."""
    starts = [(m[1], m.start()) for m in ENTRY.finditer(ptx)]
    found = {}
    for (name, start), (_, end) in zip(starts, [*starts[1:], (None, len(ptx))]):
        bounds = re.search(r"^\.maxntid (\d+)(?:, (\d+), (\d+))?$", ptx[start:end], re.MULTILINE)
        found[name] = bounds and int(bounds[1]) * int(bounds[2] or 1) * int(bounds[3] or 1)
    return found


def shared_memory(ptx):
    """The bytes of dynamic shared memory of a thread block, by entry, where SHARED_BYTES of common/platform.cuh names them."""
    found = re.finditer(r"^\.global \.align 4 \.u32 (\w+)_shared_bytes(?: = (\d+))?;$", ptx, re.MULTILINE)
    return {m[1]: int(m[2] or 0) for m in found}


def parse(output):
    """What `ptxas -v` says: the usage by entry, and the lines that it should not have said."""
    usage, remarks, function, entry = {}, [], None, None
    for line in output.splitlines():
        if not EXPECTED.match(line):
            remarks.append(line.strip())
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            entry = usage[found[1]] = Usage()
        elif found := re.search(r"Function properties for (\S+)", line):
            function = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if function in usage:
                usage[function].stack = int(found[1])
                usage[function].spilled = int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            entry.registers = int(found[1])
            entry.static_shared = int(shared[1]) if shared else 0
    return usage, remarks


def as_loaded(ptx, architecture):
    """PTX for every device, as src/cuda/driver/ptx.rs changes it for a device of this architecture."""
    if int(re.sub(r"\D", "", architecture)) < 90:
        return ptx
    return ptx.replace("\n.target sm_80\n", "\n.target sm_90\n").replace("// griddepcontrol.", "griddepcontrol.")


def assemble(name, ptx, architecture, cubin="/dev/null"):
    """The usage of each entry, and problems as sentences."""
    ptx = as_loaded(ptx, architecture)
    program = install.program("ptxas", "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        file = f"{name}.ptx"
        (Path(folder) / file).write_text(ptx, encoding="utf-8")
        options = ["-v", "--warn-on-spills", "--warn-on-local-memory-usage", f"-arch={architecture}", "-o", str(cubin)]
        run = subprocess.run([program, *options, file], cwd=folder, capture_output=True, encoding="utf-8")
    usage, remarks = parse(run.stdout + run.stderr)
    problems = [f"{file} for {architecture}: {remark}" for remark in remarks]
    if run.returncode != 0 and not remarks:
        problems.append(f"{file} for {architecture}: ptxas ends with {run.returncode}")
    for entry in entries(ptx).keys() - usage.keys():
        problems.append(f"{file} for {architecture}: ptxas says nothing of {entry}")
    return usage, problems


def bodies(text, start):
    """The text of each entry, by entry. `start` finds where an entry begins."""
    found = [(m[1], m.start()) for m in start.finditer(text)]
    return {name: text[at:end] for (name, at), (_, end) in zip(found, [*found[1:], (None, len(text))])}


# Instructions that reach global memory. `LD` and `ST` may reach it.
GLOBAL = re.compile(r"\b(LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|LD|ST|UBLKCP|UBLKRED|UTMA\w+)\b")


def early_accesses(file, ptx, sass):
    """A problem for each entry that does not wait for earlier launches before anything else."""
    code = bodies(sass, re.compile(r"^\.text\.(\w+):", re.MULTILINE))
    for entry in bodies(ptx, ENTRY):
        text = code.get(entry, "")
        wait, access = text.find("ACQBULK"), GLOBAL.search(text)
        if wait < 0:
            yield f"{file}: {entry} does not wait for earlier launches"
        elif access and access.start() < wait:
            yield f"{file}: {entry} has {access[0]} before it waits for earlier launches"


def matrix_units(file, ptx, sass):
    """A problem for each entry that asks for wgmma and gets no HGMMA, and for each of these whose machine code touches local memory."""
    code = bodies(sass, re.compile(r"^\.text\.(\w+):", re.MULTILINE))
    for entry, text in bodies(ptx, ENTRY).items():
        if "wgmma.mma_async" not in text:
            continue
        if not re.search(r"\bHGMMA\b", code.get(entry, "")):
            yield f"{file}: {entry} asks for wgmma, and its machine code has no HGMMA"
        if re.search(r"\b(LDL|STL)\b", code.get(entry, "")):
            yield f"{file}: {entry} reads or writes local memory"


def disassemble(cubin):
    program = install.program("nvdisasm", "nvdisasm")
    return subprocess.run([program, "--print-code", cubin], capture_output=True, encoding="utf-8", check=True).stdout
