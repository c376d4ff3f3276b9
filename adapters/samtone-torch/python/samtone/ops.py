"""The operations that autograd and torch.compile see: `samtone::forward` and `samtone::backward`.

forward ── at once: loss, and the gradients that are needed, as float32 (a later call would have to compute every cosine again)
│          in turn: loss, and the state that gradients are computed from, O(M) numbers
▼
backward ─ at once: those gradients times the upstream gradient, then rounded to the type of the inputs
           in turn: the gradients, times the upstream gradient, in the type of the inputs

In a group of processes, the forward call exchanges all that processes tell each other, so that the backward call computes by itself.

The CPU does it at once, and so does CUDA unless the gradients would take much memory until the backward call (`cuda.at_once`), which
sees by the state which of the two it was.

`calls.call` is what the package calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native, cuda, processes
from .options import Settings, group_of, prefixes_of, skips_tiles

# What `wanted` is made of.
QUERY, PASSAGE, TEMPERATURE = 1, 2, 4
# Gradients at once with the loss, however much memory they take until the backward call.
AT_ONCE = 8
# Row losses, of a call in a group of processes. They are those of all processes, so a compiler does not know how many there are.
ROW_LOSSES = 16
# Numbers of `results`: the loss, P@1 and MRR of query -> passage, and of passage -> query. So many follow for each prefix.
RESULTS = 5

Tensors = list[Tensor]
# temperature as used; results; row losses; gradients of both towers; derivative of the temperature; state.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _capsule(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().__dlpack__()


def _readable(argument: str, tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, whatever lies between them; otherwise a copy."""
    if tensor.dim() != 2:
        value = f"a tensor of shape {tuple(tensor.shape)}"
        raise _native.SamtoneError(f"argument `{argument}` is {value}; allowed: a matrix, rows x dim")
    rows, dim = tensor.shape
    row, column = tensor.stride()
    in_place = (dim <= 1 or column == 1) and (rows <= 1 or row >= dim)
    tensor = tensor.detach().resolve_neg()
    return tensor if in_place else tensor.contiguous()


def _annotations(
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    positives: Tensor | None,
    weights: Tensor | None,
    owners: Tensor | None,
) -> dict[str, Tensor | None]:
    return {
        "query_ids": query_ids,
        "passage_ids": passage_ids,
        "positives": positives,
        "weights": weights,
        "owners": owners,
    }


def _towers(wanted: int) -> tuple[bool, bool]:
    return bool(wanted & QUERY), bool(wanted & PASSAGE)


def _where_wanted(gradients: list[Any], wanted: tuple[bool, bool]) -> tuple[Any, Any]:
    dq, dp = (gradient if want else None for gradient, want in zip(gradients, wanted))
    return dq, dp


def _at_once(query: Tensor, passage: Tensor, wanted: int) -> bool:
    """Whether the forward call computes the gradients that are wanted, too, and leaves no state."""
    if query.device.type != "cuda" or wanted & AT_ONCE:
        return True
    return wanted != 0 and cuda.at_once(query.shape[0], passage.shape[0], query.shape[1], _towers(wanted))


def _forward_cpu(
    settings: Settings, q: Tensor, p: Tensor, annotations: dict[str, Tensor | None], wanted: int
) -> Tensors:
    losses = torch.empty(q.shape[0], dtype=torch.float64, device="cpu")  # whatever PyTorch's default device is
    gradients = [
        torch.empty((x.shape[0] if want else 0, x.shape[1]), dtype=torch.float32, device="cpu")
        for x, want in zip((q, p), _towers(wanted))
    ]
    results, derivative = _native.cpu_step(
        settings.native(),
        _capsule(q),
        _capsule(p),
        (_capsule(gradients[0]) if wanted & QUERY else None, _capsule(gradients[1]) if wanted & PASSAGE else None),
        wanted != 0,
        {name: _capsule(vector) for name, vector in annotations.items()},
        _capsule(losses),
        torch.get_num_threads(),
    )
    return [
        torch.tensor(results[0], dtype=torch.float32, device="cpu"),
        torch.tensor(results, dtype=torch.float64, device="cpu"),
        losses,
        *gradients,
        torch.tensor([derivative] if wanted & TEMPERATURE else [], dtype=torch.float64, device="cpu"),
        torch.empty(0, dtype=torch.uint8, device="cpu"),
    ]


