"""One step, forward and backward, of `samtone_query`: an eager module of PyTorch, this package, and on the CPU the native call
alone, with its buffers made beforehand: what remains of a step without autograd, custom operations and allocation.

    python benches/step.py [--rows 4096] [--dim 768] [--dtype float32] [--rounds 7] [--device cuda]

All in turns; medians. The share of a step that is spent outside of the native call is measured within the same step, so that a
machine whose speed drifts does not blur it. On CUDA each step is waited for, and what a call costs beside its launches is
the matter of overhead.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import samtone
import torch
from samtone import _native
from torch import Tensor
from torch.nn.functional import normalize

TEMPERATURE = 0.01


def eager(q: Tensor, p: Tensor) -> Tensor:
    """SamToNe as one writes it in PyTorch."""
    q, p = normalize(q.float(), dim=1), normalize(p.float(), dim=1)
    logits = q @ p.T / TEMPERATURE
    same = (q @ q.T / TEMPERATURE).masked_fill(torch.eye(len(q), dtype=torch.bool, device=q.device), -torch.inf)
    positive = logits.diagonal()
    forward = torch.logsumexp(torch.cat([logits, same], 1), 1)
    return (forward + torch.logsumexp(logits, 0) - 2 * positive).mean()


def native(q: Tensor, p: Tensor) -> Callable[[], Any]:
    """The native call on buffers that exist."""
    gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (q, p)]
    losses = torch.zeros(len(q), dtype=torch.float64)
    settings = _native.Settings("loss=samtone_query", TEMPERATURE)
    annotations = dict.fromkeys(("query_ids", "passage_ids", "positives", "weights", "owners"))

    def call() -> Any:
        q_, p_, dq, dp, rows = (x.__dlpack__() for x in (q, p, *gradients, losses))
        return _native.cpu_step(settings, q_, p_, (dq, dp), True, annotations, rows, torch.get_num_threads())

    return call


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    q, p = (torch.randn(arguments.rows, arguments.dim).to(getattr(torch, arguments.dtype)) for _ in range(2))
    p += q
    q, p = q.to(arguments.device), p.to(arguments.device)
    on_cuda = q.device.type == "cuda"
    a, b = q.clone().requires_grad_(), p.clone().requires_grad_()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        def call() -> None:
            a.grad = b.grad = None
            loss(a, b).backward()

        return call

    engines: dict[str, Callable[[], Any]] = {
        "eager PyTorch": step(eager),
        "samtone": step(lambda x, y: samtone.samtone_loss(x, y, temperature=TEMPERATURE)),
    }
    if not on_cuda:
        engines["the native call"] = native(q, p)
    inside: list[float] = []
    cpu_step = _native.cpu_step

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = cpu_step(*arguments)
        inside.append(time.perf_counter() - start)
        return result

    _native.cpu_step = timed  # type: ignore[assignment]
    shares: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(arguments.rounds + 1):
        for name, call in engines.items():
            if on_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if on_cuda:
                torch.cuda.synchronize()
            if round_ > 0:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
                if name == "samtone" and not on_cuda:
                    shares.append(times[name][-1] / inside[-1] - 1)
    threads = torch.get_num_threads()
    place = torch.cuda.get_device_name() if on_cuda else f"{threads} threads"
    print(f"B = {arguments.rows}, d = {arguments.dim}, {arguments.dtype}, {place}, torch {torch.__version__}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        spread = f"{min(times[name]) * 1e3:.1f} to {max(times[name]) * 1e3:.1f}"
        print(f"{name:16} {median * 1e3:9.1f} ms   ({spread})")
    print(f"eager / samtone: {medians['eager PyTorch'] / medians['samtone']:.2f}")
    if shares:
        print(f"a step outside of its native call: {100 * statistics.median(shares):.2f}%")


if __name__ == "__main__":
    main()
