"""One of several processes of test_distributed.py: its part of a batch, the recipe of docs/distributed.md or OpenCLIP's own loss, and its
gradients in a file.

python distributed_worker.py RANK STORE OUT LOSSES
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import samtone
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

PROCESSES = 2
ROWS, HARD, WIDTH, DIM = 12, 4, 20, 16


@contextmanager
def group(store: str, rank: int, size: int = PROCESSES) -> Iterator[None]:
    """The processes of a test, on gloo. They leave together: gloo can abort a process whose peer has closed the connection already."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    yield
    dist.barrier()
    dist.destroy_process_group()


def batch() -> dict[str, Tensor]:
    """The whole batch, the same in every process."""
    generator = torch.Generator().manual_seed(70)
    query = torch.randn(ROWS, WIDTH, generator=generator)
    passage = query + torch.randn(ROWS, WIDTH, generator=generator)
    hard = torch.randn(HARD, WIDTH, generator=generator)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 1, 7, 8, 3, 10, 11, 12, 13, 4, 15])
    return {"query": query, "passage": passage, "hard": hard, "ids": ids}


class Towers(torch.nn.Module):
    """Both towers and the temperature, so that one wrapper averages all gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(71)
        self.query, self.passage = torch.nn.Linear(WIDTH, DIM), torch.nn.Linear(WIDTH, DIM)
        self.log_beta = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, query: Tensor, passage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(query), self.passage(passage), self.log_beta


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks, in each of them; gradients go back to where rows came from."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


def gathered_ids(ids: Tensor) -> Tensor:
    parts = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, ids)
    return torch.cat(parts)


def distributed_loss(query: Tensor, passage: Tensor, passage_ids: Tensor, **options: Any) -> Tensor:
    """The loss of the batch of all processes. Every process has M queries and N passages, the first M of which are positives."""
    rows, passages = len(query), len(passage)
    positives = [rank * passages + i for rank in range(dist.get_world_size()) for i in range(rows)]
    return samtone.samtone_loss(
        gathered(query), gathered(passage), passage_ids=gathered_ids(passage_ids), positives=positives, **options
    )


def results_of(name: str, rank: int) -> list[Tensor]:
    towers = Towers()
    model = DistributedDataParallel(towers)
    data = batch()
    own = {key: x.chunk(PROCESSES)[rank] for key, x in data.items() if key != "ids"}
    ids = torch.cat([part.chunk(PROCESSES)[rank] for part in data["ids"].split([ROWS, HARD])])
    if name.startswith("open_clip"):
        from open_clip.loss import ClipLoss

        q, p, log_beta = model(own["query"], own["passage"])
        local = name == "open_clip_local"
        theirs = ClipLoss(gather_with_grad=True, local_loss=local, rank=rank, world_size=PROCESSES)
        loss = theirs(normalize(q, dim=1), normalize(p, dim=1), log_beta.exp())
    else:
        clip = name.startswith("clip")
        hard = own["hard"][:0] if clip else own["hard"]
        q, p, log_beta = model(own["query"], torch.cat([own["passage"], hard]))
        ids = ids[: len(p)] if not clip else torch.arange(len(p)) + rank * len(p)
        if name == "clip_group":
            loss = samtone.samtone_loss(q, p, loss="clip", log_beta=log_beta, group=dist.group.WORLD)
        else:
            loss = distributed_loss(q, p, ids, loss=name, log_beta=log_beta)
    loss.backward()
    return [loss.detach(), *(x.grad for x in towers.parameters() if x.grad is not None)]


def main() -> None:
    rank = int(sys.argv[1])
    store, out, names = sys.argv[2:5]
    with group(store, rank):
        torch.save({name: results_of(name, rank) for name in names.split(",")}, f"{out}-{rank}")


if __name__ == "__main__":
    main()
