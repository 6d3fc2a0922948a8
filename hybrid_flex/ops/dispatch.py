"""How an operator is run: which form serves a tensor, and in which precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Operator = TypeVar("Operator", bound=Callable[..., Any])


def has_kernels(x: Tensor) -> bool:
    """Tell whether Triton kernels serve ``x``: on CUDA, in every dtype but float64."""
    return x.is_cuda and x.dtype != torch.float64


def in_its_own_precision(operator: Operator) -> Operator:
    """Run the body of a registered operator without autocast.

    Autocast stays on inside an operator that is made of PyTorch's own, and would turn the products behind its float32
    sums and states into bfloat16.  An operator's dtypes follow from its arguments.
    """

    @functools.wraps(operator)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device.type
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return operator(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return operator(*args, **kwargs)

    return run  # type: ignore[return-value]
