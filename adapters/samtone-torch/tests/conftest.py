"""What a machine may lack is skipped, unless the variable SAMTONE_REQUIRE names it.

SAMTONE_TEST_DEVICE=cpu has the tests of GPUs run on the CPU, as far as they can: they themselves are tested so.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

REQUIRED = {name.strip() for name in os.environ.get("SAMTONE_REQUIRE", "").split(",")}
DEVICE = os.environ.get("SAMTONE_TEST_DEVICE", "cuda")


def missing(name: str, module: str) -> bool:
    """Whether tests of `module` are to be skipped; an error if it is required and not there."""
    absent = importlib.util.find_spec(module) is None
    if absent and name in REQUIRED:
        raise pytest.UsageError(f"SAMTONE_REQUIRE names {name}, which is not installed")
    return absent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu`, and those of them marked `cuda`, which ask CUDA itself, run where there is a GPU, or it is required."""
    if torch.cuda.is_available() or "cuda" in REQUIRED:
        return
    for item in items:
        if item.get_closest_marker("cuda") or (item.get_closest_marker("gpu") and DEVICE == "cuda"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)
