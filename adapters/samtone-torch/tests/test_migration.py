"""What docs/migration.md says: other implementations and our presets give equal losses and gradients. sentence-transformers
judges itself; OpenCLIP, GTE, Qwen3-Embedding and PAIR are written out from their papers and code, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import samtone
import torch
from conftest import missing
from judge import gradient_error
from samtone.sentence_transformers import SamToNeLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

ROWS, DIM, SCALE = 9, 12, 20.0
THEIRS = Callable[[list[Tensor]], Tensor]


def columns(negatives: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(60 + negatives)
    anchor = torch.randn(ROWS, DIM, generator=generator)
    others = [torch.randn(ROWS, DIM, generator=generator) for _ in range(1 + negatives)]
    return [anchor, 0.5 * anchor + others[0], *others[1:]]


def compare(theirs: THEIRS, ours: THEIRS, embeddings: list[Tensor]) -> None:
    """Theirs in float64, ours in float32."""
    wide = [x.double().requires_grad_() for x in embeddings]
    want = theirs(wide)
    want.backward()
    narrow = [x.clone().requires_grad_() for x in embeddings]
    got = ours(narrow)
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=2e-6)
    for a, b in zip(narrow, wide):
        assert a.grad is not None and b.grad is not None
        assert gradient_error(a.grad, b.grad, b.detach()) < 3e-5


def ours(loss: str | samtone.Loss, **options: Any) -> THEIRS:
    """A preset on columns, as the class for the trainer calls it."""
    criterion = SamToNeLoss(None, loss, scale=SCALE, mask_duplicates=False, **options)
    return lambda embeddings: criterion.loss_of(embeddings, {})


def theirs(*directions: str, mode: str = "joint", swapped: bool = False) -> THEIRS:
    """MultipleNegativesRankingLoss; `swapped` searches the anchors for each positive instead."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(None, scale=SCALE, directions=directions, partition_mode=mode)

    def call(embeddings: list[Tensor]) -> Tensor:
        if swapped:
            embeddings = [embeddings[1], embeddings[0]]
        return loss.compute_loss_from_embeddings(embeddings, None)

    return call


def added(*losses: THEIRS) -> THEIRS:
    return lambda embeddings: torch.stack([loss(embeddings) for loss in losses]).sum()


QD, QQ, DQ, DD = "query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"
# Preset, theirs, hard negatives that may come with it.
TABLE: list[tuple[str, Any, Any, tuple[int, ...]]] = [
    ("the default", lambda: theirs(QD), "info_nce", (0, 1, 2)),
    ("symmetric", lambda: theirs(QD, DQ, mode="per_direction"), "clip", (0, 1, 2)),
    ("queries, too", lambda: theirs(QD, QQ), "samtone_query_one_way", (0, 1, 2)),
    ("GTE", lambda: theirs(QD, QQ, DQ, DD), "gte", (0,)),
    ("Qwen3 without its mask", lambda: theirs(QD, QQ, DD), "qwen3", (0,)),
    (
        "both directions in one softmax",
        lambda: theirs(QD, DQ),
        samtone.Loss.custom("joint", [samtone.Group(1.0, ["qp", "pq"], 2)]),
        (0, 1, 2),
    ),
    ("two calls: bidirectional", lambda: added(theirs(QD), theirs(QD, swapped=True)), "bidirectional", (0,)),
    ("two calls: SamToNe", lambda: added(theirs(QD, QQ), theirs(QD, swapped=True)), "samtone_query", (0, 1, 2)),
    ("two calls: passages", lambda: added(theirs(QD), theirs(QD, QQ, swapped=True)), "samtone_passage", (0,)),
    ("two calls: both towers", lambda: added(theirs(QD, QQ), theirs(QD, QQ, swapped=True)), "samtone_both", (0,)),
]


@pytest.mark.sentence_transformers
@pytest.mark.parametrize(
    "make, preset, negatives",
    [pytest.param(make, preset, n, id=f"{name}, {n}") for name, make, preset, all_n in TABLE for n in all_n],
)
def test_multiple_negatives_ranking_loss(make: Callable[[], THEIRS], preset: Any, negatives: int) -> None:
    compare(make(), ours(preset, margin=float("inf")), columns(negatives))


@pytest.mark.sentence_transformers
def test_gte_with_hard_negatives_differs_as_the_table_says() -> None:
    """Theirs drops a row's own hard negatives from document to document; ours keeps them there."""
    embeddings = [x.double() for x in columns(1)]
    got = ours("gte")([x.float() for x in embeddings]).item()
    assert abs(theirs(QD, QQ, DQ, DD)(embeddings).item() - got) > 1e-4


@pytest.mark.sentence_transformers
@pytest.mark.parametrize("cached", [False, True])
def test_symmetric_and_cached_classes_of_sentence_transformers(cached: bool) -> None:
    """The classes themselves, with a model and features: equal gradients of its parameters."""
    from samtone.sentence_transformers import CachedSamToNeLoss
    from sentence_models import Encoder
    from sentence_models import columns as texts
    from sentence_transformers.sentence_transformer import losses

    model = Encoder().double()
    if cached:
        their = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
        our = CachedSamToNeLoss(model, "info_nce", scale=20.0, mini_batch_size=4, mask_duplicates=False)
    else:
        with pytest.warns(DeprecationWarning):
            their = losses.MultipleNegativesSymmetricRankingLoss(model)
        our = SamToNeLoss(model, "clip", scale=20.0, mask_duplicates=False)
    results = []
    for loss in (their, our):
        model.zero_grad()
        model.double() if loss is their else model.float()
        value = loss(texts(1), None)
        value.backward()
        results.append([value.item(), *(p.grad.double().clone() for p in model.parameters() if p.grad is not None)])
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for a, b in zip(results[1][1:], results[0][1:]):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.sentence_transformers
def test_their_temperature_is_the_inverse_of_their_scale() -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    assert SamToNeLoss(None, scale=20.0).temperature == MultipleNegativesRankingLoss(None).temperature == 0.05


