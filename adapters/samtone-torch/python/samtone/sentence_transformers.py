"""Losses for the trainer of sentence-transformers, in place of its MultipleNegativesRankingLoss and the cached one.

    from samtone.sentence_transformers import SamToNeLoss

    loss = SamToNeLoss(model, temperature=0.05)
    trainer = SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss)

Columns are, in order, anchor, positive, and any number of hard negatives; labels are not used. This module imports nothing of
sentence-transformers: a model is whatever maps the features of a column to a dictionary with a `sentence_embedding`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _native
from .grad_cache import Chunks
from .loss import Loss
from .module import SamToNeLoss as Criterion

Features = dict[str, Any]


def _refused(argument: str, value: str, allowed: str) -> _native.SamtoneError:
    return _native.SamtoneError(f"argument `{argument}` is {value}; allowed: {allowed}")


def _texts(features: Features) -> list[bytes] | None:
    """The tokens of every text, without padding; None for inputs that have none."""
    tokens = features.get("input_ids")
    if not isinstance(tokens, Tensor):
        return None
    tokens = tokens.detach().cpu()
    if "offsets" in features:  # of a bag of embeddings: where each text begins
        pieces = torch.tensor_split(tokens, features["offsets"].detach().cpu()[1:])
    elif "cu_seq_lens_q" in features:  # texts without padding, one after the other
        pieces = torch.tensor_split(tokens.flatten(), features["cu_seq_lens_q"].detach().cpu()[1:-1].long())
    elif isinstance(features.get("attention_mask"), Tensor):
        mask = features["attention_mask"].detach().cpu().bool()
        pieces = tuple(row[keep] for row, keep in zip(tokens, mask))
    else:
        pieces = tokens.unbind(0)
    return [piece.to(torch.int64).numpy().tobytes() for piece in pieces]


def text_ids(columns: list[Features]) -> Tensor | None:
    """Equal numbers for equal texts (equal tokens, prompts included), over all columns one after the other. None if a column
    has no `input_ids`."""
    numbers: dict[bytes, int] = {}
    ids: list[int] = []
    for features in columns:
        texts = _texts(features)
        if texts is None:
            return None
        ids.extend(numbers.setdefault(text, len(numbers)) for text in texts)
    return torch.tensor(ids, dtype=torch.int64)


class SamToNeLoss(nn.Module):
    """The contrastive losses of samtone on (anchor, positive), (anchor, positive, negative) or (anchor, positive, negative_1,
    ..., negative_n) columns. Embeddings are compared by cosine.

    Args:
        model: A SentenceTransformer.
        loss: Name of a preset, or a `samtone.Loss`.
        temperature: tau. Default: 0.01, as SamToNe uses.
        scale: Instead of `temperature`, 1/tau, as MultipleNegativesRankingLoss calls it (its default is 20).
        learnable: None, ``"log_beta"`` or ``"tau"``: the temperature as a parameter of this module.
        mask_duplicates: Whether equal texts are never negatives of each other, by their tokens: repeated anchors in all
            blocks, repeated passages, be they positives or hard negatives, too. Inputs without tokens are not compared.
        hard_negative_scope: ``"all"``: hard negatives are everyone's, as in MultipleNegativesRankingLoss. ``"own"``: only
            their anchor sees them.
        margin, zero_norm, workspace_bytes, tile_skipping: As in `samtone.samtone_loss`.

    In distributed training each process takes negatives from its own batch.
    """

    def __init__(
        self,
        model: Any,
        loss: str | Loss = "samtone_query",
        *,
        temperature: float | None = None,
        scale: float | None = None,
        learnable: str | None = None,
        mask_duplicates: bool = True,
        hard_negative_scope: str = "all",
        margin: float | None = None,
        zero_norm: str = "error",
        workspace_bytes: int | None = None,
        tile_skipping: float | None = None,
    ) -> None:
        super().__init__()
        if temperature is not None and scale is not None:
            raise _refused("scale", "given together with `temperature`", "one of the two")
        if scale is not None:
            if not scale > 0:
                raise _refused("scale", str(scale), "a number above 0")
            temperature = 1 / scale
        self.model = model
        self.criterion = Criterion(
            loss,
            temperature=0.01 if temperature is None else temperature,
            learnable=learnable,
            hard_negative_scope=hard_negative_scope,
            margin=margin,
            zero_norm=zero_norm,
            workspace_bytes=workspace_bytes,
            tile_skipping=tile_skipping,
        )
        self.mask_duplicates = mask_duplicates

    @property
    def temperature(self) -> float:
        """tau as it is now."""
        return self.criterion.current_temperature()

    @property
    def scale(self) -> float:
        """1/tau as it is now."""
        return 1 / self.temperature

    def batch(self, columns: list[Features]) -> dict[str, Any]:
        """What the criterion takes beside embeddings: ids of texts, owners of hard negatives."""
        if len(columns) < 2:
            raise _refused(
                "sentence_features", f"{len(columns)} columns", "anchor, positive, and any number of negatives"
            )
        if not self.mask_duplicates:
            return {}
        return {"query_ids": text_ids(columns[:1]), "passage_ids": text_ids(columns[1:])}

    def loss_of(self, embeddings: list[Tensor], batch: dict[str, Any]) -> Tensor:
        """The loss of the columns' embeddings."""
        rows, negatives = len(embeddings[0]), len(embeddings) - 2
        if negatives > 0:
            owners = torch.arange(rows).repeat(negatives)
            batch = batch | {"hard_negative_owners": torch.cat([torch.full((rows,), -1), owners])}
        value: Tensor = self.criterion(embeddings[0], torch.cat(embeddings[1:]), **batch)
        return value

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar. `labels` are not used."""
        columns = list(sentence_features)
        batch = self.batch(columns)  # before modules of the model change their features
        return self.loss_of([self.model(features)["sentence_embedding"] for features in columns], batch)

    def get_config_dict(self) -> dict[str, Any]:
        """For model cards."""
        return {
            "loss": self.criterion.loss.spec,
            "temperature": self.criterion.temperature,
            "learnable": self.criterion.learnable,
            "mask_duplicates": self.mask_duplicates,
            "hard_negative_scope": self.criterion.hard_negative_scope,
            "margin": self.criterion.margin,
            "zero_norm": self.criterion.zero_norm,
            "workspace_bytes": self.criterion.workspace_bytes,
            "tile_skipping": self.criterion.tile_skipping,
        }

    @property
    def citation(self) -> str:
        """For model cards."""
        return """
