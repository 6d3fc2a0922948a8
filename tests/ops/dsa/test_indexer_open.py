"""lightning_topk in graphs with open sizes: launches, guards and memory of what CUDA would run, traced without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx

from hybrid_flex.ops import lightning_topk
from hybrid_flex.ops.dsa import indexer

launcher = pytest.importorskip("hybrid_flex.kernels.dsa.topk")

HI, DI = 8, 64
Launches = Callable[[torch.fx.Graph], list[dict[str, Any]]]
Size = int | tuple[int, Any]
OPERATOR = torch.ops.hybrid_flex.lightning_topk_cuda.default


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "has_kernels", lambda x: x.dtype != torch.float64)


class Selection(nn.Module):
    def __init__(self, topk: int = 2048, **options: Any) -> None:
        super().__init__()
        self.topk, self.options = topk, options

    def forward(
        self, q: Tensor, k: Tensor, w: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        k = k[:, : k.shape[1] // self.options.get("kpool", 1)]
        return lightning_topk(q, k, w, self.topk, lengths=lengths, cu_seqlens=cu_seqlens, **self.options)


def opened(example: int, most: int | None) -> Size:
    """Return a size of an example and what opens it; 1 stays 1."""
    if most == 1:
        return 1
    return min(example, most or example), Dim.DYNAMIC(min=1) if most is None else Dim.DYNAMIC(min=1, max=most)


def exported(module: nn.Module, B: Size, T: Size, S: Size, **tensors: Size) -> ExportedProgram:
    shapes: dict[str, tuple[Size, ...]] = {"q": (B, T, HI, DI), "k": (B, S, DI), "w": (B, T, HI)}
    shapes |= {name: (size,) for name, size in tensors.items()}
    sizes = {name: [n[0] if isinstance(n, tuple) else n for n in shape] for name, shape in shapes.items()}
    kinds = {name: torch.int64 if name in tensors else torch.bfloat16 for name in sizes}
    x = {name: torch.zeros(size, dtype=kinds[name]) for name, size in sizes.items()}
    dims: dict[str, Any] = {
        name: {i: n[1] for i, n in enumerate(shape) if isinstance(n, tuple)} for name, shape in shapes.items()
    }
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):
        return torch.export.export(module, (), x, dynamic_shapes=dims)


class WrittenOut(torch.fx.Interpreter):
    """Run a program, and the operator's body for the operator."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not OPERATOR:
            return super().call_function(target, args, kwargs)
        defaults = (None, None, False)
        return indexer._in_kernels(*args, *defaults[len(args) - 8 :])


def written_out(program: ExportedProgram) -> torch.fx.Graph:
    """Trace what a compiler sees in the place of the operator."""
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    assert program.graph.find_nodes(op="call_function", target=OPERATOR)
    with inputs[0].fake_mode as mode, symbolic_shapes.patch(backed_size_oblivious=True):
        before = list(mode.shape_env.guards)
        graph: torch.fx.Graph = make_fx(WrittenOut(program.graph_module).run)(*inputs).graph
        assert mode.shape_env.guards == before, "a question about a size binds the graph"
    return graph


PREFILLS = {
    # most T and B, and into how many blocks the workspace cuts that
    "few": (8, 1, 1),
    "one-block": (2048, 4, 1),
    "two": (4096, 8, 2),
    "many": (32768, 1, 15),
    "too-many": (131072, 1, 32),
    "unbounded": (None, None, 32),
}


