"""An ordinary training loop: a dual encoder of hashed words, AdamW, a learned temperature. The data, and the curve that it must
follow, are specified in adapters/dual-encoder/README.md of the repository.

    python examples/train.py [FOLDER] [--device cuda] [--prefixes]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import samtone
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[2] / "dual-encoder"


class Encoder(nn.Module):
    """Both towers: a weighted sum of bucket embeddings, projected."""

    def __init__(self, table: Tensor, projection: Tensor) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="sum")
        self.projection = nn.Parameter(projection)

    def forward(self, buckets: Tensor, weights: Tensor) -> Tensor:
        projected: Tensor = self.table(buckets, per_sample_weights=weights) @ self.projection
        return projected


class Training(NamedTuple):
    """What is to follow a curve."""

    loss: list[float]
    """Before each step."""
    prefix_losses: list[list[float]]
    """Likewise of each prefix; empty without prefixes."""
    log_beta: float
    """After the last step."""


def train(folder: Path, device: str = "cpu", **options: Any) -> Training:
    """The training; `options` may be `prefixes` and `prefix_weights`."""
    # Ids stay on the CPU, where samtone looks at them.
    data = {k: v if k.endswith("ids") else v.to(device) for k, v in load_file(folder / "pairs.safetensors").items()}
    encoder = Encoder(data["table"].clone(), data["projection"].clone())
    criterion = samtone.SamToNeLoss("samtone_query", temperature=1 / 20, learnable="log_beta", **options)
    parameters = [*encoder.parameters(), *criterion.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    losses, prefix_losses = [], []
    for step, (pairs, on_cpu) in enumerate(zip(data["batches"].long(), data["batches"].long().cpu())):
        query, passage = (
            encoder(data[f"{tower}_buckets"].long()[pairs], data[f"{tower}_weights"][pairs])
            for tower in ("query", "passage")
        )
        ids = {f"{tower}_ids": data[f"{tower}_ids"][on_cpu] for tower in ("query", "passage")}
        evaluation = criterion.evaluate(query, passage, **ids)
        optimizer.zero_grad()
        evaluation.loss.backward()
        optimizer.step()
        losses.append(evaluation.loss.item())
        print(
            f"step {step:2}  loss {losses[-1]:.6f}  P@1 {evaluation.query_to_passage.precision_at_1.item():.3f}", end=""
        )
        if evaluation.prefixes:
            prefix_losses.append(evaluation.prefixes.losses.tolist())
            found = zip(evaluation.prefixes.dims, evaluation.prefixes.query_to_passage.precision_at_1)
            print("".join(f"  {dim}: {precision:.3f}" for dim, precision in found), end="")
        print()
    return Training(losses, prefix_losses, -math.log(criterion.temperature))


def main() -> None:
    """Trains, and says how far the curve is from the expected one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prefixes", action="store_true", help="train the first 8 and 16 entries, too (Matryoshka)")
    arguments = parser.parse_args()
    name = "curve_prefixes.json" if arguments.prefixes else "curve.json"
    expected = json.loads((arguments.folder / name).read_text())
    options = {k: expected[k] for k in ("prefixes", "prefix_weights") if k in expected}
    got = train(arguments.folder, arguments.device, **options)
    largest = max(abs(a / b - 1) for a, b in zip(got.loss, expected["loss"]))
    print(
        f"log beta {got.log_beta:.6f}, expected {expected['log_beta']:.6f}; "
        f"losses within {largest:.1e} of the float64 curve"
    )
    if not largest < 1e-4:
        raise SystemExit("that is too far")


if __name__ == "__main__":
    main()
