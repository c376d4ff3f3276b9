"""Which rows features belong to: equal inputs by all that they have, and chunks of anything that models take."""

from __future__ import annotations

from typing import Any

import pytest
import samtone
import torch
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss, text_ids
from samtone.sentence_transformers.columns import Column
from sentence_models import TEXTS, Encoder, close, columns, parameters_after
from torch import Tensor, nn


def ids_of(*features: dict[str, Any]) -> list[int]:
    ids = text_ids(list(features))
    assert ids is not None
    return ids.tolist()


def packed(features: dict[str, Any]) -> dict[str, Any]:
    """The same texts without padding."""
    rows = [row[keep] for row, keep in zip(features["input_ids"], features["attention_mask"].bool())]
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    longest = max(len(row) for row in rows)
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "seq_idx": torch.cat([torch.full((len(row),), k) for k, row in enumerate(rows)])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def bag(features: dict[str, Any]) -> dict[str, Any]:
    """The same texts as a bag of tokens with offsets."""
    flat = packed(features)
    return {"input_ids": flat["input_ids"][0], "offsets": flat["cu_seq_lens_q"][:-1].long()}


def test_equal_texts_have_equal_ids_whatever_their_padding() -> None:
    ids = text_ids(columns(2)[1:])
    assert ids is not None
    flat = [text for name in ("positive", "negative_1", "negative_2") for text in TEXTS[name]]
    assert [[a == b for b in flat] for a in flat] == (ids[:, None] == ids[None]).tolist()
    left = {name: torch.zeros(6, 9, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    for row, (tokens, mask) in enumerate(zip(columns(0)[1]["input_ids"], columns(0)[1]["attention_mask"].bool())):
        left["input_ids"][row, 9 - int(mask.sum()) :] = tokens[mask]
        left["attention_mask"][row, 9 - int(mask.sum()) :] = 1
    assert ids_of(columns(0)[1], left) == 2 * ids_of(left)
    for other in (bag(columns(0)[1]), packed(columns(0)[1])):
        assert ids_of(other) == ids_of(columns(0)[1])


def test_ids_that_are_the_same_in_every_process() -> None:
    ours, theirs = columns(2), columns(2)[::-1]
    one, other = text_ids(ours, everywhere=True), text_ids(theirs, everywhere=True)
    plain = text_ids(ours)
    assert one is not None and other is not None and plain is not None
    assert torch.equal(one.view(4, 6), other.view(4, 6).flip(0))
    assert torch.equal(one[:, None] == one, plain[:, None] == plain)


def with_images(count: list[int], seed: int = 0) -> dict[str, Any]:
    """Rows of equal tokens, with so many images of 2 x 2 patches each."""
    generator = torch.Generator().manual_seed(seed)
    images = sum(count)
    return {
        "input_ids": torch.ones(len(count), 4, dtype=torch.int64),
        "attention_mask": torch.ones(len(count), 4, dtype=torch.int64),
        "pixel_values": torch.randn(4 * images, 6, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * images).reshape(-1, 3),
        "num_images_per_sample": torch.tensor(count),
    }


def test_equal_tokens_with_other_images_are_other_inputs() -> None:
    features = with_images([1, 1, 1, 1])
    assert ids_of(features) == [0, 1, 2, 3]
    features["pixel_values"][8:12] = features["pixel_values"][0:4]
    assert ids_of(features) == [0, 1, 0, 2]
    features["pixel_values"][11, 5] += 1e-6
    assert ids_of(features) == [0, 1, 2, 3]
    # Without counts a row has one image; other shapes of images are other images.
    del features["num_images_per_sample"]
    assert ids_of(features) == [0, 1, 2, 3]
    same = with_images([1, 1]) | {
        "pixel_values": torch.zeros(8, 6),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 4, 1]]),
    }
    assert ids_of(same) == [0, 1]


