"""Which loss: presets by name, PAIR with another alpha, and softmax groups of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from . import _native
from .arguments import number, refused

PRESETS: tuple[str, ...] = tuple(_native.presets())
"""Names of all presets."""


@dataclass(frozen=True)
class Group:
    """One softmax of a loss:

        l_gi = log( e_g exp(beta s+_i) + sum over blocks b and kept j of exp(beta s^b_ij) ),

    which contributes c_g sum_i w_i (l_gi - beta s+_i).

    Args:
        coefficient: c_g, at least 0.
        blocks: One to four different ones of ``"qp"``, ``"pq"``, ``"qq"``, ``"pp"``: which cosines are negatives.
        positive_copies: e_g, 0, 1 or 2: how often the positive is in the denominator.
    """

    coefficient: float
    blocks: Sequence[str]
    positive_copies: int = 1


@dataclass(frozen=True)
class Loss:
    """A weighted sum of softmax groups, L = sum_g c_g sum_i w_i (l_gi - beta s+_i). Made by `preset`, `pair` or `custom`."""

    spec: str
    """The loss as text, which is what operations take."""

    def __post_init__(self) -> None:
        _native.describe_loss(self.spec)

    @staticmethod
    def preset(name: str) -> Loss:
        """The preset of that name, one of `PRESETS`.

        Raises:
            SamtoneError: For any other name; it lists all.
        """
        return Loss(spec_of(name))

    @staticmethod
    def pair(alpha: float = 0.1) -> Loss:
        """PAIR (Ren et al. 2021): (1 - alpha) {QP} + alpha {PP}, alpha from 0 to 1."""
        return Loss(f"pair({number('alpha', alpha, 'a number from 0 to 1')!r})")

    @staticmethod
    def custom(name: str, groups: Iterable[Group]) -> Loss:
        """Any other list of groups, at least one with a coefficient above 0.

        Raises:
            SamtoneError: For groups outside of their domain, and for a name with ``|`` in it.
        """
        if "|" in name:
            raise refused("name", repr(name), "names without |")
        c = "0, or a number from 1e-30 to 1e30"
        parts = [
            f"{number('coefficient', g.coefficient, c)!r}:{'+'.join(g.blocks)}:{g.positive_copies}" for g in groups
        ]
        if not parts:
            raise refused("groups", "an empty list", "one group or more")
        return Loss("|".join([name, *parts]))

    @property
    def name(self) -> str:
        """Name of the preset, or the one given to `custom`."""
        return _native.describe_loss(self.spec)[0]

    @property
    def groups(self) -> list[Group]:
        """The softmax groups."""
        return [Group(c, tuple(blocks), copies) for c, blocks, copies in _native.describe_loss(self.spec)[1]]


def spec_of(loss: str | Loss) -> str:
    """The text of a loss, or of the preset of that name. torch.compile traces it, so it stays in Python."""
    if isinstance(loss, Loss):
        return loss.spec
    if isinstance(loss, nn.Module):
        raise refused(
            "loss",
            f"a model ({type(loss).__name__})",
            "a `Loss` or the name of a preset; the loss that takes a model of sentence-transformers is "
            "`samtone.sentence_transformers.SamToNeLoss`, not `samtone.SamToNeLoss`",
        )
    if loss not in PRESETS:
        raise refused("loss", repr(loss), f"a `Loss`, or {', '.join(PRESETS)}")
    return loss
