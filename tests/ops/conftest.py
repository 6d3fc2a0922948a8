"""The names of all kernels, shared by the tests that launch or compile every one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


@pytest.fixture
def kernel_names() -> set[str]:
    """Return the names of all Triton kernels of the package."""
    names = set()
    for path in (Path(__file__).resolve().parents[2] / "hybrid_flex" / "kernels").rglob("*.py"):
        names |= set(re.findall(r"@(?:triton|gluon)\.jit.*\ndef (\w+_kernel)\(", path.read_text()))
    return names
