"""The loss as a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native, ops
from .loss import Loss, spec_of

Integers = Tensor | Sequence[int]
Numbers = Tensor | Sequence[float]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Metrics(NamedTuple):
    """In-batch retrieval quality of one direction, float64 scalars. rank_i is 1 + the number of kept negatives whose cosine
    exceeds that of the positive."""

    precision_at_1: Tensor
    """sum_i w_i [rank_i = 1]"""
    mrr: Tensor
    """sum_i w_i / rank_i"""


class Evaluation(NamedTuple):
    """What a call computes beside gradients. Only `loss` is differentiable."""

    loss: Tensor
    """The scalar loss, float32."""
    row_losses: Tensor
    """sum_g c_g (l_gi - beta s+_i) of each of the M rows, without its weight, float64."""
    query_to_passage: Metrics
    passage_to_query: Metrics


def _refused(argument: str, value: str, allowed: str) -> _native.SamtoneError:
    return _native.SamtoneError(f"argument `{argument}` is {value}; allowed: {allowed}")


def _check_embeddings(argument: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise _refused(argument, f"a {type(tensor).__name__}", "a tensor")
    if tensor.layout != torch.strided:
        raise _refused(argument, f"a tensor of layout {tensor.layout}", "a dense tensor")
    if tensor.dim() != 2:
        raise _refused(argument, f"a tensor of shape {tuple(tensor.shape)}", "a matrix, rows x dim")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise _refused(argument, f"of type {tensor.dtype}", "torch.float32, torch.float16 or torch.bfloat16")
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise _refused(argument, f"on device {tensor.device}", "tensors on the CPU or a CUDA device")


def _indices(argument: str, values: Integers | None) -> Tensor | None:
    """As a contiguous vector of int64 on the host, where plans are made."""
    if values is None:
        return None
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise _refused(argument, f"a tensor of type {tensor.dtype}", "integers of up to 64 bits")
    if tensor.dim() != 1:
        raise _refused(argument, f"a tensor of shape {tuple(tensor.shape)}", "a vector")
    return tensor.detach().to(device="cpu", dtype=torch.int64).contiguous()


def _weights(values: Numbers | None) -> Tensor | None:
    if values is None:
        return None
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float32, device="cpu")
    if tensor.dtype not in _FLOATS:
        raise _refused("weights", f"a tensor of type {tensor.dtype}", "floating-point numbers")
    if tensor.dim() != 1:
        raise _refused("weights", f"a tensor of shape {tuple(tensor.shape)}", "a vector")
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _temperature(
    temperature: float | Tensor | None, log_beta: float | Tensor | None
) -> tuple[Tensor | None, float, bool]:
    """The tensor, if it is one; the number otherwise; and whether it is log beta."""
    if temperature is not None and log_beta is not None:
        raise _refused("log_beta", "given together with `temperature`", "one of the two")
    value = log_beta if log_beta is not None else temperature
    name = "temperature" if log_beta is None else "log_beta"
    if value is None:
        raise _refused("temperature", "None, as is `log_beta`", "one of the two")
    if not isinstance(value, Tensor):
        return None, float(value), log_beta is not None
    if value.numel() != 1 or value.dtype not in _FLOATS:
        described = f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
        raise _refused(name, described, "one number, float64, float32, float16 or bfloat16")
    return value, 0.0, log_beta is not None


def samtone_loss(
    query: Tensor,
    passage: Tensor,
    *,
    loss: str | Loss = "samtone_query",
    temperature: float | Tensor | None = None,
    log_beta: float | Tensor | None = None,
    query_ids: Integers | None = None,
    passage_ids: Integers | None = None,
    positives: Integers | None = None,
    weights: Numbers | None = None,
    hard_negative_owners: Integers | None = None,
    hard_negative_scope: str = "all",
    margin: float | None = None,
    zero_norm: str = "error",
    workspace_bytes: int | None = None,
    tile_skipping: float | None = None,
) -> Tensor:
    """The loss of M queries against N >= M passages, a differentiable float32 scalar:

        L = sum_g c_g sum_i w_i (l_gi - beta s+_i),
        l_gi = log( e_g exp(beta s+_i) + sum over blocks b of g and kept negatives j of exp(beta s^b_ij) ),

    with cosines s of the raw embeddings (do not normalise them first), beta = 1/temperature, and w normalised to a sum of 1.
    No matrix of M x N is ever made.

    Args:
        query: M x d, float32, float16 or bfloat16. Rows that are contiguous are read in place, whatever lies between them.
        passage: N x d, of the same type. Passage i is the positive of query i unless `positives` says otherwise.
        loss: Name of a preset, or a `Loss`.
        temperature: tau, from 1e-6 to 1e6; SamToNe uses 0.01. A tensor of one element may be learned.
        log_beta: Instead of `temperature`, log(1/tau): the logit scale that CLIP learns.
        query_ids: M integers; queries of equal id are never negatives of each other. Default: all different.
        passage_ids: N integers; passages of equal id are never negatives of each other, nor of each other's queries.
        positives: M integers: for each query the row of its positive. Several may share one. Default: 0, 1, 2, ...
        weights: M numbers of at least 0, not all 0. Constants to autograd. Default: all equal.
        hard_negative_owners: N integers: the query whose hard negative a passage is, or -1 for everyone's.
        hard_negative_scope: ``"all"``: everyone sees owned hard negatives. ``"own"``: only their owners do.
        margin: Drops every negative whose cosine exceeds that of the positive by more than this. Qwen3 uses 0.1.
        zero_norm: ``"error"`` for embeddings of norm zero, or ``"zero_gradient"`` to let their cosines and gradients be 0.
        workspace_bytes: Bound on memory beyond O((M + N) d). Default: 256 MiB.
        tile_skipping: eta, above 0 and below 1, such as 1e-3: of every row at most this share of the softmax mass of its
            negatives is left out of the gradient, tile by tile; loss and metrics keep every bit. It pays for batches sorted
            by clusters at tau of 0.02 or less. Only CUDA skips; the CPU keeps the promise by skipping nothing. Default: none.

    Gradients come in the type of what they belong to, rounded after the upstream gradient has been applied, and only for
    tensors that require them; in `torch.no_grad` this is a forward pass. They are constants: there are no second derivatives.
    Under autocast tensors are taken as they come.

    Raises:
        SamtoneError: A ValueError that names the argument, its value and what is allowed; for embeddings that are not finite
            or of norm zero, the row.
    """
    vectors = (query_ids, passage_ids, positives, weights, hard_negative_owners)
    options = (hard_negative_scope, margin, zero_norm, workspace_bytes, tile_skipping)
    return _outputs(query, passage, loss, temperature, log_beta, *vectors, *options)[0]


def evaluate(
    query: Tensor,
    passage: Tensor,
    *,
    loss: str | Loss = "samtone_query",
    temperature: float | Tensor | None = None,
    log_beta: float | Tensor | None = None,
    query_ids: Integers | None = None,
    passage_ids: Integers | None = None,
    positives: Integers | None = None,
    weights: Numbers | None = None,
    hard_negative_owners: Integers | None = None,
    hard_negative_scope: str = "all",
    margin: float | None = None,
    zero_norm: str = "error",
    workspace_bytes: int | None = None,
    tile_skipping: float | None = None,
) -> Evaluation:
    """`samtone_loss`, and with it the loss of every row, P@1 and MRR in both directions, which cost nothing more."""
    vectors = (query_ids, passage_ids, positives, weights, hard_negative_owners)
    options = (hard_negative_scope, margin, zero_norm, workspace_bytes, tile_skipping)
    value, results, row_losses, *_ = _outputs(query, passage, loss, temperature, log_beta, *vectors, *options)
    return Evaluation(value, row_losses, Metrics(results[1], results[2]), Metrics(results[3], results[4]))


def _outputs(
    query: Tensor,
    passage: Tensor,
    loss: str | Loss,
    temperature: float | Tensor | None,
    log_beta: float | Tensor | None,
    query_ids: Integers | None,
    passage_ids: Integers | None,
    positives: Integers | None,
    weights: Numbers | None,
    hard_negative_owners: Integers | None,
    hard_negative_scope: str,
    margin: float | None,
    zero_norm: str,
    workspace_bytes: int | None,
    tile_skipping: float | None,
) -> ops.Outputs:
    """What the operation gives, after arguments have been checked."""
    if temperature is None and log_beta is None:
        temperature = 0.01
    if hard_negative_scope not in ("all", "own"):
        raise _refused("hard_negative_scope", repr(hard_negative_scope), '"all" or "own"')
    _check_embeddings("query", query)
    _check_embeddings("passage", passage)
    if query.device != passage.device:
        raise _refused("passage", f"on device {passage.device}", f"the device of the queries, {query.device}")
    tensor, number, is_log_beta = _temperature(temperature, log_beta)
    wanted = 0
    if torch.is_grad_enabled():
        wanted |= ops.QUERY if query.requires_grad else 0
        wanted |= ops.PASSAGE if passage.requires_grad else 0
        wanted |= ops.TEMPERATURE if tensor is not None and tensor.requires_grad else 0
    return ops.call(
        query,
        passage,
        tensor,
        _indices("query_ids", query_ids),
        _indices("passage_ids", passage_ids),
        _indices("positives", positives),
        _weights(weights),
        _indices("hard_negative_owners", hard_negative_owners),
        spec_of(loss),
        number,
        is_log_beta,
        None if margin is None else float(margin),
        zero_norm,
        workspace_bytes,
        None if tile_skipping is None else float(tile_skipping),
        hard_negative_scope == "own",
        wanted,
    )
