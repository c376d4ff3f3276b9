"""The example follows the curves of float64 PyTorch, the README's example runs, and the wheel asks for what its users need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss
from sentence_models import transformer_model
from test_distributed import needs_gloo

HERE = Path(__file__).resolve().parents[1]
DATA = HERE.parent / "dual-encoder"


@pytest.mark.parametrize("name", ["curve.json", "curve_prefixes.json"])
def test_curve(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("train", HERE / "examples" / "train.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    expected = json.loads((DATA / name).read_text())
    options = {key: expected[key] for key in ("prefixes", "prefix_weights") if key in expected}
    got = example.train(DATA, **options)
    assert len(got.loss) == len(expected["loss"]) == 60
    assert got.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert got.log_beta == pytest.approx(expected["log_beta"], rel=1e-5)
    assert len(got.prefix_losses) == len(expected.get("prefix_losses", []))
    for of_step, want in zip(got.prefix_losses, expected.get("prefix_losses", [])):
        assert of_step == pytest.approx(want, rel=2e-5)
    # The command says so, of the same training.
    monkeypatch.setattr("sys.argv", ["train.py", str(DATA), *(["--prefixes"] if options else [])])
    monkeypatch.setattr(example, "train", lambda *_, **given: (options == given and got) or pytest.fail(str(given)))
    example.main()
    assert "of the float64 curve" in capsys.readouterr().out
    got.loss[7] *= 1.001
    with pytest.raises(SystemExit, match="too far"):
        example.main()


@needs_gloo
def test_curve_in_two_processes() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, HERE / "examples" / "train_distributed.py", DATA]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    if done.returncode != 0 or "2 processes: losses within" not in done.stdout:
        pytest.fail(f"it ended with {done.returncode} and wrote:\n{done.stdout}\n{done.stderr}")


BLOCKS = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
OF_THE_TRAINER = [block for block in BLOCKS if "sentence_transformers" in block]


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_readme() -> None:
    blocks = [block for block in BLOCKS if block not in OF_THE_TRAINER]
    assert len(blocks) == 3, "the example at the top, those of Matryoshka and of GradCache"
    for block in blocks:
        run(block)


@pytest.mark.sentence_transformers
@pytest.mark.parametrize("line", ["plain", "cached"])
def test_readme_of_the_trainer(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in the place of one that would be downloaded; with either of the two losses, and nothing else changed."""
    (block,) = OF_THE_TRAINER
    folder = tmp_path / "model"
    before = transformer_model(tmp_path / "bert")
    before.save(str(folder))
    block, models = re.subn(r'SentenceTransformer\("[^"]+"\)', f"SentenceTransformer({str(folder)!r})", block)
    block, losses = re.subn(r"(?m)^loss = CachedSamToNeLoss\(.*\n", "" if line == "plain" else r"\g<0>", block)
    assert models == losses == 1
    monkeypatch.chdir(tmp_path)  # where the trainer leaves what it saves
    names = run(block)
    assert type(names["loss"]) is (CachedSamToNeLoss if line == "cached" else SamToNeLoss)
    assert names["trainer"].state.global_step == 3
    assert any((a != b).any() for a, b in zip(names["model"].parameters(), before.parameters()))


def test_the_extra_brings_what_the_trainer_needs() -> None:
    """`datasets` and `accelerate`, which sentence-transformers itself has in an extra."""
    required = importlib.metadata.requires("samtone") or []
    extra = [
        line
        for line in required
        if line.endswith(("extra == 'sentence-transformers'", 'extra == "sentence-transformers"'))
    ]
    assert len(extra) == 1 and extra[0].startswith("sentence-transformers[train]>=")
