"""RMS norm with an output gate: what stands between the recurrence and the output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_flex.checks import FLOATING, check, check_choice, check_device, check_dtype, check_shape
from hybrid_flex.ops.dispatch import has_kernels, in_its_own_precision, plain_form
from hybrid_flex.ops.sums import sum_over_tokens

ACTIVATIONS = ("sigmoid", "silu")


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``x / rms(x)`` and ``1 / rms(x)`` in the accumulation dtype."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    reciprocal = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * reciprocal, reciprocal


@torch.library.triton_op("hybrid_flex::gated_rms_norm", mutates_args=())
@plain_form("gated_rms_norm")
@in_its_own_precision
def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    if has_kernels(x):
        from hybrid_flex.kernels.kda.gated_norm import gated_rms_norm as launch

        return launch(x, gate, weight, eps, activation)

    normed, _ = _normalise(x, eps)
    gate = gate.to(normed.dtype)
    factor = torch.sigmoid(gate)
    if activation == "silu":
        factor = gate * factor
    return (normed * weight.to(normed.dtype) * factor).to(x.dtype)


@torch.library.triton_op("hybrid_flex::gated_rms_norm_backward", mutates_args=())
@in_its_own_precision
def _gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    if has_kernels(x):
        from hybrid_flex.kernels.kda.gated_norm import gated_rms_norm_backward as launch

        return launch(dy, x, gate, weight, eps, activation)

    normed, reciprocal = _normalise(x, eps)
    gate_, weight_, dy = gate.to(normed.dtype), weight.to(normed.dtype), dy.to(normed.dtype)
    sigmoid = torch.sigmoid(gate_)
    if activation == "silu":
        factor = gate_ * sigmoid
        slope = sigmoid * (1 + gate_ * (1 - sigmoid))
    else:
        factor = sigmoid
        slope = sigmoid * (1 - sigmoid)
    d_weight = sum_over_tokens(dy * normed * factor, tuple(range(x.dim() - 1)))
    d_gate = dy * normed * weight_ * slope
    d_normed = dy * weight_ * factor
    # The norm removes the component along x, because y does not change when x is scaled.
    dx = reciprocal * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), d_gate.to(gate.dtype), d_weight.to(weight.dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, gate, weight, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(x, gate, weight)


def _backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    x, gate, weight = ctx.saved_tensors
    return *_gated_rms_norm_backward(dy, x, gate, weight, ctx.eps, ctx.activation), None, None


_gated_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-6, activation: str = "sigmoid"
) -> Tensor:
    """Scale every row to unit root mean square, then by a weight and an activated gate.

    .. code-block:: text

        y = x / sqrt(mean(x^2) + eps) * weight * act(gate)        act = sigmoid, or silu(a) = a sigmoid(a)

    Computed in float32 (float64 for float64 inputs).

    Args:
        x: rows [..., D], in KDA [B, T, HV, V]; bfloat16, float16, float32 or float64.
        gate: gate before its activation [..., D], the shape and dtype of ``x``.
        weight: [D], the dtype of ``x`` or float32.
        eps: added to the mean square, inside the root; positive.
        activation: ``"sigmoid"`` (Kimi Linear) or ``"silu"``.

    Returns:
        y [..., D] in the dtype of ``x``. Gradients reach x, gate and weight.

    Raises:
        ValueError: a shape, a device, eps or the activation are wrong.
        TypeError: a dtype is wrong.

    Device:
        CPU, in plain torch that the compiler fuses; CUDA, in kernels that read and write each row once (float64: the
        plain form). Each gives the same bits for the same input.

    Source:
        Kimi Linear (arXiv:2510.26692), section 4, the head-wise gated RMSNorm; RMSNorm is arXiv:1910.07467.

    Example:
        >>> import torch
        >>> x, gate = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 3, 16)
        >>> gated_rms_norm(x, gate, torch.ones(16)).shape
        torch.Size([2, 5, 3, 16])
    """
    op = "gated_rms_norm"
    check(x.dim() >= 1, op, "x", "be [..., D], a tensor of rank 1 or more", f"shape {tuple(x.shape)}")
    check_dtype(op, "x", x, FLOATING)
    check(gate.shape == x.shape, op, "gate", f"have the shape of x, {tuple(x.shape)}", f"shape {tuple(gate.shape)}")
    check_dtype(op, "gate", gate, (x.dtype,))
    check_device(op, "gate", gate, x.device)
    check_shape(op, "weight", weight, (x.shape[-1],), "[D]")
    check_dtype(op, "weight", weight, tuple(dict.fromkeys((x.dtype, torch.float32))))
    check_device(op, "weight", weight, x.device)
    check(eps > 0, op, "eps", "be positive", eps)
    check_choice(op, "activation", activation, ACTIVATIONS)
    return _gated_rms_norm(x, gate, weight, eps, activation)
