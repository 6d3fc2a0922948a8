"""What the tests of programs and packages share: operators as they are on CUDA, without a device."""

from __future__ import annotations

import importlib

import pytest
import torch

from hybrid_flex.ops import dispatch

KDA, DSA = ("chunk", "recurrent", "short_conv", "gated_norm"), ("indexer", "attention")
FAMILIES = (*(f"kda.{name}" for name in KDA), *(f"dsa.{name}" for name in DSA))


@pytest.fixture(scope="session")
def loops_compile() -> None:
    """Skip a test that packages plain forms, for a CPU, where the compiler cannot."""
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        pytest.skip("AOTInductor of torch 2.11 compiles no loop with open sizes")


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every operator that is traced take the form it has on CUDA; what it computes is never asked."""
    for name in FAMILIES:
        module = importlib.import_module(f"hybrid_flex.ops.{name}")
        monkeypatch.setattr(module, "has_kernels", lambda x: dispatch._kernels_wanted)
