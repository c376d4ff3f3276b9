"""One of several processes of test_group.py. What each check finds, or an error of it, goes to a file.

python group_worker.py RANK STORE OUT SIZE,CHECK,CHECK…
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading
import time
import traceback
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import samtone
import torch
import torch.distributed as dist
from distributed_worker import group
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

DIM = 24
# Of each process: with hard negatives, without, without any row, and with nothing but a further passage.
QUERIES = (7, 4, 0, 0)
PASSAGES = (9, 4, 0, 1)
TEMPERATURE = 0.1


class Batch:
    """The batch of so many processes, and what one of them has of it."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(80)
        counts = [x[:size] for x in (QUERIES, PASSAGES)]
        first = [[0, *accumulate(x)] for x in counts]
        m, n = (sum(x) for x in counts)
        self.rows, self.passages = (slice(x[rank], x[rank + 1]) for x in first)
        query = torch.randn(m, DIM, generator=generator)
        self.whole_positives = [first[1][r] + i for r in range(size) for i in range(counts[0][r])]
        passage = torch.randn(n, DIM, generator=generator)
        passage[self.whole_positives] += 0.7 * query
        self.query, self.passage = query.to(dtype), passage.to(dtype)
        self.lists: dict[str, Tensor] = {
            "query_ids": torch.arange(m) % (m - 2),
            "passage_ids": torch.arange(n) % (n - 3),
            "weights": torch.rand(m, generator=generator),
        }
        # The owners of the first process's hard negatives, which are its last passages.
        self.owners = torch.full((n,), -1)
        self.owners[7:9] = torch.tensor([1, 6])

    def given(self, names: str, whole: bool) -> dict[str, Any]:
        """Lists, of all processes or of one."""
        own = {"query_ids": self.rows, "passage_ids": self.passages, "weights": self.rows}
        lists = {name: x if whole else x[own[name]] for name, x in self.lists.items() if name in names}
        if "owners" in names:
            lists["hard_negative_owners"] = self.owners if whole else self.owners[self.passages]
        return lists | ({"positives": self.whole_positives} if whole else {})


def outcome(query: Tensor, passage: Tensor, learn: str, **options: Any) -> dict[str, Tensor]:
    """Loss, gradients and metrics."""
    q, p = query.clone().requires_grad_(), passage.clone().requires_grad_()
    value = TEMPERATURE if learn == "temperature" else -torch.tensor(TEMPERATURE).log().item()
    number = torch.tensor(value, requires_grad=True)
    evaluation = samtone.evaluate(q, p, **{learn: number}, **options)
    (evaluation.loss * 3).backward()
    assert q.grad is not None and p.grad is not None and number.grad is not None
    there, back = evaluation.query_to_passage, evaluation.passage_to_query
    found = {"loss": evaluation.loss, "row_losses": evaluation.row_losses, "metrics": torch.stack([*there, *back])}
    if evaluation.prefixes:
        found["prefixes"] = evaluation.prefixes.losses
    return found | {"query": q.grad, "passage": p.grad, learn: number.grad}


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, (what, got.shape, want.shape)
    far = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert far <= tolerance * max(want.double().abs().max().item() if want.numel() else 0.0, 1e-6), (what, got, want)


CASES: list[tuple[torch.dtype, str, str, dict[str, Any]]] = [
    (torch.float32, "temperature", "", {"loss": "samtone_both"}),
    (torch.float32, "log_beta", "query_ids passage_ids weights", {"loss": "samtone_both"}),
    (torch.float32, "log_beta", "passage_ids", {"loss": "clip", "prefixes": [5, 24], "prefix_weights": [2.0, 1.0]}),
    (torch.float32, "log_beta", "owners", {"loss": "qwen3", "hard_negative_scope": "own"}),
    (torch.bfloat16, "temperature", "weights", {"loss": "samtone_query"}),
]


def values(rank: int, size: int) -> None:
    """Each process gets the loss of all, and the gradients of its rows."""
    world = dist.group.WORLD
    for dtype, learn, lists, options in CASES:
        batch = Batch(rank, size, dtype)
        want = outcome(batch.query, batch.passage, learn, **options, **batch.given(lists, whole=True))
        for reduction in ("mean", "sum"):
            query, passage = batch.query[batch.rows], batch.passage[batch.passages]
            own = batch.given(lists, whole=False)
            got = outcome(query, passage, learn, group=world, reduction=reduction, **options, **own)
            if reduction == "sum":
                dist.all_reduce(got[learn])
            tolerance = 2e-5 if dtype == torch.float32 else 2.0**-7
            factor = size if reduction == "mean" else 1
            for name, x in want.items():
                if name in ("query", "passage"):
                    x = factor * x[batch.rows if name == "query" else batch.passages]
                close(got[name], x, tolerance, f"{options}, {reduction}: {name}")
    with torch.no_grad():
        batch = Batch(rank, size)
        lone = samtone.samtone_loss(batch.query, batch.passage, positives=batch.whole_positives)
        got = samtone.samtone_loss(batch.query[batch.rows], batch.passage[batch.passages], group=world)
        close(got, lone, 1e-6, "without gradients")
    samtone.release_memory()
    again = samtone.samtone_loss(batch.query[batch.rows], batch.passage[batch.passages], group=world)
    assert torch.equal(got, again)


