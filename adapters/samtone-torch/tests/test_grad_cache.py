"""Chunks give what one large batch gives."""

from __future__ import annotations

from typing import Any

import pytest
import samtone
import torch
from samtone import grad_cache
from torch import nn


class Tower(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def gradients_of(*modules: nn.Module) -> list[torch.Tensor]:
    gradients = []
    for module in modules:
        for parameter in module.parameters():
            gradients.append(parameter.grad)
            parameter.grad = None
    return gradients


@pytest.mark.parametrize("options", [{}, {"prefixes": [3, 16], "prefix_weights": [0.5, 1.0]}])
@pytest.mark.parametrize("sizes", [(4, 9), (7, 7), (26, 31)])
def test_chunks_equal_one_batch(sizes: tuple[int, int], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query, passage = Tower(0.0), Tower(0.0)
    criterion = samtone.SamToNeLoss("samtone_both", temperature=0.1, learnable="log_beta", **options)
    q, p = torch.randn(26, 20), torch.randn(31, 20)
    ids = torch.arange(31) // 2
    want_loss = criterion(query(q), passage(p), passage_ids=ids)
    (want_loss * 8).backward()
    want = gradients_of(query, passage, criterion)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return criterion(a, b, passage_ids=ids)

    value = grad_cache.step(loss, (query, q.split(sizes[0])), (passage, p.split(sizes[1])), scale=8.0)
    assert value.item() == pytest.approx(want_loss.item(), rel=1e-6) and not value.requires_grad
    for a, b in zip(gradients_of(query, passage, criterion), want):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_draws_the_same_masks_again() -> None:
    """The gradients are those of the embeddings of the first encoding: dropout drawn anew would differ."""
    torch.manual_seed(1)
    tower = Tower(0.5)
    inputs = torch.randn(12, 20)
    seen: list[torch.Tensor] = []

    def encode(x: torch.Tensor) -> torch.Tensor:
        seen.append(tower(x))
        return seen[-1]

    before = torch.get_rng_state()
    grad_cache.step(samtone.samtone_loss, (encode, inputs.split(5)), (tower, [inputs]))
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]).detach())
    assert not torch.equal(before, torch.get_rng_state()), "the first encoding moves the generator on"


def test_only_one_chunk_has_a_graph_at_a_time() -> None:
    tower = Tower(0.0)
    recorded: list[Any] = []

    def encode(x: torch.Tensor) -> torch.Tensor:
        embeddings = tower(x)
        recorded.append((len(x), embeddings.requires_grad))
        return embeddings

    inputs = torch.randn(9, 20)
    grad_cache.step(samtone.samtone_loss, (encode, inputs.split(4)), (tower, [inputs]))
    assert recorded == [(4, False), (4, False), (1, False), (4, True), (4, True), (1, True)]


def test_a_frozen_tower_gets_no_gradients() -> None:
    tower, frozen = Tower(0.0), Tower(0.0).requires_grad_(False)
    inputs = torch.randn(6, 20)
    grad_cache.step(samtone.samtone_loss, (tower, inputs.split(2)), (frozen, inputs.split(3)))
    assert all(p.grad is None for p in frozen.parameters()) and all(p.grad is not None for p in tower.parameters())
