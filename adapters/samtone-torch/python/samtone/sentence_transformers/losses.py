"""The losses as modules that the trainer calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import Unpack

from .. import _native, processes
from ..arguments import Integers, Numbers, listed
from ..grad_cache import Chunks, backward
from ..loss import Loss
from ..module import SamToNeLoss as Criterion
from ..options import Options, Settings, text_of
from .citations import GRAD_CACHE, MATRYOSHKA, citation
from .columns import Column, Features, refused, text_ids
from .temperature import Averaged, follow_trainer, processes_of, wrappers

# What users of MatryoshkaLoss call these options.
_NAMES = {"prefixes": "matryoshka_dims", "prefix_weights": "matryoshka_weights"}


class SamToNeLoss(nn.Module):
    """The contrastive losses of samtone on (anchor, positive), (anchor, positive, negative) or (anchor, positive, negative_1,
    ..., negative_n) columns. Embeddings are compared by cosine.

    Args:
        model: A SentenceTransformer.
        loss: Name of a preset, or a `samtone.Loss`.
        temperature: tau. Default: 0.01, as SamToNe uses.
        scale: Instead of `temperature`, 1/tau, as MultipleNegativesRankingLoss calls it (its default is 20).
        learnable: None, ``"log_beta"`` or ``"tau"``: the temperature as a parameter of this module.
        mask_duplicates: Whether equal inputs are never negatives of each other, by all their features: repeated anchors in all
            blocks, repeated passages, be they positives or hard negatives, too, and anchors that are passages of other rows
            (`shared_ids` of `samtone.samtone_loss`).
        hard_negative_scope: ``"all"``: hard negatives are everyone's, as in MultipleNegativesRankingLoss. ``"own"``: only
            their anchor sees them.
        zero_norm, no_negative: As in `samtone.samtone_loss`. None: embeddings of norm zero, such as that of an empty text in
            StaticEmbedding, and rows without a negative, such as a last batch of one row with ``"decoupled"``, contribute nothing,
            with one warning where the loss is on the CPU. On a GPU there is none, because the host would wait for it in each step.
        matryoshka_dims, matryoshka_weights: Embeddings are trained at these numbers of leading entries, in any order, with these
            weights (default: 1 each), as in MatryoshkaLoss around this loss. One pass computes all of them: `prefixes` and
            `prefix_weights` of `samtone.samtone_loss`.
        gather_across_devices: Whether the processes of a distributed training compute the loss of all their batches together, so that
            each row has the negatives of all processes. They may have different numbers of rows. It needs embeddings on the CPU.
            Otherwise each process takes negatives from its own batch.
        margin, workspace_bytes, tile_skipping: As in `samtone.samtone_loss`.
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
        matryoshka_dims: Integers | None = None,
        matryoshka_weights: Numbers | None = None,
        gather_across_devices: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if temperature is not None and scale is not None:
            raise refused("scale", "given together with `temperature`", "one of the two")
        if scale is not None:
            if not scale > 0:
                raise refused("scale", str(scale), "a number above 0")
            temperature = 1 / scale
        self.model = model
        for name in _NAMES.keys() & options.keys():
            raise refused(name, "given", f"`{_NAMES[name]}`, as MatryoshkaLoss calls it")
        for name in {"group", "reduction"} & options.keys():
            raise refused(name, "given", "`gather_across_devices=True`, which takes the processes of the trainer")
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        matryoshka = _matryoshka(matryoshka_dims, matryoshka_weights)
        defaults = {"hard_negative_scope": "all", "zero_norm": "zero_gradient", "no_negative": "zero"}
        self.criterion = Criterion(
            loss,
            temperature=0.01 if temperature is None else temperature,
            learnable=learnable,
            **(defaults | given | matryoshka),
        )
        kept = zip(*matryoshka.values()) if matryoshka else ()
        # The shortest prefix, which is 0 wherever a longer one is.
        self._shortest = next((dim for dim, weight in kept if weight > 0), None)
        self.mask_duplicates = mask_duplicates
        self.gather_across_devices = gather_across_devices
        # Policies that nobody asked for: what they leave out is said once.
        self._unsaid = {"zero_norm", "no_negative"} - given.keys()
        if all(group.positive_copies > 0 for group in self.criterion.loss.groups):
            self._unsaid.discard("no_negative")  # the positive alone is a softmax

    @property
    def temperature(self) -> float:
        """tau as it is now."""
        return self.criterion.temperature

    @property
    def scale(self) -> float:
        """1/tau as it is now."""
        return 1 / self.temperature

    def learned_temperature(self) -> dict[str, nn.Parameter]:
        """The parameter, by its name in this module, if the temperature is learned."""
        return {f"criterion.{name}": x for name, x in self.criterion.named_parameters() if x.requires_grad}

    def columns(self, sentence_features: Iterable[Features]) -> list[Features]:
        """The columns, looked at before modules of the model change them.

        Raises:
            SamtoneError: If they are not what a trainer passes.
        """
        columns = list(sentence_features)
        if len(columns) < 2:
            raise refused(
                "sentence_features", f"{len(columns)} columns", "anchor, positive, and any number of negatives"
            )
        for index, features in enumerate(columns):
            if not isinstance(features, Mapping):
                raise refused(
                    "sentence_features",
                    f"a {type(features).__name__} at column {index}",
                    "a dictionary for each column",
                )
        if self.learned_temperature():
            follow_trainer()
        return columns

    def batch(self, columns: list[Features]) -> dict[str, Any]:
        """What the criterion takes beside embeddings and owners of hard negatives: ids of equal inputs."""
        ids = text_ids(columns, everywhere=self._together() is not None) if self.mask_duplicates else None
        if ids is None:
            return {}
        rows = Column(columns[0]).rows
        return {"query_ids": ids[:rows], "passage_ids": ids[rows:], "shared_ids": True}

    def _together(self) -> str | None:
        """The processes that compute the loss together, if some do: those that average the model's gradients, or else all."""
        if not (self.gather_across_devices and dist.is_available() and dist.is_initialized()):
            return None
        return processes.name_of(processes_of(self.model) or dist.group.WORLD)

    def loss_of(self, embeddings: list[Tensor], batch: dict[str, Any]) -> Tensor:
        """The loss of the columns' embeddings."""
        together = self._together()
        if together is None:
            return self._evaluated(*self._inputs(embeddings, batch))
        # Whatever is wrong with the columns of one process, the others must not wait for it.
        with processes.told(processes.ranks_of(together)):
            if embeddings[0].device.type != "cpu":
                value = f"True, and embeddings are on {embeddings[0].device}"
                raise refused("gather_across_devices", value, "False, or embeddings on the CPU")
            inputs, batch = self._inputs(embeddings, batch)
        return self._evaluated(inputs, batch | {"group": together, "reduction": "mean"})

    def _inputs(self, embeddings: list[Tensor], batch: dict[str, Any]) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Queries and passages, and what the criterion takes beside them."""
        sizes = [len(column) for column in embeddings]
        rows, negatives = sizes[0], len(sizes) - 2
        if len(set(sizes)) > 1:
            raise refused(
                "sentence_features",
                f"columns of {', '.join(map(str, sizes))} rows",
                "as many rows in each; give every anchor a negative in each column of negatives, or leave the row out",
            )
        if negatives > 0:
            owners = torch.arange(rows).repeat(negatives)
            batch = batch | {"hard_negative_owners": torch.cat([torch.full((rows,), -1), owners])}
        longest, dim = max(self.criterion.options.get("prefixes") or [0]), embeddings[0].shape[1]
        if longest > dim:
            raise refused("matryoshka_dims", str(longest), f"at most {dim}, the dimension of the embeddings")
        return (embeddings[0], torch.cat(embeddings[1:])), batch

    def _evaluated(self, inputs: tuple[Tensor, Tensor], batch: dict[str, Any]) -> Tensor:
        """The loss, after what contributes nothing has been told of."""
        group = processes_of(self.model)
        learned = self.criterion.named_parameters() if group is not None else ()
        averaged = {name: Averaged.apply(x, group) for name, x in learned}

        def evaluate() -> Tensor:
            value: Tensor = functional_call(self.criterion, averaged, inputs, batch)
            return value

        if inputs[0].device.type != "cpu":
            return evaluate()
        for name, x in zip(("query", "passage"), inputs):
            if "zero_norm" in self._unsaid and not x.detach()[:, : self._shortest].any(dim=1).all():
                where = f", in its first {self._shortest} entries," if self._shortest else ""
                self._say("zero_norm", f"an embedding of norm zero in `{name}`{where}")
        if "no_negative" not in self._unsaid:
            return evaluate()
        self.criterion.options["no_negative"] = "error"
        try:
            return evaluate()
        except _native.SamtoneError as error:
            self.criterion.options["no_negative"] = "zero"
            value = evaluate()  # any other error comes again
            self._say("no_negative", f"a row without a negative ({error})")
            return value
        finally:
            self.criterion.options["no_negative"] = "zero"

    def _say(self, policy: str, what: str) -> None:
        """Warns of what contributes nothing, once for each policy that nobody asked for."""
        self._unsaid.remove(policy)
        warnings.warn(f'{what} contributes nothing to the loss; `{policy}="error"` refuses it', stacklevel=5)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of the columns' embeddings, for losses that encode by themselves, as SpladeLoss does. They pass no inputs, so
        equal ones are not kept from being negatives of each other. `labels` are not used."""
        if self.mask_duplicates:
            warnings.warn(
                "equal inputs are not kept from being negatives of each other where only embeddings are passed; use "
                "`BatchSamplers.NO_DUPLICATES`; `mask_duplicates=False` says that this is meant",
                stacklevel=2,
            )
        return self.loss_of(list(embeddings), {})

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar. `labels` are not used."""
        columns = self.columns(sentence_features)
        batch = self.batch(columns)
        return self.loss_of([self.model(features)["sentence_embedding"] for features in columns], batch)

    def get_config_dict(self) -> dict[str, Any]:
        """For model cards. A learned temperature is that of now, in as many digits as say something."""
        learned = self.criterion.learnable is not None
        return {
            "loss": self.criterion.loss.spec,
            "temperature": float(f"{self.temperature:.6g}") if learned else self.temperature,
            "learnable": self.criterion.learnable,
            "mask_duplicates": self.mask_duplicates,
            "gather_across_devices": self.gather_across_devices,
        } | {_NAMES.get(name, name): value for name, value in self.criterion.options.items()}

    @property
    def citation(self) -> str:
        """For model cards."""
        return citation(self.criterion.loss.spec) + ("" if self._shortest is None else MATRYOSHKA)


def _matryoshka(dims: Any, weights: Any) -> dict[str, Any]:
    """Both, in any order, as options of the criterion; none if there are none."""
    dims, weights = (listed(name, x, kind) for name, x, kind in zip(_NAMES.values(), (dims, weights), (int, float)))
    try:
        # Their number and the weights, at the positions where the caller has them.
        numbered = {"prefixes": dims and range(1, len(dims) + 1), "prefix_weights": weights}
        Settings(text_of("info_nce", numbered), 1.0).native()
    except _native.SamtoneError as error:
        sentence = str(error)
        for name, theirs in _NAMES.items():
            sentence = sentence.replace(f"`{name}`", f"`{theirs}`")
        raise _native.SamtoneError(sentence) from None
    if dims is None:
        return {}
    for position, dim in enumerate(dims):
        if dim < 1 or dim in dims[:position]:
            value = f"{dim} at position {position}" + (", and before" if dim in dims[:position] else "")
            raise refused("matryoshka_dims", value, "different numbers of entries, each at least 1")
    ascending = sorted(zip(dims, [1.0] * len(dims) if weights is None else weights))
    return dict(zip(_NAMES, map(list, zip(*ascending))))


class _Known(torch.autograd.Function):
    """A loss whose gradients by some of what it depends on are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return upstream, None, *((gradient * upstream).to(gradient.dtype) for gradient in ctx.gradients)


