"""Writes curve.json: the training that README.md specifies, in float64, with the loss written out. Needs torch, safetensors."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent


def samtone_query(q, p, log_beta, query_ids, passage_ids):
    """{QP, QQ} + {PQ} of docs/loss.md, row i's positive being passage i."""
    q, p = torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(p, dim=1)
    kept = (query_ids[:, None] != query_ids) & (passage_ids[:, None] != passage_ids)
    logits = lambda x, y: (log_beta.exp() * x @ y.T).masked_fill(~kept, -math.inf)
    positive = log_beta.exp() * (q * p).sum(1)
    forward = torch.cat([positive[:, None], logits(q, p), logits(q, q)], 1).logsumexp(1)
    backward = torch.cat([positive[:, None], logits(p, q)], 1).logsumexp(1)
    return (forward + backward - 2 * positive).mean()


def main():
    data = load_file(FOLDER / "pairs.safetensors")
    table, projection = (torch.nn.Parameter(data[name].double()) for name in ("table", "projection"))
    log_beta = torch.nn.Parameter(torch.tensor(math.log(20.0), dtype=torch.float64))
    optimizer = torch.optim.AdamW([table, projection, log_beta], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)

    def encode(tower, pairs):
        buckets, weights = data[f"{tower}_buckets"].long()[pairs], data[f"{tower}_weights"].double()[pairs]
        return (table[buckets] * weights[:, :, None]).sum(1) @ projection

    curve = []
    for pairs in data["batches"].long():
        ids = (data[f"{tower}_ids"][pairs] for tower in ("query", "passage"))
        loss = samtone_query(encode("query", pairs), encode("passage", pairs), log_beta, *ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    text = {"loss": curve, "log_beta": log_beta.item()}
    draft = FOLDER / ".curve.json"
    draft.write_text(json.dumps(text, indent=1) + "\n")
    draft.replace(FOLDER / "curve.json")  # whole or not at all
    print(f"{curve[0]:.6f} -> {curve[-1]:.6f}, log beta {log_beta.item():.6f}")


main()
