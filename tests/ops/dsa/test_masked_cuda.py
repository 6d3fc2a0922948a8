"""sparse_attention, masked form, on CUDA: against float64 and the gather form, the compiler, determinism, auto."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from hybrid_flex.ops.dsa import attention, masked, sparse_attention

pytestmark = pytest.mark.gpu

NAMES = ("o", "lse", "dq", "dk", "dv")


@pytest.fixture
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((attention, "_in_masked_hopper_kernel"), (masked, "_is_backward_in_gluon")):
        monkeypatch.setattr(module, name, lambda q, k, v: False)


@pytest.fixture(params=["triton", "gluon"])
def kernel(request: pytest.FixtureRequest) -> None:
    """Choose the kernel, where both serve."""
    if request.param == "triton":
        request.getfixturevalue("in_triton")


# B, T, S, H, Hkv, D, Dv, J
CASES = [
    (1, 1, 1, 1, 1, 16, 16, 1),
    (1, 300, 700, 32, 8, 128, 128, 64),
    (2, 150, 200, 8, 8, 64, 64, 40),
    (2, 150, 200, 8, 2, 64, 64, 40),
    (1, 200, 300, 6, 1, 96, 128, 64),
    (1, 70, 260, 64, 1, 128, 128, 130),
    (1, 20, 260, 130, 2, 40, 24, 200),
    (3, 40, 500, 12, 4, 80, 48, 500),
]
IDS = ["B{}-T{}-S{}-H{}-Hkv{}-D{}-Dv{}-J{}".format(*case) for case in CASES]


def draw(case: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    b, t, s, h, g, d, e, _ = case
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((b, t, h, d), (b, s, g, d), (b, s, g, e))
    return [torch.randn(n, generator=generator, device="cuda").to(dtype).requires_grad_() for n in sizes]


def results(inputs: list[Tensor], indices: Tensor, backend: str) -> dict[str, Tensor]:
    o, lse = sparse_attention(*inputs, indices, backend=backend)
    generator = torch.Generator("cuda").manual_seed(1)
    do, dlse = (torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in (o, lse))
    grads = torch.autograd.grad((o, lse.masked_fill(lse.isinf(), 0.0)), inputs, (do, dlse))
    return dict(zip(NAMES, (o.detach(), lse.detach(), *grads), strict=True))


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-3 * y.numel() ** 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_outputs_and_gradients(
    case: tuple[int, ...], dtype: torch.dtype, selection: Callable[..., Tensor], kernel: None
) -> None:
    indices = selection(case[0], case[1], case[2], case[7]).cuda()
    inputs = draw(case, dtype)
    got = results(inputs, indices, "masked")
    want = results([x.detach().double().requires_grad_() for x in inputs], indices, "reference")
    empty = want["lse"].isinf()
    assert torch.equal(got["lse"].isinf(), empty) and (got["o"][empty] == 0).all()
    for name in NAMES:
        x, y = (r[name].masked_fill(empty, 0.0) if name == "lse" else r[name] for r in (got, want))
        bound = 1e-5 if name == "lse" else 1e-2
        assert x.isfinite().all() and relative(x, y) <= bound, (name, relative(x, y))


def causal(T: int, J: int) -> Tensor:
    """Draw J past keys of every token."""
    generator = torch.Generator("cuda").manual_seed(3)
    scores = torch.rand(T, T, generator=generator, device="cuda")
    scores = scores.masked_fill(torch.ones(T, T, device="cuda", dtype=torch.bool).triu(1), -1)
    values, indices = scores.topk(min(J, T))
    indices = indices.masked_fill(values < 0, T).sort().values
    return indices.masked_fill(indices == T, -1).int()[None]


@pytest.mark.parametrize("J", [40, 300])
def test_it_equals_the_gather_form_over_many_tiles(J: int, kernel: None) -> None:
    """Some tiles share too much to be gathered and some too little to be masked, or all are masked."""
    inputs, indices = draw((1, 3000, 3000, 16, 4, 128, 128, 0), torch.bfloat16), causal(3000, J)
    for worth in (masked.FORWARD, masked.FORWARD_ON_HOPPER, masked.TRAINING, masked.TRAINING_ON_HOPPER):
        tiles = masked._unions(inputs[0], inputs[1], indices, worth)[1].tiles
        assert (tiles < 0).any() == (J == 40) and (tiles >= 0).any()
    got, want = (results(inputs, indices, backend) for backend in ("masked", "gather"))
    assert all(relative(got[name], want[name]) <= 1e-2 for name in NAMES)


def test_bits_repeat(selection: Callable[..., Tensor], kernel: None) -> None:
    """Of the outputs and dq; with deterministic algorithms of all gradients."""
    case = (2, 300, 500, 8, 2, 128, 128, 100)
    inputs, indices = draw(case, torch.bfloat16), selection(2, 300, 500, 100).cuda()
    first, second = (results(inputs, indices, "masked") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES[:3])
    torch.use_deterministic_algorithms(True)
    try:
        third, fourth = (results(inputs, indices, "masked") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(third[name], fourth[name]) for name in NAMES)
    assert all(relative(third[name], first[name]) <= 1e-2 for name in NAMES if name != "lse")  # -inf without keys


@pytest.mark.parametrize("layout", ["head-major", "sliced"])
def test_strides(layout: str, selection: Callable[..., Tensor], kernel: None) -> None:
    inputs, indices = draw((2, 70, 300, 8, 2, 64, 64, 0), torch.bfloat16), selection(2, 70, 300, 40).cuda()
    want = results(inputs, indices, "masked")
    if layout == "head-major":
        moved = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    else:
        moved = [torch.nn.functional.pad(x.detach(), (8, 8))[..., 8:-8] for x in inputs]
    got = results([x.requires_grad_() for x in moved], indices.long(), "masked")
    assert all(torch.equal(got[name], want[name]) for name in NAMES[:3])
    assert all(relative(got[name], want[name]) <= 5e-3 for name in NAMES[3:])


def test_the_hopper_kernel_in_a_graph(fresh_dynamo: None, called: list[str], listing: Callable[..., Any]) -> None:
    """It masks some tiles and leaves some."""
    from hybrid_flex.kernels.dsa import masked_hopper

    inputs, indices = [x.detach() for x in draw((1, 3000, 3000, 16, 4, 128, 128, 0), torch.bfloat16)], causal(3000, 60)
    if not masked_hopper.is_served(*inputs):
        pytest.skip("a kernel for compute capability 9.0")
    torch.library.opcheck(torch.ops.hybrid_flex.sparse_attention_masked_hopper, (*inputs, indices, 0.1))
    got = torch.compile(Attention(), fullgraph=True, backend=listing)(*inputs, indices)
    assert len(called) == 1 and "sparse_attention_masked_hopper" in called[0]
    want = sparse_attention(*(2 * x for x in inputs), indices, backend="gather")
    assert relative(got[0], want[0]) <= 5e-3
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-4)


def test_opcheck(selection: Callable[..., Tensor]) -> None:
    inputs, indices = draw((1, 40, 200, 8, 2, 64, 64, 0), torch.float16), selection(1, 40, 200, 20).cuda()
    torch.library.opcheck(torch.ops.hybrid_flex.sparse_attention_masked, (*inputs, indices, 0.1))


def test_auto_takes_it_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None, called: list[str], listing: Callable[..., Any]
) -> None:
    """Lengths on both sides of the bounds, eager and as graphs; the selection decides which tiles it leaves."""
    monkeypatch.setattr(attention, "FEWEST_QUERIES", 256)
    monkeypatch.setattr(attention, "FEWEST_ROWS", 0)
    monkeypatch.setattr(attention, "UNION_BYTES", 500 * 500 // 128)
    for T, name in ((250, "cuda"), (300, "masked"), (600, "cuda")):
        inputs, indices = draw((1, T, T, 8, 2, 64, 64, 0), torch.bfloat16), causal(T, 10)
        called.clear()
        o, _ = torch.compile(sparse_attention, fullgraph=True, backend=listing)(*inputs, indices)
        assert [f"sparse_attention_{name}" in x for x in called] == [True], (T, called)
        want = "gather" if name == "cuda" else name
        assert torch.equal(o, sparse_attention(*inputs, indices)[0])
        assert torch.equal(o, sparse_attention(*inputs, indices, backend=want)[0])


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_attention(2 * q, 2 * k, 2 * v, indices, backend="masked")


@pytest.mark.parametrize("form", ["compiled", "package"])
def test_one_graph_masks_all_tiles_or_leaves_some(
    form: str, fresh_dynamo: None, in_triton: None, packaged: Callable[[ExportedProgram], Any]
) -> None:
    """At some lengths nothing is left to gather: that launch is empty."""
    lengths = {3000: 1, 300: 0, 2000: 1, 700: 0}
    x = {T: ([t.detach() for t in draw((1, T, T, 16, 4, 64, 64, 0), torch.bfloat16)], causal(T, 60)) for T in lengths}
    inputs, indices = x[3000]
    if form == "compiled":
        call = torch.compile(Attention(), fullgraph=True, dynamic=True)
    else:
        open_length = {1: Dim.DYNAMIC(min=1)}
        with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):
            call = packaged(torch.export.export(Attention(), (*inputs, indices), dynamic_shapes=(open_length,) * 4))
    for T, is_part in lengths.items():
        inputs, indices = x[T]
        assert masked._unions(inputs[0], inputs[1], indices, masked.FORWARD)[1].is_part == is_part
        with torch.no_grad():
            got, want = call(*inputs, indices), Attention()(*inputs, indices)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), T


def test_nothing_selected_and_nothing_there(kernel: None) -> None:
    q, k, v = draw((1, 30, 40, 4, 2, 32, 32, 0), torch.bfloat16)
    got = results([q, k, v], torch.full((1, 30, 7), -1, device="cuda"), "masked")
    assert (got["o"] == 0).all() and (got["lse"] == float("-inf")).all() and (got["dk"] == 0).all()
    o, lse = sparse_attention(q, k[:, :0], v[:, :0], torch.full((1, 30, 0), -1, device="cuda"), backend="masked")
    assert (o == 0).all() and (lse == float("-inf")).all()


def test_more_than_two_to_the_31_elements(kernel: None) -> None:
    """The rows of late heads lie behind 2^31 elements."""
    T, S = 600, 2**17 + 70
    q = torch.randn(1, T, 128, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 128, S, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    indices = torch.randint(S, (1, T, 40), device="cuda").sort().values
    indices = indices.masked_fill(torch.nn.functional.pad(indices.diff() == 0, (1, 0)), -1).int()
    with torch.no_grad():
        got, lse = sparse_attention(q, k, k, indices, backend="masked")
        want, want_lse = sparse_attention(q, k, k, indices, backend="gather")
    assert relative(got[0, -50:, -2:], want[0, -50:, -2:]) <= 1e-2
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)
