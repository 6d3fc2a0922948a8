"""The masked kernels, by their operators, against dense attention in float64: sizes on and off tiles and blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops.dsa import attention, sparse_attention

NAMES = ("o", "lse", "dq", "dk", "dv")
# B, T, S, H, Hkv, D, Dv, J
SIZES = [
    (1, 1, 1, 1, 1, 16, 16, 1),
    (2, 33, 130, 8, 2, 64, 64, 20),
    (1, 20, 300, 6, 2, 40, 24, 64),
    (1, 130, 200, 2, 2, 128, 128, 40),
    (2, 3, 520, 65, 1, 16, 64, 500),
    (1, 150, 150, 3, 1, 80, 128, 9),
]
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Let the operators launch their kernels on a CPU, too, where they are interpreted."""
    if device == "cpu":
        monkeypatch.setattr(attention, "has_kernels", lambda x: True)


def select(B: int, T: int, S: int, J: int) -> Tensor:
    """Draw a selection with unused slots, some in the middle, blocks nobody touches, and a last token without a key."""
    generator = torch.Generator().manual_seed(S + J)
    indices = torch.rand(B, T, max(S, J), generator=generator).argsort(-1)[..., :J].int()
    indices[indices >= S] = -1
    indices[(indices >= 128) & (indices < 256)] = -1
    indices[..., J // 2 :: 3] = -1 if J > 1 else 0
    if T > 1:
        indices[-1, -1] = -1
    return indices


def make(B: int, T: int, S: int, H: int, Hkv: int, D: int, Dv: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(D + Dv)
    sizes = ((B, T, H, D), (B, S, Hkv, D), (B, S, Hkv, Dv), (B, T, H, Dv))
    return [torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes]


def results(tensors: list[Tensor], indices: Tensor, scale: float, exact: bool) -> dict[str, Tensor]:
    *leaves, do = (x.double() if exact else x for x in tensors)
    leaves = [x.detach().requires_grad_() for x in leaves]
    if exact:
        o, lse = sparse_attention(*leaves, indices, scale=scale, backend="reference")
    else:
        o, lse = torch.ops.hybrid_flex.sparse_attention_masked(*leaves, indices, scale)
    finite = lse.masked_fill(lse.isinf(), 0.0)
    dlse = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype, device=lse.device).view(lse.shape)
    grads = torch.autograd.grad((o, finite), leaves, (do, dlse))
    return dict(zip(NAMES, (o.detach(), finite.detach(), *grads), strict=True))


def compare(tensors: list[Tensor], indices: Tensor, scale: float = 0.2, factor: float = 1.0) -> dict[str, Tensor]:
    indices = indices.to(tensors[0].device)
    got, want = (results(tensors, indices, scale, exact) for exact in (False, True))
    bound = factor * BOUNDS[tensors[0].dtype]
    for name in NAMES:
        error = (got[name].double() - want[name]).norm()
        assert error <= bound * want[name].norm().clamp_min(1e-3 * tensors[3].double().norm()), name
    empty = (indices < 0).all(-1)
    assert (got["o"][empty] == 0).all() and (got["dq"][empty] == 0).all()
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "B{}-T{}-S{}-H{}-Hkv{}-D{}-Dv{}-J{}".format(*s))
def test_sizes(device: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(make(*sizes[:7], dtype, device), select(*sizes[:3], sizes[7]))


def test_rows_without_keys_have_no_sum(device: str) -> None:
    q, k, v, _ = make(1, 3, 40, 4, 2, 16, 16, torch.float32, device)
    o, lse = torch.ops.hybrid_flex.sparse_attention_masked(q, k, v, torch.full((1, 3, 5), -1, device=device), 1.0)
    assert (o == 0).all() and (lse == float("-inf")).all()


def test_strides_and_wide_integers(device: str) -> None:
    x, indices = make(2, 5, 140, 4, 2, 24, 16, torch.float32, device), select(2, 5, 140, 9)
    want = compare(x, indices)
    moved = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in x]
    moved[1] = x[1].transpose(1, 3).contiguous().transpose(1, 3)
    got = compare(moved, indices.long())
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_extreme_logits_and_a_negative_scale(device: str) -> None:
    x = make(1, 9, 140, 2, 1, 16, 16, torch.float32, device)
    # Logits of some thousands have lost three of float32's digits before the softmax sees them.
    compare([100 * x[0], *x[1:]], select(1, 9, 140, 30), -3.0, factor=100.0)


def test_every_key_selected(device: str) -> None:
    indices = torch.arange(140).expand(1, 9, 140).tril(130).masked_fill(torch.ones(1, 9, 140).tril(130) == 0, -1)
    compare(make(1, 9, 140, 2, 1, 16, 16, torch.float32, device), indices)
