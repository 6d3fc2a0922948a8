"""sparse_attention, flex form: FlexAttention inside one operator, against the reference, compiled and padded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops.dsa import flex, sparse_attention


def draw(b: int, t: int, s: int, h: int, g: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, t, h, d), (b, s, g, d), (b, s, g, e))
    return [torch.randn(x, generator=generator).to(dtype).requires_grad_() for x in shapes]


@pytest.fixture(params=["union-of-queries", "heads-as-rows"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let every size take one of the two forms."""
    monkeypatch.setattr(flex, "FEW_QUERIES", 0 if request.param == "union-of-queries" else 10**9)
    return str(request.param)


# All cases with one head count and widths share two inner graphs: queries and keys are padded to 128 or 256.
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (65, 65), (1, 70), (130, 200)], ids=lambda n: str(n))
def test_outputs_and_gradients(num_queries: int, num_keys: int, selection: Callable[..., Tensor]) -> None:
    inputs, indices = (
        draw(2, num_queries, num_keys, 4, 2, 16, 16, torch.float32),
        selection(2, num_queries, num_keys, 20),
    )
    values = {}
    for backend in ("flex", "reference"):
        o, lse = sparse_attention(*inputs, indices, backend=backend)
        grads = torch.autograd.grad((o.sin().sum() + lse.exp().sum()), inputs)
        values[backend] = dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *grads), strict=True))
    for name, want in values["reference"].items():
        torch.testing.assert_close(values["flex"][name], want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    empty = values["reference"]["lse"].isneginf()
    assert empty.any() and (values["flex"]["o"][empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_latent_attention(dtype: torch.dtype, form: str, selection: Callable[..., Tensor]) -> None:
    q, k, _ = (x.detach() for x in draw(1, 40, 60, 4, 1, 24, 24, dtype))
    indices = selection(1, 40, 60, 12)
    got, _ = sparse_attention(q, k, k[..., :16], indices, backend="flex")
    exact, _ = sparse_attention(q.double(), k.double(), k[..., :16].double(), indices, backend="reference")
    plain, _ = sparse_attention(q, k, k[..., :16], indices, backend="reference")
    budget = 2 * (plain.double() - exact).norm() + 1e-3 * exact.norm()
    assert got.dtype == dtype and (got.double() - exact).norm() <= budget


# B, T, S, H, Hkv, D, Dv, J; more than 128 heads are two blocks of rows, and 40 slots are more than 30 keys.
CASES = [(2, 1, 70, 4, 1, 16, 24, 20), (2, 19, 150, 6, 3, 24, 16, 40), (1, 21, 30, 130, 1, 16, 16, 40)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-T{}-S{}-H{}-Hkv{}-D{}-Dv{}-J{}".format(*c))
def test_both_forms(case: tuple[int, ...], form: str, selection: Callable[..., Tensor]) -> None:
    b, t, s, h, g, d, e, j = case
    inputs, indices = draw(b, t, s, h, g, d, e, torch.float32), selection(b, t, s, j)
    between = indices.gather(-1, torch.rand(indices.shape).argsort(-1))  # unused slots between used ones
    for slots in (indices, between) if j <= s else (indices,):
        (o, lse), want = (sparse_attention(*inputs, slots, backend=x) for x in ("flex", "reference"))
        torch.testing.assert_close(o, want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, want[1], rtol=1e-4, atol=1e-5)
        assert lse.isneginf().any() and (o[lse.isneginf()] == 0).all()
    for got, right in zip(
        torch.autograd.grad(o.sin().sum(), inputs), torch.autograd.grad(want[0].sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_fully_selected_blocks(form: str) -> None:
    """Pools that fill blocks skip the bits; poisoned keys of other blocks are never read into a result."""
    q, k, v = (x.detach() for x in draw(1, 40, 200, 4, 1, 16, 16, torch.float32))
    pools = torch.stack([torch.randperm(12)[:4].sort().values for _ in range(40)])[None]
    indices = (pools[..., None] * 16 + torch.arange(16)).flatten(-2).int()
    got, want = (sparse_attention(q, k, v, indices, backend=x)[0] for x in ("flex", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.ops.hybrid_flex.pack_selection(indices, 256, 1, 16)[3].sum() == 4 * 40
    k[:, 192:] = v[:, 192:] = 1e4
    torch.testing.assert_close(sparse_attention(q, k, v, indices, backend="flex")[0], want, rtol=1e-4, atol=1e-5)


def test_heads_as_rows_in_pieces_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, selection: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(flex, "MOST_ENTRIES", 8)
    for b, t in ((2, 16), (16, 1)):
        inputs, indices = draw(b, t, 60, 4, 1, 16, 16, torch.float32), selection(b, t, 60, 12)
        for got, want in zip(
            *(sparse_attention(*inputs, indices, backend=x) for x in ("flex", "reference")), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_which_form_is_taken(monkeypatch: pytest.MonkeyPatch, selection: Callable[..., Tensor]) -> None:
    taken = []
    for name in ("_union_of_queries", "_heads_as_rows"):
        note = lambda q, k, v, *_, name=name: (taken.append(name), (q.new_zeros(*q.shape[:3], v.shape[3]), None))[1]  # noqa: E731
        monkeypatch.setattr(flex, name, note)
    for t, g in ((1, 1), (128, 1), (129, 1), (32, 4), (33, 4)):
        sparse_attention(*draw(1, t, 200, 4, g, 16, 16, torch.float32), selection(1, t, 200, 9), backend="flex")
    assert [name == "_heads_as_rows" for name in taken] == [True, True, False, True, False]


def test_a_hundred_masks_take_one_compilation(form: str) -> None:
    """The mask's tensors are inputs of the compiled graph: as constants each mask would compile again."""
    torch.manual_seed(0)
    q, k, v = (x.detach() for x in draw(1, 100, 200, 4, 1, 16, 16, torch.float32))
    counters, before = torch._dynamo.utils.counters, None
    for number in range(100):
        indices = torch.rand(1, 100, 200).argsort(-1)[..., : 1 + number].int()
        indices = torch.nn.functional.pad(indices, (0, 100 - indices.shape[-1]), value=-1)
        got, _ = sparse_attention(q, k, v, indices, backend="flex")
        compiled = (counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"])
        before = compiled if before is None else before
        assert compiled == before, number
        if number % 33 == 0:
            torch.testing.assert_close(got, sparse_attention(q, k, v, indices)[0], rtol=1e-4, atol=1e-5)


def test_another_selection_reuses_the_compiled_graph(selection: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    q, k, v = (x.detach() for x in draw(1, 100, 100, 4, 2, 16, 16, torch.float32))
    sparse_attention(q, k, v, selection(1, 100, 100, 10), backend="flex")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in (1, 2, 3):
        for length in (100, 77):
            indices = selection(1, length, length, 10, seed=seed)
            inputs = [x[:, :length] for x in (q, k, v)]
            got, _ = sparse_attention(*inputs, indices, backend="flex")
            torch.testing.assert_close(got, sparse_attention(*inputs, indices)[0], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_opcheck(selection: Callable[..., Tensor]) -> None:
    inputs, indices = draw(1, 20, 30, 4, 2, 16, 16, torch.float32), selection(1, 20, 30, 6)
    torch.library.opcheck(torch.ops.hybrid_flex.sparse_attention_flex.default, (*inputs, indices, 0.25))


def test_fullgraph_inside_an_outer_compilation(selection: Callable[..., Tensor]) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
        return (sparse_attention(q, k, v, indices, backend="flex")[0] ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 45):
        inputs, indices = draw(1, length, length, 4, 2, 16, 16, torch.float32), selection(1, length, length, 6)
        got, want = compiled(*inputs, indices), loss(*inputs, indices)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_outputs_are_written_everywhere(nan_memory: None, selection: Callable[..., Tensor]) -> None:
    q, k, v = (x.detach() for x in draw(1, 20, 30, 4, 2, 16, 16, torch.float32))
    indices = selection(1, 20, 30, 6)
    for got, want in zip(
        sparse_attention(q, k, v, indices, backend="flex"),
        sparse_attention(q, k, v, indices, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_cuda_tiles_fit_and_divide_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from hybrid_flex.kernels import launch

    cuda = torch.device("cuda", 0)
    assert flex.kernel_options(64, 512, 512, torch.bfloat16, torch.device("cpu")) == {}
    for limit in (99 * 1024, launch.HOPPER_BYTES):
        monkeypatch.setattr(launch, "device_limits", lambda device, limit=limit: (limit, 9))
        for rows in (0, 1, 12, 64, 130):
            for D, V in ((64, 64), (128, 96), (512, 512), (576, 512)):
                for dtype in (torch.bfloat16, torch.float32):
                    tiles = flex.kernel_options(rows, D, V, dtype, cuda)
                    assert ("FORCE_USE_FLEX_ATTENTION" in tiles) == (rows == 0)
                    if "BLOCK_M" not in tiles:
                        assert rows == 0 and D == 128
                        continue
                    padded, own = (1 << (n - 1).bit_length() for n in (D, V))
                    held = tiles["BLOCK_M"] * padded + tiles["num_stages"] * tiles["BLOCK_N"] * (padded + own)
                    assert flex.BLOCK_SIZE % tiles["BLOCK_M"] == 0
                    assert (flex.KEY_BLOCK if rows else flex.BLOCK_SIZE) % tiles["BLOCK_N"] == 0
                    assert tiles["num_warps"] == 8 or tiles["BLOCK_M"] * own * dtype.itemsize <= 16384
                    if limit == launch.HOPPER_BYTES or D <= 128:
                        assert held * dtype.itemsize < limit
    best = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 3}
    assert flex.kernel_options(64, 512, 512, torch.bfloat16, cuda) == best
