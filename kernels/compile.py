#!/usr/bin/env python3
"""Compiles kernels/*.cu to kernels/ptx/*.ptx, has ptxas translate them for every architecture, and writes docs/kernels.md of what
ptxas says. With --check it writes nothing, and fails unless the files are what the sources give.

It needs Linux and Python 3.9 or newer with pip. Only the first run needs network.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toolchain import install, nvrtc, ptxas, sources, table
from toolchain.sources import KERNELS, TOOLCHAIN, Refused

REPOSITORY = KERNELS.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail unless all is current and clean")
    parser.add_argument("--sources", type=Path, default=KERNELS, help="folder of the .cu files")
    parser.add_argument("--output", type=Path, help="folder of the PTX; the table is then written there too")
    parser.add_argument("--sass", metavar="ARCHITECTURE", help="also write machine code, below target/sass")
    arguments = parser.parse_args()
    output = arguments.output or KERNELS / "ptx"
    report = output / "kernels.md" if arguments.output else REPOSITORY / "docs" / "kernels.md"
    try:
        problems = run(arguments, output, report)
    except Refused as refused:
        problems = [str(refused)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def run(arguments, output, report):
    kernels = sources.read_all(arguments.sources)
    wanted, usage, problems = build(kernels)
    # If one file does not compile, the others are written all the same. But a table without that file would be wrong.
    complete = len(wanted) == len(kernels)
    listed = {(k.name, e): t for k in kernels for e, t in ptxas.entries(wanted.get(k.stem, "")).items()}
    for (file, entry), threads in listed.items():
        if threads is None:
            problems.append(f"{file}: {entry} has no __launch_bounds__")

    files = {output / f"{stem}.ptx": ptx for stem, ptx in wanted.items()}
    if kernels and complete:
        shared_memory = {entry: bytes for ptx in wanted.values() for entry, bytes in ptxas.shared_memory(ptx).items()}
        if unknown := sorted(shared_memory.keys() - {entry for _, entry in listed}):
            raise Refused(f"SHARED_BYTES names {', '.join(unknown)}, which no kernel file defines")
        architectures = sorted({a for k in kernels for a in k.target["architectures"]}, key=order)
        rows = [(*key, threads, usage[key]) for key, threads in listed.items() if usage.get(key)]
        files[report] = table.render(rows, architectures, shared_memory)
    present = [*output.glob("*.ptx"), report]
    stale = [path for path in present if complete and path not in files and path.exists()]
    if arguments.check:
        problems += differences(files, stale)
    else:
        for path, text in files.items():
            write(path, text)
        for path in stale:
            path.unlink()
    if arguments.sass:
        disassemble([k for k in kernels if k.stem in wanted], wanted, arguments.sass)
    if not kernels:
        print(f"no kernels: {shown(arguments.sources)} has no .cu files")
    elif not problems:
        print(f"{len(kernels)} kernel files, {len(listed)} kernels: {'all current' if arguments.check else 'compiled'}")
    return problems


def build(kernels):
    """Gives three things: PTX by stem; usage by (file, entry) and then by architecture; problems."""
    wanted, usage, problems = {}, {}, []
    if not kernels:
        return wanted, usage, problems
    install.wheel("ptxas")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = []
        for kernel in kernels:
            try:
                ptx = wanted[kernel.stem] = nvrtc.compile(kernel)
            except Refused as refused:
                problems.append(str(refused))
                continue
            for architecture in kernel.target["architectures"]:
                job = pool.submit(ptxas.assemble, kernel.stem, ptx, architecture)
                jobs.append((kernel, architecture, job))
        for kernel, architecture, job in jobs:
            found, remarks = job.result()
            problems += remarks
            if not remarks and architecture.startswith("sm_90") and "griddepcontrol" in wanted[kernel.stem]:
                problems += machine_code(kernel.stem, wanted[kernel.stem], architecture)
            for entry, used in found.items():
                usage.setdefault((kernel.name, entry), {})[architecture] = used
    return wanted, usage, problems


def machine_code(stem, ptx, architecture):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{stem}.cubin"
        ptxas.assemble(stem, ptx, architecture, cubin)
        sass = ptxas.disassemble(cubin)
    file = f"{stem}.ptx for {architecture}"
    return [*ptxas.matrix_units(file, ptx, sass), *ptxas.early_accesses(file, ptx, sass)]


def differences(files, stale):
    command = "python3 kernels/compile.py"
    for path, text in files.items():
        if not path.exists():
            yield f"{shown(path)} is missing: run {command}"
        elif path.read_bytes().replace(b"\r\n", b"\n") != text.encode():
            yield f"{shown(path)} is not what the sources give: run {command}"
    for path in stale:
        yield f"{shown(path)} has no kernel file: run {command}"


def write(path, text):
    """Writes the file whole or not at all. It does not write if nothing changed, so that cargo has nothing to rebuild."""
    if path.exists() and path.read_bytes() == text.encode():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=".write-", delete=False) as file:
        file.write(text.encode())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def disassemble(kernels, wanted, architecture):
    folder = REPOSITORY / "target" / "sass"
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in kernels:
        if architecture in kernel.target["architectures"]:
            cubin = folder / f"{kernel.stem}.{architecture}.cubin"
            ptxas.assemble(kernel.stem, wanted[kernel.stem], architecture, cubin)
            if cubin.exists():
                cubin.with_suffix(".sass").write_text(ptxas.disassemble(cubin), encoding="utf-8")
                print(f"wrote {shown(cubin.with_suffix('.sass'))}")


def order(architecture):
    return int("".join(c for c in architecture if c.isdigit())), architecture


def shown(path):
    path = path.resolve()
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else str(path)


if __name__ == "__main__":
    # Remarks quote the sources, which are UTF-8. The terminal may not be.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.exit(main())
