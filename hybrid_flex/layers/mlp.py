"""The gated feed-forward layer between mixers."""

from __future__ import annotations

from torch import Tensor, nn

from hybrid_flex.checks import check


class SwiGLU(nn.Module):
    """Transform each token by itself: ``y = W_down (SiLU(W_gate x) * W_up x)``.

    Args:
        hidden_size: model width D.
        mlp_size: inner width.

    Raises:
        ValueError: a width is not positive.

    Device: any.

    Source: GLU Variants Improve Transformer, arXiv:2002.05202.

    Example:
        >>> import torch
        >>> SwiGLU(32, 64)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        check(hidden_size > 0, "SwiGLU", "hidden_size", "be positive", hidden_size)
        check(mlp_size > 0, "SwiGLU", "mlp_size", "be positive", mlp_size)
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x [..., D]``."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
