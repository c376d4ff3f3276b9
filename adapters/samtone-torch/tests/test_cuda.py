"""CUDA without a GPU: on the emulated driver in a child process, and shapes alone. On a GPU: test_gpu.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import emulated
import pytest
import samtone
import torch
from conftest import REQUIRED
from samtone import _native, cuda, ops
from torch._subclasses.fake_tensor import FakeTensorMode

COMPILER = os.environ.get("CXX", "g++")


def test_on_the_emulated_driver() -> None:
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        assert "emulator" not in REQUIRED, "it is required, but there is no C++ compiler on Linux"
        pytest.skip("the emulated driver needs a C++ compiler and Linux")
    folder = emulated.build(Path(tempfile.gettempdir()) / f"samtone-emulated-driver-{os.getuid()}", COMPILER)
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
    settings = _native.Settings("clip", 0.1)
    with pytest.raises(RuntimeError, match="CUDA is not available: .*; allowed: "):
        _native.CudaPlan(settings, cuda.capsule(there), cuda.capsule(there), annotations, (True, True))


def test_shapes_on_cuda_without_a_gpu() -> None:
    """What torch.compile knows of a call on CUDA."""
    with FakeTensorMode():
        q, p = (torch.empty(rows, 16, device="cuda", dtype=torch.bfloat16) for rows in (8, 9))
        evaluation = samtone.evaluate(q, p, passage_ids=torch.arange(9))
        assert evaluation.loss.device.type == "cuda" and evaluation.row_losses.shape == (8,)
        for share in (None, 0.1):
            options = ("samtone_query", False, None, "error", None, share, False)
            saved = ops.forward(q, p, None, None, None, None, None, None, options[0], 0.1, *options[1:], 3)[3:]
            size = cuda.state_bytes(8, 9, skipping=share is not None)
            assert [len(x) for x in saved] == [0, 0, 1, size, 1] and saved[-1].device.type == "cpu"
            dq, dp, derivative = ops.backward(evaluation.loss, q, p, None, None, None, None, None, *saved, *options, 1)
            assert dq.shape == q.shape and dq.dtype == q.dtype and dq.device == q.device
            assert dp.shape == (0, 16) and derivative.shape == (1,)
