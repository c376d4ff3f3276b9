"""The losses in the trainer of sentence-transformers, and a learned temperature in its keeping."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss
from sentence_models import TEXTS, Encoder, features_of, static_model, theirs

pytestmark = pytest.mark.sentence_transformers


def trainer_of(folder: Path, model: Any, loss: Any, data: Any = None, evaluation: Any = None, **arguments: Any) -> Any:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    options: dict[str, Any] = {
        "max_steps": 15, "per_device_train_batch_size": 6, "learning_rate": 0.05, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output_dir=str(folder), **options | arguments),
        train_dataset=Dataset.from_dict(TEXTS) if data is None else data,
        eval_dataset=evaluation,
        loss=loss,
    )


def curve_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make(cached: bool, **options: Any) -> tuple[Any, Any]:
    """A model and its loss, the same in each call."""
    torch.manual_seed(5)
    model = static_model()
    options = {"temperature": 0.1, "hard_negative_scope": "own", "learnable": "log_beta"} | options
    return model, CachedSamToNeLoss(model, mini_batch_size=2, **options) if cached else SamToNeLoss(model, **options)


@pytest.mark.parametrize("cached", [False, True])
def test_trainer(cached: bool, tmp_path: Path) -> None:
    model, loss = make(cached)
    trainer = trainer_of(tmp_path, model, loss)
    trainer.train()
    curve = curve_of(trainer)
    assert len(curve) == 15 and curve[-1] < 0.5 * curve[0]
    assert abs(loss.temperature - 0.1) > 0.01, "the trainer's optimizer has not got the parameters of the loss"
    assert loss.get_config_dict()["loss"] == "samtone_query" and "SamToNe" in loss.citation
    model.save(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "SamToNe" in card and f'"temperature": {loss.temperature:.6g}' in card


@pytest.mark.parametrize("cached", [False, True])
def test_trainer_with_dims(cached: bool, tmp_path: Path) -> None:
    """The same steps as with MatryoshkaLoss around the loss, and what it is on the card."""
    dims: dict[str, Any] = {"matryoshka_dims": [16, 4], "matryoshka_weights": [1.0, 0.5]}
    model, loss = make(cached, **dims)
    trainer = trainer_of(tmp_path, model, loss, max_steps=4)
    trainer.train()
    other, inner = make(False)
    around = trainer_of(tmp_path, other, theirs()[0].MatryoshkaLoss(other, inner, *dims.values()), max_steps=4)
    around.train()
    assert curve_of(trainer) == pytest.approx(curve_of(around), rel=1e-3) and len(curve_of(trainer)) == 4
    model.save(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    shown = re.sub(r"\s+", "", card)
    assert "matryoshka_dims" in shown and "[4,16]" in shown and "[0.5,1.0]" in shown and "kusupati2022" in card


def test_every_step_has_its_own_gradient(tmp_path: Path) -> None:
    """The trainer clears the gradients of the model after a step, not those of the loss."""
    from transformers import TrainerCallback

    model, loss = make(False)
    seen: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            assert loss.criterion.log_beta.grad is not None
            got = loss.criterion.log_beta.grad.item()
            batch = [features_of(model, TEXTS[name]) for name in TEXTS]
            value = loss(batch, None)
            (want,) = torch.autograd.grad(value, [loss.criterion.log_beta])
            seen.append((got, want.item()))

    trainer = trainer_of(tmp_path, model, loss, max_steps=4)
    trainer.add_callback(Watch())
    trainer.train()
    assert len(seen) == 4
    for got, want in seen:
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("learnable", ["log_beta", "tau"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_training_that_goes_on_from_a_checkpoint(learnable: str, wrapped: bool, tmp_path: Path) -> None:
    """The same curve as training at one go, in a new process for all that the trainer knows."""

    def start(name: str) -> tuple[Any, Any]:
        model, loss = make(False, learnable=learnable)
        outer = theirs()[0].MatryoshkaLoss(model, loss, [16, 8]) if wrapped else loss
        arguments = {"save_strategy": "steps", "save_steps": 5, "learning_rate": 0.02, "max_steps": 10}
        return loss, trainer_of(tmp_path / name, model, outer, **arguments)

    loss, whole = start("whole")
    whole.train()
    again, second = start("again")
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    second.train(resume_from_checkpoint=str(checkpoint))
    assert curve_of(second) == curve_of(whole) and len(curve_of(whole)) == 10
    assert again.temperature == loss.temperature != pytest.approx(0.1, rel=1e-3)
    card = (checkpoint / "README.md").read_text()
    if not wrapped:
        saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["SamToNeTemperature"]
        value = saved["attributes"]["values"][f"criterion.{learnable}"]
        shown = re.search(r'"temperature": ([-+.e\d]+)', card)
        tau = value if learnable == "tau" else torch.tensor(-value).exp().item()
        assert shown and float(shown[1]) == pytest.approx(tau, rel=1e-5) != pytest.approx(0.1, rel=1e-3)


def test_the_best_model_comes_with_its_temperature(tmp_path: Path) -> None:
    from datasets import Dataset

    model, loss = make(False)
    trainer = trainer_of(
        tmp_path, model, loss, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        evaluation=Dataset.from_dict(TEXTS),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    value = saved["SamToNeTemperature"]["attributes"]["values"]["criterion.log_beta"]
    assert loss.criterion.log_beta.item() == value


def test_losses_for_several_data_sets_keep_their_own_temperatures(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    def start(folder: str) -> tuple[dict[str, Any], Any]:
        torch.manual_seed(5)
        model = static_model()
        losses = {name: SamToNeLoss(model, temperature=t, learnable="tau") for name, t in (("a", 0.1), ("b", 0.3))}
        data = DatasetDict({name: Dataset.from_dict(TEXTS) for name in losses})
        arguments = {"max_steps": 4, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(tmp_path / folder, model, losses, data, **arguments, learning_rate=0.01)
        return losses, trainer

    losses, whole = start("whole")
    whole.train()
    again, second = start("again")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [x.temperature for x in again.values()] == [x.temperature for x in losses.values()]
    assert curve_of(second) == curve_of(whole)


@pytest.mark.parametrize("learnable", [None, "log_beta", "tau"])
def test_the_temperature_is_shown_as_it_is(learnable: str | None) -> None:
    loss = SamToNeLoss(Encoder(), temperature=0.1, learnable=learnable)
    if learnable is not None:
        other = SamToNeLoss(Encoder(), temperature=0.025, learnable=learnable)
        loss.load_state_dict(other.state_dict())
    now = 0.1 if learnable is None else 0.025
    assert loss.temperature == loss.criterion.temperature == pytest.approx(now)
    assert loss.scale == pytest.approx(1 / now) and loss.get_config_dict()["temperature"] == now
    assert f"temperature={now}" in repr(loss)
