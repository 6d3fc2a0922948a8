"""Kernels run on a CUDA device, or under Triton's interpreter in a process of its own (see test_interpreter.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where there is neither a device nor the interpreter."""
    if torch.cuda.is_available() or INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device or TRITON_INTERPRET=1; test_interpreter.py runs it so")
    for item in items:
        if HERE in item.path.parents and item.path.name != "test_interpreter.py":
            item.add_marker(skip)


@pytest.fixture
def device() -> str:
    """Return the device that kernels run on here."""
    return "cpu" if INTERPRETED else "cuda"
