"""CUDA without a GPU: on the emulated driver in a child process, and shapes alone. On a GPU: test_gpu.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import emulated
import pytest
import samtone
import torch
from conftest import REQUIRED
from samtone import _native, cuda, ops
from samtone.options import prefixes_of, skips_tiles, text_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

COMPILER = os.environ.get("CXX", "g++")


def test_on_the_emulated_driver() -> None:
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        assert "emulator" not in REQUIRED, "it is required, but there is no C++ compiler on Linux"
        pytest.skip("the emulated driver needs a C++ compiler and Linux")
    built = os.environ.get("SAMTONE_EMULATED_DRIVER")  # by somebody else
    folder = built or emulated.build(Path(tempfile.gettempdir()) / f"samtone-emulated-driver-{os.getuid()}", COMPILER)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    checks = Path(__file__).with_name("cuda_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, env=os.environ | {"LD_LIBRARY_PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_it_is_a_sentence() -> None:
    """Of a tensor that says it is on a GPU, of which nothing is read before a device is found."""
    there = emulated.DeviceTensor(1 << 20, (4, 8), torch.float32)
    annotations = dict.fromkeys(("query_ids", "passage_ids", "positives", "weights", "owners"))
    settings = _native.Settings("loss=clip", 0.1)
    with pytest.raises(RuntimeError, match="CUDA is not available: .*; allowed: "):
        _native.CudaPlan(settings, cuda.capsule(there), cuda.capsule(there), annotations, (True, True), True)


def test_a_text_says_whether_tiles_are_skipped() -> None:
    """By its own line, whatever a loss is called."""
    named = "tile_skipping=None|1.0:qp:1"
    assert skips_tiles(text_of(named, {"tile_skipping": 0.1})) and not skips_tiles(text_of(named, {}))
    assert not skips_tiles(text_of("clip", {"tile_skipping": None}))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("options", [{}, {"tile_skipping": 0.1}, {"prefixes": [2, 16]}], ids=str)
@pytest.mark.parametrize("wanted", [ops.PASSAGE, ops.QUERY | ops.PASSAGE, ops.TEMPERATURE, 0])
def test_shapes_on_cuda_without_a_gpu(
    wanted: int, options: dict[str, Any], at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.compile knows of a call on CUDA."""
    if not at_once:
        monkeypatch.setattr(cuda, "AT_ONCE_BYTES", -1)
    with FakeTensorMode():
        q, p = (torch.empty(rows, 16, device="cuda", dtype=torch.bfloat16) for rows in (8, 9))
        evaluation = samtone.evaluate(q, p, passage_ids=torch.arange(9))
        assert evaluation.loss.device.type == "cuda" and evaluation.row_losses.shape == (8,)
        text = text_of("samtone_query", options)
        vectors = [None] * 5
        saved = ops.forward(q, p, None, *vectors, text, 0.1, wanted)[3:]
        rows = [8 if wanted & ops.QUERY else 0, 9 if wanted & ops.PASSAGE else 0, 1 if wanted & ops.TEMPERATURE else 0]
        prefixes = len(options.get("prefixes", []))
        state = cuda.state_bytes(8, 9, skipping="tile_skipping" in options, prefixes=prefixes)
        left = [*rows, 0] if at_once and wanted else [0, 0, 0, state]
        assert [len(x) for x in saved] == [*left, 1] and saved[-1].device.type == "cpu"
        assert all(x.dtype == torch.float32 and x.shape[1] == 16 for x in saved[:2])
        *gradients, derivative = ops.backward(evaluation.loss, q, p, None, *vectors, *saved, text, wanted)
        assert [len(x) for x in (*gradients, derivative)] == rows
        assert all(x.shape[1] == 16 and x.dtype == q.dtype and x.device == q.device for x in gradients)
        assert derivative.dtype == torch.float64 and derivative.device == q.device


