"""A launchable kernel runs; without Triton the room says what to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from hybrid_flex.kernels.launch import launchable


@triton.jit
def _double(p_x, p_y, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(p_y + offsets, 2 * tl.load(p_x + offsets))


def test_a_kernel_runs(device: str) -> None:
    x = torch.randn(16, device=device)
    y = torch.full_like(x, float("nan"))
    launchable(_double)[(1,)](x, y, SIZE=16)
    torch.testing.assert_close(y, 2 * x)


def test_without_triton_the_cure_is_named(fresh_process: Callable[..., str]) -> None:
    source = """
import sys
sys.modules["triton"] = None
try:
    import hybrid_flex.kernels
except RuntimeError as error:
    print(error)
"""
    assert "install it with `pip install triton`" in fresh_process(source)
