"""Sums over tokens: the gradients of parameters that every token shares."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_tokens(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum float32 or float64 ``x`` over ``dims``, accumulating in float64; the result has the dtype of ``x``.

    A plain float32 sum of n terms loses digits as n grows.  Inductor therefore picks another order of summation on CPU
    when a float32 sum passes 4096 terms, and with it compiles a graph again whose length is dynamic; a float64 sum
    is accurate in any order and takes one graph.
    """
    # An empty tuple would stand for every dimension.
    return x.sum(dims, dtype=torch.float64).to(x.dtype) if dims else x
