"""Calls on CUDA: plans kept from step to step, memory from PyTorch's allocator, launches on its current stream.

Gradients that are small come at once with the loss (`at_once`), others from a call of their own. A plan is for one or the other.

A plan is made on the host from everything but the embeddings, so ids and the like belong on the CPU: from a GPU they are copied,
which waits. So does reading a temperature that is on the GPU. Nothing else waits.

Embeddings that are refused (NaN, norm zero, no negative) are found on the device: loss and gradients are NaN then. With
`torch.autograd.set_detect_anomaly(True)` every call waits and raises the sentence instead.

A step can be captured into a CUDA graph on a stream on which the same call has been made before, since making a plan allocates and
copies from the host. What a graph reads is kept until `release`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _native
from .options import Settings

# Plans are small (side data is a few numbers for each row); batches with ids of their own need one each.
KEPT_PLANS = 16
# Gradients of up to so many bytes come at once with the loss, and wait as float32 for the upstream gradient. The first pass then
# keeps its cosines for them, where that pays and as many as the workspace holds: 9 B²d operations instead of 12, if it holds all.
# Beyond, a call of their own spares the memory from forward to backward and costs little: at d = 768 so many bytes are 43,690 pairs,
# of whose cosines the workspace holds one in twenty, unless it is larger than the default.
AT_ONCE_BYTES = 256 << 20


class Memory(Protocol):
    """Where memory of a device comes from, and the stream that it is used on."""

    stream: int
    capturing: bool
    """Whether the stream is being captured into a graph."""

    def empty(self, size: int) -> Any:
        """So many bytes, of any content."""

    def matrix(self, rows: int, dim: int, dtype: torch.dtype) -> Any:
        """Rows without anything between them, of any content."""

    def upload(self, content: bytes) -> Any:
        """A copy on the device, in the order of the stream."""


class TorchMemory:
    """PyTorch's caching allocator and its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: int = torch.cuda.current_stream(device).cuda_stream
        self.capturing = torch.cuda.is_current_stream_capturing()

    def empty(self, size: int) -> Tensor:
        """So many bytes, of any content."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def matrix(self, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
        """Rows without anything between them, of any content."""
        return torch.empty((rows, dim), dtype=dtype, device=self.device)

    def upload(self, content: bytes) -> Tensor:
        """A copy on the device, in the order of the stream, from page-locked memory that PyTorch keeps until it is done."""
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).pin_memory().to(self.device, non_blocking=True)


def capsule(tensor: Any) -> Any:
    """As it lies on the device; the stream is the current one, so none has to wait for another."""
    return tensor.detach().__dlpack__(stream=-1)


def _capsules(gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    dq, dp = (None if gradient is None else capsule(gradient) for gradient in gradients)
    return dq, dp


class Planned:
    """A plan and its side data on the device."""

    def __init__(self, plan: _native.CudaPlan, side: Any) -> None:
        self.plan = plan
        self.side = side

    def _call(self, memory: Memory, query: Any, passage: Any, state: Any) -> dict[str, Any]:
        return {
            "towers": (capsule(query), capsule(passage)),
            "side": capsule(self.side),
            "state": capsule(state),
            "workspace": capsule(memory.empty(self.plan.workspace_bytes)),
            "stream": memory.stream,
        }

    def forward(self, memory: Memory, query: Any, passage: Any, state: Any) -> None:
        """Enqueues loss, row losses and metrics into the state."""
        self.plan.forward(**self._call(memory, query, passage, state))
        self._check_if_asked(memory, query, passage, state)

    def loss_and_gradients(
        self, memory: Memory, query: Any, passage: Any, state: Any, gradients: tuple[Any, Any]
    ) -> None:
        """Enqueues `forward`, and with it the gradients, float32 and for an upstream gradient of 1."""
        self.plan.loss_and_gradients(**self._call(memory, query, passage, state), gradients=_capsules(gradients))
        self._check_if_asked(memory, query, passage, state)

    def backward(
        self, memory: Memory, query: Any, passage: Any, state: Any, gradients: tuple[Any, Any], upstream: Any
    ) -> None:
        """Enqueues the gradients of a forward call with this state, times `upstream`, one float32 on the device."""
        call = self._call(memory, query, passage, state)
        self.plan.backward(**call, gradients=_capsules(gradients), upstream=capsule(upstream))

    def _check_if_asked(self, memory: Memory, query: Any, passage: Any, state: Any) -> None:
        if torch.is_anomaly_enabled():
            self.plan.check(**self._call(memory, query, passage, state))


_plans: OrderedDict[Any, Planned] = OrderedDict()
# Plans whose side data graphs read, however many other plans there were since.
_captured: dict[Any, Planned] = {}
_lock = threading.Lock()


def planned(
    memory: Memory,
    settings: Settings,
    query: Any,
    passage: Any,
    annotations: dict[str, Tensor | None],
    wanted: tuple[bool, bool],
    at_once: bool,
) -> Planned:
    """The plan for such a call, made now or in an earlier step. `wanted` are the towers that get gradients: `at_once` from
    `loss_and_gradients`, otherwise from `backward` after `forward`."""
    vectors = tuple(None if x is None else x.numpy().tobytes() for x in annotations.values())
    towers = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in (query, passage))
    key = (settings, towers, vectors, wanted, at_once, memory.stream)
    with _lock:
        found = _plans.get(key)
        if found is not None:
            _plans.move_to_end(key)
            if memory.capturing:
                _captured[key] = found
            return found
    if memory.capturing:
        raise _native.SamtoneError(
            "a stream is being captured, and this call is the first of its kind on it; allowed: a call with these shapes, types, "
            "options and ids on the same stream before, as in torch.cuda.graph(graph, stream=stream)"
        )
    plan = _native.CudaPlan(
        settings.native(),
        capsule(query),
        capsule(passage),
        {name: None if x is None else x.__dlpack__() for name, x in annotations.items()},
        wanted,
        at_once,
    )
    made = Planned(plan, memory.upload(plan.side()))
    with _lock:
        _plans[key] = made
        while len(_plans) > KEPT_PLANS:
            _plans.popitem(last=False)
    return made


def release() -> None:
    """Gives up all plans and their memory. Graphs of calls must not be replayed any more."""
    with _lock:
        _plans.clear()
        _captured.clear()


def at_once(rows: Any, passages: Any, dim: Any, wanted: tuple[bool, bool]) -> bool:
    """Whether the gradients of the towers that are wanted come at once with the loss. By shapes alone, so that torch.compile, for
    which they may be symbols, knows it before there is a plan. The derivative of the temperature takes no memory to speak of."""
    query, passage = wanted
    elements = ((rows if query else 0) + (passages if passage else 0)) * dim
    return bool(elements * torch.float32.itemsize <= AT_ONCE_BYTES)


def state_bytes(rows: Any, passages: Any, *, shared: bool = False, skipping: bool = False, prefixes: int = 0) -> Any:
    """Size of the state, which torch.compile must know before there is a plan. A plan needs 160 bytes for each row, 16 for each
    passage and for each row that shares its positive, and room for the alignment of its arrays; native code refuses a state that
    is too short.

    Each of `prefixes` takes 176 bytes for each row, 8 for each passage and for each row that shares its positive, and 176 at all. All of
    them together take 8 bytes for each of the latter two.

    With tile skipping 20 bytes more for each square: no plan has smaller ones than 64 x 64, in QQ and in S and PP, whose passages
    come in parts that end with a square of their own: positives, others, and, if positives may be shared, repetitions."""
    size = 176 * rows + 16 * passages + 4096
    if prefixes:
        size = (184 * prefixes + 8) * rows + (8 * prefixes + 8) * passages + 5120 + 176 * prefixes
    if skipping:
        queries, indices = rows // 64 + 2, (passages + rows if shared else passages) // 64 + 3
        size += 20 * queries * (queries + 2 * indices)
    return size


def numbers(state: Tensor, offset: int, count: int) -> Tensor:
    """A copy of so many float64 numbers of the state."""
    return state[offset : offset + 8 * count].view(torch.float64).clone()


def results(state: Tensor, plan: _native.CudaPlan, count: int, prefixes: int) -> Tensor:
    """The first `count` results of the call, and behind them those of each prefix."""
    parts, step = plan.results
    if parts > 1:
        return numbers(state, plan.offsets[0], parts * step).view(parts, step)[:, :count].flatten()
    # The only prefix is the whole embedding with weight 1, if the call names one.
    of_call = numbers(state, plan.offsets[0], count)
    return of_call.repeat(1 + prefixes) if prefixes else of_call
