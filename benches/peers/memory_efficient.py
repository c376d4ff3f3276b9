"""memeff (PyPI, Apache-2.0): contrastive losses in Triton that never hold a matrix of cosines; two of them are presets of ours.

    MemoryEfficientQwen3Loss with queries and documents as negatives   = 1 {QP, QQ, PP} with a margin, `qwen3`
    MemoryEfficientCLIPLoss                                            = 1/2 {QP} + 1/2 {PQ}, `clip`

`stable=False`, since by default it scales gradients by sqrt(B temperature) on top.
"""

import importlib
import sys

import torch
from losses import LOSSES

# What the package is told about its kernels for gradients: to choose by itself, or sums of tiles by atomic additions, as it does for
# more than 1024 dimensions. Its other kernels keep whole rows on the chip, which f32 rows of less than that do not fit.
KERNELS = {"its own choice of kernels": None, "sums of tiles by atomic additions": False}


class MemoryEfficient:
    """One of the two losses, as a function of raw rows; gradients of bf16 rows are bf16."""

    def __init__(self, loss: str, kernels: str) -> None:
        memeff = importlib.import_module("memeff")
        settings, self.kernels = LOSSES[loss], KERNELS[kernels]
        if settings.margin is None:
            self.loss = memeff.MemoryEfficientCLIPLoss(temperature=settings.temperature, stable=False)
        else:
            self.loss = memeff.MemoryEfficientQwen3Loss(
                temperature=settings.temperature, margin=settings.margin,
                use_qq_negatives=True, use_dd_negatives=True, stable=False,
            )  # fmt: skip
        self.module = sys.modules[type(self.loss).__module__]

    def __call__(self, query: torch.Tensor, passage: torch.Tensor, _temperature: float) -> torch.Tensor:
        self.module._FORCE_FA = self.kernels  # read again by the backward call
        return self.loss(query, passage)
