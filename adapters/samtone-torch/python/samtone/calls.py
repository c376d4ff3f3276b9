"""Which way a call goes.

plain tensors ──────────────────────────► `_Direct`: the code of the operations without PyTorch's dispatcher, which takes longer for
│                                         an operation written in Python than the launches of a small batch
torch.func, forward-mode derivatives ───► `_Transformed`: gradients at once with the loss, from which every first derivative follows
compilers, tracers, modes, subclasses ──► the operations of ops.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import _native, ops

_DIFFERENTIATING = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


def call(*inputs: Any) -> ops.Outputs:
    """The operation, with the arguments of `ops.forward` but the last, which says what derivatives are wanted of."""
    query, passage, temperature = inputs[:3]
    if _transformed():
        return _of_transforms(inputs)
    wanted = 0
    if torch.is_grad_enabled():
        wanted |= ops.QUERY if query.requires_grad else 0
        wanted |= ops.PASSAGE if passage.requires_grad else 0
        wanted |= ops.TEMPERATURE if temperature is not None and temperature.requires_grad else 0
    outputs: ops.Outputs
    if query.device.type == "meta" or not _nobody_watches(inputs[:8]):
        outputs = ops.forward(*inputs, wanted)
    elif wanted == 0:
        with torch.no_grad():
            outputs = ops._forward(*inputs, wanted)
    else:
        outputs = _Direct.apply(*inputs, wanted)
    return outputs


def _transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode derivatives is at work."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


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


def _of_transforms(inputs: tuple[Any, ...]) -> ops.Outputs:
    levels = {i.level() for i in _functorch.get_interpreter_stack() or () if i.key() in _DIFFERENTIATING}
    forward_mode = forward_ad._current_level >= 0
    met: set[int] = set()
    wanted = 0
    for tensor, flag in zip(inputs[:3], (ops.QUERY, ops.PASSAGE, ops.TEMPERATURE)):
        if tensor is None:
            continue
        own = set()
        while _functorch.is_functorch_wrapped_tensor(tensor):
            own.add(_functorch.maybe_get_level(tensor))
            tensor = _functorch.get_unwrapped(tensor)
        met |= own & levels
        wanted |= flag if own & levels or tensor.requires_grad or forward_mode else 0
    outputs: ops.Outputs = _Transformed.apply(len(met), *inputs, wanted | ops.AT_ONCE if wanted else 0)
    return outputs


class _Transformed(torch.autograd.Function):
    """`ops.forward` as torch.func and forward-mode derivatives want it. With the gradients of the loss every first derivative is known:
    backward is their product with the upstream gradient, jvp their scalar product with the tangents.

    The gradients themselves have derivatives, which nobody computes. They are outputs to autograd, so that one who asks for
    those comes to `backward` here. Forward mode asks before anyone knows whether the answer is used, so it is refused where a
    gradient may have been taken: where there is another level of derivatives, of which `levels` have met an argument.
    """

    @staticmethod
    def forward(levels: int, *inputs: Any) -> ops.Outputs:
        output: ops.Outputs = ops.forward(*inputs)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: ops.Outputs) -> None:
        ctx.levels, *given = inputs[:4]
        ctx.inputs, ctx.wanted = len(inputs), inputs[-1]
        ctx.given = [None if x is None else (x.device, x.dtype, x.shape) for x in given]
        _, results, losses, *gradients, state, used = output
        ctx.losses = losses.shape, losses.device
        ctx.mark_non_differentiable(results, state, used)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.save_for_forward(*gradients)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        _, losses, *gradients = others[:5]
        if losses is not None:
            raise _native.SamtoneError("argument `row_losses` is differentiated; allowed: derivatives of `loss` alone")
        if any(x is not None for x in gradients):
            raise ops.no_second_derivatives()
        found: list[Any] = [None] * ctx.inputs
        if upstream is not None:
            flags = (ops.QUERY, ops.PASSAGE, ops.TEMPERATURE)
            for k, (gradient, flag, given) in enumerate(zip(ctx.saved_tensors, flags, ctx.given)):
                if ctx.wanted & flag:
                    device, dtype, shape = given
                    product = gradient * upstream.to(gradient.dtype)
                    found[1 + k] = product.to(device=device, dtype=dtype).reshape(shape)
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> tuple[Any, ...]:
        if ctx.levels > (1 if _functorch.peek_interpreter_stack() is not None else 0):
            raise ops.no_second_derivatives()
        products = [
            (
                gradient.to(torch.float64)
                * tangent.to(device=gradient.device, dtype=torch.float64).reshape(gradient.shape)
            ).sum()
            for gradient, tangent in zip(ctx.saved_tensors, tangents[:3])
            if tangent is not None
        ]
        # Losses of rows are not differentiated: whoever uses their tangents must not take 0 for them.
        shape, device = ctx.losses
        unknown = torch.full(shape, float("nan"), dtype=torch.float64, device=device)
        return sum(products[1:], products[0]).to(torch.float32), None, unknown, *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], levels: int, *inputs: Any) -> tuple[Any, Any]:
        """One call after the other."""

        def item(x: Any, dim: int | None, k: int) -> Any:
            return x if dim is None else x.select(dim, k)

        calls = [
            _Transformed.apply(levels, *(item(x, dim, k) for x, dim in zip(inputs, in_dims[1:])))
            for k in range(info.batch_size)
        ]
        return tuple(torch.stack(output) for output in zip(*calls)), (0,) * len(calls[0])
