"""One of two processes of test_trainer_distributed.py. What it finds goes to a file.

python trainer_worker.py RANK STORE OUT KINDS, where KINDS are some of plain, cached, theirs (a loss of sentence-transformers itself),
routes (columns take different parameters of the model), towers (`samtone.grad_cache.step`), gathered and gathered_cached (the loss of
both processes together), nothing (the same for rows without negatives), and `trainer`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import samtone
import sentence_models as models
import torch
from distributed_worker import PROCESSES, group
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
# Of each process: with chunks of 2 that is 4 and 2 of them in a column.
ROWS = (8, 3)
GATHERED = ("gathered", "gathered_cached")


class Routes(nn.Module):
    """Anchors and passages take parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = models.Encoder(), models.Encoder()

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return (self.query if features["task"] == "query" else self.document)(features)


def part(rank: int | None, names: Sequence[str] = ("anchor", "positive"), width: int = 4) -> list[dict[str, Any]]:
    """The rows of a process; without a rank, those of all."""
    first, rows = (0, sum(ROWS)) if rank is None else (sum(ROWS[:rank]), ROWS[rank])
    texts = [[t for _ in range(2) for t in models.TEXTS[name]][first : first + rows] for name in names]
    columns = [models.tokenized(column, width) for column in texts]
    for column, task in zip(columns, ("query", "document")):
        column["task"] = task
    return columns


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(9)
    if kind == "towers":
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    return Routes() if kind == "routes" else models.Encoder()


def loss_of(kind: str, model: Any) -> Any:
    if kind == "theirs":
        return models.theirs()[0].CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    plain = kind in ("plain", "gathered")
    make: Any = SamToNeLoss if plain else CachedSamToNeLoss
    options: dict[str, Any] = {} if plain else {"mini_batch_size": 2}
    if kind in GATHERED:
        options |= {"gather_across_devices": True, "hard_negative_scope": "own"}
    return make(model, temperature=0.1, learnable="log_beta", **options)


def gradients(kind: str, model: Any, loss: Any, rank: int | None) -> Any:
    """Of one step, with the loss if there is one."""
    if kind == "towers":
        q, p = (column["input_ids"].float() for column in part(rank))
        samtone.grad_cache.step(loss.criterion, (model, q.split(2)), (model, p.split(2)))
    else:
        # Where processes know equal texts of each other, each pads them in its own way.
        gathered: dict[str, Any] = {"names": ("anchor", "positive", "negative_1"), "width": 4 + (rank or 0)}
        value = loss(part(rank, **(gathered if kind in GATHERED else {})), None)
        value.backward()
        return value.detach()


def by_hand(kind: str, rank: int) -> Any:
    inner = model_of(kind)
    model = DistributedDataParallel(inner)
    reduced = [0]

    def counted(state: Any, bucket):  # type: ignore[no-untyped-def]  # PyTorch reads annotations, and these are texts
        reduced[0] += bucket.is_last()
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, counted)
    loss = loss_of(kind, inner)
    loss.model = model  # as the trainer does, in this step and no earlier
    parameters = list(dict.fromkeys([*inner.parameters(), *loss.parameters()]))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    first = None
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = gradients(kind, model, loss, rank)
        if first is None:
            first, loss_then = [None if x.grad is None else x.grad.clone() for x in parameters], value
        optimizer.step()
    return {"first": first, "value": loss_then, "reduced": reduced[0], "after": [x.detach() for x in parameters]}


def nothing(rank: int) -> Any:
    """The loss of rows that have no negative in any process, and what is said of them in two steps."""
    model = model_of("plain")
    loss = SamToNeLoss(model, "decoupled", margin=-5.0, gather_across_devices=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        values = [loss(part(rank), None).item() for _ in range(2)]
    return {"values": values, "said": [str(x.message) for x in said if "contributes nothing" in str(x.message)]}


def by_trainer(rank: int, out: str) -> Any:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, and not used: the group is there
    # sentence-transformers 5.1 makes default arguments behind ours, which without this take the processes away again.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.manual_seed(9)
    model = models.static_model()
    loss = loss_of("gathered_cached", model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{out}-trainer", max_steps=4, per_device_train_batch_size=3, learning_rate=0.02, report_to=[],
        save_strategy="steps", save_steps=2, disable_tqdm=True, use_cpu=True, ddp_backend="gloo",
    )  # fmt: skip
    data = Dataset.from_dict(models.TEXTS)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    wrapped = isinstance(loss.model, DistributedDataParallel)
    return {"wrapped": wrapped, "after": [loss.criterion.log_beta.detach(), *(x.detach() for x in model.parameters())]}


def main() -> None:
    rank, store, out, kinds = int(sys.argv[1]), *sys.argv[2:5]
    with group(store, rank):
        special = {"trainer": lambda: by_trainer(rank, out), "nothing": lambda: nothing(rank)}
        found = {kind: special[kind]() if kind in special else by_hand(kind, rank) for kind in kinds.split(",")}
    torch.save(found, f"{out}-{rank}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
