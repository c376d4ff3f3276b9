"""Losses of sentence-transformers around ours: MatryoshkaLoss, AdaptiveLayerLoss, SpladeLoss. What they give around the plain class
is what docs/migration.md says; around the cached class it is the same."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss
from sentence_models import (
    TEXTS,
    alike,
    close,
    equal_training,
    features_of,
    parameters_after,
    static_model,
    theirs,
    transformer_model,
)

pytestmark = pytest.mark.sentence_transformers
OPTIONS: dict[str, Any] = {"temperature": 0.1, "learnable": "log_beta"}


def batch(model: Any, negatives: int = 1) -> list[dict[str, Any]]:
    return [features_of(model, TEXTS[name]) for name in list(TEXTS)[: 2 + negatives]]


def matryoshka(model: Any, loss: Any) -> Any:
    width = 16
    return theirs()[0].MatryoshkaLoss(model, loss, [width, width // 2, width // 4], [1.0, 0.5, 0.25])


def adaptive(model: Any, loss: Any) -> Any:
    return theirs()[0].AdaptiveLayerLoss(model, loss, n_layers_per_step=-1)


def both(model: Any, loss: Any, dims_per_step: int = -1) -> Any:
    weights = [1.0, 0.5]
    return theirs()[0].Matryoshka2dLoss(
        model, loss, [16, 8], weights, n_layers_per_step=-1, n_dims_per_step=dims_per_step
    )


@pytest.mark.parametrize("wrap, static", [(matryoshka, False), (matryoshka, True), (adaptive, False)])
def test_around_the_cached_class(wrap: Callable[[Any, Any], Any], static: bool, tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = static_model() if static else transformer_model(tmp_path)
    want = parameters_after(wrap(model, SamToNeLoss(model, **OPTIONS)), model, batch(model), 3.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cached = wrap(model, CachedSamToNeLoss(model, mini_batch_size=4, **OPTIONS))
        close(parameters_after(cached, model, batch(model), 3.0), want, len(want))
    at_once = [str(w.message) for w in said if "the batch is encoded at once" in str(w.message)]
    assert bool(at_once) == (wrap is not matryoshka or not _offers_gradient_cache())
    if at_once:
        assert ("AdaptiveLayerLoss" if wrap is adaptive else "MatryoshkaLoss") in at_once[0]


DIMS: dict[str, Any] = {"matryoshka_dims": [16, 8, 4], "matryoshka_weights": [1.0, 0.5, 0.25]}


@pytest.mark.parametrize("kind", [SamToNeLoss, CachedSamToNeLoss])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("loss", ["samtone_both", "qwen3", "decoupled"])
def test_dims_are_matryoshka_loss_around(loss: str, static: bool, kind: Any, tmp_path: Path) -> None:
    """Theirs around our losses, the cached one chunk by chunk where theirs allows it, and ours with dimensions of its own."""
    torch.manual_seed(13)
    model = static_model() if static else transformer_model(tmp_path)
    chunks = {"mini_batch_size": 4} if kind is CachedSamToNeLoss else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the batch is encoded at once")
        around = matryoshka(model, kind(model, loss, **chunks, **OPTIONS))
        want = parameters_after(around, model, batch(model), 3.0)
    got = parameters_after(kind(model, loss, **chunks, **OPTIONS, **DIMS), model, batch(model), 3.0)
    alike(got, want)
    assert not torch.allclose(got[0], kind(model, loss, **chunks, **OPTIONS)(batch(model), None))


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_dims_are_matryoshka_loss_around_theirs(cached: bool, negatives: int, tmp_path: Path) -> None:
    """Around MultipleNegativesRankingLoss, for whose cached class theirs has a way of its own."""
    model = transformer_model(tmp_path)
    options: dict[str, Any] = {"scale": 10.0} | ({"mini_batch_size": 4} if cached else {})
    name = f"{'Cached' if cached else ''}MultipleNegativesRankingLoss"
    their = matryoshka(model, getattr(theirs()[0], name)(model, **options))
    kind: Any = CachedSamToNeLoss if cached else SamToNeLoss
    our = kind(model, "info_nce", mask_duplicates=False, **options, **DIMS)
    equal_training(their, our, model, batch(model, negatives))


@pytest.mark.parametrize("kind", [SamToNeLoss, CachedSamToNeLoss])
def test_dims_within_other_wrappers(kind: Any, tmp_path: Path) -> None:
    """AdaptiveLayerLoss around dimensions of ours is Matryoshka2dLoss; MatryoshkaLoss around them is refused where it cuts too short."""
    model = transformer_model(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the batch is encoded at once")
        want = parameters_after(both(model, SamToNeLoss(model, **OPTIONS)), model, batch(model))
        dims: dict[str, Any] = {"matryoshka_dims": [16, 8], "matryoshka_weights": [1.0, 0.5]}
        got = parameters_after(adaptive(model, kind(model, **OPTIONS, **dims)), model, batch(model))
        close(got, want, len(want))
        with pytest.raises(ValueError, match="`matryoshka_dims` is 16; allowed: at most 8, the dimension"):
            matryoshka(model, kind(model, **DIMS))(batch(model), None)


@pytest.mark.parametrize("learnable", [None, "log_beta"])
@pytest.mark.parametrize("dims_per_step", [-1, 1])
def test_the_cached_class_under_two_wrappers(dims_per_step: int, learnable: str | None, tmp_path: Path) -> None:
    """AdaptiveLayerLoss around MatryoshkaLoss, which in newer versions replaces what only chunks go through."""
    model = transformer_model(tmp_path)
    options = OPTIONS | {"learnable": learnable}

    def after(loss: Any) -> list[torch.Tensor]:
        random.seed(5)  # draws dimensions
        return parameters_after(both(model, loss, dims_per_step), model, batch(model), 3.0)

    want = after(SamToNeLoss(model, **options))
    with pytest.warns(UserWarning, match="the batch is encoded at once"):
        got = after(CachedSamToNeLoss(model, mini_batch_size=4, **options))
    close(got, want, len(want))
    with torch.no_grad():
        values = []
        for kind in (SamToNeLoss, CachedSamToNeLoss):
            random.seed(5)
            values.append(both(model, kind(model, **options), dims_per_step)(batch(model), None))
    assert torch.allclose(values[0], want[0]) and torch.allclose(values[1], want[0])


def _offers_gradient_cache() -> bool:
    """Whether MatryoshkaLoss takes cached losses other than its own."""
    try:
        from sentence_transformers.base.losses import uses_gradient_cache
    except ImportError:
        return False
    return callable(uses_gradient_cache)


@pytest.mark.parametrize("wrap", [matryoshka, adaptive, both])
def test_around_the_plain_class_as_around_theirs(wrap: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    model = transformer_model(tmp_path)
    their = wrap(model, theirs()[0].MultipleNegativesRankingLoss(model, scale=10.0))
    our = wrap(model, SamToNeLoss(model, "info_nce", scale=10.0, mask_duplicates=False))
    equal_training(their, our, model, batch(model, 2))


def test_repeated_texts_are_masked_in_every_dimension(tmp_path: Path) -> None:
    """Features of the later calls have embeddings among them, which dropout makes different for equal texts."""
    model = transformer_model(tmp_path)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    seen = []

    class Watched(SamToNeLoss):
        def batch(self, columns: Any) -> Any:
            seen.append(super().batch(columns))
            return seen[-1]

    matryoshka(model, Watched(model, temperature=0.1))(batch(model), None).backward()
    assert len(seen) == 3 and len(set(seen[0]["query_ids"].tolist())) == 5
    for later in seen[1:]:
        assert all(torch.equal(later[name], seen[0][name]) for name in ("query_ids", "passage_ids"))


def test_splade() -> None:
    """It passes embeddings, no texts."""
    from sentence_transformers.sparse_encoder.losses import SpladeLoss

    torch.manual_seed(12)
    model = static_model()
    weights = {"document_regularizer_weight": 1e-3, "query_regularizer_weight": 1e-3}
    loss = SpladeLoss(model, SamToNeLoss(model, **OPTIONS), **weights)
    with pytest.warns(UserWarning, match="where only embeddings are passed"):
        parts = loss(batch(model), None)
    want = SamToNeLoss(model, **OPTIONS, mask_duplicates=False)(batch(model), None)
    assert torch.allclose(parts["base_loss"], want)
    sum(parts.values()).backward()
    assert loss.loss.criterion.log_beta.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpladeLoss(model, SamToNeLoss(model, mask_duplicates=False), **weights)(batch(model), None)
