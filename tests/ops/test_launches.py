"""What kernels read in a graph that computes it: one tensor, however many launches and arguments it serves.

Inductor computes what is elementwise anew, into memory of its own, for each argument of a launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from hybrid_flex.ops.kda.inputs import Raw

topk = pytest.importorskip("hybrid_flex.kernels.dsa.topk")
gather = pytest.importorskip("hybrid_flex.kernels.dsa.gather")
chunk = pytest.importorskip("hybrid_flex.kernels.kda.chunk")
short_conv = pytest.importorskip("hybrid_flex.kernels.kda.short_conv")
decode = pytest.importorskip("hybrid_flex.kernels.kda.decode")

Launches = Callable[[torch.fx.Graph], list[dict[str, Any]]]
KDA = [(4, 64)] * 4 + [(4,)]
FLAGS = (True, False, False, False, None)  # norms inside, and no gate


def chunked(*x: Tensor) -> Any:
    return chunk.forward(Raw(*x, None, None, *FLAGS), None, None, 1.0, False, 64)


def chunked_back(*x: Tensor) -> Any:
    return chunk.backward(x[0], None, x[1], Raw(*x[1:], None, None, *FLAGS), None, None, 1.0, False, 64)


def recurrent(*x: Tensor) -> Any:
    o, state = torch.empty_like(x[2]), x[0].new_empty(x[0].shape[0], 4, 64, 64, dtype=torch.float32)
    decode.launch_decode(*x, None, None, *FLAGS, None, 1.0, False, o=o, state=state)
    return o


def attended(q: Tensor, k: Tensor) -> Any:
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    indices = q.new_zeros((*q.shape[:2], 80), dtype=torch.int32)
    gather.launch_gather(q, k, k[..., :512], indices, 1.0, o=o, lse=lse)
    return o


CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "selection": (lambda *x: topk.lightning_topk(*x, 64, True, 0, None, 1), [(4, 64), (64,), (4,)]),
    "attention": (attended, [(16, 512), (1, 512)]),
    "chunk_kda": (chunked, KDA),
    "chunk_kda_backward": (chunked_back, [(4, 64), *KDA]),
    "decoding": (recurrent, KDA),
    "short_conv": (lambda x, w: short_conv.short_conv(x, w[0, :256], None, None, None, True, True), [(256,), (4,)]),
    "short_conv_backward": (
        lambda dy, x, w: short_conv.short_conv_backward(dy, None, x, w[0, :256], None, None, None, True),
        [(256,), (256,), (4,)],
    ),
}


def traced(call: Callable[..., Any], widths: list[tuple[int, ...]]) -> torch.fx.Graph:
    """Trace a call with inputs ``[B, T, *width]`` that leave B and T open."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(*width: int) -> Tensor:
        x = torch.empty((2, 700, *width), dtype=torch.bfloat16, device="meta")
        kinds = [DimDynamic.DUCK, DimDynamic.DUCK, *([DimDynamic.STATIC] * len(width))]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    with symbolic_shapes.patch(backed_size_oblivious=True), torch.no_grad():
        inputs = [fake(*width) for width in widths]
        with mode:
            return make_fx(call)(*inputs).graph


@pytest.mark.parametrize("name", CALLS)
def test_what_a_graph_computes_is_computed_once(name: str, launches: Launches) -> None:
    call, widths = CALLS[name]
    found = launches(traced(lambda *x: call(*(t * 2 for t in x)), widths))
    arguments = [x for launch in found for x in launch.values() if isinstance(x, torch.fx.Node)]
    assert any(x.target is torch.ops.aten.as_strided.default for x in arguments)
    computed = Counter(x for x in arguments if x.target is torch.ops.aten.mul.Tensor)
    assert not {x: n for x, n in computed.items() if n > 1}


def test_a_part_of_a_tensor_is_left_where_it_lies(launches: Launches) -> None:
    """Its place in memory is the graph's business: counted from the start of what it is a part of, it would be lost."""
    found = launches(
        traced(lambda q, k, w: topk.lightning_topk(q, k[..., 64:], w, 64, True, 0, None, 1), [(4, 64), (128,), (4,)])
    )
    keys = {launch["p_k"].target for launch in found if "p_k" in launch}
    assert keys == {torch.ops.aten.slice.Tensor}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_written_through_two_arguments(
    name: str, launches: Launches, written: Callable[[torch.fx.Graph], list[set[str]]]
) -> None:
    """Torch would copy it for one of them; scores of a selection are half a gigabyte."""
    graph = traced(*CALLS[name])
    for arguments, names in zip(launches(graph), written(graph), strict=True):
        tensors = [arguments[name] for name in names]
        assert len(set(tensors)) == len(tensors), names
