"""The masked kernels, by their operators, against dense attention in float64: sizes on and off tiles, shared or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops.dsa import attention, masked, sparse_attention

kernels = pytest.importorskip("hybrid_flex.kernels.dsa.masked")

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
    """Draw a selection with unused slots, some in the middle, keys nobody selects, and a last token without a key."""
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


@pytest.mark.parametrize(
    ("worth", "sizes"),
    [(19, (1, 70, 400, 4, 1, 64, 128, 30)), (27, (2, 36, 500, 16, 2, 40, 24, 40))],
    ids=["4 heads", "8 heads"],
)
def test_tiles_that_share_too_little_are_gathered(
    device: str, worth: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of queries that select alike, of such that do not, and of few; a union may have some 126 keys."""
    for name in ("FORWARD", "TRAINING"):
        monkeypatch.setattr(masked, name, worth)
    B, T, S, H, Hkv, D, Dv, J = sizes
    tensors, indices = make(B, T, S, H, Hkv, D, Dv, torch.float32, device), select(B, T, S, J)
    indices[0, : kernels.queries_of_tile(H // Hkv)] = indices[0, :1]
    _, done = masked._unions(tensors[0], tensors[1], indices.to(device), worth)
    assert done.is_part == 1 and (done.tiles[0] < 0).tolist() == [False, True, False]
    compare(tensors, indices)


@pytest.mark.parametrize("most", [100, 380])
def test_unions(device: str, most: int) -> None:
    B, T, S, J = 2, 70, 700, 6
    indices = torch.rand(B, T, S, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :J].int()
    indices[0, :32] = torch.tensor([0, 31, 32, 63, 699, -1])
    indices[0, 5, 2:4] = -1
    indices[1, 64:] = -1
    bits, number, keys = (x.cpu() for x in kernels.launch_unions(indices.to(device), S, 4, most, 384))
    assert bits.shape == (B, 96, 12) and number.shape == (B, 3) and keys.shape == (B, 3, 384)
    member = torch.zeros(B, 96, S + 1, dtype=torch.bool)
    member[:, :T].scatter_(2, indices.masked_fill(indices < 0, S).long(), True)
    member = member[..., :S]
    for b in range(B):
        for i in range(3):
            union = member[b, 32 * i : 32 * i + 32].any(0).nonzero()[:, 0]
            if len(union) > most:
                assert number[b, i] == -1 and (bits[b, 32 * i : 32 * i + 32] == 0).all()
                continue
            assert number[b, i] == len(union) and torch.equal(keys[b, i, : len(union)].long(), union)
            places = (bits[b, 32 * i : 32 * i + 32, :, None] >> torch.arange(32)) & 1
            want = torch.nn.functional.pad(member[b, 32 * i : 32 * i + 32][:, union], (0, 384 - len(union)))
            assert torch.equal(places.flatten(1).bool(), want)
    assert (number[0, 0], number[1, 2]) == (5, 0) and (number == -1).any() == (most == 100)


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
    assert all(torch.equal(got[name], want[name]) for name in NAMES[:3])  # dk and dv are added up in any order


def test_extreme_logits_and_a_negative_scale(device: str) -> None:
    x = make(1, 9, 140, 2, 1, 16, 16, torch.float32, device)
    # Logits of some thousands have lost three of float32's digits before the softmax sees them.
    compare([100 * x[0], *x[1:]], select(1, 9, 140, 30), -3.0, factor=100.0)


def test_every_key_selected(device: str) -> None:
    indices = torch.arange(140).expand(1, 9, 140).tril(130).masked_fill(torch.ones(1, 9, 140).tril(130) == 0, -1)
    compare(make(1, 9, 140, 2, 1, 16, 16, torch.float32, device), indices)
