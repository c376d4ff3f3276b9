"""What a PTX file depends on, and the hash of it.

A kernel is compiled from its own text and from the `.cuh` headers that it includes, directly or not. The compiler gets these texts and
no folder to search, so that nothing else can enter. The emulator's headers end in `.hpp` and are not among them.

The hash is FNV-1a of 64 bits, as 16 hexadecimal digits. tests/library/artefacts.rs computes it as well. It is taken over

    nvrtc VERSION OPTION OPTION …      one line
    NAME                               of the kernel file, then of each header in the order of the names
    TEXT                               with LF line ends, and one LF after it

A name is the path below the folder of the kernels. `#include "x"` is looked up beside the including file first, and then in the folder of
the kernels. The line counts even if it stands in a branch that the preprocessor skips.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1]
TOOLCHAIN = json.loads((Path(__file__).parent / "toolchain.json").read_text(encoding="utf-8"))

INCLUDE = re.compile(r'^([ \t]*#[ \t]*include[ \t]*")([^"]+\.cuh)(".*)$', re.MULTILINE)


class Refused(Exception):
    """A sentence for the person who called the command."""


@dataclass(frozen=True)
class Source:
    name: str
    target: dict
    hash: str
    # Texts by name, the kernel first. The name in an #include is replaced by that of the file it stands for. So a header is one file to the
    # compiler, however the #include spells it.
    files: dict

    @property
    def stem(self):
        return self.name.removesuffix(".cu")

    @property
    def compiler(self):
        return TOOLCHAIN["wheels"][self.target["compiler"]]

    @property
    def first_line(self):
        return f"// samtone {self.hash} nvrtc {self.compiler['version']}"


def fnv1a(data, state=0xCBF29CE484222325):
    for byte in data:
        state = (state ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return state


def target_of(name):
    return next(t for t in TOOLCHAIN["targets"] if name.removesuffix(".cu").endswith(t["suffix"]))


def read(kernel, folder):
    """The kernel file with everything that it includes. `folder` is the one in which it stands, or one above."""
    roots = [folder.resolve(), KERNELS]
    texts, resolved = {}, {}

    def name_of(path):
        root = next((r for r in roots if path.is_relative_to(r)), None)
        if root is None:
            raise Refused(f"{path.name} is outside of the folder of the kernels")
        return path.relative_to(root).as_posix()

    def visit(path):
        name = name_of(path)
        if name in texts:
            return name
        text = texts[name] = path.read_bytes().replace(b"\r\n", b"\n").decode()

        def include(match):
            candidates = [Path(os.path.normpath(base / match[2])) for base in (path.parent, *roots)]
            header = next((c for c in candidates if c.is_file()), None)
            if header is None:
                raise Refused(f"{name} includes {match[2]}, which does not exist")
            return match[1] + visit(header) + match[3]

        resolved[name] = INCLUDE.sub(include, text)
        return name

    first = visit(kernel.resolve())
    target = target_of(first)
    version = TOOLCHAIN["wheels"][target["compiler"]]["version"]
    names = [first, *sorted(n for n in texts if n != first)]
    state = fnv1a(f"nvrtc {version} {' '.join(target['options'])}\n".encode())
    for name in names:
        state = fnv1a(f"{name}\n{texts[name]}\n".encode(), state)
    return Source(first, target, f"{state:016x}", {n: resolved[n] for n in names})


def read_all(folder):
    return [read(path, folder) for path in sorted(folder.glob("*.cu"))]
