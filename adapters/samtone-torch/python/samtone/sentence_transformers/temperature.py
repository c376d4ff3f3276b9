"""A learned temperature in the trainer's keeping: one value in all processes, in its checkpoints and on its model cards.

The trainer gives the optimizer the parameters of a loss. But checkpoints, DistributedDataParallel and `zero_grad` know only those of
the model. What is missing is done here, from within the call of a loss, so that users need not know.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


class Averaged(torch.autograd.Function):
    """The same number, with the mean over processes of its gradients, as DistributedDataParallel gives the model's parameters."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return number.view_as(number)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        mean = gradient.clone()
        torch.distributed.all_reduce(mean, group=ctx.group)
        return mean / torch.distributed.get_world_size(ctx.group), None


def wrappers(model: Any) -> Iterator[Any]:
    """The model, what it wraps, and so on: DistributedDataParallel, torch.compile."""
    while isinstance(model, nn.Module):
        yield model
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)


def processes_of(model: Any) -> Any | None:
    """The processes that a wrapper averages the model's gradients over."""
    return next(
        (x.process_group for x in wrappers(model) if hasattr(x, "no_sync") and hasattr(x, "process_group")), None
    )


def _calling_trainer() -> Any | None:
    """The trainer whose `compute_loss` this is called from."""
    trainers: Any = sys.modules.get("transformers.trainer")
    frame: FrameType | None = sys._getframe(1)
    while trainers is not None and frame is not None:
        if frame.f_code.co_name == "compute_loss" and isinstance(frame.f_locals.get("self"), trainers.Trainer):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _learned(loss: Any) -> dict[str, nn.Parameter]:
    """The learned temperatures in a loss of the trainer, or in its losses for several data sets."""
    if isinstance(loss, dict):
        return {f"{name}.{key}": x for name, one in loss.items() for key, x in _learned(one).items()}
    found: dict[str, nn.Parameter] = {}
    for name, module in loss.named_modules() if isinstance(loss, nn.Module) else ():
        if hasattr(module, "learned_temperature"):
            found |= {f"{name}.{key}".lstrip("."): x for key, x in module.learned_temperature().items()}
    return found


@cache
def _callback() -> Any:
    """The class, made when transformers is there."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class SamToNeTemperature(TrainerCallback, ExportableState):
        """Has learned temperatures saved in the `trainer_state.json` of every checkpoint, and takes them from there. After each
        step it forgets their gradients, which the trainer would add to those of the next step."""

        def __init__(self) -> None:
            self.trainer: Any = None
            self.run: Any = None

        def follow(self, trainer: Any) -> None:
            """In every step; only the first of a run, which may go on from a checkpoint, finds something to do."""
            if self.run is trainer.state:
                return
            self.trainer, self.run = trainer, trainer.state
            self.forget()
            self.take(trainer.state.stateful_callbacks.setdefault(type(self).__name__, self.state()))

        def state(self) -> dict[str, Any]:
            values = {name: x.item() for name, x in _learned(self.trainer.loss).items()} if self.trainer else {}
            return {"args": {}, "attributes": {"values": values}}

        def take(self, state: dict[str, Any]) -> None:
            values = state["attributes"]["values"]
            with torch.no_grad():
                for name, x in _learned(self.trainer.loss).items():
                    if name in values:
                        x.fill_(values[name])

        def forget(self) -> None:
            for x in _learned(self.trainer.loss).values():
                x.grad = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.forget()
            if control.should_save:
                self.show()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.show()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.load_best_model_at_end and state.best_model_checkpoint:
                best = json.loads((Path(state.best_model_checkpoint) / "trainer_state.json").read_text())
                self.take(best["stateful_callbacks"][type(self).__name__])
            self.show()

        def show(self) -> None:
            """On the model card, whose text for a loss is made when the trainer is."""
            trainer = self.trainer
            card = getattr(trainer.model, "model_card_data", None)
            for kind in ("train", "eval"):
                infos, data = getattr(card, f"{kind}_datasets", []), getattr(trainer, f"{kind}_dataset", None)
                names = list(data) if isinstance(trainer.loss, dict) and isinstance(data, dict) else [None] * len(infos)
                for name, info in zip(names, infos):
                    _show(trainer.loss if name is None else trainer.loss[name], info.get("loss", {}))

    return SamToNeTemperature


def _show(loss: Any, described: dict[str, Any]) -> None:
    learned = [x for x in loss.modules() if hasattr(x, "learned_temperature") and x.learned_temperature()]
    if len(learned) == 1 and "config_code" in described:
        number = re.compile(r'(?<="temperature": )[-+.e\d]+|(?<=\btemperature=)[-+.e\d]+')
        described["config_code"] = number.sub(
            repr(learned[0].get_config_dict()["temperature"]), described["config_code"]
        )


def follow_trainer() -> None:
    """Called in a step: whatever trainer makes it, if one does, keeps learned temperatures."""
    trainer = None if torch.compiler.is_compiling() else _calling_trainer()
    if trainer is None:
        return
    kind = _callback()
    callback = next((x for x in trainer.callback_handler.callbacks if isinstance(x, kind)), None)
    if callback is None:
        callback = kind()
        trainer.add_callback(callback)
    callback.follow(trainer)
