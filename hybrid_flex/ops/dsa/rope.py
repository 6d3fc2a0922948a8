"""Rotary positions, with the layout of the pairs as one explicit argument.

    (x_a, x_b) -> (x_a cos - x_b sin, x_b cos + x_a sin)        pair i turns by position * theta^(-2 i / R)

The layout says which two of the R rotated channels form pair i.  A wrong one is the commonest defect of a ported
indexer: outputs stay plausible while about a quarter of the selected keys changes.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from hybrid_flex.checks import check, check_choice, check_rank

_OP = "apply_rope"


class RopeLayout(StrEnum):
    """Name the channels that rotate together.

    ``HALF``: channels ``i`` and ``i + R / 2`` (the indexer of DeepSeek-V3.2).
    ``INTERLEAVED``: channels ``2 i`` and ``2 i + 1`` (main attention of DeepSeek-V3.2; GLM-5).
    ``NONE``: no rotation (GLM-5.3-Flash).
    """

    HALF = "half"
    INTERLEAVED = "interleaved"
    NONE = "none"


# Torch 2.11 cannot trace the iteration of an enum class.
_LAYOUTS = tuple(RopeLayout)


def rope_cos_sin(positions: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Tabulate the cosines and sines of the rotation angles ``position * theta^(-2 i / dim)``.

    Args:
        positions: integers (or floats) of any shape, usually ``[T]`` or ``[B, T]``.
        dim: number of rotated channels R; even.
        theta: base of the frequencies, > 0.

    Returns:
        cos and sin, each ``[*positions.shape, dim // 2]``, float32 (float64 for float64 positions).

    Raises:
        ValueError: ``dim`` is odd or not positive.

    Device: any; the result lies beside ``positions``.

    Example:
        >>> cos, sin = rope_cos_sin(torch.arange(5), 8)
        >>> cos.shape
        torch.Size([5, 4])
    """
    check(dim > 0 and dim % 2 == 0, "rope_cos_sin", "dim", "be even and positive", dim)
    dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim
    # Written as the published models compute it: a frequency rounded otherwise turns far positions by another angle.
    angles = positions.to(dtype)[..., None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout | str = RopeLayout.HALF) -> Tensor:
    """Rotate the FIRST ``R = 2 * cos.shape[-1]`` channels of every head; the others pass unchanged.

    Args:
        x: ``[B, T, E]`` or ``[B, T, H, E]`` with E >= R, any floating dtype.
        cos: ``[T, R / 2]`` or ``[B, T, R / 2]`` from `rope_cos_sin`.
        sin: like ``cos``.
        layout: `RopeLayout` or its string, ``"half"``, ``"interleaved"`` or ``"none"``; ``"none"`` returns ``x``
            itself.

    Returns:
        Like ``x``; the rotation is computed in float32 (float64 for float64).  Pairs stay where they were.

    Raises:
        ValueError: wrong rank, fewer than R channels, unknown layout.

    Device: any.
    Source: DeepSeek-V3.2 report, section 2; RoFormer, equation 34.

    Example:
        >>> cos, sin = rope_cos_sin(torch.arange(5), 4)
        >>> apply_rope(torch.ones(2, 5, 3, 6), cos, sin, "interleaved").shape
        torch.Size([2, 5, 3, 6])
    """
    check_choice(_OP, "layout", layout, _LAYOUTS)
    if layout == RopeLayout.NONE:
        return x
    check(x.dim() in (3, 4), _OP, "x", "have shape [B, T, E] or [B, T, H, E]", tuple(x.shape))
    check_rank(_OP, "cos", cos, "[B, T, R / 2]" if cos.dim() == 3 else "[T, R / 2]")
    half = cos.shape[-1]
    check(x.shape[-1] >= 2 * half, _OP, "x", "have at least R channels, (channels, R) given", (x.shape[-1], 2 * half))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dim() == 4:
        cos, sin = cos[..., None, :], sin[..., None, :]
    cos, sin = cos.to(dtype), sin.to(dtype)
    turning, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if layout == RopeLayout.HALF:
        a, b = turning[..., :half], turning[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
