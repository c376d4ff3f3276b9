"""What callers pass, checked, as operations take it."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native

Integers = Tensor | Sequence[int]
Numbers = Tensor | Sequence[float]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_INTEGERS = "integers of up to 64 bits"


def refused(argument: str, value: str, allowed: str) -> _native.SamtoneError:
    """The sentence for an argument outside of its domain."""
    return _native.SamtoneError(f"argument `{argument}` is {value}; allowed: {allowed}")


def number(argument: str, value: Any, allowed: str) -> float:
    """A number of any type; a text that looks like one is none."""
    if type(value) is float:
        return value
    try:
        if not isinstance(value, (str, bytes, bytearray)):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise refused(argument, _shown(value), allowed)


def listed(argument: str, values: Any, kind: type[int] | type[float]) -> list[Any] | None:
    """A list, a vector or any other sequence of numbers as a list of Python's own. What numbers are in their domain, native code
    knows. torch.compile traces this."""
    if values is None:
        return None
    allowed = "a list of integers" if kind is int else "a list of numbers"
    items = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes, bytearray)):
        raise refused(argument, f"a {type(values).__name__}", allowed)
    found: list[Any] = []
    for position, item in enumerate(items):
        # Numbers of NumPy and PyTorch. Those of Python may be symbols to torch.compile, which have no attributes.
        x = item.tolist() if not isinstance(item, (int, float)) and hasattr(item, "tolist") else item
        if isinstance(x, bool) or not isinstance(x, numbers.Integral if kind is int else numbers.Real):
            raise refused(argument, f"{_shown(x)} at position {position}", allowed)
        found.append(int(x) if isinstance(x, numbers.Integral) else float(x))
    return found


def choice(argument: str, value: Any, *allowed: str) -> str:
    """One of some words."""
    for word in allowed:
        if isinstance(value, str) and value == word:
            return word
    raise refused(argument, _shown(value), " or ".join(f'"{word}"' for word in allowed))


def _shown(value: Any) -> str:
    """The value itself if that is short, else its type."""
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def check_embeddings(argument: str, tensor: Any) -> None:
    """An error unless it may be a matrix of embeddings."""
    if isinstance(tensor, (list, tuple)) and tensor and all(isinstance(x, Mapping) for x in tensor):
        allowed = (
            "a tensor, rows x dim; a trainer of sentence-transformers, which passes features, takes "
            "`samtone.sentence_transformers.SamToNeLoss(model)`, not `samtone.SamToNeLoss()`"
        )
        raise refused(argument, f"a {type(tensor).__name__} of features", allowed)
    if not isinstance(tensor, Tensor):
        raise refused(argument, f"a {type(tensor).__name__}", "a tensor")
    if tensor.layout != torch.strided:
        raise refused(argument, f"a tensor of layout {tensor.layout}", "a dense tensor")
    if tensor.dim() != 2:
        raise refused(argument, f"a tensor of shape {tuple(tensor.shape)}", "a matrix, rows x dim")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise refused(argument, f"of type {tensor.dtype}", "torch.float32, torch.float16 or torch.bfloat16")
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise refused(argument, f"on device {tensor.device}", "tensors on the CPU or a CUDA device")


def _vector(argument: str, values: Any, allowed: str, dtype: torch.dtype | None = None) -> Tensor:
    """As a vector, wherever it is, of any type."""
    tensor = values if isinstance(values, Tensor) else _read(argument, values, allowed, dtype)
    if tensor.dim() != 1:
        raise refused(argument, f"a tensor of shape {tuple(tensor.shape)}", "a vector")
    return tensor


def _read(argument: str, values: Any, allowed: str, dtype: torch.dtype | None) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=dtype, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        # Arrays that PyTorch does not read (of objects, of other byte orders, in reverse), and integers from 2**63 on.
        items = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(items, (list, tuple)):
            raise refused(argument, f"a {type(values).__name__}", allowed) from error
        for index, x in enumerate(items):
            fits = -(2**63) <= int(x) < 2**64 if isinstance(x, numbers.Integral) else dtype is not None
            if not isinstance(x, numbers.Real) or not fits:
                raise refused(argument, f"{_shown(x)} at index {index}", allowed) from error
        if dtype is not None:
            return torch.tensor([float(x) for x in items], dtype=dtype, device="cpu")
        low, high = int(min(items)), int(max(items))
        if low < 0 and high >= 2**63:
            raise refused(
                argument, f"from {low} to {high}", "integers of up to 64 bits, all signed or all unsigned"
            ) from error
        return torch.tensor([int(x) for x in items], dtype=torch.uint64 if high >= 2**63 else torch.int64, device="cpu")


def ids(argument: str, values: Integers | None) -> Tensor | None:
    """As a contiguous vector of int64 on the host, where plans are made. Only equality counts, so unsigned integers of 64 bits
    keep their bits."""
    if values is None:
        return None
    tensor = _vector(argument, values, _INTEGERS)
    return _on_host(argument, tensor.view(torch.int64) if tensor.dtype == torch.uint64 else tensor)


def indices(argument: str, values: Integers | None) -> Tensor | None:
    """As a contiguous vector of int64 on the host, where plans are made."""
    if values is None:
        return None
    tensor = _vector(argument, values, _INTEGERS)
    if tensor.dtype == torch.uint64:
        signed = tensor.view(torch.int64)
        beyond = (signed < 0).nonzero().flatten()
        if len(beyond) > 0:
            index = int(beyond[0])
            raise refused(argument, f"{int(signed[index]) + 2**64} at index {index}", "integers below 2**63")
    return _on_host(argument, tensor)


def _on_host(argument: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _SIGNED and tensor.dtype not in _UNSIGNED:
        raise refused(argument, f"a tensor of type {tensor.dtype}", _INTEGERS)
    return tensor.detach().to(device="cpu", dtype=torch.int64).contiguous()


def weights_of(values: Numbers | None) -> Tensor | None:
    """As a contiguous vector of float32 on the host."""
    if values is None:
        return None
    tensor = _vector("weights", values, "numbers", torch.float32)
    if tensor.dtype not in _FLOATS:
        raise refused("weights", f"a tensor of type {tensor.dtype}", "floating-point numbers")
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


def temperature_of(
    temperature: float | Tensor | None, log_beta: float | Tensor | None
) -> tuple[Tensor | None, float, bool]:
    """The tensor, if it is one; the number otherwise; and whether it is log beta."""
    if temperature is not None and log_beta is not None:
        raise refused("log_beta", "given together with `temperature`", "one of the two")
    value = log_beta if log_beta is not None else temperature
    name = "temperature" if log_beta is None else "log_beta"
    if value is None:
        raise refused("temperature", "None, as is `log_beta`", "one of the two")
    if not isinstance(value, Tensor):
        return None, number(name, value, "a number, or a tensor of one"), log_beta is not None
    if value.numel() != 1 or value.dtype not in _FLOATS:
        described = f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
        raise refused(name, described, "one number, float64, float32, float16 or bfloat16")
    return value, 0.0, log_beta is not None