class Towers(nn.Module):
    """Both towers and the temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(81)
        self.query, self.passage = nn.Linear(DIM, 16), nn.Linear(DIM, 16)
        self.log_beta = nn.Parameter(torch.tensor(2.0))

    def forward(self, query: Tensor, passage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(query), self.passage(passage), self.log_beta


def trained(rank: int, size: int) -> None:
    """Gradients of parameters are those of one process with the whole batch: averaged by DistributedDataParallel, and summed by hand."""
    batch = Batch(rank, size)
    lone = Towers()
    q, p, log_beta = lone(batch.query, batch.passage)
    samtone.samtone_loss(q, p, log_beta=log_beta, positives=batch.whole_positives).backward()
    want = [x.grad for x in lone.parameters()]
    for reduction in ("mean", "sum"):
        towers = Towers()
        model = DistributedDataParallel(towers) if reduction == "mean" else towers
        q, p, log_beta = model(batch.query[batch.rows], batch.passage[batch.passages])
        loss = samtone.samtone_loss(q, p, log_beta=log_beta, group=dist.group.WORLD, reduction=reduction)
        loss.backward()
        for x, wanted in zip(towers.parameters(), want, strict=True):
            assert x.grad is not None and wanted is not None
            if reduction == "sum":
                dist.all_reduce(x.grad)
            close(x.grad, wanted, 2e-5, reduction)


def compiled(rank: int, size: int) -> None:
    """Whole graphs, of the function and of the module."""
    batch, world = Batch(rank, size), dist.group.WORLD
    assert world is not None

    def step(q: Tensor, p: Tensor, log_beta: Tensor, ids: Tensor) -> Tensor:
        return 2 * samtone.samtone_loss(q * 2, p, log_beta=log_beta, passage_ids=ids, group=world, loss="clip")

    module = samtone.SamToNeLoss("clip", temperature=TEMPERATURE, learnable="log_beta", group=world)

    def modular(q: Tensor, p: Tensor, log_beta: Tensor, ids: Tensor) -> Tensor:
        return 2 * module(q * 2, p, passage_ids=ids)

    def gradients(function: Any) -> list[Tensor]:
        q, p = batch.query[batch.rows].clone().requires_grad_(), batch.passage[batch.passages].clone().requires_grad_()
        log_beta = torch.tensor(2.3025851, requires_grad=True)
        loss = function(q, p, log_beta, batch.lists["passage_ids"][batch.passages])
        loss.backward()
        learned = log_beta.grad if log_beta.grad is not None else module.log_beta.grad
        module.log_beta.grad = None
        assert q.grad is not None and p.grad is not None and learned is not None
        return [loss.detach(), q.grad, p.grad, learned]

    want = gradients(step)
    for function in (step, modular):
        for backend in ("eager", "aot_eager"):
            for got, x in zip(gradients(torch.compile(function, fullgraph=True, backend=backend)), want, strict=True):
                close(got, x, 1e-5, f"{function.__name__}, {backend}")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        rows = torch.compile(
            lambda q, p: samtone.evaluate(q, p, group=world).row_losses + 1, fullgraph=True, backend="aot_eager"
        )
        got = rows(batch.query[batch.rows], batch.passage[batch.passages])
        lone = samtone.evaluate(batch.query, batch.passage, positives=batch.whole_positives)
        close(got, lone.row_losses + 1, 1e-6, "row losses")


def modules(rank: int, size: int) -> None:
    """The module, a copy of it and one that was saved; groups by name, as a mesh, and one of some processes."""
    batch = Batch(rank, size)
    q, p = batch.query[batch.rows], batch.passage[batch.passages]
    lone = samtone.samtone_loss(batch.query, batch.passage, temperature=TEMPERATURE, positives=batch.whole_positives)
    world = dist.group.WORLD
    assert world is not None
    module = samtone.SamToNeLoss(temperature=TEMPERATURE, group=world, reduction="sum")
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        close(one(q, p), lone, 1e-6, "module")
    mesh = init_device_mesh("cpu", (size,))
    for given in (mesh, world.group_name):
        close(samtone.samtone_loss(q, p, temperature=TEMPERATURE, group=given), lone, 1e-6, str(given))
    # The others are not in it.
    first = dist.new_group([0])
    if rank == 0:
        got = samtone.samtone_loss(q, p, temperature=TEMPERATURE, group=first)
        assert torch.equal(got, samtone.samtone_loss(q, p, temperature=TEMPERATURE))
    else:
        said = sentence(lambda: samtone.samtone_loss(q, p, group=first))
        assert said.startswith("SamtoneError: argument `group` is ") and "not in; allowed: a ProcessGroup" in said, said
    # Ranks of a group are not those of the world.
    last = dist.new_group([1, 0], use_local_synchronization=True) if rank < 2 else None
    if last is not None:
        got = samtone.samtone_loss(q, p, temperature=TEMPERATURE, group=last)
        assert size > 2 or abs(got.item() - lone.item()) < 1e-5


def side_by_side(rank: int, size: int) -> None:
    """Calls in two groups from two threads of each process, which begin in another order in each."""
    batch = Batch(rank, size)
    q, p = batch.query[batch.rows], batch.passage[batch.passages]
    torch.set_num_threads(1)
    groups = [dist.new_group(timeout=timedelta(seconds=20)) for _ in range(2)]
    found: dict[int, Tensor] = {}

    def call(k: int) -> None:
        time.sleep(0.5 * ((k + rank) % 2))
        found[k] = samtone.samtone_loss(q, p, group=groups[k])

    threads = [threading.Thread(target=call, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], found[1])


def sentence(call: Any) -> str:
    """Kind and sentence of the error that a call ends with."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused(rank: int, size: int) -> dict[str, str]:
    """What is wrong in one process, every process says. The group can be used afterwards."""
    batch, world = Batch(rank, size), dist.group.WORLD
    q, p = batch.query[batch.rows], batch.passage[batch.passages]
    ids = batch.lists["passage_ids"][batch.passages]

    def said(query: Tensor = q, passage: Tensor = p, **options: Any) -> str:
        found = sentence(lambda: samtone.samtone_loss(query, passage, group=world, **options))
        assert samtone.samtone_loss(q, p, group=world).isfinite()
        return found

    last = rank == 1
    bad = q.clone()
    if last:
        bad[2, 3] = float("nan")
    zero = p.clone()
    if rank == 0:
        zero[8] = 0
    return {
        "nan": said(bad),
        "zero": said(passage=zero),
        "temperature": said(temperature=0.05 if last else 0.06),
        "reduction": said(q.clone().requires_grad_(), reduction="mean" if last else "sum"),
        "domain": said(temperature=0.0 if last else 0.06),
        "argument": said(passage_ids=ids.float() if last else ids),
        "length": said(passage_ids=ids[:-1] if last else ids),
        "owners": said(hard_negative_owners=ids * 0 + 99 if last else ids * 0 - 1),
        "dtype": said(q.double() if last else q),
        "rows": said(passage=p[:2] if last else p),
        "gradients": said(q.clone().requires_grad_() if last else q),
    }


