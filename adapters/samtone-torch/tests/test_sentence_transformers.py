"""Losses for the trainer of sentence-transformers, on models that are made here; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import samtone
import torch
from conftest import missing
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss, text_ids
from torch import nn

needs_sentence_transformers = pytest.mark.skipif(
    missing("sentence-transformers", "sentence_transformers"), reason="sentence-transformers is not installed"
)

TEXTS = {
    "anchor": ["a red fox", "the tall tree", "a red fox", "cold water", "one small step", "who goes there"],
    "positive": ["a fox", "tree", "red fox", "water is cold", "a step", "the tree"],
    "negative_1": ["a tree", "fox", "water", "a fox", "there is water", "one red tree"],
    "negative_2": ["tall water", "cold fox", "red tree", "there goes one", "who is tall", "tree"],
}
WORDS = sorted({word for column in TEXTS.values() for text in column for word in text.split()})


class Encoder(nn.Module):
    """A model of padded texts, as sentence-transformers calls it: features in, features with an embedding out."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(len(WORDS) + 1, 16)
        self.dense = nn.Linear(16, 12)
        self.dropout = nn.Dropout(dropout)
        self.rows: list[int] = []

    def __getitem__(self, index: int) -> nn.Module:
        """The modules of a model, as sentence-transformers looks at them."""
        return self.dense

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(len(features["input_ids"]))
        mask = features["attention_mask"][..., None].float()
        mean = (self.table(features["input_ids"]) * mask).sum(1) / mask.sum(1)
        features["sentence_embedding"] = self.dense(self.dropout(torch.tanh(mean)))
        return features


def tokenized(texts: list[str], width: int) -> dict[str, Any]:
    rows = [[1 + WORDS.index(word) for word in text.split()] for text in texts]
    padded = [row + [0] * (width - len(row)) for row in rows]
    ids = torch.tensor(padded)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "task": "anything", "width": width}


def columns(negatives: int) -> list[dict[str, Any]]:
    names = ["anchor", "positive", "negative_1", "negative_2"][: 2 + negatives]
    return [tokenized(TEXTS[name], 4 + k) for k, name in enumerate(names)]


def parameters_after(
    loss: Any, model: nn.Module, batch: list[dict[str, Any]], upstream: float = 1.0
) -> list[torch.Tensor]:
    """The loss, and all gradients."""
    loss.zero_grad()
    model.zero_grad()
    value = loss(batch, None)
    (value * upstream).backward()
    tensors = [*model.parameters(), *loss.criterion.parameters()]
    return [value.detach(), *(parameter.grad.clone() for parameter in tensors if parameter.grad is not None)]


def test_equal_texts_have_equal_ids_whatever_their_padding() -> None:
    ids = text_ids(columns(2)[1:])
    assert ids is not None
    flat = [text for name in ("positive", "negative_1", "negative_2") for text in TEXTS[name]]
    assert [[a == b for b in flat] for a in flat] == (ids[:, None] == ids[None]).tolist()
    assert text_ids([{"pixel_values": torch.ones(2, 3)}]) is None
    # The same texts as a bag of tokens with offsets, and without padding.
    rows = [row[keep] for c in columns(0)[1:] for row, keep in zip(c["input_ids"], c["attention_mask"].bool())]
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    bag = {"input_ids": torch.cat(rows), "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])}
    packed = {
        "input_ids": torch.cat(rows)[None],
        "cu_seq_lens_q": torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()]),
    }
    for other in (bag, packed):
        assert torch.equal(text_ids([other]), text_ids(columns(0)[1:]))  # type: ignore[arg-type]


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
    assert len(got) == len(want) == 5
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


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
        "zero_norm": "zero_gradient", "workspace_bytes": 1 << 24, "tile_skipping": 1e-3,
    }  # fmt: skip
    for make in (SamToNeLoss, CachedSamToNeLoss):
        assert options.items() <= make(Encoder(), "clip", **options).get_config_dict().items()


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
        (
            lambda: CachedSamToNeLoss(Encoder())([{"pixel_values": torch.ones(2, 2)}] * 2),
            "a batch of images or videos; allowed: padded texts",
        ),
    ],
)
def test_refused(make: Any, sentence: str) -> None:
    with pytest.raises(samtone.SamtoneError) as error:
        make()
    assert sentence in str(error.value)


def static_model() -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: k + 1 for k, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


@needs_sentence_transformers
@pytest.mark.parametrize("cached", [False, True])
def test_trainer(cached: bool, tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    torch.manual_seed(5)
    model = static_model()
    options: dict[str, Any] = {"temperature": 0.1, "hard_negative_scope": "own", "learnable": "log_beta"}
    loss = CachedSamToNeLoss(model, mini_batch_size=2, **options) if cached else SamToNeLoss(model, **options)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=15,
        per_device_train_batch_size=6,
        learning_rate=0.05,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset = Dataset.from_dict(TEXTS)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(curve) == 15 and curve[-1] < 0.5 * curve[0]
    assert abs(loss.temperature - 0.1) > 0.01, "the trainer's optimizer has not got the parameters of the loss"
    # For the model card, as JSON.
    assert loss.get_config_dict()["loss"] == "samtone_query" and "SamToNe" in loss.citation
    model.save(str(tmp_path / "model"))
    assert "SamToNe" in (tmp_path / "model" / "README.md").read_text()


@needs_sentence_transformers
def test_plain_loop_and_prompts() -> None:
    torch.manual_seed(6)
    model = static_model()
    prompts = ["the ", "", "", ""]
    batch = [model.preprocess(texts, prompt=prompt) for texts, prompt in zip(TEXTS.values(), prompts)]
    for loss in (SamToNeLoss(model, temperature=0.1), CachedSamToNeLoss(model, temperature=0.1, mini_batch_size=4)):
        model.zero_grad()
        loss([dict(features) for features in batch], None).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
