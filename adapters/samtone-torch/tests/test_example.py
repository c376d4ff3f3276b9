"""The example follows the curve of float64 PyTorch, and the README's example runs."""

from __future__ import annotations

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
