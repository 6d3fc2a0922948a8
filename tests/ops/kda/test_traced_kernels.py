"""Graphs that hold CUDA kernels: what torch.compile reads off the kernels, without a device to run them on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from hybrid_flex.ops import chunk_kda, gated_rms_norm, short_conv

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def kernels_for_cpu_tensors(monkeypatch: pytest.MonkeyPatch, analysed_for_hopper: None) -> None:
    """Let operators on the CPU be traced as on a CUDA device."""
    for name in ("chunk", "training", "gated_norm", "short_conv"):
        module = importlib.import_module(f"hybrid_flex.ops.kda.{name}")  # its function of the same name is in the way
        monkeypatch.setattr(module, "has_kernels", lambda x: x.dtype != torch.float64)


def joint_graph(function: Callable[..., Tensor], *inputs: Any) -> torch.fx.Graph:
    """Trace forward and backward into one graph."""
    graphs: list[torch.fx.Graph] = []

    class Traced(Exception):
        """Ends the call when everything is traced; nothing could be run."""

    def partition(joint: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        graphs.append(joint.graph)
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            raise Traced

        return run

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition)
    with pytest.raises(Traced):
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]


def kernels(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]


def written(node: torch.fx.Node) -> dict[str, torch.fx.Node]:
    """Return the arguments that a kernel writes to, as the compiler sees it."""
    arguments = node.kwargs["kwargs"]
    return {name: arguments[name] for name in node.kwargs["tensors_to_clone"]}


def check_writes(graph: torch.fx.Graph, num_kernels: int) -> None:
    """A kernel may write to fresh memory and to what an earlier kernel left, never to what the caller passed."""
    assert len(kernels(graph)) == num_kernels
    for node in kernels(graph):
        assert written(node)
        for name, source in written(node).items():
            while source.target is torch.ops.aten.view.default:
                source = source.args[0]
            assert source.op != "placeholder", f"{node}: {name}"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("packed", [False, True], ids=["equal", "packed"])
@pytest.mark.parametrize("options", [{"lower_bound": -5.0}, {}], ids=["lower-bound", "softplus"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_chunk_kda(dynamic: bool, packed: bool, options: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v, g = (torch.randn(1, 256, 2, 64, dtype=dtype, requires_grad=True) for _ in range(4))
    beta = torch.randn(1, 256, 2, dtype=dtype, requires_grad=True)
    A_log, dt_bias = torch.zeros(2, requires_grad=True), torch.zeros(2, 64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 100, 256], dtype=torch.int32) if packed else None
    state = torch.zeros(2 if packed else 1, 2, 64, 64, requires_grad=True)
    if dynamic:
        for x in (q, k, v, g, beta):
            torch._dynamo.mark_dynamic(x, 1)

    def loss(*x: Tensor) -> Tensor:
        o, final = chunk_kda(
            *x, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, A_log=A_log, dt_bias=dt_bias, cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
        assert final is not None
        return o.float().sum() + final.sum()

    # Forward: prepare near and far, scan.  Backward: prepare near and far, scan, scan back, triangle, inputs; in
    # bfloat16 inputs of near and of far chunks.  Packed: where chunks lie, twice.
    check_writes(joint_graph(loss, q, k, v, g, beta), 9 + (dtype == torch.bfloat16) + 2 * packed)


def test_chunk_kda_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_flex.kernels.kda import chunk

    monkeypatch.setattr(chunk, "_segments", lambda plan: chunk.cut(4, 2))
    x = [torch.randn(1, 256, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(4)]
    beta = torch.rand(1, 256, 2, dtype=torch.bfloat16, requires_grad=True)
    # Two more scans and a join forward, three and two in the backward.
    check_writes(joint_graph(lambda *x: chunk_kda(*x)[0].float().sum(), *x, beta), 10 + 3 + 5)


def test_short_conv() -> None:
    x, weight = torch.randn(1, 50, 32, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    check_writes(joint_graph(lambda x, weight: short_conv(x, weight)[0].sum(), x, weight), 2)


def test_gated_rms_norm() -> None:
    x, gate = (torch.randn(1, 50, 2, 32, requires_grad=True) for _ in range(2))
    weight = torch.ones(32, requires_grad=True)
    check_writes(joint_graph(lambda *x: gated_rms_norm(*x).sum(), x, gate, weight), 2)
