"""A CUDA driver on the CPU (tests/cuda_driver of the repository) and tensors in its memory, so that calls on CUDA can be tested
without a GPU. PyTorch knows nothing of this device: what stands in for its tensors here has what samtone asks of them.

    python emulated.py FOLDER     builds the driver there; the loader finds it by LD_LIBRARY_PATH
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ["-std=c++20", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-DSAMTONE_EMULATED"]
LIBRARY = "libcuda.so.1"


def build(folder: Path, compiler: str = "g++") -> Path:
    """The folder with the driver's library, built there unless it is there already."""
    sources = [path for path in sorted((ROOT / "kernels" / "emulator").glob("*.cpp")) if path.name != "server.cpp"]
    sources += [*sorted((ROOT / "kernels").glob("*.cu")), *sorted((ROOT / "tests" / "cuda_driver").glob("*.cpp"))]
    headers = [*(ROOT / "kernels").rglob("*.cuh"), *(ROOT / "kernels").rglob("*.hpp")]
    headers += (ROOT / "tests" / "cuda_driver").glob("*.hpp")
    content = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, *sorted(headers)])).hexdigest()[:16]
    own = folder / content
    if (own / LIBRARY).exists():
        return own
    own.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        target = own / f"{source.stem}.o"
        subprocess.run([compiler, *OPTIONS, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(own / "draft")], check=True)
    (own / "draft").rename(own / LIBRARY)
    for target in objects:
        target.unlink()
    return own


class Driver:
    """The driver, with the primary context of device 0 current."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(LIBRARY)
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream = stream.value or 0

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def write(self, address: int, content: bytes) -> None:
        stream = ctypes.c_void_p(self.stream)
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), content, ctypes.c_size_t(len(content)), stream)

    def read(self, address: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(max(size, 1))
        stream = ctypes.c_void_p(self.stream)
        self.call("cuMemcpyDtoHAsync_v2", buffer, ctypes.c_uint64(address), ctypes.c_size_t(size), stream)
        self.call("cuStreamSynchronize", stream)
        return buffer.raw[:size]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER)]
_CODES = {torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.uint8: (1, 8)}
_alive: dict[int, Any] = {}
_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


@_DELETER
def _delete(managed: Any) -> None:
    del _alive[ctypes.addressof(managed.contents)]


class DeviceTensor:
    """What stands in for a tensor of PyTorch on a CUDA device."""

    device = torch.device("cuda:0")

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        strides: tuple[int, ...] | None = None,
        memory: EmulatedMemory | None = None,
    ) -> None:
        self.address, self.shape, self.dtype, self.memory = address, shape, dtype, memory
        self.strides = strides or tuple(torch.empty(shape, dtype=dtype, device="meta").stride())

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def detach(self) -> DeviceTensor:
        return self

    def clone(self) -> DeviceTensor:
        assert self.memory is not None
        return self.memory.copy(self)

    def __dlpack__(self, stream: int | None = None) -> Any:
        assert stream == -1, "the stream is the current one"
        dims = len(self.shape)
        shape, strides = (ctypes.c_int64 * dims)(*self.shape), (ctypes.c_int64 * dims)(*self.strides)
        code, bits = _CODES[self.dtype]
        tensor = _Tensor(self.address, 2, 0, dims, code, bits, 1, shape, strides, 0)
        managed = _Managed(tensor, None, _delete)
        _alive[ctypes.addressof(managed)] = managed, shape, strides
        return _new(ctypes.addressof(managed), b"dltensor", None)


class EmulatedMemory:
    """Memory of the driver in place of PyTorch's allocator; everything that it gives is filled with what no call expects."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.stream, self.capturing = driver, driver.stream, False

    def put(self, content: bytes, shape: tuple[int, ...], dtype: torch.dtype, strides: Any = None) -> DeviceTensor:
        address = self.driver.allocate(len(content))
        self.driver.write(address, content)
        return DeviceTensor(address, shape, dtype, strides, self)

    def empty(self, size: int) -> DeviceTensor:
        return self.put(b"\x5a" * size, (size,), torch.uint8)

    def matrix(self, rows: int, dim: int, dtype: torch.dtype) -> DeviceTensor:
        return self.put(b"\x5a" * (rows * dim * dtype.itemsize), (rows, dim), dtype)

    def copy(self, tensor: DeviceTensor) -> DeviceTensor:
        """Of a tensor without gaps, in the order of the stream."""
        made = self.empty(math.prod(tensor.shape) * tensor.dtype.itemsize)
        addresses = (ctypes.c_uint64(x.address) for x in (made, tensor))
        stream = ctypes.c_void_p(self.driver.stream)
        self.driver.call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(made.shape[0]), stream)
        return DeviceTensor(made.address, tensor.shape, tensor.dtype, None, self)

    def upload(self, content: bytes) -> DeviceTensor:
        return self.put(content, (len(content),), torch.uint8)

    def tensor(self, values: torch.Tensor, pitch: int = 0) -> DeviceTensor:
        """A copy of a matrix, with so many numbers between its rows."""
        wide = torch.nn.functional.pad(values, (0, pitch), value=float("nan")).contiguous()
        return self.put(wide.view(torch.uint8).numpy().tobytes(), tuple(values.shape), values.dtype, wide.stride())

    def read(self, tensor: DeviceTensor) -> torch.Tensor:
        read = torch.empty(tensor.shape, dtype=tensor.dtype)
        if read.nbytes > 0:  # of none there is no buffer
            content = bytearray(self.driver.read(tensor.address, read.nbytes))
            read = torch.frombuffer(content, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
        return read


def leaked() -> int:
    """Capsules whose memory nobody has given back; a capsule that nobody takes counts, too."""
    return len(_alive)


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
