"""A launchable kernel runs, or is compiled ahead; without Triton the room says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from hybrid_flex.kernels.launch import compile_ahead, launchable


@triton.jit
def _double(p_x, p_y, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(p_y + offsets, 2 * tl.load(p_x + offsets))


def test_a_kernel_runs(device: str) -> None:
    x = torch.randn(16, device=device)
    y = torch.full_like(x, float("nan"))
    launchable(_double)[(1,)](x, y, SIZE=16)
    torch.testing.assert_close(y, 2 * x)


def test_compiling_ahead_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    class Kernel:
        def warmup(self, *args: Any, **kwargs: Any) -> None:
            compiled.append((args, kwargs))
            raise RuntimeError("a kernel that does not compile")

    monkeypatch.setattr(triton, "JITFunction", Kernel)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: f"wrapped {type(kernel).__name__}")

    def call() -> None:
        launchable(Kernel())[(2,)](1, SIZE=16)
        launchable(Kernel())[(3,)](2)

    compile_ahead(call, torch.device("cuda", 0))
    assert sorted(compiled, key=str) == [((1,), {"SIZE": 16, "grid": (2,)}), ((2,), {"grid": (3,)})]
    assert launchable(Kernel()) == "wrapped Kernel"  # from now on it is launched again
    with pytest.raises(ZeroDivisionError):
        compile_ahead(lambda: 1 / 0, torch.device("cuda", 0))
    assert launchable(Kernel()) == "wrapped Kernel"


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
