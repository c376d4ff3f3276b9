"""What a call costs beyond its launches: a step (forward and backward) of this package at a small batch, enqueued without waiting,
against the native call alone on memory that is there. The mark on CUDA is 20 microseconds.

    python benches/overhead.py [--rows 256] [--dim 256] [--device cuda] [--profile]

Times are the host's. On CUDA a burst of steps is enqueued, fewer than the driver's queue holds, and only then waited for; what the
device takes does not count. On the CPU the native call computes, so that only the difference says anything.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import samtone
import torch
from samtone import _native, cuda
from torch import Tensor

TEMPERATURE = 0.05
MARK_US = 20.0
BURST, BURSTS = 20, 40


def microseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the median of bursts."""
    times = []
    for _ in range(BURSTS + 3):
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        times.append((time.perf_counter() - start) / BURST * 1e6)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return statistics.median(times[3:])


def native(q: Tensor, p: Tensor) -> Callable[[], Any]:
    """Loss and gradients of the native module at once, on buffers that exist."""
    names: dict[str, Any] = dict.fromkeys(("query_ids", "passage_ids", "positives", "weights", "owners"))
    gradients = [torch.empty_like(x, dtype=torch.float32) for x in (q, p)]
    if q.device.type == "cpu":
        losses = torch.empty(len(q), dtype=torch.float64)
        settings = _native.Settings("loss=samtone_query", TEMPERATURE)

        def on_cpu() -> None:
            q_, p_, dq, dp, rows = (x.__dlpack__() for x in (q, p, *gradients, losses))
            _native.cpu_step(settings, q_, p_, (dq, dp), True, names, rows, torch.get_num_threads())

        return on_cpu
    memory = cuda.TorchMemory(q.device)
    settings_ = ("samtone_query", TEMPERATURE, False, None, "error", None, None, False)
    planned = cuda.planned(memory, settings_, q, p, names, (True, True), True)
    state = memory.empty(cuda.state_bytes(len(q), len(p)))
    workspace = memory.empty(planned.plan.workspace_bytes)

    def on_cuda() -> None:
        planned.plan.loss_and_gradients(
            towers=(cuda.capsule(q), cuda.capsule(p)),
            side=cuda.capsule(planned.side),
            state=cuda.capsule(state),
            workspace=cuda.capsule(workspace),
            gradients=(cuda.capsule(gradients[0]), cuda.capsule(gradients[1])),
            stream=memory.stream,
        )

    return on_cuda


class Floor(torch.autograd.Function):
    """What autograd itself costs: an operation of two inputs that does nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(q, p)
        return q.new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        q, p = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(p)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="also where the time of a step goes, by Python function")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    q, p = (torch.randn(arguments.rows, arguments.dim, device=device).requires_grad_() for _ in range(2))

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        def call() -> None:
            q.grad = p.grad = None
            loss(q, p).backward()

        return call

    whole = step(lambda x, y: samtone.samtone_loss(x, y, temperature=TEMPERATURE))
    engines = {
        "samtone, forward and backward": whole,
        "native call alone": native(q.detach(), p.detach()),
        "autograd around nothing": step(Floor.apply),
    }
    print(f"B = {arguments.rows}, d = {arguments.dim}, {device}, torch {torch.__version__}")
    times = {name: microseconds(call, device) for name, call in engines.items()}
    for name, value in times.items():
        print(f"{name:32}{value:9.1f} us")
    overhead = times["samtone, forward and backward"] - times["native call alone"]
    verdict = (
        "" if device.type == "cpu" else f", the mark is {MARK_US:.0f}: {'PASS' if overhead <= MARK_US else 'FAIL'}"
    )
    print(f"{'overhead of a step':32}{overhead:9.1f} us{verdict}")
    print(f"{'of which not autograd itself':32}{overhead - times['autograd around nothing']:9.1f} us")
    if arguments.profile:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(200):
            whole()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
