"""One of two processes of test_trainer_distributed.py. What it finds goes to a file.

python trainer_worker.py RANK STORE OUT KINDS, where KINDS are some of plain, cached, theirs (a loss of sentence-transformers itself),
routes (columns take different parameters of the model), towers (`samtone.grad_cache.step`), and `trainer`.
"""

from __future__ import annotations

import os
import sys
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


class Routes(nn.Module):
    """Anchors and passages take parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = models.Encoder(), models.Encoder()

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return (self.query if features["task"] == "query" else self.document)(features)


def part(rank: int) -> list[dict[str, Any]]:
    """The rows of a process."""
    first = sum(ROWS[:rank])
    texts = [
        [t for _ in range(2) for t in models.TEXTS[name]][first : first + ROWS[rank]] for name in ("anchor", "positive")
    ]
    columns = [models.tokenized(column, 4) for column in texts]
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
    make: Any = SamToNeLoss if kind == "plain" else CachedSamToNeLoss
    size = {} if kind == "plain" else {"mini_batch_size": 2}
    return make(model, temperature=0.1, learnable="log_beta", **size)


def gradients(kind: str, model: Any, loss: Any, rank: int) -> Any:
    """Of one step."""
    if kind == "towers":
        q, p = (column["input_ids"].float() for column in part(rank))
        samtone.grad_cache.step(loss.criterion, (model, q.split(2)), (model, p.split(2)))
    else:
        loss(part(rank), None).backward()


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
        gradients(kind, model, loss, rank)
        if first is None:
            first = [None if x.grad is None else x.grad.clone() for x in parameters]
        optimizer.step()
    return {"first": first, "reduced": reduced[0], "after": [x.detach() for x in parameters]}


def by_trainer(rank: int, out: str) -> Any:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, and not used: the group is there
    # sentence-transformers 5.1 makes default arguments behind ours, which without this take the processes away again.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.manual_seed(9)
    model = models.static_model()
    loss = CachedSamToNeLoss(model, temperature=0.1, learnable="log_beta", mini_batch_size=2)
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
        found = {kind: by_trainer(rank, out) if kind == "trainer" else by_hand(kind, rank) for kind in kinds.split(",")}
    torch.save(found, f"{out}-{rank}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