def test_openclip() -> None:
    """ClipLoss of open_clip on normalised features, with its logit_scale, which is learned as a logarithm."""
    logit_scale = torch.tensor(2.6592, dtype=torch.float64)  # ln(1/0.07)
    scales: list[Tensor] = []

    def clip(embeddings: list[Tensor]) -> Tensor:
        scales.append(logit_scale.clone().requires_grad_())
        image, text = (normalize(x, dim=-1) for x in embeddings)
        logits_per_image = scales[-1].exp() * image @ text.T
        labels = torch.arange(len(image))
        return (cross_entropy(logits_per_image, labels) + cross_entropy(logits_per_image.T, labels)) / 2

    def preset(embeddings: list[Tensor]) -> Tensor:
        scales.append(logit_scale.float().requires_grad_())
        return samtone.samtone_loss(*embeddings, loss="clip", log_beta=scales[-1])

    compare(clip, preset, columns(0))
    assert scales[1].grad.item() == pytest.approx(scales[0].grad.item(), rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.skipif(missing("open-clip", "open_clip"), reason="open_clip_torch is not installed")
def test_openclip_itself() -> None:
    """The class of the package; ci/with-open-clip installs it and runs this."""
    from open_clip.loss import ClipLoss

    logit_scale = torch.tensor(2.6592, dtype=torch.float64)  # ln(1/0.07)
    scales = [logit_scale.clone().requires_grad_(), logit_scale.float().requires_grad_()]

    def clip(embeddings: list[Tensor]) -> Tensor:
        value: Tensor = ClipLoss()(*(normalize(x, dim=-1) for x in embeddings), scales[0].exp())
        return value

    compare(clip, lambda x: samtone.samtone_loss(*x, loss="clip", log_beta=scales[1]), columns(0))
    assert scales[0].grad is not None and scales[1].grad is not None
    assert scales[1].grad.item() == pytest.approx(scales[0].grad.item(), rel=1e-5)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return normalize(a, dim=-1) @ normalize(b, dim=-1).T


def without_diagonal(x: Tensor) -> Tensor:
    return x.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)


def test_gte_as_its_paper_writes_it() -> None:
    """Li et al. 2023: Z_i over (q_i, d_j), (q_i, q_j) j != i, (q_j, d_i), (d_j, d_i) j != i."""

    def gte(embeddings: list[Tensor]) -> Tensor:
        q, d = embeddings
        s = SCALE * cosines(q, d)
        parts = [s, without_diagonal(SCALE * cosines(q, q)), s.T, without_diagonal(SCALE * cosines(d, d))]
        return (torch.logsumexp(torch.cat(parts, 1), 1) - s.diagonal()).mean()

    compare(gte, ours("gte"), columns(0))


def test_qwen3_embedding_as_its_report_writes_it() -> None:
    """Z_i over the positive, (q_i, d_j), (q_i, q_j) and (d_i, d_j), j != i, where m_ij drops similarities above s(q_i, d_i) + 0.1."""
    dropped = []

    def qwen3(embeddings: list[Tensor]) -> Tensor:
        q, d = embeddings
        positive = cosines(q, d).diagonal()
        parts = []
        for s in (cosines(q, d), cosines(q, q), cosines(d, d)):
            false_negatives = s > positive[:, None] + 0.1
            dropped.append(without_diagonal(false_negatives.double()).gt(0).sum().item())
            parts.append(without_diagonal((SCALE * s).masked_fill(false_negatives, -torch.inf)))
        z = torch.cat([SCALE * positive[:, None], *parts], 1)
        return (torch.logsumexp(z, 1) - SCALE * positive).mean()

    compare(qwen3, ours("qwen3"), columns(0))
    assert sum(dropped) > 0, "nothing was masked, so this tests no mask"


@pytest.mark.parametrize("alpha", [0.1, 0.4])
def test_pair_as_its_paper_writes_it(alpha: float) -> None:
    """Ren et al. 2021: (1 - alpha) of query-centric and alpha of passage-centric, p+ closer to q than to other passages."""

    def pair(embeddings: list[Tensor]) -> Tensor:
        q, p, negative = embeddings
        passages = torch.cat([p, negative])
        query_centric = SCALE * cosines(q, passages)
        positive = query_centric.diagonal()
        others = SCALE * cosines(p, passages)
        others = others.masked_fill(torch.eye(len(p), len(passages), dtype=torch.bool), -torch.inf)
        passage_centric = torch.cat([positive[:, None], others], 1)
        return (
            (1 - alpha) * (torch.logsumexp(query_centric, 1) - positive)
            + alpha * (torch.logsumexp(passage_centric, 1) - positive)
        ).mean()

    compare(pair, ours(samtone.Loss.pair(alpha)), columns(1))
