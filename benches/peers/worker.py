"""Measures one engine after the other at given shapes, and prints each result as a line of JSON. Started by run.py.

A process of its own, because a kernel that fails can leave the device unusable and a compiler cannot be interrupted.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from engines import BY_NAME, Engine, Inputs, Made, make_inputs
from measure import allocated, free, graph_of, median, peak_of, synchronize
from reference import Judge, Reference, sampled_rows

LIMIT_S = 2.0


@dataclass
class Shape:
    """Inputs of one shape and what float64 says of them."""

    inputs: Inputs
    references: dict[str, Reference] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: int, dim: int, device: torch.device, losses: set[str]) -> "Shape":
        shape = cls(make_inputs(rows, dim, device))
        judge = Judge(*shape.inputs.narrow)
        sample = sampled_rows(rows, device)
        shape.references = {loss: judge.reference(loss, sample) for loss in losses}
        return shape


def reason(error: BaseException) -> str:
    """One line: the type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def too_large(engine: Engine, rows: int, device: torch.device) -> str | None:
    """Why a dense engine cannot run: QP and QQ in f32 alone need 8 B^2 bytes."""
    if not engine.dense or device.type != "cuda":
        return None
    needed, there = 8 * rows**2, torch.cuda.get_device_properties(device).total_memory
    if needed < 0.9 * there:
        return None
    return f"not tried: two B x B matrices of f32 need {needed / 2**30:.0f} GiB, the device has {there / 2**30:.0f}"


def measured(engine: Engine, shape: Shape) -> dict:
    """Medians, peak memory beyond inputs and gradients, gradient error."""
    inputs, device = shape.inputs, shape.inputs.device
    free(device)
    before = allocated(device)
    made: Made = engine.make(inputs)
    step = made.step
    step.run()
    synchronize(device)
    result: dict = {"note": made.note, "loss": step.loss()}
    if engine.loss is not None:
        reference = shape.references[engine.loss]
        result["gradient_error"] = reference.errors(step.gradients)
        result["judged_rows"] = inputs.rows if reference.rows is None else len(reference.rows)
        result["reference_loss"] = reference.loss
    peak = peak_of(step, device)
    if peak is not None:
        # bf16 products have no gradients of their own; everyone else has two of f32.
        gradients = 2 * inputs.rows * inputs.dim * 4 if engine.loss is not None else 0
        result["extra_mib"] = (peak - before - gradients) / 2**20
    result["ms"] = median(step.run, device, LIMIT_S)
    if inputs.rows <= engine.graph and device.type == "cuda":
        try:
            result["graph_ms"] = median(graph_of(step).replay, device, LIMIT_S)
        except Exception as error:  # noqa: BLE001
            result["note"] = f"{result['note']}; no graph: {reason(error)}".lstrip("; ")
            result["restart"] = True  # a failed capture can spoil what follows
    return result


def run_task(engine: Engine, shape: Shape) -> dict:
    try:
        return measured(engine, shape)
    except torch.OutOfMemoryError as error:
        return {"failed": reason(error)}
    except Exception as error:  # noqa: BLE001
        return {"failed": reason(error), "restart": True}


def environment(device: torch.device) -> dict:
    """Versions of everything that has a part in the figures."""
    about = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    for name in ("triton", "sentence-transformers", "memeff"):
        try:
            about[name] = version(name)  # without the seconds of an import
        except PackageNotFoundError:
            about[name] = "none"
    about["device"] = "cpu"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        about["device memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
    return about


def main() -> None:
    request = json.loads(sys.argv[1])
    device = torch.device(request["device"])
    # Only answers may reach the driver; libraries print what they like.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: dict) -> None:
        print(json.dumps(line), file=answers, flush=True)

    if request.get("about"):
        return answer(environment(device))
    at, shape = None, None
    for rows, dim, name in request["tasks"]:
        if (why := too_large(BY_NAME[name], rows, device)) is not None:
            answer({"failed": why})
            continue
        if (rows, dim) != at:
            shape = None
            free(device)
            wanted = {BY_NAME[other].loss for *size, other in request["tasks"] if size == [rows, dim]} - {None}
            at, shape = (rows, dim), Shape.of(rows, dim, device, wanted)
            free(device)
            answer({"ready": [rows, dim]})
        result = run_task(BY_NAME[name], shape)
        with contextlib.suppress(RuntimeError):
            free(device)
        answer(result)
        if result.get("restart"):
            return None
    return None


if __name__ == "__main__":
    main()
