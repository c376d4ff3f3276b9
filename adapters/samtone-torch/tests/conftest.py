"""What a machine may lack is skipped, unless the variable SAMTONE_REQUIRE names it."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

REQUIRED = {name.strip() for name in os.environ.get("SAMTONE_REQUIRE", "").split(",")}


def missing(name: str, module: str) -> bool:
    """Whether tests of `module` are to be skipped; an error if it is required and not there."""
    absent = importlib.util.find_spec(module) is None
    if absent and name in REQUIRED:
        raise pytest.UsageError(f"SAMTONE_REQUIRE names {name}, which is not installed")
    return absent


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)
