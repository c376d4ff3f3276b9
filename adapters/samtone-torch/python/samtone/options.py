"""What a call computes, beside tensors."""

from __future__ import annotations

from typing import NamedTuple

from . import _native


class Options(NamedTuple):
    """Loss, temperature and options, in the order in which the operations take them."""

    loss: str
    temperature: float
    log_beta: bool
    margin: float | None
    zero_norm: str
    workspace_bytes: int | None
    tile_skipping: float | None
    own: bool
    shared_ids: bool
    no_negative: str

    def native(self) -> _native.Settings:
        """As native code takes them."""
        loss, temperature, *_ = self
        named = self._asdict()
        del named["loss"], named["temperature"]
        return _native.Settings(loss, temperature, **named)