@pytest.mark.parametrize("at_once", [True, False])
def test_shapes_of_prefixes_on_cuda(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole embedding alone, and of several prefixes, one of which may have weight 0."""
    if not at_once:
        monkeypatch.setattr(cuda, "AT_ONCE_BYTES", -1)
    with FakeTensorMode():
        q, p = (torch.empty(8, 16, device="cuda", requires_grad=True) for _ in range(2))
        for prefixes, weights, count in (([16], None, 1), ([2, 4, 16], [1, 0, 1.0], 2), ([2, 4, 16], None, 3)):
            got = samtone.evaluate(q, p, prefixes=prefixes, prefix_weights=weights)
            assert got.prefixes and got.row_losses.shape == (8,)
            vectors = [got.prefixes.losses, *got.prefixes.query_to_passage, *got.prefixes.passage_to_query]
            assert all(x.shape == (count,) and x.dtype == torch.float64 and x.device == q.device for x in vectors)


def test_a_text_says_which_prefixes_are_computed() -> None:
    """By its own lines, whatever a loss is called."""
    options: dict[str, Any] = {"margin": 0.1, "prefixes": (2, 4, 8), "prefix_weights": [1, 0, 1e-3]}
    named = "x\nprefixes=[3]|1.0:qp:1"
    for loss in ("clip", named):
        assert prefixes_of(text_of(loss, options, log_beta=True)) == [(2, 1.0), (8, 1e-3)]
        assert prefixes_of(text_of(loss, options | {"prefix_weights": None})) == [(2, 1.0), (4, 1.0), (8, 1.0)]
        assert prefixes_of(text_of(loss, {"prefixes": None, "margin": 0.1})) == prefixes_of(text_of(loss, {})) == []


@pytest.mark.parametrize("at_once", [True, False])
def test_shapes_on_cuda_may_be_symbols(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiled program for all batches that go the same way."""
    if not at_once:
        monkeypatch.setattr(cuda, "AT_ONCE_BYTES", 0)
    shapes = ShapeEnv()
    given = [torch.empty(rows, 16, device="meta") for rows in (8, 9)]
    with FakeTensorMode(shape_env=shapes) as mode:
        q, p = (torch.empty(mode.from_tensor(x, static_shapes=False).shape, device="cuda") for x in given)
        saved = ops.forward(q, p, *[None] * 6, text_of("samtone_query", {}), 0.1, ops.QUERY | ops.PASSAGE)[3:]
        state = cuda.state_bytes(q.shape[0], p.shape[0])
    left = [q.shape[0], p.shape[0], 0, 0] if at_once else [0, 0, 0, state]
    assert [str(x.shape[0]) for x in saved] == [*map(str, left), "1"]
    assert not str(state).isdigit() and not str(q.shape[0]).isdigit() and len(shapes.guards) <= 1


def test_rows_that_depend_on_data_want_a_bound() -> None:
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        rows = shapes.create_unbacked_symint()
        torch._check(rows >= 2)
        q, p = (torch.empty(rows, 16, device="cuda", requires_grad=True) for _ in range(2))
        with pytest.raises(GuardOnDataDependentSymNode):
            samtone.samtone_loss(q, p)
        torch._check(rows <= 16384)
        assert samtone.samtone_loss(q, p).shape == ()


def test_how_many_bytes_come_at_once() -> None:
    both, query, passage = (True, True), (True, False), (False, True)
    for dim in (1, 256, 1024):
        rows = cuda.AT_ONCE_BYTES // 4 // dim // 2
        assert cuda.at_once(rows, rows, dim, both) and not cuda.at_once(rows, rows + 1, dim, both)
        assert cuda.at_once(2 * rows, 9 * rows, dim, query) and not cuda.at_once(2 * rows + 1, 1, dim, query)
        assert cuda.at_once(9 * rows, 2 * rows, dim, passage) and not cuda.at_once(1, 2 * rows + 1, dim, passage)
        assert cuda.at_once(9 * rows, 9 * rows, dim, (False, False)), "the temperature alone"
