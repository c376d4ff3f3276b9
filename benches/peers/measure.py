"""Medians by CUDA events, replayed graphs, peak memory; on the CPU, where only the machinery is tried, by the clock."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
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
    last, warm_ms = 0.0, 0.0
    for _ in range(WARM_UPS):
        last = once(call, device)
        warm_ms += last
        if warm_ms > limit_s * 1e3:
            break
    repeats = max(LEAST_REPEATS, min(REPEATS, int(limit_s * 1e3 / max(last, 1e-3))))
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


def replay_or_run(step: Step) -> Callable[[], None]:
    """A replay of the step's graph; where it cannot be captured, the step itself."""
    try:
        return graph_of(step).replay
    except Exception:  # noqa: BLE001
        torch.cuda.synchronize()
        return step.run


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


def fastest(build: Callable[[Any], Step], candidates: Sequence[Any], device: torch.device, graphed: bool = False) -> Any:
    """The candidate whose step (or its graph) is fastest on this device; one that does not fit or compile is none.

    Without a choice, or on the CPU, the first.
    """
    if len(candidates) == 1 or device.type == "cpu":
        return candidates[0]
    best, best_ms, failure = None, float("inf"), ""
    for candidate in candidates:
        step = call = None
        try:
            step = build(candidate)
            step.run()
            call = replay_or_run(step) if graphed else step.run
            ms = median(call, device, 0.3)
            if ms < best_ms:
                best, best_ms = candidate, ms
        # Out of memory, or too much shared memory for a tile; a broken context fails again in the measurement.
        except Exception as error:  # noqa: BLE001
            failure = f"{type(error).__name__}: {error}"  # the error itself would keep its frames, and their tensors
        del step, call
        free(device)
    if best is None:
        raise RuntimeError(f"no candidate ran: {failure}")
    return best