def _forward_in_group(
    settings: Settings, q: Tensor, p: Tensor, annotations: dict[str, Tensor | None], wanted: int
) -> Tensors:
    ranks = processes.ranks_of(group_of(settings.text) or "")
    with processes.told(ranks):
        native = settings.native()
    towers = _towers(wanted)
    gradients = [
        torch.empty((x.shape[0] if want else 0, x.shape[1]), dtype=torch.float32, device="cpu")
        for x, want in zip((q, p), towers)
    ]
    results, derivative, losses = ranks.step(
        native,
        (_capsule(q) if len(q) else None, _capsule(p) if len(p) else None),
        (_capsule(gradients[0]) if len(gradients[0]) else None, _capsule(gradients[1]) if len(gradients[1]) else None),
        any(towers) or bool(wanted & TEMPERATURE),
        {name: _capsule(vector) for name, vector in annotations.items()},
        torch.get_num_threads(),
    )
    whole = torch.frombuffer(losses, dtype=torch.float64)
    return [
        torch.tensor(results[0], dtype=torch.float32, device="cpu"),
        torch.tensor(results, dtype=torch.float64, device="cpu"),
        whole if wanted & ROW_LOSSES else torch.empty(0, dtype=torch.float64, device="cpu"),
        *gradients,
        torch.tensor([derivative] if wanted & TEMPERATURE else [], dtype=torch.float64, device="cpu"),
        torch.empty(0, dtype=torch.uint8, device="cpu"),
    ]


def _state_bytes(text: str, query: Tensor, passage: Tensor, positives: Tensor | None) -> Any:
    shared, skipping, prefixes = positives is not None, skips_tiles(text), len(prefixes_of(text))
    rows, passages = query.shape[0], passage.shape[0]
    return cuda.state_bytes(rows, passages, shared=shared, skipping=skipping, prefixes=prefixes)


def _forward_cuda(
    settings: Settings, q: Tensor, p: Tensor, annotations: dict[str, Tensor | None], wanted: int
) -> Tensors:
    memory, towers, at_once = cuda.TorchMemory(q.device), _towers(wanted), _at_once(q, p, wanted)
    planned = cuda.planned(memory, settings, q, p, annotations, towers, at_once)
    prefixes = len(prefixes_of(settings.text))
    state = memory.empty(_state_bytes(settings.text, q, p, annotations["positives"]))
    gradients = [
        memory.matrix(x.shape[0] if want and at_once else 0, x.shape[1], torch.float32)
        for x, want in zip((q, p), towers)
    ]
    if at_once:
        planned.loss_and_gradients(memory, q, p, state, _where_wanted(gradients, towers))
    else:
        planned.forward(memory, q, p, state)
    _, row_losses, derivative = planned.plan.offsets
    numbers = cuda.results(state, planned.plan, RESULTS, prefixes)
    return [
        numbers[0].to(torch.float32),
        numbers,
        cuda.numbers(state, row_losses, q.shape[0]),
        *gradients,
        cuda.numbers(state, derivative, 1 if at_once and wanted & TEMPERATURE else 0),
        memory.empty(0) if at_once else state,
    ]


