"""The losses for sentence-transformers in two processes: one all-reduce in a step, whatever the number of chunks, and one
temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trainer_worker as worker
from conftest import missing
from test_distributed import needs_gloo, spread

pytestmark = needs_gloo


KINDS = ["plain", "cached", "routes", "towers"]
TRAINER = [] if missing("sentence-transformers", "sentence_transformers") else ["trainer"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process finds, kind by kind, and with the trainer at last."""
    return spread(
        tmp_path_factory.mktemp("kinds"), ",".join([*KINDS, *worker.GATHERED, "nothing", *TRAINER]), "trainer_worker.py"
    )


def alone(kind: str) -> list[torch.Tensor]:
    """The mean over processes of the gradients of their rows."""
    sums: list[torch.Tensor] = []
    for rank in range(worker.PROCESSES):
        model = worker.model_of(kind)
        loss = worker.loss_of("cached" if kind == "towers" else kind, model)
        worker.gradients(kind, model, loss, rank)
        parameters = dict.fromkeys([*model.parameters(), *loss.parameters()])
        got = [x.grad for x in parameters if x.grad is not None]
        sums = [a + b for a, b in zip(sums, got)] if sums else got
    return [x / worker.PROCESSES for x in sums]


@pytest.mark.parametrize("kind", KINDS)
def test_one_all_reduce_in_a_step_and_the_mean_of_gradients(kind: str, results: list[dict[str, Any]]) -> None:
    want, (one, other) = alone(kind), (result[kind] for result in results)
    for result in (one, other):
        assert result["reduced"] == worker.STEPS
        got = [x for x in result["first"] if x is not None]
        # The temperature of `grad_cache.step` is in the keeping of whoever calls it.
        count = len(want) - 1 if kind == "towers" else len(want)
        for a, b in list(zip(got, want, strict=True))[:count]:
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (a, b)
    count = len(one["after"]) - (kind == "towers")
    for a, b in list(zip(one["after"], other["after"]))[:count]:
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", worker.GATHERED)
def test_the_loss_of_both_processes_is_that_of_one_with_all_rows(kind: str, results: list[dict[str, Any]]) -> None:
    """Texts of one process are texts of the other, too, and the batches have 8 and 3 rows."""
    model = worker.model_of(kind)
    loss = worker.loss_of(kind, model)  # there is no other process here, so nothing to gather
    value = worker.gradients(kind, model, loss, None)
    want = [x.grad for x in dict.fromkeys([*model.parameters(), *loss.parameters()])]
    one, other = (result[kind] for result in results)
    for result in (one, other):
        assert torch.allclose(result["value"], value, rtol=1e-6)
        assert result["reduced"] == worker.STEPS
        for a, b in zip(result["first"], want, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (a, b)
    for a, b in zip(one["after"], other["after"], strict=True):
        assert torch.equal(a, b)


def test_rows_without_negatives_are_told_of_in_every_process(results: list[dict[str, Any]]) -> None:
    one, other = (result["nothing"] for result in results)
    assert one == other and one["values"] == [0.0, 0.0]
    assert len(one["said"]) == 1 and "(rank 0 has failed: row 0 has no negative left" in one["said"][0]


@pytest.mark.sentence_transformers
def test_the_trainer_has_one_temperature(results: list[dict[str, Any]]) -> None:
    one, other = (result["trainer"] for result in results)
    assert one["wrapped"] and other["wrapped"], "the trainer has not wrapped the model, so this tests nothing"
    assert one["after"][0].item() != pytest.approx(2.302585, rel=1e-3), "the temperature is not learned"
    for a, b in zip(one["after"], other["after"], strict=True):
        assert torch.equal(a, b)
