"""The kernels written in Gluon, without a device: their programs as gluon_machine.py runs them, against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops.dsa import sparse_attention

pytest.importorskip("triton.experimental.gluon")
SCALE = 0.2


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("gluon_machine")


@pytest.fixture
def run(machine: ModuleType) -> Callable[..., None]:
    return machine.run


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def select(B: int, T: int, S: int, J: int) -> Tensor:
    """Draw ascending selections without an unused slot, for more tiles than buffers; the last token's has no key."""
    generator = torch.Generator().manual_seed(J)
    indices = torch.rand(B, T, S, generator=generator).argsort(-1)[..., :J].sort(-1).values.int()
    indices[-1, -1] = -1
    return indices


def check(o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float = SCALE) -> None:
    want, want_lse = sparse_attention(*(x.double() for x in (q, k, v)), indices, scale=scale, backend="reference")
    assert (o.double() - want).norm() <= 5e-3 * want.norm()
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    empty = (indices < 0).all(-1)
    assert (o[empty] == 0).all()


def unite(indices: Tensor, S: int, tile: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make the bits, numbers and keys of `Unions`, with rubbish where nothing counts."""
    B, T, _ = indices.shape
    tiles, room = -(-T // tile), -(-most // 128) * 128
    chosen = torch.zeros(B, tiles * tile, S + 1, dtype=torch.bool)
    chosen[:, :T].scatter_(2, indices.long() % (S + 1), True)
    chosen = chosen[..., :S]
    bits = torch.zeros(B, tiles * tile, room // 32, dtype=torch.int64)
    number = torch.full((B, tiles), -1, dtype=torch.int32)
    keys = torch.full((B, tiles, room), 7777, dtype=torch.int32)
    for b in range(B):
        for i in range(tiles):
            mine = chosen[b, i * tile : (i + 1) * tile]
            union = mine.any(0).nonzero()[:, 0]
            if len(union) <= most:
                number[b, i] = len(union)
                keys[b, i, : len(union)] = union
                words = torch.nn.functional.pad(mine[:, union], (0, room - len(union))).unflatten(1, (-1, 32))
                bits[b, i * tile : (i + 1) * tile] = (words * 2 ** torch.arange(32)).sum(-1)
    return (bits - (bits >> 31) * 2**32).int(), number, keys


# B, T, S, H, Hkv, D, J
SIZES = [
    (1, 40, 700, 8, 2, 128, 30),
    (2, 33, 65, 6, 2, 64, 20),
    (1, 5, 300, 1, 1, 128, 100),
    (1, 3, 128, 128, 1, 64, 128),
    (1, 2, 500, 9, 1, 128, 1),
]


def name(x: tuple[int, ...] | float) -> str:
    return "B{}-T{}-S{}-H{}-Hkv{}-D{}-J{}".format(*x) if isinstance(x, tuple) else f"scale{x:g}"


@pytest.mark.parametrize(
    ("sizes", "scale"),
    [*((sizes, SCALE) for sizes in SIZES), *(((1, 9, 200, 4, 1, 64, 60), scale) for scale in (1e4, -0.2, -1e-30, 0.0))],
    ids=name,
)
def test_masked(sizes: tuple[int, ...], scale: float, run: Callable[..., None]) -> None:
    from hybrid_flex.kernels.dsa.masked import ROWS, Unions, queries_of_tile
    from hybrid_flex.kernels.dsa.masked_hopper import masked_hopper_kernel
    from hybrid_flex.kernels.launch import next_power_of_2

    B, T, S, H, HKV, D, J = sizes
    q, k, v = rows(B, T, H, D, seed=1), rows(B, S, HKV, D, seed=2), rows(B, S, HKV, D, seed=3)
    indices = select(B, T, S, J)
    unions = Unions(*unite(indices, S, queries_of_tile(H // HKV), S))
    o, lse = torch.full((B, T, H, D), float("nan"), dtype=q.dtype), torch.full((B, T, H), float("nan"))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    run(
        masked_hopper_kernel, B * HKV * unions.number.shape[1],
        q, k, v, *unions, o, lse, scale, T, *unions.sizes, *strides,
        H=H, HKV=HKV, D=D, BG=next_power_of_2(H // HKV), BM=ROWS, BN=64,
    )  # fmt: skip
    check(o, lse, q, k, v, indices, scale)


@pytest.mark.parametrize(
    ("sizes", "scale"),
    [*((sizes, SCALE) for sizes in SIZES), *(((1, 9, 200, 4, 1, 64, 60), scale) for scale in (30.0, -0.2, 0.0))],
    ids=name,
)
def test_masked_backward(sizes: tuple[int, ...], scale: float, run: Callable[..., None]) -> None:
    """Every gradient, of tiles that have a union; the others are left alone."""
    from hybrid_flex.kernels.dsa.masked import ROWS, Unions, queries_of_tile
    from hybrid_flex.kernels.dsa.masked_backward_hopper import masked_backward_hopper_kernel
    from hybrid_flex.kernels.launch import next_power_of_2

    B, T, S, H, HKV, D, J = sizes
    q, k, v = rows(B, T, H, D, seed=1), rows(B, S, HKV, D, seed=2), rows(B, S, HKV, D, seed=3)
    do, dlse = rows(B, T, H, D, seed=4), rows(B, T, H, seed=5).float()
    indices = select(B, T, S, J)
    tile = queries_of_tile(H // HKV)
    unions = Unions(*unite(indices, S, tile, S))
    left = torch.zeros(B, T, dtype=torch.bool)
    if unions.number.shape[1] > 1:
        unions.number[0, 0], left[0, :tile] = -1, True
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    o, lse = sparse_attention(*leaves, indices, scale=scale, backend="reference")
    outputs = o.detach().to(q.dtype).contiguous(), lse.detach().float().contiguous()
    seen = ~(left | (indices < 0).all(-1))[..., None]
    want = torch.autograd.grad((o * do * seen[..., None]).sum() + (lse * dlse).where(seen, 0.0).sum(), leaves)
    dq = torch.full((B, T, H, D), 7.0, dtype=q.dtype)
    dk, dv = (torch.ones(B, S, HKV, D) for _ in range(2))
    strides = (*q.stride()[:3], *do.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    run(
        masked_backward_hopper_kernel, B * HKV * unions.number.shape[1],
        q, k, v, *unions, *outputs, do, dlse, dq, dk, dv, scale, T, S, *unions.sizes, *strides,
        H=H, HKV=HKV, D=D, BG=next_power_of_2(H // HKV), BM=ROWS, BN=64,
    )  # fmt: skip
    assert (dq[left] == 7).all()
    dq[left] = 0
    for which, got, exact in zip(("dq", "dk", "dv"), (dq, dk - 1, dv - 1), want, strict=True):
        assert (got.double() - exact).norm() <= 8e-3 * exact.norm() + 1e-4, which


GATHERED = [
    (1, 3, 700, 64, 1, 512, 300),
    (1, 3, 700, 64, 1, 576, 200),
    (2, 2, 90, 80, 2, 512, 70),
    (1, 2, 90, 70, 1, 512, 1),
    (1, 2, 900, 64, 1, 576, 700),
    (1, 2, 300, 40, 1, 512, 150),
]


@pytest.mark.parametrize("gaps", [False, True], ids=["ascending", "gaps"])
@pytest.mark.parametrize(
    ("sizes", "scale", "dtype"),
    [
        *((sizes, SCALE, torch.bfloat16) for sizes in GATHERED),
        *((GATHERED[-1], scale, torch.float16) for scale in (1e4, -0.5, -1e-30, 0.0)),
    ],
    ids=str,
)
def test_gather(sizes: tuple[int, ...], scale: float, dtype: torch.dtype, gaps: bool, run: Callable[..., None]) -> None:
    from hybrid_flex.kernels.dsa.gather_hopper import HEADS, VALUE_DIM, gather_hopper_kernel

    B, T, S, H, HKV, D, J = sizes
    q, k = rows(B, T, H, D, seed=1).to(dtype), rows(B, S, HKV, D, seed=2).to(dtype)
    indices = select(B, T, S, J)
    if gaps:
        indices[..., J // 2 :: 3] = -1
    k[:, -1] = float("nan")
    indices[indices == S - 1] = -1
    o, lse = torch.full((B, T, H, VALUE_DIM), float("nan"), dtype=q.dtype), torch.full((B, T, H), float("nan"))
    programs = B * T * HKV * -(-(H // HKV) // HEADS)
    run(
        gather_hopper_kernel, programs, q, k, indices, o, lse, scale, T, J, *q.stride()[:3], *k.stride()[:3],
        H=H, HKV=HKV, D=D, V=VALUE_DIM,
    )  # fmt: skip
    check(o, lse, q, k.nan_to_num(0.0), k[..., :VALUE_DIM].nan_to_num(0.0), indices, scale)


@pytest.mark.parametrize("seconds", [(0.01,), (0.02, 0.0), (0.0, 0.02, 0.0)], ids=["all", "first", "second"])
def test_nobody_writes_what_slow_products_read(
    seconds: tuple[float, ...], machine: ModuleType, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.Machine, "seconds_of_products", seconds)
    test_masked((1, 20, 700, 4, 1, 64, 60), SCALE, run)
    test_masked_backward((1, 20, 700, 4, 1, 64, 60), SCALE, run)
    test_gather((1, 1, 900, 64, 1, 576, 700), SCALE, torch.bfloat16, False, run)


def test_the_model_shows_what_is_not_waited_for(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ones = machine.Machine(), torch.ones(4, 4)
    shared = model.allocate_shared_memory(torch.float32, [4, 4], None)
    pointers = machine.Pointer(ones.flatten(), torch.arange(16).view(4, 4))

    def product() -> Tensor:
        return model.warpgroup_mma_wait(0, deps=[model.warpgroup_mma(ones, shared, ones, is_async=True)])

    model.async_load(shared, pointers)
    model.commit_group()
    model.fence_async_shared()
    assert shared.load(None).isnan().all() and product().isnan().all()
    model.wait_group(0)
    assert (shared.load(None) == 1).all() and product().isnan().all()
    model.fence_async_shared()
    assert (product() == 5).all()
    begun = model.warpgroup_mma(ones, shared, ones, is_async=True)
    later = model.warpgroup_mma(ones, shared, begun, is_async=True)
    with pytest.raises(AssertionError, match="before it is waited for"):
        model.warpgroup_mma_wait(1, deps=[later])
    model.async_load(shared, pointers)
    with pytest.raises(AssertionError, match="changed under a product"):
        model.warpgroup_mma_wait(0, deps=[later])
    with pytest.raises(AssertionError, match="outside"):
        (pointers + 1).load()

    monkeypatch.setattr(machine.Barriers, "PATIENCE", 0.01)
    barriers = model.allocate_shared_memory(torch.int64, [2, 1], model.barriers().MBarrierLayout())
    barriers.index(1).count = 1
    with pytest.raises(AssertionError, match="nobody arrives"):
        barriers.index(1).wait(0)
    barriers.index(1).arrive(1)
    barriers.index(1).wait(0)

    model, arrived = machine.Machine(), machine.Barriers(1)
    shared = model.allocate_shared_memory(torch.float32, [4, 4], None)
    model.async_load(shared, pointers)
    model.mbarrier_arrive(arrived, increment_count=False)
    assert shared.load(None).isnan().all()
    model.barriers().wait(arrived, 0)
    assert (shared.load(None) == 1).all() and product().isnan().all()
    model.fence_async_shared()
    assert (product() == 5).all()
