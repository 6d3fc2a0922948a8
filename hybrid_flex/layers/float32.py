"""Parameters that stay in float32 when the module around them is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


class Float32Parameters(nn.Module):
    """Keep the parameters named in ``float32_parameters`` out of half-precision casts.

    ``module.to(torch.bfloat16)``, ``.half()`` and the like leave them as they were (device moves still apply), so decay
    rates and norms keep their precision.  Casts to float32 and float64 pass.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Float32Parameters:
        before = {name: getattr(self, name).detach() for name in self.float32_parameters}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = getattr(self, name)
            if parameter.dtype in HALF:
                # nn.Parameter is made anew: assigning .data of another dtype is refused.
                kept = value.to(device=parameter.device)
                setattr(self, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        return self


class Float32LayerNorm(Float32Parameters):
    """Normalise the last dimension in float32: ``(x - mean) / sqrt(var + eps) * weight + bias``, returned in x's dtype.

    Args:
        dim: width of the last dimension.
        eps: added to the variance; 1e-6 in the lightning indexer.
    """

    float32_parameters = ("weight", "bias")

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x [..., dim]``; float64 stays float64."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return nn.functional.layer_norm(x.to(wide), weight.shape, weight, bias, self.eps).to(x.dtype)
