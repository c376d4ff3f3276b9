"""What a call computes, beside tensors: options by name, and all of them as one text, which is what operations and native code take.

A new option of the crate is a line of `Options` here, and an arm of `Settings::option` in src/settings.rs.
"""

from __future__ import annotations

import ast
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from . import _native
from .arguments import Integers, Numbers, listed
from .processes import name_of

if TYPE_CHECKING:
    from .processes import Group


class Options(TypedDict, total=False):
    """Options of a call, of which each may be left out. `samtone_loss` says what they mean."""

    hard_negative_scope: str
    margin: float | None
    zero_norm: str
    no_negative: str
    workspace_bytes: int | None
    tile_skipping: float | None
    prefixes: Integers | None
    prefix_weights: Numbers | None
    group: Group | None
    reduction: str


NAMES = frozenset(Options.__annotations__)
# Options that are lists, and what they are lists of.
LISTS: dict[str, type[int] | type[float]] = {"prefixes": int, "prefix_weights": float}


class Settings(NamedTuple):
    """Loss and options as text, and the temperature as a number: log beta if the text says so."""

    text: str
    temperature: float

    def native(self) -> _native.Settings:
        """As native code takes them."""
        return _native.Settings(self.text, self.temperature)


def text_of(loss: str, options: Any, *, log_beta: bool = False, shared_ids: Any = False) -> str:
    """A line for each option, and the text of the loss. Native code refuses values outside of their domain; torch.compile traces
    this, so that it stays in Python."""
    lines = [f"{name}={_text(name, options[name])}" for name in options if name in NAMES]
    if len(lines) < len(options):
        unknown = ", ".join(repr(name) for name in options if name not in NAMES)
        raise TypeError(f"unexpected keyword argument {unknown}; options are {', '.join(sorted(NAMES))}")
    lines += ["log_beta=True"] if log_beta else []
    lines += [f"shared_ids={_value(shared_ids)}"] if shared_ids is not False else []
    return "\n".join([*lines, f"loss={loss}"])


def _text(name: str, value: Any) -> str:
    if name == "group":
        return f"{name_of(value)!r}"  # in full, however long it is
    values = listed(name, value, LISTS[name]) if name in LISTS else None
    return _value(value) if values is None else f"[{', '.join([f'{x!r}' for x in values])}]"


def held(options: Options) -> Options:
    """A copy that nobody else changes: tensors and arrays become lists. A group becomes its name, which can be copied and saved."""
    own: Any = {name: listed(name, x, LISTS[name]) if name in LISTS else x for name, x in options.items()}
    if "group" in own:
        own["group"] = name_of(own["group"])
    return own  # type: ignore[no-any-return]


def _value(value: Any) -> str:
    """A number of any type as one of Python's own, anything else as it is printed, on one line."""
    if value is not None and not isinstance(value, (bool, int, str)):
        try:
            value = int(value) if isinstance(value, numbers.Integral) else float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    text = f"{value!r}"  # not `repr`, which torch.compile does not know of symbols
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def prefixes_of(text: str) -> list[tuple[int, float]]:
    """Length and weight of each prefix that a call computes, shortest first: those whose weight is above 0."""
    found: dict[str, list[float]] = {}
    for line in ("" if text.startswith("loss=") else text.partition("\nloss=")[0]).split("\n"):
        name, _, value = line.partition("=")
        if name in LISTS and value != "None":
            found[name] = [float(x) for x in value[1:-1].split(", ") if x]
    dims = [int(x) for x in found.get("prefixes", [])]
    return [(dim, weight) for dim, weight in zip(dims, found.get("prefix_weights", [1.0] * len(dims))) if weight > 0]


def group_of(text: str) -> str | None:
    """The name of the group of processes that make the call together, if there is one."""
    for line in ("" if text.startswith("loss=") else text.partition("\nloss=")[0]).split("\n"):
        name, _, value = line.partition("=")
        if name == "group":
            found: str | None = ast.literal_eval(value)
            return found
    return None


def skips_tiles(text: str) -> bool:
    """Whether the text asks for tile skipping."""
    return any(line.startswith("tile_skipping=") and line != "tile_skipping=None" for line in text.split("\n"))
