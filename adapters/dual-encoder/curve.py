"""Writes curve.json and curve_prefixes.json: the trainings that README.md specifies, in float64, with the loss written out. Needs torch,
safetensors."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent
# Matryoshka: how many leading entries of an embedding are an embedding, too, and the weight of each loss.
PREFIXES, WEIGHTS = [8, 16, 32], [0.25, 0.5, 1.0]


def samtone_query(q, p, log_beta, query_ids, passage_ids):
    """{QP, QQ} + {PQ} of docs/loss.md, row i's positive being passage i."""
    q, p = torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(p, dim=1)
    kept = (query_ids[:, None] != query_ids) & (passage_ids[:, None] != passage_ids)
    logits = lambda x, y: (log_beta.exp() * x @ y.T).masked_fill(~kept, -math.inf)
    positive = log_beta.exp() * (q * p).sum(1)
    forward = torch.cat([positive[:, None], logits(q, p), logits(q, q)], 1).logsumexp(1)
    backward = torch.cat([positive[:, None], logits(p, q)], 1).logsumexp(1)
    return (forward + backward - 2 * positive).mean()


def train(prefixes, weights):
    """Losses of every prefix before each step, the sum of these times the weights, and log beta after the last step."""
    data = load_file(FOLDER / "pairs.safetensors")
    table, projection = (torch.nn.Parameter(data[name].double()) for name in ("table", "projection"))
    log_beta = torch.nn.Parameter(torch.tensor(math.log(20.0), dtype=torch.float64))
    optimizer = torch.optim.AdamW([table, projection, log_beta], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)

    def encode(tower, pairs):
        buckets, weights = data[f"{tower}_buckets"].long()[pairs], data[f"{tower}_weights"].double()[pairs]
        return (table[buckets] * weights[:, :, None]).sum(1) @ projection

    curve, parts = [], []
    for pairs in data["batches"].long():
        ids = [data[f"{tower}_ids"][pairs] for tower in ("query", "passage")]
        q, p = encode("query", pairs), encode("passage", pairs)
        losses = [samtone_query(q[:, :dim], p[:, :dim], log_beta, *ids) for dim in prefixes]
        loss = sum(weight * part for weight, part in zip(weights, losses))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
        parts.append([part.item() for part in losses])
    print(f"{curve[0]:.6f} -> {curve[-1]:.6f}, log beta {log_beta.item():.6f}")
    return curve, parts, log_beta.item()


def write(name, content):
    draft = FOLDER / f".{name}"
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(FOLDER / name)  # whole or not at all


def main():
    curve, _, log_beta = train([32], [1.0])  # the whole embedding
    write("curve.json", {"loss": curve, "log_beta": log_beta})
    curve, parts, log_beta = train(PREFIXES, WEIGHTS)
    prefixes = {"prefixes": PREFIXES, "prefix_weights": WEIGHTS}
    write("curve_prefixes.json", prefixes | {"loss": curve, "prefix_losses": parts, "log_beta": log_beta})


main()
