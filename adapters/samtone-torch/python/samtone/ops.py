"""The operations that autograd and torch.compile see: `samtone::forward` and `samtone::backward`.

    forward ── CPU:  loss, and the gradients that are needed, at once, as float32 (a later call would have to compute every
    │                cosine again)
    ▼
    backward ─ CPU:  those gradients times the upstream gradient, then rounded to the type of the inputs
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native

# What `wanted` is made of.
QUERY, PASSAGE, TEMPERATURE = 1, 2, 4
# Numbers of `results`: the loss, P@1 and MRR of query -> passage, and of passage -> query.
RESULTS = 5


def _capsule(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().__dlpack__()


def _readable(argument: str, tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, whatever lies between them; otherwise a copy."""
    if tensor.dim() != 2:
        raise _native.SamtoneError(f"argument `{argument}` is a tensor of shape {tuple(tensor.shape)}; allowed: a matrix, rows x dim")
    rows, dim = tensor.shape
    row, column = tensor.stride()
    in_place = (dim <= 1 or column == 1) and (rows <= 1 or row >= dim)
    tensor = tensor.detach().resolve_neg()
    return tensor if in_place else tensor.contiguous()


def _settings(
    temperature: Tensor | None,
    loss: str,
    tau: float,
    log_beta: bool,
    margin: float | None,
    zero_norm: str,
    workspace_bytes: int | None,
    own: bool,
) -> _native.Settings:
    value = tau if temperature is None else float(temperature.detach().reshape(()).item())
    return _native.Settings(
        loss, value, log_beta=log_beta, margin=margin, zero_norm=zero_norm, workspace_bytes=workspace_bytes, own=own
    )


@torch.library.custom_op("samtone::forward", mutates_args=())
def forward(
    query: Tensor,
    passage: Tensor,
    temperature: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    positives: Tensor | None,
    weights: Tensor | None,
    owners: Tensor | None,
    loss: str,
    tau: float,
    log_beta: bool,
    margin: float | None,
    zero_norm: str,
    workspace_bytes: int | None,
    own: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (float32), results and row losses (float64), and what the backward call needs.

    The latter on the CPU: the gradients of both towers as float32, without rows where they are not wanted, and the
    derivative of the temperature.
    """
    settings = _settings(temperature, loss, tau, log_beta, margin, zero_norm, workspace_bytes, own)
    q, p = _readable("query", query), _readable("passage", passage)
    losses = torch.empty(q.shape[0], dtype=torch.float64)
    # Always new: what an operation gives back may not be what it was given.
    gradients = [
        torch.empty((x.shape[0] if wanted & bit else 0, x.shape[1]), dtype=torch.float32)
        for x, bit in ((q, QUERY), (p, PASSAGE))
    ]
    value, metrics, derivative = _native.cpu_step(
        settings,
        _capsule(q),
        _capsule(p),
        tuple(_capsule(x) if wanted & bit else None for x, bit in zip(gradients, (QUERY, PASSAGE))),
        wanted != 0,
        {
            "query_ids": _capsule(query_ids),
            "passage_ids": _capsule(passage_ids),
            "positives": _capsule(positives),
            "weights": _capsule(weights),
            "owners": _capsule(owners),
        },
        _capsule(losses),
        torch.get_num_threads(),
    )
    results = torch.tensor([value, *metrics], dtype=torch.float64)
    scalar = torch.tensor(value, dtype=torch.float32)
    return scalar, results, losses, gradients[0], gradients[1], torch.tensor([derivative], dtype=torch.float64)


@forward.register_fake
def _(
    query: Tensor,
    passage: Tensor,
    temperature: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    positives: Tensor | None,
    weights: Tensor | None,
    owners: Tensor | None,
    loss: str,
    tau: float,
    log_beta: bool,
    margin: float | None,
    zero_norm: str,
    workspace_bytes: int | None,
    own: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(shape: Any, dtype: torch.dtype) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    return (
        empty((), torch.float32),
        empty((RESULTS,), torch.float64),
        empty((query.shape[0],), torch.float64),
        empty((query.shape[0] if wanted & QUERY else 0, query.shape[1]), torch.float32),
        empty((passage.shape[0] if wanted & PASSAGE else 0, passage.shape[1]), torch.float32),
        empty((1,), torch.float64),
    )


@torch.library.custom_op("samtone::backward", mutates_args=())
def backward(
    upstream: Tensor,
    query: Tensor,
    passage: Tensor,
    grad_query: Tensor,
    grad_passage: Tensor,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of both towers, in their types, times the upstream gradient; without rows where they are not wanted."""

    def scaled(gradient: Tensor, like: Tensor) -> Tensor:
        return (gradient * upstream.to(torch.float32)).to(like.dtype)

    return scaled(grad_query, query), scaled(grad_passage, passage)


@backward.register_fake
def _(
    upstream: Tensor, query: Tensor, passage: Tensor, grad_query: Tensor, grad_passage: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    return grad_query.to(query.dtype, copy=True), grad_passage.to(passage.dtype, copy=True)


def _no_second_derivatives(ctx: Any, *gradients: Tensor) -> Any:
    raise _native.SamtoneError("samtone has no second derivatives: its gradients are constants; allowed: create_graph=False")


backward.register_autograd(_no_second_derivatives)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, passage, temperature = inputs[:3]
    ctx.wanted = inputs[-1]
    ctx.inputs = len(inputs)
    _, results, losses, grad_query, grad_passage, derivative = output
    ctx.mark_non_differentiable(results, losses, grad_query, grad_passage, derivative)
    ctx.set_materialize_grads(False)
    ctx.temperature = None if temperature is None else (temperature.dtype, temperature.shape)
    ctx.save_for_backward(query, passage, grad_query, grad_passage, derivative)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients: list[Any] = [None] * ctx.inputs
    if upstream is None:
        return tuple(gradients)
    query, passage, grad_query, grad_passage, derivative = ctx.saved_tensors
    if ctx.wanted & (QUERY | PASSAGE):
        dq, dp = backward(upstream, query, passage, grad_query, grad_passage, ctx.wanted)
        gradients[0] = dq if ctx.wanted & QUERY else None
        gradients[1] = dp if ctx.wanted & PASSAGE else None
    if ctx.wanted & TEMPERATURE:
        dtype, shape = ctx.temperature
        gradients[2] = (derivative * upstream.to(torch.float64)).to(dtype).reshape(shape)
    return tuple(gradients)


forward.register_autograd(_backward, setup_context=_setup)
