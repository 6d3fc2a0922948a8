"""Which form of an operator serves a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def has_kernels(x: Tensor) -> bool:
    """Tell whether Triton kernels serve ``x``: on CUDA, in every dtype but float64."""
    return x.is_cuda and x.dtype != torch.float64
