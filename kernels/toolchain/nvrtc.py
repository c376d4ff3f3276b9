"""Makes PTX of CUDA C++, by NVRTC.

Which NVRTC is best? A driver refuses PTX whose `.version` is newer than its own CUDA. So the oldest NVRTC is best, if it compiles as well
as the others. 11.8 writes version 7.8 (drivers from 520 on), 12.0 writes 8.0 (525), 12.2 writes 8.2 (535), 12.8 writes 8.7 (570).

The four were compared with ptxas 12.8 on 52 kernels, for sm_80, 86, 90 and 120. None of them spills. 181 of 208 register counts are the
same. The others differ both ways, and no tile kernel loses a resident thread block. For logsumexp and gradient_product, 11.8 makes up to
2.4 % fewer instructions than 12.8. For gradient_tile it makes up to 2.4 % more, and 5 to 7 % more with f16x3, where it derives positions
from the index of the thread again and again. Time was not measured, and instructions are not time. To compare anew, change "compiler" and
"version" in toolchain.json.

Instructions of 9.0, such as wgmma, need version 8.0 of the PTX. Files with them are checked with ptxas 12.8, and compiled by NVRTC 12.8.
"""

import ctypes
import re

from toolchain import install
from toolchain.sources import Refused

_loaded = {}


def _library(key):
    if key not in _loaded:
        folder = install.wheel(key)
        # This is loaded first, because NVRTC asks the loader for it by its name alone.
        for builtins in folder.glob("nvidia/*/lib/libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        [library] = folder.glob("nvidia/*/lib/libnvrtc.so.*")
        _loaded[key] = ctypes.CDLL(str(library))
    return _loaded[key]


def compile(source):
    """The PTX of a source. Its first line names what it was compiled from. Any remark of the compiler is an error."""
    library = _library(source.target["compiler"])
    program = ctypes.c_void_p()

    def strings(values):
        return (ctypes.c_char_p * len(values))(*(v.encode() for v in values))

    def text_of(size, get):
        count = ctypes.c_size_t()
        size(program, ctypes.byref(count))
        buffer = ctypes.create_string_buffer(count.value)
        get(program, buffer)
        return buffer.value.decode()

    (name, text), *headers = source.files.items()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program),
        text.encode(),
        name.encode(),
        len(headers),
        strings([text for _, text in headers]),
        strings([name for name, _ in headers]),
    )
    if created != 0:
        raise Refused(f"{name}: NVRTC gave error {created}")
    try:
        options = source.target["options"]
        failed = library.nvrtcCompileProgram(program, len(options), strings(options)) != 0
        log = text_of(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog).strip()
        if failed or log:
            raise Refused(f"{name} does not compile without remarks:\n{log or 'no message'}")
        ptx = text_of(library.nvrtcGetPTXSize, library.nvrtcGetPTX)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return finish(source, ptx)


def finish(source, ptx):
    # The compilers for different processors have different build numbers.
    lines = [line.rstrip() for line in ptx.splitlines() if "Compiler Build ID" not in line]
    body = "\n".join(lines).strip("\n") + "\n"
    for directive, wanted in (("version", source.target["version"]), ("target", source.target["target"])):
        found = re.search(rf"^\.{directive} (\S+)$", body, re.MULTILINE)
        if found is None or found[1] != wanted:
            raise Refused(f"{source.name}: NVRTC wrote .{directive} {found and found[1]}, toolchain.json has {wanted}")
    return f"{source.first_line}\n{body}"
