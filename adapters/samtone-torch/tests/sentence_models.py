"""Models and texts for tests of the losses for sentence-transformers; nothing is downloaded. sentence-transformers is imported by
names that its oldest and its newest version have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    tensors = dict.fromkeys([*model.parameters(), *loss.parameters()])
    return [value.detach(), *(parameter.grad.clone() for parameter in tensors if parameter.grad is not None)]


def close(got: list[torch.Tensor], want: list[torch.Tensor], count: int) -> None:
    """Loss and gradients, so many tensors, agree."""
    assert len(got) == len(want) == count
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (a, b)


def alike(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """The loss (2e-6, relative) and all gradients together (3e-5, relative Frobenius) agree."""
    assert len(got) == len(want) > 1 and want[0] > 0.01
    assert abs(got[0] - want[0]) <= 2e-6 * want[0], (got[0], want[0])
    mine, judge = (torch.cat([x.flatten().double() for x in found[1:]]) for found in (got, want))
    assert (mine - judge).norm() <= 3e-5 * judge.norm(), (mine - judge).norm() / judge.norm()


def equal_training(their: Any, our: Any, model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """Two losses of a model have an equal value and equal gradients of its parameters: theirs in float64, ours in float32."""
    want = parameters_after(their, model.double(), [dict(column) for column in batch])
    got = parameters_after(our, model.float(), [dict(column) for column in batch])
    assert want[0].dtype == torch.float64
    alike(got, want)


def theirs() -> tuple[Any, Any]:
    """The modules `losses` and `models` of sentence-transformers, whose newer versions warn that they have moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import losses, models
    return losses, models


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: k + 1 for k, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def static_model() -> Any:
    """Bags of embeddings."""
    from sentence_transformers import SentenceTransformer

    static = theirs()[1].StaticEmbedding(_tokenizer(), embedding_dim=16)
    return SentenceTransformer(modules=[static], device="cpu")


def transformer_model(folder: Path) -> Any:
    """Two layers of BERT with the mean of tokens."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(8)
    BertModel(BertConfig(vocab_size=len(WORDS) + 1, **size, **options)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), unk_token="[UNK]", pad_token="[UNK]").save_pretrained(folder)
    models = theirs()[1]
    transformer = models.Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, models.Pooling(16, pooling_mode="mean")], device="cpu")


def features_of(model: Any, texts: list[str], **also: Any) -> dict[str, Any]:
    """Of a column, as the trainer's collator makes them."""
    call = model.preprocess if hasattr(model, "preprocess") else model.tokenize
    return dict(call(texts)) | also
