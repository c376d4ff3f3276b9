"""Large batches in chunks (GradCache, Gao et al. 2021): memory of the towers for one chunk, gradients of the whole batch.

    1. every chunk is encoded without gradients; embeddings of the whole batch
    2. one call of the loss on all of them: loss, and the gradient of every embedding
    3. every chunk is encoded again, with gradients, and its embeddings pass theirs on to the towers

Towers with dropout draw the same masks in both encodings, because the random state of the first is kept for the second. A tower
must leave its chunk as it found it, since it gets the chunk twice.

A tower in DistributedDataParallel averages gradients over processes once in a step, with its last chunk. So processes may have
different numbers of rows and chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    """Inputs of one tower in chunks, encoded now without gradients and later with them.

    `module` is what encodes them, if that is not `encode` itself; where it has a `no_sync`, gradients are averaged over
    processes.
    """

    def __init__(self, encode: Encode, chunks: Iterable[Any], module: Any = None) -> None:
        self.encode = encode
        self.module: Any = encode if module is None else module
        self.inputs: Sequence[Any] = list(chunks)
        self.states: list[RandomState] = []
        rows = []
        with torch.no_grad():
            for chunk in self.inputs:
                self.states.append(RandomState())
                rows.append(encode(chunk))
        self.sizes = [len(row) for row in rows]
        self.embeddings = torch.cat(rows).requires_grad_(torch.is_grad_enabled())

    def again(self, index: int) -> Tensor:
        """Encodes a chunk for the second time, with gradients."""
        with torch.enable_grad(), self.states[index].again():
            return self.encode(self.inputs[index])


def backward(towers: Sequence[Chunks], gradients: Sequence[Tensor], together: bool = False) -> None:
    """Encodes every chunk again and passes the gradients of its embeddings on to the towers.

    A module that averages gradients over processes does so with the last chunk that it encodes. It waits for a gradient of each of
    its parameters then, so where towers use different parameters of it, the last chunks of all of them are needed `together`.
    """
    chunks = [(tower, index) for tower in towers for index in range(len(tower.sizes))]
    rows = [part for tower, gradient in zip(towers, gradients) for part in gradient.split(tower.sizes)]
    final = {id(tower.module): place for place, (tower, _) in enumerate(chunks)}
    held: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for place, (tower, index) in enumerate(chunks):
        module = id(tower.module)
        last = final[module] == place
        averaged = hasattr(tower.module, "no_sync")
        quiet: AbstractContextManager[Any] = tower.module.no_sync() if averaged and not last else nullcontext()
        with quiet:
            pairs = [(tower.again(index), rows[place])]
            if averaged and together and index == len(tower.sizes) - 1:
                held.setdefault(module, []).extend(pairs)
                if not last:
                    continue
                pairs = held[module]
            pairs = [(embeddings, upstream) for embeddings, upstream in pairs if embeddings.requires_grad]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [x for _, x in pairs])


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
    towers = [tower for tower in (queries, passages) if tower.embeddings.grad is not None]
    backward(towers, [tower.embeddings.grad for tower in towers if tower.embeddings.grad is not None])
    return value.detach()
