"""sparse_attention, flex form, on CUDA: both forms of the mask, forward and every gradient, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops.dsa import flex, sparse_attention

pytestmark = pytest.mark.gpu

# B, T, S, H, Hkv, D, Dv, J
UNION = [
    (1, 300, 700, 4, 2, 64, 64, 40),
    (2, 150, 200, 8, 8, 128, 128, 64),
    (1, 200, 300, 16, 1, 512, 512, 64),
    (1, 130, 300, 16, 1, 576, 512, 64),
]
ROWS = [
    (3, 1, 1000, 64, 1, 64, 64, 100),
    (2, 20, 500, 64, 1, 128, 128, 64),
    (1, 128, 2048, 40, 1, 128, 96, 256),
    (2, 1, 3000, 64, 1, 512, 512, 300),
    (1, 100, 700, 64, 1, 512, 512, 64),
    (1, 9, 700, 130, 1, 576, 512, 700),
    (1, 16, 200, 12, 4, 64, 64, 20),
]


def draw(b: int, t: int, s: int, h: int, g: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((b, t, h, d), (b, s, g, d), (b, s, g, e))
    x = [torch.randn(n, generator=generator, device="cuda", dtype=torch.float64) for n in sizes]
    return [t.to(dtype).requires_grad_() for t in x]


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


def results(inputs: list[Tensor], indices: Tensor, backend: str) -> dict[str, Tensor]:
    o, lse = sparse_attention(*inputs, indices, backend=backend)
    generator = torch.Generator("cuda").manual_seed(1)
    do = torch.randn(o.shape, generator=generator, device="cuda", dtype=torch.float64).to(inputs[0].dtype)
    finite = lse.masked_fill(lse.isinf(), 0.0)
    grads = torch.autograd.grad((o, finite), inputs, (do, torch.ones_like(finite)))
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (o.detach(), lse.detach(), *grads), strict=True))


def compare(case: tuple[int, ...], indices: Tensor, dtype: torch.dtype) -> None:
    inputs = draw(*case[:7], dtype)
    got = results(inputs, indices, "flex")
    want = results([x.detach().double().requires_grad_() for x in inputs], indices, "reference")
    empty = want["lse"].isinf()
    assert torch.equal(got["lse"].isinf(), empty) and (got["o"][empty] == 0).all()
    torch.testing.assert_close(got["lse"][~empty].double(), want["lse"][~empty], rtol=1e-3, atol=1e-3)
    for name in ("o", "dq", "dk", "dv"):
        assert relative(got[name], want[name]) < 1e-2, name


@pytest.mark.parametrize("case", UNION + ROWS, ids=lambda c: "B{}-T{}-S{}-H{}-Hkv{}-D{}-Dv{}-J{}".format(*c))
def test_forward_and_every_gradient(
    case: tuple[int, ...], selection: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case in ROWS:
        monkeypatch.setattr(flex, "FEW_QUERIES", 10**9)
    compare(case, selection(case[0], case[1], case[2], case[7]).cuda(), torch.bfloat16)


def test_float32(selection: Callable[..., Tensor]) -> None:
    for case in ((1, 200, 300, 4, 2, 64, 64, 40), (2, 3, 300, 16, 1, 512, 512, 40)):
        compare(case, selection(case[0], case[1], case[2], case[7]).cuda(), torch.float32)


def test_more_entries_than_a_grid_holds(selection: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "FEW_QUERIES", 10**9)
    q, k, v = (x.detach() for x in draw(1, 2**17, 256, 16, 1, 64, 64, torch.bfloat16))
    indices = selection(1, 256, 256, 20).cuda().repeat(1, 2**9, 1)
    got, lse = sparse_attention(q, k, v, indices, backend="flex")
    want, want_lse = sparse_attention(q, k, v, indices)
    assert relative(got, want.double()) < 1e-2
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("few", [0, 10**9], ids=["union-of-queries", "heads-as-rows"])
def test_a_hundred_masks_take_one_compilation(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "FEW_QUERIES", few)
    q, k, v = (x.detach() for x in draw(1, 100, 512, 16, 1, 64, 64, torch.bfloat16))
    graphs = None
    for number in range(100):
        indices = torch.rand(1, 100, 512, device="cuda").argsort(-1)[..., :64].int()
        got, _ = sparse_attention(q, k, v, indices, backend="flex")
        found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        graphs = found if graphs is None else graphs
        assert found == graphs, number
        if number % 33 == 0:
            assert relative(got, sparse_attention(q, k, v, indices)[0].double()) < 1e-2


def test_decoding_with_a_growing_cache_compiles_once_for_each_power_of_two() -> None:
    graphs = None
    for length in range(1030, 1060):
        q, k, v = (x.detach() for x in draw(2, 1, length, 64, 1, 64, 64, torch.bfloat16))
        indices = torch.rand(2, 1, length, device="cuda").argsort(-1)[..., :100].int()
        got, _ = sparse_attention(q, k, v, indices, backend="flex")
        assert relative(got, sparse_attention(q, k, v, indices)[0].double()) < 1e-2
        found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        graphs = found if graphs is None else graphs
        assert found == graphs, length
