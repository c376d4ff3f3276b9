"""Batches spread over processes: docs/distributed.md. Two processes on the CPU, their gradients averaged by PyTorch, against one
process with the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import samtone
import torch
from conftest import missing
from distributed_worker import HARD, PROCESSES, ROWS, Towers, batch
from torch import Tensor

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="PyTorch has no gloo"
)


def spread(folder: Path, names: str, script: str = "distributed_worker.py", size: int = PROCESSES) -> list[Any]:
    """What each process has left in its file: by name, of distributed_worker.py loss and gradients."""
    worker = Path(__file__).with_name(script)
    arguments = [str(folder / "store"), str(folder / "out"), names]
    command = [sys.executable, str(worker)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    # Not as an assertion, whose message pytest shortens.
    if codes != [0] * size:
        pytest.fail(f"the processes ended with {codes} and wrote:\n" + "\n".join(said))
    return [torch.load(folder / f"out-{rank}") for rank in range(size)]


def alone(name: str) -> list[Tensor]:
    """The same in one process, in the order of rows that it has anyway."""
    data, towers, hard = batch(), Towers(), HARD if name != "clip" else 0
    q, p, log_beta = towers(data["query"], torch.cat([data["passage"], data["hard"][:hard]]))
    ids = None if name == "clip" else data["ids"]
    loss = samtone.samtone_loss(q, p, loss=name, log_beta=log_beta, passage_ids=ids)
    loss.backward()
    return [loss.detach(), *(x.grad for x in towers.parameters())]


def compare(results: list[list[Tensor]], want: list[Tensor], tolerance: float) -> None:
    for result in results:
        assert len(result) == len(want) == 6
        for a, b in zip(result, want):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max())), (a, b)


@needs_gloo
def test_two_processes_equal_one(tmp_path: Path) -> None:
    assert ROWS % PROCESSES == HARD % PROCESSES == 0
    results = spread(tmp_path, "samtone_both,clip")
    for name in ("samtone_both", "clip"):
        compare([result[name] for result in results], alone(name), 2e-5)


@needs_gloo
@pytest.mark.skipif(missing("open-clip", "open_clip"), reason="open_clip_torch is not installed")
def test_open_clip_in_two_processes(tmp_path: Path) -> None:
    """Its losses with gather_with_grad, and ours in a group. With local_loss, the mean over processes is the loss."""
    names = ("open_clip", "open_clip_local", "clip_group")
    results = spread(tmp_path, ",".join(names))
    local = [result["open_clip_local"] for result in results]
    mean = torch.stack([found[0] for found in local]).mean()
    assert not torch.equal(local[0][0], mean)
    for found in local:
        found[0] = mean
    for name in names:
        compare([result[name] for result in results], alone("clip"), 1e-4)