def test_rows_with_several_images_or_none() -> None:
    features = with_images([0, 2, 0, 1, 2])
    assert ids_of(features) == [0, 1, 0, 2, 3]
    features["pixel_values"][12:20] = features["pixel_values"][0:8]
    assert ids_of(features) == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(
    "name, values",
    [
        ("pixel_values", torch.zeros(4, 3, 2, 2)),  # images of CLIP
        ("pixel_values", torch.zeros(4, 3, 2, 2, dtype=torch.bfloat16)),
        ("input_features", torch.zeros(4, 5, 6, dtype=torch.float64)),  # audio
        ("input_values", torch.zeros(4, 9)),
        ("sentence_embedding", torch.zeros(4, 7)),  # bags of words
        ("token_type_ids", torch.zeros(4, 5, dtype=torch.int64)),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_any_feature_tells_inputs_apart(name: str, values: Tensor, text: bool) -> None:
    features: dict[str, Any] = {name: values.clone()}
    if text and name != "sentence_embedding":
        features |= {"input_ids": torch.ones(4, 5, dtype=torch.int64), "attention_mask": torch.ones(4, 5)}
    assert ids_of(features) == [0, 0, 0, 0]
    features[name][2].view(-1)[-1] = 1
    assert ids_of(features) == [0, 0, 1, 0]


def test_what_modules_have_left_among_features_is_no_input() -> None:
    """MatryoshkaLoss calls a loss for each of its dimensions with the same features."""
    features = columns(0)[0]
    before = ids_of(features)
    Encoder(0.5)(features)
    features["token_embeddings"] = torch.randn(6, 4, 16)
    assert ids_of(features) == before and len(set(before)) == 5


@pytest.mark.parametrize(
    "features",
    [
        with_images([1, 1]) | {"num_images_per_sample": torch.tensor([1, 0])},
        {"input_ids": torch.ones(4, 3, dtype=torch.int64), "pixel_values": torch.ones(3, 3, 2, 2)},
        {"input_ids": torch.ones(1, 3), "pixel_values": torch.ones(1, 2), "image_text_info": [0, 1]},
        {"anything": "else"},
    ],
)
def test_features_of_no_row_are_not_compared_and_say_so(features: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="equal inputs are not kept from being negatives of each other"):
        assert text_ids([features]) is None
    with pytest.raises(samtone.SamtoneError, match="`sentence_features` is features"):
        list(Column(features).parts(1))


def test_chunks_are_what_the_same_texts_alone_would_be() -> None:
    whole = columns(0)[1]
    for make in (packed, bag):
        parts = list(Column(make(whole)).parts(4))
        for part, rows in zip(parts, (slice(0, 4), slice(4, 6))):
            want = make({name: whole[name][rows] for name in ("input_ids", "attention_mask")})
            assert part.keys() == want.keys()
            for name, value in want.items():
                assert torch.equal(torch.as_tensor(part[name]), torch.as_tensor(value)), name
    first, second, third = Column(with_images([0, 2, 0, 0, 1])).parts(2)
    assert first["image_grid_thw"].shape == (2, 3) and first["pixel_values"].shape == (8, 6)
    assert "pixel_values" not in second and "image_grid_thw" not in second
    assert torch.equal(third["pixel_values"], with_images([0, 2, 0, 0, 1])["pixel_values"][8:])


class Packed(Encoder):
    """Takes texts without padding."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        ends = features["cu_seq_lens_q"]
        rows = self.table(features["input_ids"][0]).tensor_split(ends[1:-1].long())
        return {"sentence_embedding": self.dense(torch.tanh(torch.stack([row.mean(0) for row in rows])))}


def test_cached_texts_without_padding() -> None:
    torch.manual_seed(3)
    model = Packed()
    batch = [packed(features) for features in columns(1)]
    want = parameters_after(SamToNeLoss(model, temperature=0.1), model, batch)
    close(parameters_after(CachedSamToNeLoss(model, temperature=0.1, mini_batch_size=4), model, batch), want, 4)


class VisionLanguage(nn.Module):
    """A tiny random Qwen2-VL, as sentence-transformers calls models."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Qwen2VLConfig, Qwen2VLModel

        text = {
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "bos_token_id": 0,
            "eos_token_id": 0, "pad_token_id": 0,
        }  # fmt: skip
        vision = {
            "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3,
        }  # fmt: skip
        tokens = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}
        try:
            config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
        except TypeError:
            config = Qwen2VLConfig(**text, vision_config=vision, **tokens)
        self.model = Qwen2VLModel(config)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: x for name, x in features.items() if name != "num_images_per_sample"}
        return {"sentence_embedding": self.model(**inputs).last_hidden_state[:, -1]}


def pages(count: int, seed: int) -> dict[str, Any]:
    """Images of the same size, so that tokens are equal."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[3, 5, 5, 4, 7]] * count)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == 5).int(),
        "pixel_values": torch.randn(8 * count, 24, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 4]] * count),
    }


@pytest.mark.sentence_transformers
@pytest.mark.parametrize("cached", [False, True])
def test_a_vision_language_model(cached: bool) -> None:
    torch.manual_seed(4)
    model = VisionLanguage()
    tokens = torch.tensor([[8, 9], [10, 11], [12, 13], [14, 15], [16, 17]])
    texts = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": torch.zeros(5, 2).int(),
    }
    batch = [texts, pages(5, 1)]
    plain = SamToNeLoss(model, temperature=1.0, mask_duplicates=False)
    want = parameters_after(plain, model, batch)
    assert want[0] > 1
    loss = (
        CachedSamToNeLoss(model, temperature=1.0, mini_batch_size=2) if cached else SamToNeLoss(model, temperature=1.0)
    )
    close(parameters_after(loss, model, batch), want, len(want))
