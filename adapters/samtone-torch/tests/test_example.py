"""The example follows the curve of float64 PyTorch, the README's example runs, and the wheel asks for what its users need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
DATA = HERE.parent / "dual-encoder"


def test_curve() -> None:
    spec = importlib.util.spec_from_file_location("train", HERE / "examples" / "train.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    curve, log_beta = example.train(DATA)
    expected = json.loads((DATA / "curve.json").read_text())
    assert len(curve) == len(expected["loss"]) == 60
    assert curve == pytest.approx(expected["loss"], rel=1e-5)
    assert log_beta == pytest.approx(expected["log_beta"], rel=1e-5)


def test_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert blocks, "the README has an example"
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_extra_brings_what_the_trainer_needs() -> None:
    """`datasets` and `accelerate`, which sentence-transformers itself has in an extra."""
    required = importlib.metadata.requires("samtone") or []
    extra = [
        line
        for line in required
        if line.endswith(("extra == 'sentence-transformers'", 'extra == "sentence-transformers"'))
    ]
    assert len(extra) == 1 and extra[0].startswith("sentence-transformers[train]>=")
