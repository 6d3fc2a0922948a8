"""sparse_attention, flex form: FlexAttention inside one operator, against the reference, compiled and padded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_flex.ops.dsa import sparse_attention


def draw(b: int, t: int, s: int, h: int, g: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, t, h, d), (b, s, g, d), (b, s, g, e))
    return [torch.randn(x, generator=generator).to(dtype).requires_grad_() for x in shapes]


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
def test_low_precision_latent_attention(dtype: torch.dtype, selection: Callable[..., Tensor]) -> None:
    q, k, _ = (x.detach() for x in draw(1, 40, 60, 4, 1, 24, 24, dtype))
    indices = selection(1, 40, 60, 12)
    got, _ = sparse_attention(q, k, k[..., :16], indices, backend="flex")
    exact, _ = sparse_attention(q.double(), k.double(), k[..., :16].double(), indices, backend="reference")
    plain, _ = sparse_attention(q, k, k[..., :16], indices, backend="reference")
    budget = 2 * (plain.double() - exact).norm() + 1e-3 * exact.norm()
    assert got.dtype == dtype and (got.double() - exact).norm() <= budget


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