class CachedSamToNeLoss(SamToNeLoss):
    """`SamToNeLoss` with the memory of `mini_batch_size` texts whatever the size of the batch (see `samtone.grad_cache`): the
    same loss and gradients, one more forward pass of the model.

    Args:
        mini_batch_size: Texts of a column that are encoded at a time.
        others: As in `SamToNeLoss`.

    It takes what `SamToNeLoss` takes, where all features say which rows they belong to: padded texts, bags of tokens with
    offsets (StaticEmbedding), texts without padding, images and videos in patches. In MatryoshkaLoss of sentence-transformers
    before 6 and in AdaptiveLayerLoss, which replace the model's `forward` only until the backward pass, it encodes the batch at once,
    with a warning.
    """

    # What MatryoshkaLoss and others ask: the model is called again in the backward pass.
    uses_gradient_cache = True

    def __init__(
        self, model: Any, loss: str | Loss = "samtone_query", *, mini_batch_size: int = 32, **options: Any
    ) -> None:
        super().__init__(model, loss, **options)
        if mini_batch_size < 1:
            raise refused("mini_batch_size", str(mini_batch_size), "1 or more")
        self.mini_batch_size = mini_batch_size

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
        batch: dict[str, Any] | None = None,
    ) -> Tensor:
        """The loss of embeddings in chunks, column by column, which MatryoshkaLoss calls once for each of its dimensions.
        `with_backward` leaves gradients with the embeddings, and a loss that only a learned temperature is to be differentiated
        by. `batch` is what `batch` gives. `labels` are not used."""
        value = self.loss_of([torch.cat(chunks) for chunks in reps], batch or {})
        if not with_backward:
            return value
        leaves = [chunk for chunks in reps for chunk in chunks]
        parameters = list(self.learned_temperature().values())
        gradients = torch.autograd.grad(value, [*leaves, *parameters])
        for leaf, gradient in zip(leaves, gradients):
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        known: Tensor = _Known.apply(value.detach(), gradients[len(leaves) :], *parameters)
        return known

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar whose backward call encodes the texts again. `labels` are not used."""
        features = self.columns(sentence_features)
        if borrower := _borrower(self.model):
            warnings.warn(
                f"the batch is encoded at once, since {borrower} replaces the model's `forward` only until the backward pass; "
                "`SamToNeLoss` does the same without this warning",
                stacklevel=2,
            )
            return self._at_once(features)
        columns = [Column(column) for column in features]
        batch = self.batch(features)
        # The backward pass is outside of the autocast of the forward pass, and must encode as that did.
        kind = next((x.device.type for x in features[0].values() if isinstance(x, Tensor)), "cpu")
        autocast = partial(
            torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )

        def encode(part: Features) -> Tensor:
            with autocast():
                # A copy, tensors too: modules write into them (pooling without prompts does), and they are used again.
                own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in part.items()}
                embeddings: Tensor = self.model(own)["sentence_embedding"]
                return embeddings

        towers = [Chunks(encode, column.parts(self.mini_batch_size), self.model) for column in columns]
        embeddings = [[tower.embeddings] for tower in towers]
        if not torch.is_grad_enabled():
            return self.calculate_loss(embeddings, labels, batch=batch)
        value = self.calculate_loss(embeddings, labels, with_backward=True, batch=batch)
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        gradients = [tower.embeddings.grad for tower in towers]
        together = not all(column.like(columns[0]) for column in columns)

        def replay(upstream: Tensor) -> None:
            scaled = [(x * upstream).to(x.dtype) for x in gradients if x is not None]
            backward(towers, scaled, together)

        value.register_hook(replay)
        return value

    def _at_once(self, features: list[Features]) -> Tensor:
        """The loss of a batch that is encoded as a whole. It goes through `calculate_loss`, which a MatryoshkaLoss in between may
        have replaced, and which takes gradients up to the embeddings alone."""
        batch = self.batch(features)
        embeddings = [self.model(column)["sentence_embedding"] for column in features]
        if not torch.is_grad_enabled():
            return self.calculate_loss([[x] for x in embeddings], batch=batch)
        leaves = [x.detach().requires_grad_() for x in embeddings]
        value = self.calculate_loss([[x] for x in leaves], with_backward=True, batch=batch)
        whole: Tensor = _Known.apply(value, tuple(x.grad for x in leaves), *embeddings)
        return whole

    def get_config_dict(self) -> dict[str, Any]:
        """For model cards."""
        return super().get_config_dict() | {"mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """For model cards."""
        return super().citation + GRAD_CACHE


def _borrower(model: Any) -> str | None:
    """The loss of sentence-transformers that has replaced the model's `forward` for the time of this call."""
    for module in wrappers(model):
        kind = type(vars(module).get("forward"))
        if kind.__module__.startswith("sentence_transformers.") and kind.__name__ == "ForwardDecorator":
            return "AdaptiveLayerLoss" if "adaptive" in kind.__module__.lower() else "MatryoshkaLoss"
    return None
