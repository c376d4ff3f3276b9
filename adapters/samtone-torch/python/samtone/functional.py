"""The loss as a function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import calls, processes
from .arguments import (
    Integers,
    Numbers,
    check_embeddings,
    ids,
    indices,
    refused,
    temperature_of,
    weights_of,
)
from .loss import Loss, spec_of
from .ops import RESULTS
from .options import Options, prefixes_of, text_of


class Metrics(NamedTuple):
    """In-batch retrieval quality of one direction, float64 scalars. rank_i is 1 + the number of kept negatives whose cosine
    exceeds that of the positive."""

    precision_at_1: Tensor
    """sum_i w_i [rank_i = 1]"""
    mrr: Tensor
    """sum_i w_i / rank_i"""


class Prefixes(NamedTuple):
    """Losses and metrics of each prefix whose weight is above 0, shortest first: vectors with a float64 number for each. They are those
    of a call without prefixes on embeddings that end there."""

    dims: Tensor
    """How many entries each has, int64 on the CPU."""
    losses: Tensor
    """Not multiplied by the weights."""
    query_to_passage: Metrics
    passage_to_query: Metrics


class Evaluation(NamedTuple):
    """What a call computes beside gradients. Only `loss` is differentiable: metrics are steps, with derivatives of 0, and derivatives of
    `row_losses` are refused in reverse mode and NaN in forward mode."""

    loss: Tensor
    """The scalar loss, float32."""
    row_losses: Tensor
    """sum_g c_g (l_gi - beta s+_i) of each of the M rows, without its weight, float64. With a `group`, of the rows of all processes."""
    query_to_passage: Metrics
    """With prefixes, that of the longest; so is the other direction."""
    passage_to_query: Metrics
    prefixes: Prefixes | tuple[()] = ()
    """Empty for a call without prefixes. There are tensors and tuples alone in here, as transforms of `torch.func` want it."""


def samtone_loss(
    query: Tensor,
    passage: Tensor,
    *,
    loss: str | Loss = "samtone_query",
    temperature: float | Tensor | None = None,
    log_beta: float | Tensor | None = None,
    query_ids: Integers | None = None,
    passage_ids: Integers | None = None,
    shared_ids: bool = False,
    positives: Integers | None = None,
    weights: Numbers | None = None,
    hard_negative_owners: Integers | None = None,
    **options: Unpack[Options],
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
        query_ids: M integers of up to 64 bits; queries of equal id are never negatives of each other. Default: all different.
        passage_ids: N integers; passages of equal id are never negatives of each other, nor of each other's queries.
        shared_ids: Whether query ids and passage ids name the same texts. If so, a passage with the id of a row's query, and a
            query with the id of its positive, are no negatives of that row either.
        positives: M integers: for each query the row of its positive. Several may share one. Default: 0, 1, 2, ...
        weights: M numbers of at least 0, not all 0. Constants to autograd. Default: all equal.
        hard_negative_owners: N integers: the query whose hard negative a passage is, or -1 for everyone's.
        hard_negative_scope: ``"all"``: everyone sees owned hard negatives. ``"own"``: only their owners do.
        margin: Drops every negative whose cosine exceeds that of the positive by more than this. ``float("inf")`` drops none.
            Default: that of the loss, 0.1 for ``"qwen3"`` and none for the others.
        zero_norm: ``"error"`` for embeddings of norm zero, or ``"zero_gradient"`` to let their cosines and gradients be 0.
        no_negative: ``"error"`` for a row without a negative in a group without copies of the positive, as `decoupled` is, or
            ``"zero"`` to let it contribute nothing.
        workspace_bytes: Bound on memory beyond O((M + N) d). Default: 512 MiB.
        tile_skipping: eta, above 0 and below 1, such as 1e-3: of every row at most this share of the softmax mass of its
            negatives is left out of the gradient, tile by tile; loss and metrics keep every bit. It pays for batches sorted
            by clusters at tau of 0.02 or less. Only CUDA skips; the CPU keeps the promise by skipping nothing. Default: none.
        prefixes: Matryoshka: ascending numbers of entries, none above d, such as [64, 128, 256]. The loss becomes
            sum_k v_k L(query[:, :d_k], passage[:, :d_k]), where each prefix has norms, cosines, margins and ranks of its own. It is
            computed in one pass over all of them. Entries beyond the last prefix get a gradient of 0. On CUDA, prefixes go without
            `tile_skipping`. Default: the whole embedding alone.
        prefix_weights: v_k, a number for each prefix, 0 or from 1e-30 to 1e30, not all 0. They are not normalised, and a prefix
            of weight 0 is left out. Default: 1 each.
        group: Processes that compute the loss of one batch together: a ProcessGroup, a DeviceMesh of one dimension, or the name of a
            group. Each process makes the same call and passes a part of the batch, which is made of all parts in the order of ranks.
            M and N are numbers of the part, and may differ between processes, down to 0. M must be above 0 somewhere. Lists
            have an entry for each row of the part; `positives` and `hard_negative_owners` are rows of the part. Ids mean the same in
            all processes. Everything else must be equal in all of them, and so must be whether gradients are wanted. Tensors are on
            the CPU. Default: None, this process alone.
        reduction: What the caller does with the gradients of the parameters that the processes share. ``"mean"``: their mean over
            the W processes is taken, as DistributedDataParallel and FSDP do. So the gradients of embeddings are W times those of the
            loss of the whole batch, and the gradient of the temperature is whole in each process. ``"sum"``: they are added up. So the
            gradients of embeddings are those of the loss of the whole batch, and each process has its part of the gradient of
            the temperature. Without a group it changes nothing.

    With a group, every process gets the loss of the whole batch, the same bits in each, and the gradients of its own rows. It computes
    its share of the cosines. The backward pass exchanges nothing between processes.

    Gradients come in the type of what they belong to, rounded after the upstream gradient has been applied, and only for
    tensors that require them; in `torch.no_grad` this is a forward pass. Transforms of `torch.func` and forward-mode derivatives
    have them, too. They are constants: second derivatives are refused.
    Under autocast tensors are taken as they come.

    Raises:
        SamtoneError: A ValueError that names the argument, its value and what is allowed; for embeddings that are not finite
            or of norm zero, the row. In a group, every process raises what is wrong in one, with its rank.
        RuntimeError: If a process of the group does not answer within the time-out of the group. The group cannot be used any more
            then.
    """
    vectors = (query_ids, passage_ids, positives, weights, hard_negative_owners)
    given = (query, passage, loss, temperature, log_beta, vectors, shared_ids, options)
    return _outputs(*given, row_losses=False)[0]


