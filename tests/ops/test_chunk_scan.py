"""chunk_scan: the loop, the traced scan, and both with sizes that change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from hybrid_flex.ops import chunk_scan as module
from hybrid_flex.ops.chunk_scan import chunk_scan


def step(S: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    S = 0.5 * S + xs[0] @ xs[1]
    return S, (S, S.sum(-1))


@torch.library.triton_op("hybrid_flex_test::scan", mutates_args=())
def scan(S: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    last, (states, sums) = chunk_scan(step, S, (a, b), (S, a, b))
    return last.clone(), states, sums


def loop(S: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    states = []
    for i in range(a.shape[0]):
        S = 0.5 * S + a[i] @ b[i]
        states.append(S)
    return S, torch.stack(states), torch.stack(states).sum(-1)


def arguments(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 6), torch.randn(n, 4, 5), torch.randn(n, 5, 6)


@pytest.mark.parametrize("n", [1, 7])
def test_plain_tensors(n: int) -> None:
    x = arguments(n)
    torch.testing.assert_close(scan(*x), loop(*x))


def test_traced_scan_is_one_node_for_any_length(fresh_dynamo: None) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    aot = aot_autograd(fw_compiler=backend)
    compiled = torch.compile(scan, backend=aot, fullgraph=True, dynamic=True)
    for n in (3, 8, 5):
        x = arguments(n)
        torch.testing.assert_close(compiled(*x), loop(*x))
    assert len(graphs) == 1
    assert [str(node.target) for node in graphs[0].graph.nodes].count("scan") == 1


def test_unrolled_where_scan_is_missing(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_find_scan_op", lambda: None)
    x = arguments(4)
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*x), loop(*x))
