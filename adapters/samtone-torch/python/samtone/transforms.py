"""The operation as torch.func and forward-mode derivatives want it: `samtone::transformed`, with the arguments and results of
`samtone::forward`.

Gradients come at once with the loss, and from them follows every first derivative: backward is their product with the upstream
gradient, jvp their scalar product with the tangents. Both are written in operations of PyTorch, which transforms know.

Transforms are levels, one around the other, and the operation runs once in each of them that differentiates, from the inside out.
The gradients themselves have derivatives, which nobody computes. In every level they are results that autograd follows, so that one
who asks for those comes to `backward` here, which refuses. Forward mode wants tangents of the gradients before anyone knows
whether these are used, so it refuses where a level inside has taken some.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, _disable_dynamo  # type: ignore[attr-defined]
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import _native, ops


class _Inside(threading.local):
    """How many differentiating levels are inside of the one that runs."""

    levels = 0


_inside = _Inside()
_library = torch.library.Library("samtone", "FRAGMENT")
_library.define("transformed" + str(ops.forward._opoverload._schema).removeprefix("samtone::forward"))
_library.impl("transformed", _disable_dynamo(ops._forward), "CompositeExplicitAutograd")
torch.library.register_fake("samtone::transformed", ops.fake_forward, lib=_library)
forward = torch.ops.samtone.transformed.default


def _below(keys: Any, inputs: tuple[Any, ...]) -> ops.Outputs:
    """The operation in the levels outside of this one, or as it is computed."""
    with torch._C._AutoDispatchBelowAutograd():
        outputs: ops.Outputs = forward.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
        return outputs


def _has_tangent(tensor: Tensor | None) -> bool:
    """In this level. PyTorch's own count of levels of forward mode is not kept in compiled code."""
    return tensor is not None and torch._VF._unpack_dual(tensor, level=0)[1] is not None


def _level(keys: Any, *inputs: Any) -> ops.Outputs:
    """The operation in one level."""
    reverse = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
    if not reverse and not any(_has_tangent(x) for x in inputs[:3]):
        return _below(keys, inputs)
    with enable_single_level_autograd_function():
        outputs: ops.Outputs = _Level.apply(keys, *inputs)  # type: ignore[attr-defined]
        return outputs


_library.impl("transformed", _disable_dynamo(_level), "Autograd", with_keyset=True)


class _Level(_SingleLevelFunction):
    """One level that differentiates."""

    @staticmethod
    def forward(keys: Any, *inputs: Any) -> ops.Outputs:
        _inside.levels += 1
        try:
            # Off in here, for this level; those outside have settings of their own.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return _below(keys, inputs)
        finally:
            _inside.levels -= 1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: ops.Outputs) -> None:
        ctx.inputs, ctx.wanted, ctx.inside = len(inputs), inputs[-1], _inside.levels
        ctx.given = [None if x is None else (x.device, x.dtype, x.shape) for x in inputs[1:4]]
        _, results, losses, *gradients, state, used = output
        ctx.mark_non_differentiable(results, state, used)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.save_for_forward(*gradients, losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        _, losses, *gradients = others[:5]
        if losses is not None:
            raise _native.SamtoneError("argument `row_losses` is differentiated; allowed: derivatives of `loss` alone")
        # Within a level of forward mode outside of torch.func, gradients would lack their tangents.
        forward_mode = forward_ad._current_level >= 0 and not torch._C._are_functorch_transforms_active()
        if forward_mode or any(x is not None for x in gradients):
            raise ops.no_second_derivatives()
        found: list[Any] = [None] * ctx.inputs
        if upstream is not None:
            flags = (ops.QUERY, ops.PASSAGE, ops.TEMPERATURE)
            for k, (gradient, flag, given) in enumerate(zip(ctx.saved_tensors, flags, ctx.given)):
                if ctx.wanted & flag and given is not None:
                    device, dtype, shape = given
                    product = gradient * upstream.to(gradient.dtype)
                    found[1 + k] = product.to(device=device, dtype=dtype).reshape(shape)
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> tuple[Any, ...]:
        if ctx.inside > 0:
            raise ops.no_second_derivatives()
        *gradients, losses = ctx.saved_tensors
        products = [
            (gradient.double() * tangent.to(gradient.device).double().reshape(gradient.shape)).sum()
            for gradient, tangent in zip(gradients, tangents)
            if tangent is not None
        ]
        # Losses of rows and gradients are not differentiated: whoever uses their tangents must not take 0 for them.
        unknown = [torch.full_like(x, float("nan")) for x in (losses, *gradients)]
        return sum(products[1:], products[0]).float(), None, *unknown, None, None


def _side_by_side(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    """vmap: one call after the other."""
    if info.batch_size == 0:
        raise _native.SamtoneError("argument `query` is mapped by vmap over 0 batches; allowed: 1 or more")

    def item(x: Any, dim: int | None, k: int) -> Any:
        return x if dim is None else x.select(dim, k)

    calls = [forward(*(item(x, dim, k) for x, dim in zip(inputs, in_dims))) for k in range(info.batch_size)]
    return tuple(torch.stack(output) for output in zip(*calls)), (0,) * len(calls[0])


torch.library.register_vmap("samtone::transformed", _side_by_side, lib=_library)
