"""Medians by CUDA events, replayed graphs, peak memory; on the CPU, where only the machinery is tried, by the clock."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

WARM_UPS, REPEATS, LEAST_REPEATS = 3, 20, 3


class Step(Protocol):
    """A step of one engine on inputs it holds."""

    gradients: tuple[torch.Tensor, torch.Tensor] | None

    def run(self) -> None: ...

    def loss(self) -> float | None: ...


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def once(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def median(call: Callable[[], Any], device: torch.device, limit_s: float) -> float:
    """Median milliseconds of up to REPEATS calls, fewer if they would take longer than the limit, after warm-ups."""
    synchronize(device)
    slowest = max(once(call, device) for _ in range(WARM_UPS if limit_s > 1 else 1))
    repeats = max(LEAST_REPEATS, min(REPEATS, int(limit_s * 1e3 / max(slowest, 1e-3))))
    return statistics.median(once(call, device) for _ in range(repeats))


def graph_of(step: Step) -> torch.cuda.CUDAGraph:
    """A step as a CUDA graph, captured after a warm-up on the capturing stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    return graph


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak_of(step: Step, device: torch.device) -> int | None:
    """Most bytes that tensors took during a warmed step, everything included."""
    if device.type != "cuda":
        step.run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def fastest(build: Callable[[Any], Step], candidates: Iterable[Any], device: torch.device) -> Any:
    """The candidate whose step is fastest on this device; one that does not fit or compile is none. On the CPU, the first."""
    best, best_ms, failure = None, float("inf"), None
    for candidate in candidates:
        if device.type == "cpu":
            return candidate
        step = None
        try:
            step = build(candidate)
            step.run()
            ms = median(step.run, device, 0.3)
            if ms < best_ms:
                best, best_ms = candidate, ms
        # Out of memory, or too much shared memory for a tile; a broken context fails again in the measurement.
        except Exception as error:  # noqa: BLE001
            failure = error
        del step
        free(device)
    if best is None:
        raise RuntimeError(f"no candidate ran: {failure}")
    return best