@inproceedings{moiseev2023samtone,
    title={SamToNe: Improving Contrastive Loss for Dual Encoder Retrieval Models with Same Tower Negatives},
    author={Fedor Moiseev and Gustavo Hernandez Abrego and Peter Dornbach and Imed Zitouni and Enrique Alfonseca and Zhe Dong},
    booktitle={Findings of the Association for Computational Linguistics: ACL 2023},
    year={2023},
}
"""


def _rows(features: Features) -> int:
    if "cu_seq_lens_q" in features or "pixel_values" in features or "pixel_values_videos" in features:
        kind = "texts without padding" if "cu_seq_lens_q" in features else "images or videos"
        raise _refused("sentence_features", f"a batch of {kind}", "padded texts, or bags of tokens with `offsets`")
    if "offsets" in features:
        return len(features["offsets"])
    sizes = [len(value) for value in features.values() if isinstance(value, Tensor) and value.dim() > 0]
    if not sizes:
        raise _refused(
            "sentence_features", f"features {sorted(features)} without a tensor", "features with `input_ids`"
        )
    return sizes[0]


def _slice(features: Features, start: int, stop: int) -> Features:
    """The texts from `start` to `stop`; what is not a tensor with a row for each text is passed on as it is."""
    rows = _rows(features)
    if "offsets" in features:
        offsets, tokens = features["offsets"], features["input_ids"]
        first = int(offsets[start])
        last = int(offsets[stop]) if stop < rows else len(tokens)
        return features | {"offsets": offsets[start:stop] - first, "input_ids": tokens[first:last]}

    def part(value: Any) -> Any:
        return value[start:stop] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows else value

    return {name: part(value) for name, value in features.items()}


class _Deferred(torch.autograd.Function):
    """A loss that is known already, whose backward call encodes the chunks again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, replay: Any, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.replay, ctx.gradients = replay, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        ctx.replay(upstream)
        return None, None, None, *(gradient * upstream for gradient in ctx.gradients)


class CachedSamToNeLoss(SamToNeLoss):
    """`SamToNeLoss` with the memory of `mini_batch_size` texts whatever the size of the batch (see `samtone.grad_cache`): the
    same loss and gradients, one more forward pass of the model.

    Args:
        mini_batch_size: Texts of a column that are encoded at a time.
        others: As in `SamToNeLoss`.

    It takes padded texts, and bags of tokens with offsets (StaticEmbedding); texts without padding, images and videos are
    refused.
    """

    # What MatryoshkaLoss and others ask: the model is called again in the backward pass.
    uses_gradient_cache = True

    def __init__(
        self, model: Any, loss: str | Loss = "samtone_query", *, mini_batch_size: int = 32, **options: Any
    ) -> None:
        super().__init__(model, loss, **options)
        if mini_batch_size < 1:
            raise _refused("mini_batch_size", str(mini_batch_size), "1 or more")
        self.mini_batch_size = mini_batch_size

    def _chunks(self, features: Features) -> list[Features]:
        starts = range(0, _rows(features), self.mini_batch_size)
        return [_slice(features, start, start + self.mini_batch_size) for start in starts]

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar whose backward call encodes the texts again. `labels` are not used."""
        columns = list(sentence_features)
        batch = self.batch(columns)
        # The backward pass is outside of the autocast of the forward pass, and must encode as that did.
        kind = next((value.device.type for value in columns[0].values() if isinstance(value, Tensor)), "cpu")
        autocast = partial(
            torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )

        def encode(features: Features) -> Tensor:
            with autocast():
                # A copy: modules write into their features, and these are used again.
                embeddings: Tensor = self.model(dict(features))["sentence_embedding"]
                return embeddings

        towers = [Chunks(encode, self._chunks(features)) for features in columns]
        value = self.loss_of([tower.embeddings for tower in towers], batch)
        if not value.requires_grad:
            return value
        parameters = [parameter for parameter in self.criterion.parameters() if parameter.requires_grad]
        inputs = [*(tower.embeddings for tower in towers), *parameters]
        gradients = torch.autograd.grad(value, inputs)

        def replay(upstream: Tensor) -> None:
            for tower, gradient in zip(towers, gradients):
                tower.backward((gradient * upstream).to(gradient.dtype))

        known = value.detach().requires_grad_()
        result: Tensor = _Deferred.apply(known, replay, gradients[len(towers) :], *parameters)
        return result

    def get_config_dict(self) -> dict[str, Any]:
        """For model cards."""
        return super().get_config_dict() | {"mini_batch_size": self.mini_batch_size}
