"""Losses for the trainer of sentence-transformers, on models that are made here; nothing is downloaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import samtone
import torch
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss
from sentence_models import (
    TEXTS,
    Encoder,
    close,
    columns,
    features_of,
    parameters_after,
    static_model,
    transformer_model,
)


@pytest.mark.parametrize("scope", ["all", "own"])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_columns_are_the_batch_they_describe(negatives: int, mask: bool, scope: str) -> None:
    torch.manual_seed(2)
    model = Encoder()
    loss = SamToNeLoss(model, "samtone_both", temperature=0.1, mask_duplicates=mask, hard_negative_scope=scope)
    batch = columns(negatives)
    embeddings = [model(dict(c))["sentence_embedding"] for c in batch]
    texts = [TEXTS[name] for name in list(TEXTS)[: 2 + negatives]]
    number = {text: k for k, text in enumerate(dict.fromkeys(t for column in texts for t in column))}
    options: dict[str, Any] = {}
    if mask:
        options["query_ids"] = [number[t] for t in texts[0]]
        options["passage_ids"] = [number[t] for column in texts[1:] for t in column]
        options["shared_ids"] = True
    if negatives:
        options |= {"hard_negative_owners": [-1] * 6 + list(range(6)) * negatives, "hard_negative_scope": scope}
    want = samtone.samtone_loss(
        embeddings[0], torch.cat(embeddings[1:]), loss="samtone_both", temperature=0.1, **options
    )
    assert torch.equal(loss(columns(negatives), None), want)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("size", [1, 4, 6, 50])
def test_cached_equals_one_batch(size: int, dropout: float) -> None:
    torch.manual_seed(3)
    model = Encoder(dropout)
    options: dict[str, Any] = {"temperature": 0.1, "learnable": "log_beta", "hard_negative_scope": "own"}
    cached = CachedSamToNeLoss(model, "samtone_both", mini_batch_size=size, **options)
    torch.manual_seed(4)
    got = parameters_after(cached, model, columns(2), 16.0)
    assert max(model.rows) <= size and len(model.rows) == 2 * 4 * -(-6 // size)
    if dropout:
        # In one batch dropout draws other masks; the embeddings of both encodings agree, which is all that can be asked.
        assert all(gradient.isfinite().all() for gradient in got)
        return
    want = parameters_after(SamToNeLoss(model, "samtone_both", **options), model, columns(2), 16.0)
    close(got, want, 5)


MATRYOSHKA: dict[str, Any] = {"matryoshka_dims": [12, 3, 8], "matryoshka_weights": [1.0, 0.25, 0.5]}
ASCENDING: dict[str, Any] = {"matryoshka_dims": [3, 8, 12], "matryoshka_weights": [0.25, 0.5, 1.0]}


@pytest.mark.parametrize("preset", samtone.PRESETS)
def test_dims_in_any_order(preset: str) -> None:
    torch.manual_seed(7)
    model = Encoder()
    given = SamToNeLoss(model, preset, temperature=0.1, mask_duplicates=False, **MATRYOSHKA)
    embeddings = [model(c)["sentence_embedding"] for c in columns(0)]
    options: dict[str, Any] = {"prefixes": [3, 8, 12], "prefix_weights": [0.25, 0.5, 1.0]}
    want = samtone.samtone_loss(*embeddings, loss=preset, temperature=0.1, **options)
    assert torch.equal(given(columns(0), None), want)
    for kind in (list, tuple, torch.tensor):
        other = {name: kind(values) for name, values in MATRYOSHKA.items()}
        loss = SamToNeLoss(model, preset, temperature=0.1, mask_duplicates=False, **other)
        assert torch.equal(loss(columns(0), None), want)


@pytest.mark.parametrize("size", [1, 4, 50])
def test_cached_with_dims_equals_one_batch(size: int) -> None:
    """Weights and the shortest dimension short of the end, too."""
    torch.manual_seed(3)
    model = Encoder()
    for dims in (MATRYOSHKA, {"matryoshka_dims": [7, 2]}):
        options: dict[str, Any] = {"temperature": 0.1, "learnable": "log_beta", **dims}
        cached = CachedSamToNeLoss(model, "samtone_both", mini_batch_size=size, **options)
        got = parameters_after(cached, model, columns(2), 16.0)
        want = parameters_after(SamToNeLoss(model, "samtone_both", **options), model, columns(2), 16.0)
        close(got, want, 5)
        with torch.no_grad():
            assert torch.allclose(cached(columns(2), None), want[0])


@pytest.mark.parametrize("cached", [False, True])
def test_entries_that_are_not_trained(cached: bool) -> None:
    model = Encoder()
    loss = (CachedSamToNeLoss if cached else SamToNeLoss)(model, matryoshka_dims=[5, 2])
    loss(columns(1), None).backward()
    gradient = model.dense.weight.grad
    assert gradient is not None and (gradient[:5] != 0).any() and (gradient[5:] == 0).all()


def test_zeros_in_the_shortest_prefix_are_said() -> None:
    model = Encoder()
    with torch.no_grad():
        model.dense.weight[:3], model.dense.bias[:3] = 0, 0
    for dims, weights, zeros in (([3, 12], None, True), ([3, 12], [0, 1], False), ([4, 12], None, False)):
        loss = SamToNeLoss(model, matryoshka_dims=dims, matryoshka_weights=weights, mask_duplicates=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert loss(columns(0), None).isfinite()
        sentences = [str(w.message) for w in said]
        if zeros:
            assert len(sentences) == 1 and "norm zero in `query`, in its first 3 entries, contributes" in sentences[0]
        else:
            assert sentences == []
        loss = SamToNeLoss(model, matryoshka_dims=dims, matryoshka_weights=weights, zero_norm="error")
        if zeros:
            with pytest.raises(samtone.SamtoneError, match="row 0 has norm zero in its first 3 entries"):
                loss(columns(0), None)
        else:
            loss(columns(0), None)


def test_cached_under_autocast_encodes_both_times_in_its_type() -> None:
    model = Encoder()
    cached = CachedSamToNeLoss(model, mini_batch_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cached(columns(1), None)
    value.backward()
    assert model.dense.weight.grad is not None and model.dense.weight.grad.isfinite().all()


def test_model_cards_have_every_option() -> None:
    options = {
        "temperature": 0.1, "learnable": "tau", "mask_duplicates": False, "hard_negative_scope": "own", "margin": 0.2,
        "zero_norm": "zero_gradient", "no_negative": "zero", "workspace_bytes": 1 << 24, "tile_skipping": 1e-3,
    }  # fmt: skip
    for make in (SamToNeLoss, CachedSamToNeLoss):
        config = make(Encoder(), "clip", **options, **MATRYOSHKA).get_config_dict()
        assert (options | ASCENDING).items() <= config.items() and not config.keys() & {"prefixes", "prefix_weights"}
        assert make(Encoder(), matryoshka_dims=(4, 2)).get_config_dict()["matryoshka_weights"] == [1.0, 1.0]
        for gathers in (False, True):
            config = make(Encoder(), gather_across_devices=gathers).get_config_dict()
            assert config["gather_across_devices"] is gathers and "group" not in config
        assert not [name for name in make(Encoder()).get_config_dict() if "matryoshka" in name or "prefix" in name]


def test_cached_without_gradients_encodes_once() -> None:
    model = Encoder()
    with torch.no_grad():
        value = CachedSamToNeLoss(model, mini_batch_size=4)(columns(0), None)
    assert not value.requires_grad and model.rows == [4, 2, 4, 2]


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: SamToNeLoss(Encoder(), temperature=0.1, scale=10.0), "`scale` is given together with `temperature`"),
        (lambda: SamToNeLoss(Encoder(), scale=0.0), "`scale` is 0.0; allowed: a number above 0"),
        (lambda: SamToNeLoss(Encoder())(columns(0)[:1]), "`sentence_features` is 1 columns"),
        (lambda: CachedSamToNeLoss(Encoder(), mini_batch_size=0), "`mini_batch_size` is 0"),
        (lambda: SamToNeLoss(Encoder())([*columns(0), None]), "`sentence_features` is a NoneType at column 2"),
        (
            lambda: SamToNeLoss(Encoder())([*columns(0), {k: v[:5] for k, v in columns(0)[1].items() if k[0] in "ai"}]),
            "`sentence_features` is columns of 6, 6, 5 rows; allowed: as many rows in each",
        ),
        (
            lambda: SamToNeLoss(Encoder(), matryoshka_dims=[13, 4])(columns(0)),
            "`matryoshka_dims` is 13; allowed: at most 12, the dimension of the embeddings",
        ),
        (
            lambda: CachedSamToNeLoss(Encoder(), matryoshka_dims=[4, 13], matryoshka_weights=[1, 0])(columns(0)),
            "`matryoshka_dims` is 13; allowed: at most 12, the dimension of the embeddings",
        ),
        (
            lambda: SamToNeLoss(Encoder(), matryoshka_dims=[8, 0]),
            "`matryoshka_dims` is 0 at position 1; allowed: different numbers of entries, each at least 1",
        ),
        (lambda: SamToNeLoss(Encoder(), matryoshka_dims=[8, 4, 8]), "`matryoshka_dims` is 8 at position 2, and before"),
        (lambda: SamToNeLoss(Encoder(), matryoshka_dims=[]), "`matryoshka_dims` is an empty list"),
        (lambda: SamToNeLoss(Encoder(), matryoshka_dims=8), "`matryoshka_dims` is a int; allowed: a list of integers"),
        (lambda: SamToNeLoss(Encoder(), matryoshka_dims=[8.0]), "`matryoshka_dims` is 8.0 at position 0"),
        (
            lambda: SamToNeLoss(Encoder(), matryoshka_weights=[1.0]),
            "`matryoshka_weights` is given without `matryoshka_dims`; allowed: none, or `matryoshka_dims` with them",
        ),
        (
            lambda: SamToNeLoss(Encoder(), matryoshka_dims=[8, 4], matryoshka_weights=[1.0]),
            "`matryoshka_weights` is a list of 1 elements; allowed: 2, one for each prefix",
        ),
        (
            lambda: SamToNeLoss(Encoder(), matryoshka_dims=[8, 4], matryoshka_weights=[-1.0, 1]),
            "`matryoshka_weights` is -1.0 at position 0; allowed: 0, or from 1e-30 to 1e30",
        ),
        (
            lambda: SamToNeLoss(Encoder(), matryoshka_dims=[8, 4], matryoshka_weights=[0, 0]),
            "`matryoshka_weights` is 0 for every prefix",
        ),
        (lambda: SamToNeLoss(Encoder(), group="0"), "`group` is given; allowed: `gather_across_devices=True`"),
        (lambda: SamToNeLoss(Encoder(), prefixes=[4]), "`prefixes` is given; allowed: `matryoshka_dims`"),
        (
            lambda: CachedSamToNeLoss(Encoder(), matryoshka_dims=[4], prefix_weights=[2.0]),
            "`prefix_weights` is given; allowed: `matryoshka_weights`, as MatryoshkaLoss calls it",
        ),
    ],
)
def test_refused(make: Any, sentence: str) -> None:
    with pytest.raises(samtone.SamtoneError) as error:
        make()
    assert sentence in str(error.value)


@pytest.mark.sentence_transformers
@pytest.mark.parametrize("cached", [False, True])
def test_prompts_that_are_not_pooled(cached: bool, tmp_path: Path) -> None:
    """Pooling that leaves out the prompt writes into the attention mask, in older versions into that of the features."""
    model = transformer_model(tmp_path)
    model.set_pooling_include_prompt(False)

    def batch() -> list[dict[str, Any]]:
        return [
            features_of(model, [f"the red {text}" for text in TEXTS[name]], prompt_length=2)
            for name in ("anchor", "positive", "negative_1")
        ]

    options: dict[str, Any] = {"temperature": 0.1, "mask_duplicates": False}
    loss = CachedSamToNeLoss(model, mini_batch_size=4, **options) if cached else SamToNeLoss(model, **options)
    got = parameters_after(loss, model, batch())
    value = loss.loss_of([model(features)["sentence_embedding"] for features in batch()], {})
    model.zero_grad()
    value.backward()
    want = [value.detach(), *(x.grad for x in model.parameters() if x.grad is not None)]
    close(got, want, len(want))


@pytest.mark.sentence_transformers
def test_plain_loop_and_prompts() -> None:
    torch.manual_seed(6)
    model = static_model()
    prompts = ["the ", "", "", ""]
    batch = [features_of(model, [prompt + t for t in texts]) for texts, prompt in zip(TEXTS.values(), prompts)]
    for loss in (SamToNeLoss(model, temperature=0.1), CachedSamToNeLoss(model, temperature=0.1, mini_batch_size=4)):
        model.zero_grad()
        loss([dict(features) for features in batch], None).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("preset", samtone.PRESETS)
def test_each_preset_cites_its_own_paper(preset: str) -> None:
    keys = {
        "info_nce": "oord2018", "bidirectional": "yang2019", "clip": "radford2021", "pair": "ren2021", "gte": "li2023",
        "qwen3": "zhang2025", "decoupled": "yeh2022",
    }  # fmt: skip
    key = keys.get(preset, "moiseev2023samtone")
    plain, cached = (make(Encoder(), preset).citation for make in (SamToNeLoss, CachedSamToNeLoss))
    assert key in plain and plain.count("@") == 1
    assert key in cached and "gao2021" in cached and cached.count("@") == 2
    for make in (SamToNeLoss, CachedSamToNeLoss):
        nested = make(Encoder(), preset, matryoshka_dims=[4]).citation
        assert key in nested and "kusupati2022" in nested and nested.count("@") == 2 + (make is CachedSamToNeLoss)


def test_other_losses_cite_what_they_are() -> None:
    custom = samtone.Loss.custom("clip", [samtone.Group(1.0, ["qp", "pq"], 2)])
    assert "oord2018" in SamToNeLoss(Encoder(), custom).citation
    assert "ren2021" in SamToNeLoss(Encoder(), samtone.Loss.pair(0.4)).citation
