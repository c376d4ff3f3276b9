"""samtone_query as users of PyTorch write it when the plain text does not fit: by chunks of rows, each checkpointed."""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def chunk_terms(
    rows: torch.Tensor, query: torch.Tensor, passage: torch.Tensor, start: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the rows q_start, ...: logsumexps over passages and other queries, positives, and logsumexps of the columns."""
    logits = rows @ passage.T / temperature
    same_tower = rows @ query.T / temperature
    own = torch.arange(len(rows), device=rows.device)
    same_tower = same_tower.index_put(
        (own, own + start), torch.full((), -math.inf, device=rows.device, dtype=same_tower.dtype)
    )
    to_passage = torch.logaddexp(logits.logsumexp(dim=1), same_tower.logsumexp(dim=1))
    return to_passage, logits[own, own + start], logits.logsumexp(dim=0)


def chunked(query: torch.Tensor, passage: torch.Tensor, temperature: float, size: int) -> torch.Tensor:
    """Mean of (logsumexp over passages and other queries) + (logsumexp over queries) - 2 positive logits; B/size checkpoints.

    No more than size x B logits exist at a time, forward or backward; each is computed twice.
    """
    query, passage = F.normalize(query, dim=-1), F.normalize(passage, dim=-1)
    parts = [
        checkpoint(
            chunk_terms, query[start : start + size], query, passage, start, temperature,
            use_reentrant=False, preserve_rng_state=False,
        )
        for start in range(0, len(query), size)
    ]  # fmt: skip
    to_passage, positive, columns = zip(*parts)
    to_query = torch.stack([c.float() for c in columns]).logsumexp(dim=0)
    return (torch.cat(to_passage) + to_query - 2 * torch.cat(positive)).mean()
