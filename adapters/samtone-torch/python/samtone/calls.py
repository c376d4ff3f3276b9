"""Which way a call goes.

plain tensors ──────────────────────────► `_Direct`: the code of the operations without PyTorch's dispatcher, which takes longer for
│                                         an operation written in Python than the launches of a small batch
torch.func, forward-mode derivatives ───► `transforms.forward`
compilers, tracers, modes, subclasses ──► the operations of ops.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import ops, transforms
from .arguments import refused


def call(*inputs: Any, in_group: bool = False, row_losses: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, results and row losses, from the arguments of `ops.forward` but the last, which says what derivatives are wanted of.

    `in_group`: other processes make the same call. Only there it matters whether `row_losses` are wanted.
    """
    query, passage, temperature = inputs[:3]
    outputs: ops.Outputs
    if in_group and _transformed():
        raise refused(
            "group", "given within torch.func or forward-mode derivatives", "calls outside of them, or no group"
        )
    if _transformed():
        outputs = transforms.forward(*inputs, _differentiated(inputs[:3]))
        return outputs[:3]
    wanted = 0
    if torch.is_grad_enabled():
        wanted |= ops.QUERY if query.requires_grad else 0
        wanted |= ops.PASSAGE if passage.requires_grad else 0
        wanted |= ops.TEMPERATURE if temperature is not None and temperature.requires_grad else 0
    arguments = (*inputs, wanted | ops.ROW_LOSSES if in_group and row_losses else wanted)
    if query.device.type == "meta" or not _nobody_watches(inputs[:8]):
        outputs = ops.forward(*arguments)
    elif wanted == 0:
        with torch.no_grad():
            outputs = ops._forward(*arguments)
    else:
        outputs = _Direct.apply(*arguments)
    return outputs[:3]


def _transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode derivatives is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(function: str) -> None:
    """An error within a transform, for what takes derivatives itself."""
    if _transformed():
        raise refused(
            function, "called within torch.func or forward-mode derivatives", "outside of them, since it calls backward"
        )


def _nobody_watches(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether nothing but autograd has to see an operation on these: no compiler, no tracer, no mode, no subclass."""
    return (
        not torch.compiler.is_compiling()
        and all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
    )


class _Direct(torch.autograd.Function):
    """`ops.forward` and its backward without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> ops.Outputs:
        output = ops._forward(*inputs)
        ops._setup(ctx, inputs, output)
        ctx.direct = True
        return output

    backward = staticmethod(ops._backward)


def _differentiated(tensors: tuple[Tensor | None, ...]) -> int:
    """Of which tensors derivatives may be wanted at any level of transforms."""
    if torch.compiler.is_compiling():  # which does not look into levels
        return ops.AT_ONCE | ops.QUERY | ops.PASSAGE | ops.TEMPERATURE
    wanted = 0
    for tensor, flag in zip(tensors, (ops.QUERY, ops.PASSAGE, ops.TEMPERATURE)):
        while tensor is not None:
            wanted |= flag if tensor.requires_grad or forward_ad._current_level >= 0 else 0
            tensor = _functorch.get_unwrapped(tensor) if _functorch.is_functorch_wrapped_tensor(tensor) else None
    return wanted | ops.AT_ONCE if wanted else 0
