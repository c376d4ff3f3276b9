"""What docs/migration.md says of Matryoshka losses outside of sentence-transformers: FlagEmbedding, ms-swift and memeff, written out from
their code in float64, one loss for each prefix."""

from __future__ import annotations

from typing import Any

import pytest
import samtone
import torch
from test_migration import DIM, ROWS, THEIRS, columns, compare, cosines, without_diagonal
from torch import Tensor
from torch.nn.functional import cross_entropy

DIMS, WEIGHTS, TAU = [3, 8, DIM], [1.0, 0.5, 0.25], 0.05


def nested(loss: THEIRS, weights: list[float]) -> THEIRS:
    """The sum of losses of what is cut off, each times its weight."""

    def call(embeddings: list[Tensor]) -> Tensor:
        parts = [loss([x[:, :dim] for x in embeddings]) for dim in DIMS]
        return torch.stack([weight * part for weight, part in zip(weights, parts)]).sum()

    return call


def ours(loss: str, weights: list[float], **options: Any) -> THEIRS:
    """Positives and hard negatives of a row behind each other, as FlagEmbedding and ms-swift have them."""

    def call(embeddings: list[Tensor]) -> Tensor:
        query, *passages = embeddings
        groups = torch.stack(passages, 1).flatten(0, 1)
        first = range(0, len(groups), len(passages))
        more: dict[str, Any] = {"prefixes": DIMS, "prefix_weights": weights, "positives": first}
        return samtone.samtone_loss(query, groups, loss=loss, temperature=TAU, **more | options)

    return call


def grouped(embeddings: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, all passages, and the place of each positive."""
    query, *passages = embeddings
    return query, torch.stack(passages, 1).flatten(0, 1), torch.arange(ROWS) * len(passages)


@pytest.mark.parametrize("negatives", [0, 2])
def test_flag_embedding(negatives: int) -> None:
    """`_compute_in_batch_neg_loss`, divided by the number of `mrl_dims`."""

    def loss(embeddings: list[Tensor]) -> Tensor:
        query, passages, target = grouped(embeddings)
        return cross_entropy(cosines(query, passages) / TAU, target)

    weights = [1 / len(DIMS)] * len(DIMS)
    compare(nested(loss, weights), ours("info_nce", weights), columns(negatives))


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize(
    "include_qq, include_dd, preset",
    [(False, False, "info_nce"), (True, False, "samtone_query_one_way"), (True, True, "qwen3")],
)
def test_ms_swift(include_qq: bool, include_dd: bool, preset: str, negatives: int) -> None:
    """`InfonceLoss` in batches, with `INFONCE_INCLUDE_QQ` and `INFONCE_INCLUDE_DD`; `mrl_dims` has a weight for each."""

    def loss(embeddings: list[Tensor]) -> Tensor:
        query, passages, target = grouped(embeddings)
        logits = [cosines(query, passages)]
        if include_qq:
            logits.append(without_diagonal(cosines(query, query)))
        if include_dd:
            own = cosines(passages[target], passages)
            logits.append(own.scatter(1, target[:, None], -torch.inf))
        return cross_entropy(torch.cat(logits, 1) / TAU, target)

    compare(nested(loss, WEIGHTS), ours(preset, WEIGHTS, margin=float("inf")), columns(negatives))


def test_memeff_clip() -> None:
    def loss(embeddings: list[Tensor]) -> Tensor:
        logits, target = cosines(*embeddings) / TAU, torch.arange(ROWS)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    compare(nested(loss, WEIGHTS), ours("clip", WEIGHTS), columns(0))


def test_memeff_lit() -> None:
    """The text searches the image, which is locked."""
    text, image = columns(0)

    def loss(embeddings: list[Tensor]) -> Tensor:
        return cross_entropy(
            cosines(embeddings[0], image.double()[:, : embeddings[0].shape[1]]) / TAU, torch.arange(ROWS)
        )

    compare(nested(loss, WEIGHTS), lambda x: ours("info_nce", WEIGHTS)([x[0], image]), [text])


@pytest.mark.parametrize("self_negatives", [False, True])
def test_memeff_qwen3(self_negatives: bool) -> None:
    """Each prefix drops negatives by its own similarities; `use_qq_negatives` and `use_dd_negatives` or neither."""
    dropped = []

    def loss(embeddings: list[Tensor]) -> Tensor:
        query, passage = embeddings
        s = cosines(query, passage)
        positive = s.diagonal()
        parts = []
        for x in (s, cosines(query, query), cosines(passage, passage))[: 3 if self_negatives else 1]:
            false_negatives = x.detach() > positive.detach()[:, None] + 0.1
            dropped.append(int(without_diagonal(false_negatives.double()).gt(0).sum()))
            parts.append(without_diagonal(x.masked_fill(false_negatives, -torch.inf)))
        return (torch.logsumexp(torch.cat([positive[:, None], *parts], 1) / TAU, 1) - positive / TAU).mean()

    preset = "qwen3" if self_negatives else "info_nce"
    compare(nested(loss, WEIGHTS), ours(preset, WEIGHTS, margin=0.1), columns(0))
    assert len(set(dropped)) > 1, "all prefixes drop as many, so this tests little"