def evaluate(
    query: Tensor,
    passage: Tensor,
    *,
    loss: str | Loss = "samtone_query",
    temperature: float | Tensor | None = None,
    log_beta: float | Tensor | None = None,
    query_ids: Integers | None = None,
    passage_ids: Integers | None = None,
    shared_ids: bool = False,
    positives: Integers | None = None,
    weights: Numbers | None = None,
    hard_negative_owners: Integers | None = None,
    **options: Unpack[Options],
) -> Evaluation:
    """`samtone_loss`, and with it the loss of every row, P@1 and MRR in both directions, of each prefix, too. They cost nothing
    more. With a `group`, all of them are those of the whole batch, in the order of ranks."""
    vectors = (query_ids, passage_ids, positives, weights, hard_negative_owners)
    value, results, row_losses, text = _outputs(
        query, passage, loss, temperature, log_beta, vectors, shared_ids, options
    )
    evaluation = Evaluation(value, row_losses, Metrics(results[1], results[2]), Metrics(results[3], results[4]))
    prefixes = prefixes_of(text)
    if not prefixes:
        return evaluation
    dims = torch.tensor([dim for dim, _ in prefixes], device="cpu")
    losses, *metrics = results[RESULTS:].view(len(prefixes), RESULTS).unbind(1)
    return evaluation._replace(prefixes=Prefixes(dims, losses, Metrics(*metrics[:2]), Metrics(*metrics[2:])))


def _outputs(*given: Any, row_losses: bool = True) -> tuple[Tensor, Tensor, Tensor, str]:
    """Loss, results and row losses, from the arguments of `_inputs`, and the text of loss and options."""
    options: Options = given[-1]
    group = processes.name_of(options.get("group"))
    if group is None or torch.compiler.is_compiling():
        inputs = _inputs(*given)
    else:
        with processes.told(processes.ranks_of(group)):
            inputs = _inputs(*given)
    outputs = calls.call(*inputs, in_group=group is not None, row_losses=row_losses)
    text: str = inputs[8]
    return *outputs, text


def _inputs(
    query: Tensor,
    passage: Tensor,
    loss: str | Loss,
    temperature: float | Tensor | None,
    log_beta: float | Tensor | None,
    vectors: tuple[Any, ...],
    shared_ids: bool,
    options: Options,
) -> tuple[Any, ...]:
    """The arguments of `calls.call`, from those of callers, which are checked."""
    query_ids, passage_ids, positives, weights, hard_negative_owners = vectors
    if temperature is None and log_beta is None:
        temperature = 0.01
    check_embeddings("query", query)
    check_embeddings("passage", passage)
    if query.device != passage.device:
        raise refused("passage", f"on device {passage.device}", f"the device of the queries, {query.device}")
    if options.get("group") is not None and query.device.type == "cuda":
        raise refused("group", f"given with tensors on {query.device}", "tensors on the CPU, or no group")
    tensor, value, is_log_beta = temperature_of(temperature, log_beta)
    text = text_of(spec_of(loss), options, log_beta=is_log_beta, shared_ids=shared_ids)
    return (
        query,
        passage,
        tensor,
        ids("query_ids", query_ids),
        ids("passage_ids", passage_ids),
        indices("positives", positives),
        weights_of(weights),
        indices("hard_negative_owners", hard_negative_owners),
        text,
        value,
    )
