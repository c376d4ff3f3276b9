"""The loss as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .arguments import choice, number
from .functional import Evaluation, evaluate, samtone_loss
from .loss import Loss, spec_of
from .options import Options, Settings, held, text_of


class SamToNeLoss(nn.Module):
    """`samtone_loss` with loss and options held, and a temperature that may be a parameter.

    Args:
        loss: Name of a preset, or a `Loss`.
        temperature: tau, or where it starts if it is learned.
        learnable: None for a constant temperature, ``"log_beta"`` for a parameter `log_beta` = log(1/tau), as CLIP learns
            it, or ``"tau"`` for a parameter `tau`. Both are float32 scalars.
        options: hard_negative_scope, margin, zero_norm, no_negative, workspace_bytes, tile_skipping, prefixes, prefix_weights, group,
            reduction, as in `samtone_loss`. A module keeps the name of its group, so that it can be copied and saved.
    """

    def __init__(
        self,
        loss: str | Loss = "samtone_query",
        *,
        temperature: float = 0.01,
        learnable: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self.loss = Loss(spec_of(loss))
        if learnable is not None:
            choice("learnable", learnable, "tau", "log_beta")
        temperature = number("temperature", temperature, "a number")
        Settings(text_of(self.loss.spec, options), temperature).native()  # refused here rather than in the first step
        self._temperature = temperature
        self.learnable = learnable
        if learnable == "tau":
            self.tau = nn.Parameter(torch.tensor(temperature, dtype=torch.float32))
        elif learnable == "log_beta":
            self.log_beta = nn.Parameter(torch.tensor(-math.log(temperature), dtype=torch.float32))
        self.options = held(options)

    def extra_repr(self) -> str:
        """For `print`."""
        learned = f", learnable={self.learnable!r}" if self.learnable else ""
        return f"{self.loss.spec!r}, temperature={self.temperature:.6g}{learned}"

    @property
    def temperature(self) -> float:
        """tau as it is now, learned or not."""
        if self.learnable == "tau":
            return float(self.tau.item())
        return math.exp(-float(self.log_beta.item())) if self.learnable else self._temperature

    def forward(self, query: Tensor, passage: Tensor, **batch: Any) -> Tensor:
        """The loss, a scalar. `batch` is what `samtone_loss` takes of a batch: `query_ids`, `passage_ids`, `shared_ids`,
        `positives`, `weights`, `hard_negative_owners`."""
        return samtone_loss(query, passage, loss=self.loss, **self._given(), **self.options, **batch)

    def evaluate(self, query: Tensor, passage: Tensor, **batch: Any) -> Evaluation:
        """The loss with row losses and metrics."""
        return evaluate(query, passage, loss=self.loss, **self._given(), **self.options, **batch)

    def _given(self) -> dict[str, Any]:
        """The temperature as it is given to the functions."""
        if self.learnable is None:
            return {"temperature": self._temperature}
        return {"temperature": self.tau} if self.learnable == "tau" else {"log_beta": self.log_beta}