def lost(rank: int, out: str) -> dict[str, str]:
    """Of two processes the second one does not come, and later it is gone. The first says so within the time-out."""
    batch = Batch(rank, 2)
    q, p = batch.query[batch.rows], batch.passage[batch.passages]
    slow = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    world = dist.group.WORLD
    samtone.samtone_loss(q, p, group=world)
    samtone.samtone_loss(q, p, group=slow)
    if rank == 1:
        time.sleep(4)
        torch.save({}, f"{out}-{rank}")
        os._exit(0)
    start = time.monotonic()
    found = {"late": sentence(lambda: samtone.samtone_loss(q, p, group=slow))}
    found["seconds"] = f"{time.monotonic() - start:.1f}"
    found["again"] = sentence(lambda: samtone.samtone_loss(q, p, group=slow))
    found["gone"] = sentence(lambda: samtone.samtone_loss(q, p, group=world))
    return found


CHECKS = {
    "values": values,
    "trained": trained,
    "compiled": compiled,
    "modules": modules,
    "refused": refused,
    "side_by_side": side_by_side,
}


def main() -> None:
    rank, store, out, names = int(sys.argv[1]), *sys.argv[2:5]
    if names == "lost":
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        torch.save(lost(rank, out), f"{out}-{rank}")
        os._exit(0)  # the other process, which would have to leave the group, too, is gone
    size, *checks = names.split(",")
    found: dict[str, Any] = {}
    with group(store, rank, int(size)):
        for name in checks:
            try:
                found[name] = CHECKS[name](rank, int(size))
            except Exception:
                found[name] = traceback.format_exc()
    torch.save(found, f"{out}-{rank}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
