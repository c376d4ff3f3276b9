"""Large batches in chunks (GradCache, Gao et al. 2021): memory of the towers for one chunk, gradients of the whole batch.

    1. every chunk is encoded without gradients; embeddings of the whole batch
    2. one call of the loss on all of them: loss, and the gradient of every embedding
    3. every chunk is encoded again, with gradients, and its embeddings pass theirs on to the towers

Towers with dropout draw the same masks in both encodings, because the random state of the first is kept for the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .calls import refuse_transforms

Encode = Callable[[Any], Tensor]


class RandomState:
    """The state of the random number generators of the CPU and of the CUDA devices in use, to be drawn from again."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        started = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.devices = list(range(torch.cuda.device_count())) if started else []
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within it, what was drawn after this state was taken is drawn again; afterwards all is as before."""
        with torch.random.fork_rng(self.devices, enabled=True):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda):
                torch.cuda.set_rng_state(state, device)
            yield


class Chunks:
    """Inputs of one tower in chunks, encoded now without gradients and later with them."""

    def __init__(self, encode: Encode, chunks: Iterable[Any]) -> None:
        self.encode = encode
        self.inputs: Sequence[Any] = list(chunks)
        self.states: list[RandomState] = []
        rows = []
        with torch.no_grad():
            for chunk in self.inputs:
                self.states.append(RandomState())
                rows.append(encode(chunk))
        self.sizes = [len(row) for row in rows]
        self.embeddings = torch.cat(rows).requires_grad_(torch.is_grad_enabled())

    def backward(self, gradient: Tensor) -> None:
        """Encodes every chunk again and passes the gradients of its embeddings on to the tower."""
        for chunk, state, rows in zip(self.inputs, self.states, gradient.split(self.sizes)):
            with torch.enable_grad(), state.again():
                embeddings = self.encode(chunk)
            if embeddings.requires_grad:
                embeddings.backward(rows)


def step(
    loss: Callable[[Tensor, Tensor], Tensor],
    query: tuple[Encode, Iterable[Any]],
    passage: tuple[Encode, Iterable[Any]],
    *,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """One step: the gradients that ``loss(encode(all queries), encode(all passages)).backward()`` would accumulate in the
    parameters, with the memory of one chunk.

    Args:
        loss: Gives a scalar from the embeddings of all queries and all passages: a `SamToNeLoss`, or a function that also
            passes ids.
        query: What encodes a chunk of queries to a matrix of embeddings, and the chunks.
        passage: The same for passages.
        scale: A factor of the gradients: that of a gradient scaler, or 1 / steps when steps are accumulated.

    Returns:
        The loss, detached and not scaled.
    """
    refuse_transforms("grad_cache.step")
    with torch.enable_grad():
        queries, passages = Chunks(*query), Chunks(*passage)
        value = loss(queries.embeddings, passages.embeddings)
        (value * scale).backward()
    for tower in (queries, passages):
        if tower.embeddings.grad is not None:
            tower.backward(tower.embeddings.grad)
    return value.detach()
