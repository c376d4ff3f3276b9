"""The definition (docs/loss.md of the repository) in dense float64 PyTorch, differentiated by autograd. It owes samtone nothing but
the names of the presets."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import samtone
import torch
from torch import Tensor
from torch.nn.functional import softplus

PRESETS: dict[str, list[tuple[float, list[str], int]]] = {
    "info_nce": [(1.0, ["qp"], 1)],
    "bidirectional": [(1.0, ["qp"], 1), (1.0, ["pq"], 1)],
    "clip": [(0.5, ["qp"], 1), (0.5, ["pq"], 1)],
    "samtone_query": [(1.0, ["qp", "qq"], 1), (1.0, ["pq"], 1)],
    "samtone_passage": [(1.0, ["qp"], 1), (1.0, ["pq", "pp"], 1)],
    "samtone_both": [(1.0, ["qp", "qq"], 1), (1.0, ["pq", "pp"], 1)],
    "samtone_query_one_way": [(1.0, ["qp", "qq"], 1)],
    "pair": [(0.9, ["qp"], 1), (0.1, ["pp"], 1)],
    "gte": [(1.0, ["qp", "qq", "pq", "pp"], 2)],
    "qwen3": [(1.0, ["qp", "qq", "pp"], 1)],
    "decoupled": [(1.0, ["qp"], 0)],
}
# Cosines closer than this count as equal.
TIE = 2.0**-20
# The logarithm of a masked term, finite so that rows without any negative have a gradient of 0.
NOTHING = -1e300


@dataclass
class Case:
    """A batch and everything that comes with it."""

    query: Tensor
    passage: Tensor
    groups: list[tuple[float, list[str], int]]
    temperature: float = 0.1
    positives: list[int] | None = None
    weights: list[float] | None = None
    query_ids: list[int] | None = None
    passage_ids: list[int] | None = None
    shared_ids: bool = False
    owners: list[int] | None = None
    own: bool = False
    margin: float | None = None
    zero_norm: str = "error"
    no_negative: str = "error"
    prefixes: list[int] | None = None
    prefix_weights: list[float] | None = None
    loss: Any = None

    def options(self) -> dict[str, Any]:
        """As samtone takes them."""
        custom = samtone.Loss.custom("custom", [samtone.Group(*group) for group in self.groups])
        return {
            "loss": custom if self.loss is None else self.loss,
            "positives": self.positives,
            "weights": self.weights,
            "query_ids": self.query_ids,
            "passage_ids": self.passage_ids,
            "shared_ids": self.shared_ids,
            "hard_negative_owners": self.owners,
            "hard_negative_scope": "own" if self.own else "all",
            "margin": float("inf") if self.margin is None else self.margin,
            "zero_norm": self.zero_norm,
            "no_negative": self.no_negative,
            "prefixes": self.prefixes,
            "prefix_weights": self.prefix_weights,
        }


def of_preset(name: str, query: Tensor, passage: Tensor, **other: Any) -> Case:
    """A case with the groups of a preset as written down here, which samtone gets by name."""
    return Case(query, passage, PRESETS[name], loss=name, **other)


@dataclass
class Verdict:
    """What the definition gives."""

    loss: Tensor
    row_losses: Tensor
    metrics: list[float]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    prefixes: list[Verdict] = field(default_factory=list)
    """Of each prefix of weight above 0, shortest first, without its weight."""


def _agree(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None] == b[None, :]


def definition(case: Case, q: Tensor, p: Tensor, beta: Tensor) -> Verdict:
    """Loss, row losses and metrics, differentiable in q, p and beta; all float64."""
    if case.prefixes is None:
        return of_embeddings(case, q, p, beta)
    given = zip(case.prefixes, case.prefix_weights or [1.0] * len(case.prefixes))
    kept = [(weight, of_embeddings(case, q[:, :dim], p[:, :dim], beta)) for dim, weight in given if weight > 0]
    loss = torch.stack([weight * part.loss for weight, part in kept]).sum()
    row_losses = torch.stack([weight * part.row_losses for weight, part in kept]).sum(0)
    return Verdict(loss, row_losses, kept[-1][1].metrics, prefixes=[part for _, part in kept])


def of_embeddings(case: Case, q: Tensor, p: Tensor, beta: Tensor) -> Verdict:
    """The same without prefixes."""
    m, n = len(q), len(p)
    pi = torch.tensor(case.positives if case.positives is not None else list(range(m)))
    query_ids = torch.tensor(case.query_ids if case.query_ids is not None else list(range(m)))
    passage_ids = torch.tensor(case.passage_ids if case.passage_ids is not None else list(range(n)))
    weights = torch.tensor(case.weights if case.weights is not None else [1.0] * m, dtype=torch.float64)
    weights = weights / weights.sum()

    def direction(x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        return x / torch.where(norm == 0, math.inf, norm)  # 0 where there is no direction, and so is its derivative

    qh, ph = direction(q), direction(p)
    anchors = ph[pi]
    positive = (qh * anchors).sum(1)
    # Keys: of rows (and queries as candidates), and of passages as candidates.
    row_passage = passage_ids[pi]
    owner_query = torch.full((n,), -(2**62))
    for i in reversed(range(m)):
        owner_query[row_passage[i] == passage_ids] = query_ids[i]  # copies of positives
    for i in reversed(range(m)):
        owner_query[pi[i]] = query_ids[i]
    same = {
        "queries": _agree(query_ids, query_ids) | _agree(row_passage, row_passage),
        "passages": _agree(query_ids, owner_query) | _agree(row_passage, passage_ids),
    }
    if case.shared_ids:
        same["queries"] |= _agree(row_passage, query_ids)
        same["passages"] |= _agree(query_ids, passage_ids)
    cosines = {"qp": qh @ ph.T, "pq": anchors @ qh.T, "qq": qh @ qh.T, "pp": anchors @ ph.T}
    kept = {}
    for name, cosine in cosines.items():
        keep = ~same["queries" if name in ("pq", "qq") else "passages"]
        if name in ("qp", "pp") and case.own and case.owners is not None:
            owners = torch.tensor(case.owners)[None, :]
            keep &= (owners < 0) | (owners == torch.arange(m)[:, None])
        if case.margin is not None:
            keep &= ~(cosine.detach() > positive.detach()[:, None] + case.margin + TIE)
        kept[name] = keep
    row_losses = torch.zeros(m, dtype=torch.float64)
    for coefficient, blocks, copies in case.groups:
        # l - beta s+ is log(e + D), D = sum exp(beta (s - s+)): a well-trained row keeps its digits.
        terms = [torch.where(kept[b], beta * (cosines[b] - positive[:, None]), NOTHING) for b in blocks]
        log_d, log_e = torch.logsumexp(torch.cat(terms, 1), 1), math.log(max(copies, 1))
        own = log_d if copies == 0 else log_e + softplus(log_d - log_e, threshold=60)
        if copies == 0 and case.no_negative == "zero":
            own = torch.where(torch.cat([kept[b] for b in blocks], 1).any(1), own, 0.0)
        row_losses = row_losses + coefficient * own
    metrics = []
    for name in ("qp", "pq"):
        rank = 1 + (kept[name] & (cosines[name] > positive[:, None] + TIE)).sum(1)
        metrics += [(weights * (rank == 1)).sum().item(), (weights / rank).sum().item()]
    return Verdict((weights * row_losses).sum(), row_losses, metrics)


def judge(case: Case, upstream: float = 1.0) -> Verdict:
    """What the definition gives for the embeddings as they are, rounded or not, with all gradients."""
    q = case.query.detach().double().requires_grad_()
    p = case.passage.detach().double().requires_grad_()
    tau = torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)
    verdict = definition(case, q, p, 1 / tau)
    verdict.loss.backward(torch.tensor(upstream, dtype=torch.float64))
    gradients = {"query": q.grad, "passage": p.grad, "tau": tau.grad, "log_beta": -case.temperature * tau.grad}
    return replace(verdict, loss=verdict.loss.detach(), row_losses=verdict.row_losses.detach(), gradients=gradients)


# Relative errors, as in docs/golden-format.md. Gradients: Frobenius, each row times its norm.
LOSS = {torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}
GRADIENT = {torch.float32: 3e-5, torch.float16: 2e-4, torch.bfloat16: 1e-3}
# What an element of the type resolves, for gradients that come rounded to it.
ROUNDING = {torch.float32: 6e-8, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# What cosines known to 6e-8 cost, times 1/temperature.
COSINE = 6e-8


def gradient_error(got: Tensor, want: Tensor, embeddings: Tensor) -> float:
    """Relative Frobenius, each row times the norm of its embedding."""
    norms = embeddings.double().norm(dim=1, keepdim=True)
    scale = (want * norms).norm().item()
    return ((got.double() - want) * norms).norm().item() / (scale if scale > 0 else 1.0)


def close(got: float, want: float, tolerance: float, what: str = "") -> None:
    """An error unless they agree, relatively (absolutely where the definition gives about 0)."""
    assert abs(got - want) <= tolerance * max(abs(want), 1e-6), f"{what}: {got}, wanted {want}"


def tolerance(dtype: torch.dtype, temperature: float) -> float:
    """Of gradients that come in this type."""
    return GRADIENT[dtype] * max(1.0, 0.01 / temperature) + ROUNDING[dtype] + 20 * COSINE / temperature


GOLDEN = sorted((Path(__file__).resolve().parents[3] / "tests" / "golden").glob("*.json"))


def golden(path: Path) -> tuple[Case, dict[str, Any]]:
    """A golden file: its case in float64, and the file."""
    file = json.loads(path.read_text())
    case = Case(
        torch.tensor(file["q"], dtype=torch.float64),
        torch.tensor(file["p"], dtype=torch.float64),
        [(g["coefficient"], g["blocks"], g["positive_copies"]) for g in file["groups"]],
        temperature=file["temperature"],
        positives=file.get("positives"),
        weights=file.get("weights"),
        query_ids=file.get("query_ids"),
        passage_ids=file.get("passage_ids"),
        shared_ids=file.get("shared_ids", False),
        owners=file.get("hard_negative_owner"),
        own=file.get("hard_negative_scope") == "own",
        margin=file.get("margin"),
        prefixes=[prefix["dim"] for prefix in file["prefixes"]] if "prefixes" in file else None,
        prefix_weights=[prefix["weight"] for prefix in file["prefixes"]] if "prefixes" in file else None,
        loss=file["preset"] if file["preset"] in PRESETS else None,
    )
    return case, file
