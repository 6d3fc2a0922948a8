"""The forget gate of Kimi Delta Attention: raw gate -> log decay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_flex.checks import FLOATING, check, check_device, check_dtype
from hybrid_flex.ops.sums import sum_over_tokens


def kda_gate(
    g: Tensor, A_log: Tensor | None = None, dt_bias: Tensor | None = None, *, lower_bound: float | None = None
) -> Tensor:
    """Compute the log decay of each key channel from the raw gate.

    With ``z = g + dt_bias``::

        lower_bound is None:  -exp(A_log) * softplus(z)                 (unbounded below; Kimi-Linear-48B)
        otherwise:            lower_bound * sigmoid(exp(A_log) * z)     (in (lower_bound, 0); GLM-5.3-Flash, -5)

    Args:
        g: raw gate, ``[..., HV, K]``, any floating dtype.
        A_log: log of the gate's slope per value head, any view with HV elements; None means a slope of 1 and needs
            ``lower_bound``.
        dt_bias: bias per channel, any view with HV * K elements; None means 0.
        lower_bound: smallest log decay, negative; None selects the softplus gate.

    Returns:
        Log decay per token, ``[..., HV, K]``, float32 (float64 for float64 ``g``), never positive.

    Raises:
        ValueError: a size or device does not match, ``lower_bound`` is not negative, or both it and ``A_log`` are None.
        TypeError: an argument is not floating point.

    Device: any; differentiable in g, A_log and dt_bias.

    Source: Kimi Linear (arXiv:2510.26692), section 3; the lower-bound form is GLM-5.3-Flash's.

    >>> kda_gate(torch.zeros(2, 5, 3, 16), A_log=torch.zeros(3)).shape
    torch.Size([2, 5, 3, 16])
    """
    check(g.dim() >= 2, "kda_gate", "g", "be [..., HV, K]", f"shape {tuple(g.shape)}")
    check_dtype("kda_gate", "g", g, FLOATING)
    check_gate_parameters("kda_gate", g, A_log, dt_bias, lower_bound)
    slope, z = _slope_and_argument(g, A_log, dt_bias)
    if lower_bound is None:
        return -slope * F.softplus(z)
    return lower_bound * torch.sigmoid(slope * z)


def check_gate_parameters(
    op: str, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> None:
    """Check the gate's parameters against a raw gate ``[..., HV, K]``."""
    num_heads, dim = g.shape[-2:]
    if lower_bound is None:
        check(A_log is not None, op, "A_log", "be given when lower_bound is None", "None")
    else:
        check(lower_bound < 0, op, "lower_bound", "be negative", lower_bound)
    for name, parameter, size, legend in (
        ("A_log", A_log, num_heads, "HV"),
        ("dt_bias", dt_bias, num_heads * dim, "HV * K"),
    ):
        if parameter is not None:
            check_dtype(op, name, parameter, FLOATING)
            check_device(op, name, parameter, g.device)
            rule = f"have {legend} = {size} elements"
            check(parameter.numel() == size, op, name, rule, f"shape {tuple(parameter.shape)}")


def gate_backward(
    d_log_decay: Tensor, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `kda_gate` for z (and so g), A_log ``[HV]`` and dt_bias ``[HV, K]``."""
    slope, z = _slope_and_argument(g, A_log, dt_bias)
    if lower_bound is None:
        dz = -slope * torch.sigmoid(z) * d_log_decay
        d_A_log = -slope * F.softplus(z) * d_log_decay
    else:
        s = torch.sigmoid(slope * z)
        dz = lower_bound * s * (1 - s) * slope * d_log_decay
        d_A_log = dz * z
    leading = tuple(range(g.dim() - 2))
    return dz, sum_over_tokens(d_A_log, (*leading, -1)), sum_over_tokens(dz, leading)


def _slope_and_argument(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``exp(A_log) [HV, 1]`` and ``z = g + dt_bias`` in float32, or float64 for float64 ``g``."""
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    num_heads, dim = g.shape[-2:]
    z = g.to(dtype)
    if dt_bias is not None:
        z = z + dt_bias.to(dtype).reshape(num_heads, dim)
    if A_log is None:
        return torch.ones((num_heads, 1), dtype=dtype, device=g.device), z
    return A_log.to(dtype).reshape(num_heads, 1).exp(), z
