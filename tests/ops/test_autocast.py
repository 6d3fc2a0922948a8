"""Autocast chooses what goes into an operator, not what happens inside: float32 arguments give the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops import (
    chunk_kda,
    fused_recurrent_kda,
    gated_rms_norm,
    indexer_kl_loss,
    lightning_topk,
    short_conv,
    sparse_attention,
)

B, T, H, D = 1, 40, 2, 16


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def kda() -> list[Tensor]:
    q, k = (torch.nn.functional.normalize(normal(B, T, H, D) + shift, dim=-1) for shift in (0, 1))
    return [q, k, normal(B, T, H, D), -normal(B, T, H, D).abs(), normal(B, T, H).sigmoid()]


def selection() -> Tensor:
    return lightning_topk(normal(B, T, H, 8), normal(B, T, 8), normal(B, T, H), 8)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sparse_attention(q, k, v, selection())[0]


def loss(q_idx: Tensor, k_idx: Tensor, weights: Tensor) -> Tensor:
    return indexer_kl_loss(q_idx, k_idx, weights, normal(B, T, H, D), normal(B, T, H, D) + 1, indices=selection())


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    "chunk_kda": (lambda *x: torch.cat([y.flatten() for y in chunk_kda(*x, output_final_state=True)]), kda),
    "fused_recurrent_kda": (lambda *x: fused_recurrent_kda(*x)[0], kda),
    "short_conv": (lambda x, w: short_conv(x, w, activation="silu")[0], lambda: [normal(B, T, D), normal(D, 4)]),
    "gated_rms_norm": (gated_rms_norm, lambda: [normal(T, D), normal(T, D) + 1, normal(D)]),
    "sparse_attention": (attend, lambda: [normal(B, T, H, D), normal(B, T, H, D) + 1, normal(B, T, H, D)]),
    "indexer_kl_loss": (loss, lambda: [normal(B, T, H, 8), normal(B, T, 8), normal(B, T, H)]),
}


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name: str, backward_inside: bool) -> None:
    operator, make = CASES[name]
    results = []
    for enabled in (False, True):
        x = [t.requires_grad_() for t in make()]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = operator(*x)
            grads = torch.autograd.grad(y.square().sum(), x) if backward_inside else None
        assert y.dtype == torch.float32
        results.append((y.detach(), *(grads or torch.autograd.grad(y.square().sum(), x))))
    for plain, under_autocast in zip(*results, strict=True):
        assert torch.equal(plain, under_autocast)


def test_selection_has_the_same_indices() -> None:
    plain = selection()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selection(), plain)
