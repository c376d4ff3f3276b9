"""What the losses for sentence-transformers do unless told otherwise, where a trainer has no chance to: texts that are anchors and
passages, rows without a negative, embeddings without a direction."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from samtone import SamtoneError
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss
from sentence_models import Encoder, features_of, parameters_after, static_model, tokenized
from torch import logsumexp
from torch.nn.functional import normalize

CLASSES = [SamToNeLoss, CachedSamToNeLoss]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_text_is_no_negative_of_itself_in_the_other_column(kind: Any) -> None:
    torch.manual_seed(3)
    model = Encoder()
    chain = ["a red fox", "the tall tree", "cold water", "one small step"]
    batch = [tokenized(chain[:3], 3), tokenized(chain[1:], 4)]
    query, passage = (normalize(model(dict(column))["sentence_embedding"], dim=1) for column in batch)
    logits = query @ passage.T / 0.05
    logits[1, 0] = logits[2, 1] = -torch.inf  # the texts of queries 1 and 2
    want = (logsumexp(logits, dim=1) - logits.diagonal()).mean()
    got = kind(model, "info_nce", temperature=0.05)(batch, None)
    assert torch.allclose(got, want, rtol=1e-5)
    without = kind(model, "info_nce", temperature=0.05, mask_duplicates=False)(batch, None)
    assert not torch.allclose(without, want, rtol=1e-3)


@pytest.mark.parametrize("kind", CLASSES)
def test_both_columns_the_same_texts_mask_nothing_more(kind: Any) -> None:
    torch.manual_seed(4)
    model = Encoder()
    texts = ["a red fox", "the tall tree", "cold water", "one small step"]
    batch = [tokenized(texts, 3), tokenized(texts, 5)]
    for preset in ("info_nce", "samtone_both", "gte"):
        masked, plain = (
            kind(model, preset, temperature=0.1, mask_duplicates=mask)(batch, None) for mask in (True, False)
        )
        assert torch.equal(masked, plain)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("anchors", [["a fox"], ["a fox", "a fox"]])
def test_a_row_without_a_negative_contributes_nothing_and_says_so_once(kind: Any, anchors: list[str]) -> None:
    torch.manual_seed(5)
    model = Encoder()
    batch = [tokenized(anchors, 3), tokenized(["tall tree"] * len(anchors), 4)]
    loss = kind(model, "decoupled", temperature=0.1)
    with pytest.warns(UserWarning, match="a row without a negative") as said:
        value, *gradients = parameters_after(loss, model, batch)
    assert len(said) == 1 and value == 0 and all((x == 0).all() for x in gradients)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(batch, None) == 0
    with pytest.raises(SamtoneError, match="negative"):
        kind(model, "decoupled", temperature=0.1, no_negative="error")(batch, None)


def test_rows_with_negatives_are_as_before() -> None:
    torch.manual_seed(6)
    model = Encoder()
    batch = [tokenized(["a fox", "cold water", "who goes"], 3), tokenized(["tall tree", "water", "one step"], 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = SamToNeLoss(model, "decoupled", temperature=0.1)(batch, None)
    assert (
        torch.equal(got, SamToNeLoss(model, "decoupled", temperature=0.1, no_negative="error")(batch, None)) and got > 0
    )


@pytest.mark.sentence_transformers
@pytest.mark.parametrize("kind", CLASSES)
def test_an_empty_text_contributes_nothing_and_says_so_once(kind: Any) -> None:
    torch.manual_seed(7)
    model = static_model()
    batch = [features_of(model, ["a fox", "", "cold water"]), features_of(model, ["fox", "tree", "water"])]
    loss = kind(model, temperature=0.1)
    with pytest.warns(UserWarning, match="norm zero in `query`") as said:
        found = parameters_after(loss, model, batch)
    assert sum("norm zero" in str(w.message) for w in said) == 1
    assert all(x.isfinite().all() for x in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss([dict(column) for column in batch], None)
    with pytest.raises(SamtoneError, match="norm"):
        kind(model, temperature=0.1, zero_norm="error")([dict(column) for column in batch], None)
