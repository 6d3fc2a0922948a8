"""The masked form in graphs with open sizes: launches, guards and copies of what CUDA would run, traced without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx

from hybrid_flex.ops import sparse_attention
from hybrid_flex.ops.dispatch import lengths_up_to
from hybrid_flex.ops.dsa import attention, masked
from hybrid_flex.ops.dsa.gather import fake_forward

pytest.importorskip("hybrid_flex.kernels.dsa.masked")


class Attention(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_attention(q, k, v, indices, backend=self.backend)


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_kernels", lambda x: x.dtype != torch.float64)


def exported(backend: str, most: int | None = None) -> torch.export.ExportedProgram:
    sizes = ((3, 131, 8, 64), (3, 131, 2, 64), (3, 131, 2, 64), (3, 131, 10))
    x = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes[:3]] + [torch.zeros(sizes[3], dtype=torch.int32)]
    length = Dim.DYNAMIC(min=1) if most is None else Dim.DYNAMIC(min=1, max=most)
    dims: Any = {"q": {0: Dim.DYNAMIC(min=1), 1: length}}
    dims |= dict.fromkeys(("k", "v", "indices"), dims["q"])
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):
        return torch.export.export(Attention(backend), tuple(x), dynamic_shapes=dims)


def names(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "sparse_attention" in str(node.target)]


def test_five_launches_bind_no_size_and_write_results_only(written: Callable[..., list[set[str]]]) -> None:
    program = exported("masked")
    assert names(program) == ["hybrid_flex.sparse_attention_masked.default"]
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]

    def body(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return masked._attend(q, k, v, indices, 0.125)

    with inputs[0].fake_mode as mode, symbolic_shapes.patch(backed_size_oblivious=True):
        before = list(mode.shape_env.guards)
        graph = make_fx(body)(*inputs)
        assert mode.shape_env.guards == before, "a question about a size binds the graph"
        found = written(graph.graph)
    results = {"p_o", "p_lse"}
    assert found == [{"p_union"}, {"p_before", "p_keys", "p_number"}, {"p_bits"}, results, results]


def test_a_graph_takes_the_kernel_for_hopper_and_a_program_does_not(
    monkeypatch: pytest.MonkeyPatch, called: list[str], listing: Callable[..., Any]
) -> None:
    hopper = pytest.importorskip("hybrid_flex.kernels.dsa.masked_hopper")
    monkeypatch.setattr(hopper, "is_served", lambda q, k, v: True)
    x = [torch.zeros(1, 40, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2)]
    indices = torch.zeros(1, 40, 10, dtype=torch.int32)
    monkeypatch.setattr(
        masked, "_attend", lambda q, k, v, indices, scale, in_gluon: fake_forward(q, k, v, indices, scale)
    )
    torch.compile(Attention("masked"), fullgraph=True, backend=listing)(*x, indices)
    assert len(called) == 1 and "sparse_attention_masked_hopper" in called[0]
    assert names(exported("masked")) == ["hybrid_flex.sparse_attention_masked.default"]


@pytest.mark.parametrize(("most", "form"), [(160, "masked"), (170, "cuda"), (None, "cuda")])
def test_a_program_takes_the_form_of_its_longest_sequences(
    most: int | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "FEWEST_QUERIES", 16)
    monkeypatch.setattr(attention, "FEWEST_ROWS", 0)
    monkeypatch.setattr(attention, "UNION_BYTES", 165 * 165 // 128)
    with lengths_up_to(most):
        program = exported("auto", most)
    assert names(program) == [f"hybrid_flex.sparse_attention_{form}.default"]
    lengths = [program.range_constraints[n.node.expr] for n in next(iter(program.graph.nodes)).meta["val"].shape[:2]]
    assert all(bounds.lower == 1 for bounds in lengths)


def test_a_tile_shares_no_more_keys_than_gathering_is_worth() -> None:
    """4 heads on a key head: 10 slots are worth 93 keys, or all where a query in the middle sees no more than that."""
    for T, S, most in (
        (300, 300, 93),
        (186, 186, 186),
        (187, 187, 93),
        (20, 103, 103),
        (20, 104, 93),
        (20, 60, 60),
        (900, 187, 93),
    ):
        q, k = torch.empty(1, T, 8, 64), torch.empty(1, S, 2, 64)
        assert masked._most_shared(q, k, torch.empty(1, T, 10), masked.FORWARD) == (most, most)
