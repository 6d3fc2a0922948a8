"""sparse_attention in graphs with open sizes: what CUDA would launch, traced without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import SymInt, Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

gather = pytest.importorskip("hybrid_flex.kernels.dsa.gather")
spans = pytest.importorskip("hybrid_flex.kernels.dsa.spans")

H, D, V = 64, 576, 512
Launches = Callable[[torch.fx.Graph], list[dict[str, Any]]]


def traced(B: int, T: int, J: int, opened: str, Hkv: int = 1) -> tuple[torch.fx.Graph, dict[str, Any]]:
    """Trace the launcher; return the graph, and the open sizes by name."""
    sizes = {"B": B, "T": T, "J": J, "S": 3000}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    found: dict[str, Any] = {}

    def fake(shape: str, dtype: torch.dtype) -> Tensor:
        """Make a tensor; equal sizes share a symbol."""
        x = torch.empty([sizes.get(n) or int(n) for n in shape.split()], dtype=dtype, device="meta")
        kinds = [DimDynamic.DUCK if n in opened else DimDynamic.STATIC for n in shape.split()]
        with symbolic_shapes.patch(backed_size_oblivious=True):
            tensor = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
        found.update({name: n for name, n in zip(shape.split(), tensor.shape, strict=True) if isinstance(n, SymInt)})
        return tensor

    q, k = fake(f"B T {H} {D}", torch.bfloat16), fake(f"B S {Hkv} {D}", torch.bfloat16)
    indices = fake("B T J", torch.int32)
    o, lse = fake(f"B T {H} {V}", torch.bfloat16), fake(f"B T {H}", torch.float32)

    def attend(q: Tensor, k: Tensor, indices: Tensor, o: Tensor, lse: Tensor) -> None:
        gather.launch_gather(q, k, k[..., :V], indices, 0.1, o=o, lse=lse)

    with mode, symbolic_shapes.patch(backed_size_oblivious=True):
        graph = make_fx(attend)(q, k, indices, o, lse)
        assert not mode.shape_env.guards, "a question about a size binds the graph"
    return graph.graph, found


def at(number: Any, **sizes: Any) -> int:
    """Return an open number for given sizes."""
    value = number.meta["val"] if isinstance(number, torch.fx.Node) else number
    if not isinstance(value, SymInt):
        return int(value)
    return int(value.node.expr.subs({sizes["symbol"].node.expr: sizes["size"]}))


def test_one_token_of_any_number_of_sequences_is_cut_by_how_many_there_are(launches: Launches) -> None:
    graph, found = traced(5, 1, 2051, "B S")
    attend, combine = launches(graph)
    B = found["B"]
    assert attend["CUT"] and combine["BS"] == spans.MOST_SPANS
    for size in (1, 3, 8, 64, 300):
        number, span = spans.cut(size, 1, 2051, 1)
        sizes = {"symbol": B, "size": size}
        assert at(attend["spans"], **sizes) == at(combine["spans"], **sizes) == number
        assert at(attend["span"], **sizes) == span
        assert at(attend["grid"][0], **sizes) == size * number and at(combine["grid"][0], **sizes) == size * H


@pytest.mark.parametrize("opened", ["B T S", "T S", "B J S"])
def test_open_lengths_and_selections_are_not_cut(opened: str, launches: Launches) -> None:
    T = 1 if "J" in opened else 5
    (attend,) = launches(traced(3, T, 2048, opened)[0])
    assert not attend["CUT"]


def test_many_tokens_of_any_number_of_sequences_are_not_cut(launches: Launches) -> None:
    assert len(launches(traced(3, spans.FEW_TOKENS, 2048, "B S")[0])) == 1
    assert len(launches(traced(3, spans.FEW_TOKENS - 1, 2048, "B S")[0])) == 2


def test_fixed_sizes_are_cut_as_in_eager_mode(launches: Launches) -> None:
    attend, combine = launches(traced(2, 1, 2048, "", Hkv=8)[0])
    number, span = spans.cut(2, 1, 2048, 8)
    assert number == 8 and (attend["spans"], attend["span"], combine["spans"]) == (number, span, number)
    assert combine["BS"] == 8 and attend["grid"][0] == 2 * 8 * number
    for few in (traced(2, 1, 128, ""), traced(64, 1, 2048, "", Hkv=8)):
        assert len(launches(few[0])) == 1
