"""The judge: exact gradients in float64, in chunks of rows, of all embeddings or of a sample.

A loss is a list of groups (c, blocks, e), as docs/loss.md defines them, on four blocks (losses.py):

    l_gi = log( e exp(z_ii) + sum_{b in g} sum_{j != i, kept} exp(b_ij) ),   L = sum_g c/B sum_i (l_gi - z_ii)
    QP_ij = z_ij = cos(q_i, p_j)/tau,  PQ_ij = cos(p_i, q_j)/tau,  QQ_ij = cos(q_i, q_j)/tau,  PP_ij = cos(p_i, p_j)/tau

j is kept for i unless its cosine exceeds cos(q_i, p_i) + margin. With w_b,i = log sum_{g with b} c_g exp(-l_gi), the derivatives of the
cosines are, for j != i and times 1/(B tau), each term only where j is kept for i, or i for j,

    of z_ij: exp(z_ij + w_QP,i) + exp(z_ij + w_PQ,j),   of QQ_ij: exp(QQ_ij + w_QQ,i) + exp(QQ_ij + w_QQ,j) for the pair, PP likewise,
    of z_ii: -sum_g c_g (1 - e exp(z_ii - l_gi))
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from losses import LOSSES, Loss

CHUNK_BYTES = 2**30
# Judged by all rows up to this B, by a sample of both towers beyond.
JUDGED, SAMPLED = 32768, 1024


@dataclass
class Reference:
    """Loss and gradients; `rows` are the sampled ones, or None for all."""

    loss: float
    gradients: tuple[torch.Tensor, torch.Tensor]
    rows: torch.Tensor | None

    def errors(self, gradients: tuple[torch.Tensor, torch.Tensor]) -> float:
        """|g - g64| / |g64| (Frobenius, over the sampled rows if sampled), the worse of the two towers; NaN if either is."""
        relative = []
        for got, exact in zip(gradients, self.gradients):
            got = got if self.rows is None else got[self.rows]
            # In place on a copy: a second one of 131072 x 1024 would be another GiB.
            relative.append((got.to(torch.float64, copy=True).sub_(exact).norm() / exact.norm()).item())
        return math.nan if any(map(math.isnan, relative)) else max(relative)


def sampled_rows(rows: int, device: torch.device) -> torch.Tensor | None:
    """Rows by which a batch is judged: seeded; None for all of them."""
    if rows <= JUDGED:
        return None
    source = torch.Generator(device=device).manual_seed(2)
    return torch.randperm(rows, generator=source, device=device)[:SAMPLED]


def chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows so that a float64 chunk of `width` columns stays below CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // (8 * width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def mask_own(tile: torch.Tensor, rows: torch.Tensor, value: float) -> torch.Tensor:
    """Sets the entries of `tile` whose column is their row's own number."""
    tile[torch.arange(len(rows), device=tile.device), rows] = value
    return tile


class Judge:
    """Logsumexps of every block of a loss, then gradients of any rows."""

    def __init__(self, query: torch.Tensor, passage: torch.Tensor) -> None:
        self.raw = (query.double(), passage.double())
        self.query, self.passage = (F.normalize(x, dim=-1) for x in self.raw)
        self.size = len(query)
        self.positive = (self.query * self.passage).sum(dim=1)
        q, p = self.query, self.passage
        self.blocks = {"QP": (q, p), "PQ": (p, q), "QQ": (q, q), "PP": (p, p)}

    def row_logsumexp(self, block: str, loss: Loss) -> torch.Tensor:
        (left, right), parts = self.blocks[block], []
        for rows in chunks(self.size, self.size):
            tile = left[rows] @ right.T
            if loss.margin is not None:
                tile.masked_fill_(tile > (self.positive[rows] + loss.margin)[:, None], -math.inf)
            mask_own(tile.mul_(1.0 / loss.temperature), torch.arange(rows.start, rows.stop, device=tile.device), -math.inf)
            parts.append(tile.logsumexp(dim=1))
        return torch.cat(parts)

    def reference(self, name: str, rows: torch.Tensor | None = None) -> Reference:
        loss, positive = LOSSES[name], self.positive / LOSSES[name].temperature
        total, of_positive = torch.zeros_like(positive), torch.zeros_like(positive)
        weights = {name: torch.full_like(positive, -math.inf) for name in self.blocks}
        by_row = {block: self.row_logsumexp(block, loss) for block in {b for _, blocks, _ in loss.groups for b in blocks}}
        for coefficient, blocks, copies in loss.groups:
            lse = torch.stack([by_row[b] for b in blocks] + [positive + math.log(copies)]).logsumexp(dim=0)
            negatives = torch.stack([by_row[b] for b in blocks]).logsumexp(dim=0)
            total += coefficient * (lse - positive)
            of_positive -= coefficient * (negatives - lse).exp()
            for b in blocks:
                weights[b] = torch.logaddexp(weights[b], math.log(coefficient) - lse)
        wanted = torch.arange(self.size, device=positive.device) if rows is None else rows
        of_query = of_positive[wanted, None] * self.passage[wanted]
        of_passage = of_positive[wanted, None] * self.query[wanted]
        for out, mine, theirs in (
            (of_query, "QP", "PQ"),
            (of_query, "QQ", "QQ"),
            (of_passage, "PQ", "QP"),
            (of_passage, "PP", "PP"),
        ):
            if mine in by_row or theirs in by_row:
                self.add(out, wanted, self.blocks[mine], (weights[mine], weights[theirs]), loss)
        of_query, of_passage = (g.mul_(1.0 / (loss.temperature * self.size)) for g in (of_query, of_passage))
        gradients = (
            self.to_raw(of_query, wanted, self.raw[0], self.query),
            self.to_raw(of_passage, wanted, self.raw[1], self.passage),
        )
        return Reference(total.mean().item(), gradients, rows)

    def add(self, out: torch.Tensor, wanted: torch.Tensor, towers: tuple, weights: tuple, loss: Loss) -> None:
        """out_i += sum_j (exp(z_ij + w_i) [j kept for i] + exp(z_ij + v_j) [i kept for j]) y_j for the wanted rows."""
        (left, right), (mine, theirs) = towers, weights
        for part in chunks(len(wanted), self.size):
            rows = wanted[part]
            tile = left[rows] @ right.T
            dropped = None
            if loss.margin is not None:
                limit = self.positive + loss.margin
                dropped = (tile > limit, tile > limit[rows, None])
            tile.mul_(1.0 / loss.temperature)
            factors = (tile + theirs).exp_()
            tile.add_(mine[rows, None]).exp_()
            if dropped is not None:
                factors.masked_fill_(dropped[0], 0.0)
                tile.masked_fill_(dropped[1], 0.0)
            factors += tile
            out[part] += mask_own(factors, rows, 0.0) @ right

    def to_raw(self, of_direction: torch.Tensor, wanted: torch.Tensor, raw: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """(g - x (x.g)) / |x|, for unit rows x."""
        unit, norms = unit[wanted], raw[wanted].norm(dim=1, keepdim=True)
        tangent = of_direction - unit * (unit * of_direction).sum(dim=1, keepdim=True)
        return tangent / norms
