"""What a machine may lack is skipped, unless the variable SAMTONE_REQUIRE names it.

SAMTONE_TEST_DEVICE=cpu has the tests of GPUs run on the CPU, as far as they can: they themselves are tested so.

SAMTONE_SENTENCE_TRANSFORMERS is the version that tests are meant for, if one is: any other is an error.
"""

from __future__ import annotations

import importlib.util
import os

# Tensors are tiny here, so that threads wait for each other longer than they work, the more so on a busy machine. Tests of threads set
# their number themselves. PyTorch reads this when it is imported, in processes that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

REQUIRED = {name.strip() for name in os.environ.get("SAMTONE_REQUIRE", "").split(",")}
DEVICE = os.environ.get("SAMTONE_TEST_DEVICE", "cuda")
VERSION = os.environ.get("SAMTONE_SENTENCE_TRANSFORMERS")


def missing(name: str, module: str) -> bool:
    """Whether tests of `module` are to be skipped; an error if it is required and not there."""
    absent = importlib.util.find_spec(module) is None
    if absent and name in REQUIRED:
        raise pytest.UsageError(f"SAMTONE_REQUIRE names {name}, which is not installed")
    return absent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `sentence_transformers` run where that is installed. Tests marked `gpu`, and those of them marked `cuda`, which ask
    CUDA itself, run where there is a GPU, or it is required."""
    absent = missing("sentence-transformers", "sentence_transformers")
    gpu = torch.cuda.is_available() or "cuda" in REQUIRED
    for item in items:
        if absent and item.get_closest_marker("sentence_transformers"):
            item.add_marker(pytest.mark.skip(reason="sentence-transformers is not installed"))
        if not gpu and (item.get_closest_marker("cuda") or (item.get_closest_marker("gpu") and DEVICE == "cuda")):
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(autouse=True, scope="session")
def _the_version_that_is_meant() -> None:
    if VERSION is not None:
        import sentence_transformers

        assert sentence_transformers.__version__ == VERSION, sentence_transformers.__file__


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)
