"""Contrastive losses of dual encoders as one differentiable operation, without a B x B matrix.

    import samtone

    criterion = samtone.SamToNeLoss("samtone_query", temperature=0.01)
    criterion(query, passage, passage_ids=ids).backward()

`SamToNeLoss` is the module, `samtone_loss` the function, `evaluate` the function with row losses and metrics, `Loss` says which
loss. `samtone.grad_cache` computes large batches in chunks, `samtone.sentence_transformers` has losses for its trainer.
"""

from . import grad_cache
from ._native import SamtoneError, __version__
from .functional import Evaluation, Metrics, Prefixes, evaluate, samtone_loss
from .loss import PRESETS, Group, Loss
from .module import SamToNeLoss
from .processes import release_memory

__all__ = [
    "PRESETS",
    "Evaluation",
    "Group",
    "Loss",
    "Metrics",
    "Prefixes",
    "SamToNeLoss",
    "SamtoneError",
    "__version__",
    "evaluate",
    "grad_cache",
    "release_memory",
    "samtone_loss",
]