def _backward_cuda(
    settings: Settings,
    q: Tensor,
    p: Tensor,
    annotations: dict[str, Tensor | None],
    state: Tensor,
    upstream: Tensor,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    memory, towers = cuda.TorchMemory(q.device), _towers(wanted)
    planned = cuda.planned(memory, settings, q, p, annotations, towers, False)
    gradients = [memory.matrix(x.shape[0] if want else 0, x.shape[1], x.dtype) for x, want in zip((q, p), towers)]
    # A copy of the state: the backward call writes the derivative into it, and autograd may call twice.
    state = state.clone()
    planned.backward(memory, q, p, state, _where_wanted(gradients, towers), upstream)
    derivative = cuda.numbers(state, planned.plan.offsets[2], 1 if wanted & TEMPERATURE else 0)
    return gradients[0], gradients[1], derivative


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
    text: str,
    tau: float,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (float32), results and row losses (float64), and what the backward call needs. `text` is that of `options.text_of`.

    The latter if gradients are computed at once: those of both towers as float32, without rows where they are not wanted, and the
    derivative of the temperature, without elements if it is not. Otherwise: the state. In both cases: the temperature (or log beta)
    that was used, on the CPU.
    """
    return _forward(
        query, passage, temperature, query_ids, passage_ids, positives, weights, owners,
        text, tau, wanted,
    )  # fmt: skip


def _forward(
    query: Tensor,
    passage: Tensor,
    temperature: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    positives: Tensor | None,
    weights: Tensor | None,
    owners: Tensor | None,
    text: str,
    tau: float,
    wanted: int,
) -> Outputs:
    value = tau if temperature is None else float(temperature.detach().reshape(()).item())
    settings = Settings(text, value)
    alone = _forward_cuda if query.device.type == "cuda" else _forward_cpu
    compute = alone if group_of(text) is None else _forward_in_group
    q, p = _readable("query", query), _readable("passage", passage)
    annotations = _annotations(query_ids, passage_ids, positives, weights, owners)
    scalar, results, losses, dq, dp, derivative, state = compute(settings, q, p, annotations, wanted)
    used = torch.tensor([value], dtype=torch.float64, device="cpu")
    return scalar, results, losses, dq, dp, derivative, state, used


@forward.register_fake
def fake_forward(
    query: Tensor,
    passage: Tensor,
    temperature: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    positives: Tensor | None,
    weights: Tensor | None,
    owners: Tensor | None,
    text: str,
    tau: float,
    wanted: int,
) -> Outputs:
    """Shapes and types of the results."""

    def empty(shape: Any, dtype: torch.dtype) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    rows: Any = query.shape[0]
    if group_of(text) is not None:
        rows = torch.library.get_ctx().new_dynamic_size() if wanted & ROW_LOSSES else 0
    at_once = _at_once(query, passage, wanted)
    state = 0 if at_once else _state_bytes(text, query, passage, positives)
    return (
        empty((), torch.float32),
        empty((RESULTS * (1 + len(prefixes_of(text))),), torch.float64),
        empty((rows,), torch.float64),
        empty((query.shape[0] if wanted & QUERY and at_once else 0, query.shape[1]), torch.float32),
        empty((passage.shape[0] if wanted & PASSAGE and at_once else 0, passage.shape[1]), torch.float32),
        empty((1 if wanted & TEMPERATURE and at_once else 0,), torch.float64),
        empty((state,), torch.uint8),
        torch.empty(1, dtype=torch.float64, device="meta" if query.device.type == "meta" else "cpu"),
    )


@torch.library.custom_op("samtone::backward", mutates_args=())
def backward(
    upstream: Tensor,
    query: Tensor,
    passage: Tensor,
    temperature: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    positives: Tensor | None,
    weights: Tensor | None,
    owners: Tensor | None,
    grad_query: Tensor,
    grad_passage: Tensor,
    derivative: Tensor,
    state: Tensor,
    used: Tensor,
    text: str,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both towers, in their types and without rows where they are not wanted, and the derivative of the
    temperature (float64), without elements if it is not, all times the upstream gradient. `used` is the temperature as a number;
    the tensor is an argument for autograd, to which the results depend on it."""
    return _gradients(
        upstream, query, passage, temperature, query_ids, passage_ids, positives, weights, owners,
        grad_query, grad_passage, derivative, state, used,
        text, wanted,
    )  # fmt: skip


def _gradients(
    upstream: Tensor,
    query: Tensor,
    passage: Tensor,
    temperature: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    positives: Tensor | None,
    weights: Tensor | None,
    owners: Tensor | None,
    grad_query: Tensor,
    grad_passage: Tensor,
    derivative: Tensor,
    state: Tensor,
    used: Tensor,
    text: str,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if state.shape[0] == 0:
        # A product less, where one may look without waiting.
        one = upstream.device.type == "cpu" and upstream.item() == 1.0
        factor = upstream.to(torch.float32)
        dq, dp = (
            x.to(like.dtype, copy=True) if one else torch.mul(x, factor, out=torch.empty_like(x, dtype=like.dtype))
            for x, like in ((grad_query, query), (grad_passage, passage))
        )
        return dq, dp, derivative * upstream.to(torch.float64)
    q, p = _readable("query", query), _readable("passage", passage)
    value = float(used.item())
    settings = Settings(text, value)
    annotations = _annotations(query_ids, passage_ids, positives, weights, owners)
    factor = upstream.detach().to(device=q.device, dtype=torch.float32).reshape(1)
    return _backward_cuda(settings, q, p, annotations, state, factor, wanted)


@backward.register_fake
def _(
    upstream: Tensor,
    query: Tensor,
    passage: Tensor,
    temperature: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    positives: Tensor | None,
    weights: Tensor | None,
    owners: Tensor | None,
    grad_query: Tensor,
    grad_passage: Tensor,
    derivative: Tensor,
    state: Tensor,
    used: Tensor,
    text: str,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dp = (
        torch.empty((x.shape[0] if want else 0, x.shape[1]), dtype=x.dtype, device=x.device)
        for x, want in zip((query, passage), _towers(wanted))
    )
    return dq, dp, derivative.new_empty(1 if wanted & TEMPERATURE else 0)


def no_second_derivatives() -> _native.SamtoneError:
    """The sentence for whoever differentiates a gradient."""
    return _native.SamtoneError(
        "samtone has no second derivatives: its gradients are constants; allowed: first derivatives, create_graph=False"
    )


def _differentiated(ctx: Any, *gradients: Tensor) -> Any:
    raise no_second_derivatives()


backward.register_autograd(_differentiated)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, passage, temperature, *vectors = inputs[:8]
    ctx.text, _, ctx.wanted = inputs[8:]  # the number in between is in the outputs
    ctx.inputs, ctx.direct = len(inputs), False
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.temperature = None if temperature is None else (temperature.dtype, temperature.device, temperature.shape)
    ctx.save_for_backward(query, passage, temperature, *vectors, *output[3:])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients: list[Any] = [None] * ctx.inputs
    if upstream is None:
        return tuple(gradients)
    wanted = ctx.wanted
    query, passage, *_, dq, dp, derivative, _, _ = saved = ctx.saved_tensors
    # The usual case of `loss.backward()`: the gradients are what they will be, so they are not copied. Whoever writes to them
    # and keeps the graph for another call gets autograd's error about saved tensors. Not while a compiler traces, for which
    # tensors have no values, nor for second derivatives, which the operation refuses.
    plain = type(upstream) is Tensor and upstream.device.type == "cpu" and not torch.is_grad_enabled()
    if not (plain and query.dtype == torch.float32 and upstream.item() == 1.0):
        direct = ctx.direct and type(upstream) is Tensor and not torch.is_grad_enabled()
        compute: Any = _gradients if direct else backward
        dq, dp, derivative = compute(upstream, *saved, ctx.text, wanted)
    gradients[0] = dq if wanted & QUERY else None
    gradients[1] = dp if wanted & PASSAGE else None
    if wanted & TEMPERATURE:
        dtype, device, shape = ctx.temperature
        gradients[2] = derivative.to(device=device, dtype=dtype).reshape(shape)
    return tuple(gradients)


forward.register_autograd(_backward, setup_context=_setup)
