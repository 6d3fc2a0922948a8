"""Plain forms of selection and attention: equal to the operators, in graphs with open sizes, and bounded in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_shapes

from hybrid_flex.ops import lightning_topk, sparse_attention
from hybrid_flex.ops.dsa import traced
from hybrid_flex.ops.dsa.traced import traced_attention, traced_topk


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw small integers, of which all sums are exact and many equal."""
    return torch.randint(-3, 4, shape).to(dtype)


def selection(batch_size: int, num_queries: int, num_keys: int, topk: int) -> Tensor:
    """Draw a selection without an order in time, with unused slots and a row without any key."""
    rows = [torch.randperm(num_keys)[:topk].sort().values for _ in range(batch_size * num_queries)]
    indices = torch.full((batch_size * num_queries, topk), -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        kept = row[: max(1, topk - i % 3)]
        indices[i, : len(kept)] = kept.int()
    indices[len(rows) // 2] = -1
    return indices.view(batch_size, num_queries, topk)


SELECTIONS: dict[str, dict[str, Any]] = {
    "one-block": {"sizes": (2, 9, 9, 4)},
    "blocks": {"sizes": (2, 131, 131, 4)},
    "one-query-in-the-last-block": {"sizes": (1, 65, 65, 8)},
    "fewer-keys-than-slots": {"sizes": (1, 33, 33, 3), "topk": 64},
    "more-heads-than-rows-of-a-block": {"sizes": (2, 50, 50, 300), "topk": 7},
    "pooled-after-a-cache": {"sizes": (2, 50, 25, 4), "kpool": 4, "query_start": 51},
    "not-causal": {"sizes": (1, 70, 40, 4), "causal": False},
    "packed": {"sizes": (1, 90, 90, 4), "cu_seqlens": torch.tensor([0, 1, 40, 90])},
    "fp8": {"sizes": (2, 70, 70, 4), "quantization": "fp8"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_equals_the_operator_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options = {"topk": 16, "causal": True, "query_start": 0, "cu_seqlens": None, "kpool": 1, "quantization": None}
    options |= SELECTIONS[name]
    batch_size, num_queries, num_keys, num_heads = options.pop("sizes")
    q, k, w = (
        integers(batch_size, num_queries, num_heads, 16, dtype=dtype),
        integers(batch_size, num_keys, 16, dtype=dtype),
        integers(batch_size, num_queries, num_heads, dtype=dtype),
    )
    want = lightning_topk(q, k, w, **options)
    fp8 = options.pop("quantization") == "fp8"
    got = traced_topk(q, k, w, *options.values(), fp8=fp8)
    assert got.dtype == torch.int32 and torch.equal(got, want)


def test_selection_from_pages_of_several_lengths() -> None:
    torch.manual_seed(0)
    q, w, pages = integers(2, 3, 4, 16), integers(2, 3, 4), integers(10, 8, 16)
    options = {"lengths": torch.tensor([20, 5]), "block_table": torch.tensor([[1, 5, 2, 7], [3, -1, -1, -1]])}
    got = traced_topk(q, pages, w, 7, True, 0, None, 1, **options)
    assert torch.equal(got, lightning_topk(q, pages, w, 7, **options))


@pytest.mark.parametrize("form", ["rows", "mask"])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), [(6, 2, 16, 24), (4, 4, 8, 8), (4, 1, 40, 32)])
@pytest.mark.parametrize("num_queries", [1, 64, 131])
def test_attention_equals_the_reference(
    form: str, heads: int, kv_heads: int, width: int, value_width: int, num_queries: int
) -> None:
    torch.manual_seed(0)
    attend = {"rows": traced._attend_to_rows, "mask": traced._attend_under_mask}[form]
    q = torch.randn(2, num_queries, heads, width, dtype=torch.float64)
    k, v = (torch.randn(2, 70, kv_heads, n, dtype=torch.float64) for n in (width, value_width))
    indices = selection(2, num_queries, 70, 16)
    want = sparse_attention(q, k, v, indices, backend="reference")
    torch.testing.assert_close(attend(q, k, v, indices, width**-0.5), want)
    o, lse = attend(q.float(), k.float(), v.float(), indices, width**-0.5)
    assert o.dtype == lse.dtype == torch.float32
    torch.testing.assert_close((o.double(), lse.double()), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["rows", "mask"])
def test_attention_in_low_precision_sums_in_float32(form: str) -> None:
    torch.manual_seed(0)
    attend = {"rows": traced._attend_to_rows, "mask": traced._attend_under_mask}[form]
    q, k, v = (torch.randn(1, 70, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    indices = selection(1, 70, 70, 16)
    o, lse = attend(q, k, v, indices, 0.25)
    want, want_lse = sparse_attention(q.double(), k.double(), v.double(), indices, backend="reference")
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # One rounding of the output is all that is lost.
    torch.testing.assert_close(o.double(), want, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


class Selected(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, w: Tensor) -> Tensor:
        indices = traced_topk(q_idx, k_idx, w, 16, True, 0, None, 1)
        return traced_attention(q, k, v, indices, 0.25)[0]


def inputs(batch_size: int, length: int) -> tuple[Tensor, ...]:
    heads = [(4, 16), (2, 16), (2, 16), (4, 16)]
    return *(torch.randn(batch_size, length, *n) for n in heads), *(torch.randn(batch_size, length, n) for n in (16, 4))


@pytest.mark.parametrize("longest", [None, 512], ids=["rows", "mask"])
def test_one_graph_serves_every_length_and_holds_nothing_quadratic(longest: int | None) -> None:
    torch.manual_seed(0)
    T = Dim.DYNAMIC(min=1) if longest is None else Dim.DYNAMIC(min=1, max=longest)
    shapes = tuple({0: Dim.DYNAMIC(min=1), 1: T} for _ in range(6))
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):
        program = torch.export.export(Selected(), inputs(3, 131), dynamic_shapes=shapes)
    module = program.module()
    for batch_size, length in [(1, 1), (2, 15), (1, 64), (3, 65), (1, 200)]:
        x = inputs(batch_size, length)
        torch.testing.assert_close(module(*x), Selected()(*x))

    outer = [node.meta["val"].shape for node in program.graph.find_nodes(op="placeholder")]
    ones = {shape[0].node.expr: 1 for shape in outer}
    scans = 0
    for graph in (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in graph.graph.nodes:
            scans += node.target is torch.ops.higher_order.scan
            value = node.meta.get("val")
            if isinstance(value, Tensor) and isinstance(value.numel(), torch.SymInt):
                sizes = ({**ones, **{shape[1].node.expr: n for shape in outer}} for n in (2**20, 2**21))
                long, double = (value.numel().node.expr.subs(size) for size in sizes)
                assert double <= 2 * long, f"{node} grows faster than the length: {value.shape}"
    assert scans == 2


def test_a_bound_on_the_length_decides_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    indices = selection(1, 8, 8, 4)
    calls: list[str] = []
    monkeypatch.setattr(traced, "_attend_under_mask", lambda *_: calls.append("mask"))
    monkeypatch.setattr(traced, "_attend_to_rows", lambda *_: calls.append("rows"))
    traced_attention(q, k, v, indices, 0.5)
    traced_attention(q[:, :1], k, v, indices[:, :1], 0.5)  # decoding
    many = traced.DENSE_KEYS * 4 + 1
    traced_attention(q, *(torch.randn(1, many, 2, 4) for _ in range(2)), indices, 0.5)
    assert calls == ["mask", "rows", "rows"]