@pytest.mark.parametrize("kpool", [1, 4])
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill(name: str, kpool: int, launches: Launches) -> None:
    most_T, most_B, blocks = PREFILLS[name]
    B, T = opened(3, most_B), opened(131, most_T)
    program = exported(Selection(kpool=kpool), B, T, T)
    graph = written_out(program)
    found = launches(graph)
    # Where there are never more than topk keys all are taken, and nothing is scored.
    per_block = 2 if most_T is None or most_T // kpool > 2048 else 1
    assert len(found) == per_block * blocks if kpool == 1 else len(found) <= per_block * blocks
    for launch in found:
        if "p_out" in launch:
            written = [launch[name] for name in ("p_keys", "p_kept", "p_out_keys", "p_out")]
            assert len(set(written)) == 4, "what a kernel may write through two arguments, torch would copy for one"
    if name in ("too-many", "unbounded"):
        return
    most: dict[Any, int | None] = {}
    for x in (node.meta["val"] for node in program.graph.find_nodes(op="placeholder")):
        sizes = zip(x.shape, (most_B, most_T), strict=False)
        most |= {n.node.expr: bound for n, bound in sizes if isinstance(n, torch.SymInt)}
    made = graph.find_nodes(op="call_function", target=torch.ops.aten.empty.memory_format)

    def largest(number: Any) -> int:
        if not isinstance(number, torch.SymInt):
            return int(number)
        rest = number.node.expr.subs(most)
        # Torch 2.11 gives the length of a slice, here of the pools, a symbol of its own.
        return int(rest.subs(dict.fromkeys(rest.free_symbols, most_T // kpool)))

    _indices, *workspace = (largest(x.meta["val"].numel()) for x in made)
    assert 4 * sum(workspace) <= blocks * launcher.WORKSPACE_BYTES


@pytest.mark.parametrize("most_B", [None, 4, 1])
def test_decode(most_B: int | None, launches: Launches) -> None:
    """One query for each cache: heads are the rows of the product, and rows are cut into spans."""
    B = opened(3, most_B)
    scores, spans, again, last = launches(written_out(exported(Selection(), B, 1, 131072, lengths=B)))
    assert "BH" in scores and scores["grid"][:2] == (1024, 1)
    assert not spans["LAST"] and not again["LAST"] and last["LAST"] and last["grid"][:2] == (1, 1)
    assert spans["FIRST"] and not again["FIRST"] and not last["FIRST"]
    few = launches(written_out(exported(Selection(), B, 1, 9000, lengths=B)))
    assert [launch.get("LAST") for launch in few] == [None, True]
    assert {launch["WIDTH"] for launch in (spans, again, last, few[1])} == {launcher.FEW_WIDTH}


def test_fixed_sizes_are_launched_as_in_eager_mode(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    found = launches(written_out(exported(Selection(query_start=131071), 1, 1, 131072)))
    eager: list[tuple[int, ...]] = []

    class Note:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: eager.append(grid)

    monkeypatch.setattr(launcher, "launchable", lambda kernel, x: Note())
    launcher.lightning_topk(
        torch.zeros(1, 1, HI, DI), torch.zeros(1, 131072, DI), torch.zeros(1, 1, HI), 2048, True, 131071, None, 1
    )
    assert [launch["grid"] for launch in found] == eager == [(1024, 1, 1), (16, 1, 1), (4, 1, 1), (1, 1, 1)]


def test_eight_bits_and_packed_sequences(launches: Launches) -> None:
    T = opened(131, 4096)
    assert len(launches(written_out(exported(Selection(quantization="fp8"), 1, T, T)))) == 2
    assert len(launches(written_out(exported(Selection(64), 1, T, T, cu_seqlens=4)))) == 2


def test_what_kernels_do_not_serve_keeps_the_other_operator() -> None:
    program = exported(Selection(launcher.MAX_TOPK + 1), 1, 20, 20)
    assert program.graph.find_nodes(op="call_function", target=torch.ops.hybrid_flex.lightning_topk.default)
    x = [torch.zeros(size, dtype=torch.float64) for size in ((1, 5, 2, 4), (1, 5, 4), (1, 5, 2))]
    with pytest.raises(RuntimeError, match=r"q_idx must be on CUDA .*, got cpu, torch.float64, topk = 2"):
        torch.ops.hybrid_flex.lightning_topk_cuda(*x, 2, True, 0, None, 1)
