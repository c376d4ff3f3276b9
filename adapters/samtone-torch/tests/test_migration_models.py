"""What docs/migration.md says of losses of sentence-transformers that are given a model: they themselves judge, on a tiny one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import samtone
import torch
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss
from sentence_models import (
    TEXTS,
    equal_training,
    features_of,
    theirs,
    transformer_model,
)
from torch import nn

pytestmark = pytest.mark.sentence_transformers
HERE = Path(__file__).resolve().parents[1]
OPTIONS: dict[str, Any] = {"temperature": 0.1, "mask_duplicates": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformer_model(tmp_path_factory.mktemp("model"))


def batch(model: Any, negatives: int) -> list[dict[str, Any]]:
    return [features_of(model, TEXTS[name]) for name in list(TEXTS)[: 2 + negatives]]


# With hard negatives theirs has none from positive to passage, where the presets do.
@pytest.mark.parametrize("cached, margin", [(False, 0.1), (False, -0.05), (True, 0.1)])
@pytest.mark.parametrize(
    "contrast, loss, negatives",
    [
        ({}, "qwen3", [0]),
        ({"contrast_positives": False}, "samtone_query_one_way", [0, 1]),
        ({"contrast_anchors": False}, samtone.Loss.custom("gist", [samtone.Group(1.0, ["qp", "pp"], 1)]), [0]),
        ({"contrast_anchors": False, "contrast_positives": False}, "info_nce", [0, 1]),
    ],
    ids=["qwen3", "no positives", "no anchors", "neither"],
)
def test_a_model_that_guides_itself(
    contrast: dict[str, bool], loss: Any, negatives: list[int], cached: bool, margin: float, model: Any
) -> None:
    """GISTEmbedLoss drops negatives above the positive minus its margin."""
    for count in negatives:
        texts = batch(model, count)
        size = {"mini_batch_size": 4} if cached else {}
        kind = theirs()[0].CachedGISTEmbedLoss if cached else theirs()[0].GISTEmbedLoss
        ours: Any = CachedSamToNeLoss if cached else SamToNeLoss
        their = kind(model, model, temperature=0.1, margin=margin, **size, **contrast)
        equal_training(their, ours(model, loss, margin=-margin, **size, **OPTIONS), model, texts)
        values = [SamToNeLoss(model, loss, margin=m, **OPTIONS)(texts, None) for m in (-margin, 2.0, -2.0)]
        assert values[0] < values[1] - 1e-3, "nothing is dropped, so this tests nothing"
        assert values[0] > values[2] + 1e-3, "everything is dropped, so this tests nothing"


class RowByRow(nn.Module):
    """The mean of a loss over batches of one row."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, features: Iterable[dict[str, Any]], labels: Any) -> Any:
        columns = list(features)
        rows = len(columns[0]["input_ids"])
        parts = [
            [{k: x[i : i + 1] if torch.is_tensor(x) else x for k, x in column.items()} for column in columns]
            for i in range(rows)
        ]
        return torch.stack([self.loss(part, labels) for part in parts]).mean()


@pytest.mark.parametrize("cached", [False, True])
def test_own_hard_negatives_alone(cached: bool, model: Any) -> None:
    """By the class that docs/migration.md shows."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "docs" / "migration.md").read_text(), re.S)
    (block,) = [block for block in blocks if "OwnNegatives" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    kind = names["OwnNegatives"]
    if cached:
        kind = type("CachedOwnNegatives", (kind, CachedSamToNeLoss), {})
    their = RowByRow(theirs()[0].MultipleNegativesRankingLoss(model, scale=10.0))
    equal_training(their, kind(model, "info_nce", hard_negative_scope="own", **OPTIONS), model, batch(model, 2))
