"""The judge: exact gradients in float64, in chunks of rows, of all embeddings or of a sample.

A loss is a list of groups (c, blocks, e), as docs/loss.md defines them, of which the peers need three blocks:

    l_gi = log( e exp(z_ii) + sum_{b in g} sum_{j != i} exp(b_ij) ),   L = sum_g c/B sum_i (l_gi - z_ii)
    QP_ij = z_ij = cos(q_i, p_j)/tau,  PQ_ij = cos(p_i, q_j)/tau,  QQ_ij = cos(q_i, q_j)/tau

With w_b,i = log sum_{g with b} c_g exp(-l_gi), the derivatives of the cosines are, for j != i and times 1/(B tau),

    of z_ij: exp(z_ij + w_QP,i) + exp(z_ij + w_PQ,j),   of QQ_ij: exp(QQ_ij + w_QQ,i) + exp(QQ_ij + w_QQ,j) for the pair,
    of z_ii: -sum_g c_g (1 - e exp(z_ii - l_gi))
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Group: (coefficient, blocks, copies of the positive in the denominator).
LOSSES = {
    "samtone_query": [(1.0, ("QP", "QQ"), 1), (1.0, ("PQ",), 1)],
    "samtone_query_joint": [(1.0, ("QP", "QQ", "PQ"), 2)],
}
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
    """Logsumexps of every block once, then gradients of any rows of any loss."""

    def __init__(self, query: torch.Tensor, passage: torch.Tensor, temperature: float) -> None:
        self.raw = (query.double(), passage.double())
        self.query, self.passage = (F.normalize(x, dim=-1) for x in self.raw)
        self.beta, self.size = 1.0 / temperature, len(query)
        self.positive = self.beta * (self.query * self.passage).sum(dim=1)
        self.blocks = {"QP": (self.query, self.passage), "PQ": (self.passage, self.query), "QQ": (self.query, self.query)}
        self.lse = {name: self.row_logsumexp(*towers) for name, towers in self.blocks.items()}

    def row_logsumexp(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        parts = []
        for rows in chunks(self.size, self.size):
            tile = left[rows] @ right.T
            mask_own(tile.mul_(self.beta), torch.arange(rows.start, rows.stop, device=tile.device), -math.inf)
            parts.append(tile.logsumexp(dim=1))
        return torch.cat(parts)

    def reference(self, loss: str, rows: torch.Tensor | None = None) -> Reference:
        groups, total = LOSSES[loss], torch.zeros_like(self.positive)
        weights = {name: torch.full_like(self.positive, -math.inf) for name in self.blocks}
        of_positive = torch.zeros_like(self.positive)
        for coefficient, blocks, copies in groups:
            lse = torch.stack([self.lse[b] for b in blocks] + [self.positive + math.log(copies)]).logsumexp(dim=0)
            negatives = torch.stack([self.lse[b] for b in blocks]).logsumexp(dim=0)
            total += coefficient * (lse - self.positive)
            of_positive -= coefficient * (negatives - lse).exp()
            for b in blocks:
                weights[b] = torch.logaddexp(weights[b], math.log(coefficient) - lse)
        wanted = torch.arange(self.size, device=self.positive.device) if rows is None else rows
        q, p, own = self.query, self.passage, of_positive[wanted, None]
        of_query = own * p[wanted]
        of_passage = own * q[wanted]
        self.add(of_query, wanted, (q, p), (weights["QP"], weights["PQ"]))
        self.add(of_query, wanted, (q, q), (weights["QQ"], weights["QQ"]))
        self.add(of_passage, wanted, (p, q), (weights["PQ"], weights["QP"]))
        gradients = (self.to_raw(of_query, wanted, self.raw[0], q), self.to_raw(of_passage, wanted, self.raw[1], p))
        return Reference(total.mean().item(), gradients, rows)

    def add(self, out: torch.Tensor, wanted: torch.Tensor, towers: tuple, weights: tuple) -> None:
        """out_i += sum_j (exp(z_ij + w_i) + exp(z_ij + v_j)) y_j for the wanted rows."""
        (left, right), (mine, theirs) = towers, weights
        for part in chunks(len(wanted), self.size):
            rows = wanted[part]
            tile = (left[rows] @ right.T).mul_(self.beta)
            factors = (tile + theirs).exp_()
            factors += tile.add_(mine[rows, None]).exp_()
            out[part] += mask_own(factors, rows, 0.0) @ right

    def to_raw(
        self, of_direction: torch.Tensor, wanted: torch.Tensor, raw: torch.Tensor, unit: torch.Tensor
    ) -> torch.Tensor:
        """(g - x (x.g)) / |x| times 1/(B tau), for unit rows x."""
        unit, norms = unit[wanted], raw[wanted].norm(dim=1, keepdim=True)
        tangent = of_direction - unit * (unit * of_direction).sum(dim=1, keepdim=True)
        return tangent * (self.beta / self.size) / norms
