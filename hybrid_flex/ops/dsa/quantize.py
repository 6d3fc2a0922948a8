"""Index queries and keys in eight bits, as DeepSeek-V3.2 scores them.

    x' = H x / sqrt(DI)        s = max(|x'|, 1e-4) / 448        x8 = e4m3(x' / s)        q . k ~ s_q s_k (q8 . k8)

H, the Hadamard matrix, is orthogonal: it changes no product, but spreads what is large over all channels before eight
bits are all that is left.  One scale serves one vector of one head.
Source: DeepSeek-V3.2 report and its published inference code (format, scale and rotation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_flex.checks import check

LARGEST = 448.0
"""Largest finite e4m3 number."""
SMALLEST_AMAX = 1e-4


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension, a power of two, by the Hadamard matrix: sums and differences, log2 DI times over."""
    width = x.shape[-1]
    y = x.unsqueeze(-1)
    while y.shape[-2] > 1:
        a, b = y[..., 0::2, :], y[..., 1::2, :]
        y = torch.cat((a + b, a - b), dim=-1)
    return y.squeeze(-2) * width**-0.5


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Turn vectors ``[..., DI]`` into float8_e4m3fn of the same shape and their scales, float32 ``[...]``."""
    rotated = hadamard(x.float())
    scale = rotated.abs().amax(-1).clamp_min(SMALLEST_AMAX) / LARGEST
    return (rotated / scale[..., None]).to(torch.float8_e4m3fn), scale


def rounded(x: Tensor) -> Tensor:
    """Return in float32 what eight bits leave of vectors, rotated."""
    x8, scale = quantize(x)
    return x8.float() * scale[..., None]


def check_fp8(op: str, q_idx: Tensor) -> None:
    """Raise unless the width can be rotated and the device multiplies in eight bits."""
    width = q_idx.shape[-1]
    check(width & (width - 1) == 0, op, "q_idx", "have a width that is a power of two for fp8", width)
    if q_idx.is_cuda and torch.cuda.get_device_capability(q_idx.device) < (8, 9):
        capability = ".".join(map(str, torch.cuda.get_device_capability(q_idx.device)))
        raise RuntimeError(
            f"{op}: fp8 must run on compute capability 8.9 or later, got {capability}; leave quantization out"
        )
