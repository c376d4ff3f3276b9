"""The training of train.py in several processes, each of which encodes its part of every batch. It follows the curve of one process.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py [FOLDER]

Three lines differ from a training of one process: each takes its part of the pairs, DistributedDataParallel wraps the towers, and the loss
has a `group`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import samtone
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from train import FOLDER, Encoder


class Towers(nn.Module):
    """Both towers at once, as DistributedDataParallel wants one call in a step."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, query: tuple[Tensor, Tensor], passage: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.encoder(*query), self.encoder(*passage)


def train(folder: Path) -> list[float]:
    """The loss before each step, the same in every process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    data = load_file(folder / "pairs.safetensors")
    towers = DistributedDataParallel(Towers(Encoder(data["table"].clone(), data["projection"].clone())))
    # Averaged gradients are what DistributedDataParallel gives. That of the temperature is whole in every process.
    criterion = samtone.SamToNeLoss(
        "samtone_query", temperature=1 / 20, learnable="log_beta", group=dist.group.WORLD, reduction="mean"
    )
    parameters = [*towers.parameters(), *criterion.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    losses = []
    for batch in data["batches"].long():
        pairs = batch.tensor_split(size)[rank]  # parts may be uneven
        texts = (
            (data[f"{tower}_buckets"].long()[pairs], data[f"{tower}_weights"][pairs]) for tower in ("query", "passage")
        )
        query, passage = towers(*texts)
        loss = criterion(query, passage, query_ids=data["query_ids"][pairs], passage_ids=data["passage_ids"][pairs])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Trains, and says how far the curve is from the expected one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    dist.init_process_group("gloo")
    losses = train(folder)
    expected = json.loads((folder / "curve.json").read_text())["loss"]
    largest = max(abs(a / b - 1) for a, b in zip(losses, expected))
    if dist.get_rank() == 0:
        for step, (got, want) in enumerate(zip(losses, expected)):
            print(f"step {step:2}  loss {got:.6f}  of one process {want:.6f}")
        print(f"{dist.get_world_size()} processes: losses within {largest:.1e} of the float64 curve")
    dist.barrier()
    dist.destroy_process_group()
    if len(losses) != len(expected) or not largest < 1e-4:
        raise SystemExit("that is too far")


if __name__ == "__main__":
    main()
