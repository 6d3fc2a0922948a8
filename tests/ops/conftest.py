"""What tests of operators share: the names of all kernels, and what graphs launch, read without a device."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree


@pytest.fixture
def kernel_names() -> set[str]:
    """Return the names of all Triton kernels of the package."""
    names = set()
    for path in (Path(__file__).resolve().parents[2] / "hybrid_flex" / "kernels").rglob("*.py"):
        names |= set(re.findall(r"@(?:triton|gluon)\.jit.*\ndef (\w+_kernel)\(", path.read_text()))
    return names


class HopperDriver:
    """Tells Triton which device to analyse kernels for; nothing can be launched on it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@pytest.fixture
def analysed_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch analyse kernels where no device is."""
    import triton

    monkeypatch.setattr(triton.runtime.driver, "_active", HopperDriver())


@pytest.fixture
def launches() -> Callable[[torch.fx.Graph], list[dict[str, Any]]]:
    """List what a graph launches: arguments by name, constants among them, and the ``grid``."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    def listed(graph: torch.fx.Graph) -> list[dict[str, Any]]:
        target = torch.ops.higher_order.triton_kernel_wrapper_mutation
        nodes = graph.find_nodes(op="call_function", target=target)
        constants = [kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"]) for node in nodes]
        arguments = [{**node.kwargs["kwargs"], "grid": node.kwargs["grid"][0]} for node in nodes]
        return [fixed | own for fixed, own in zip(constants, arguments, strict=True)]

    return listed


@pytest.fixture
def written(analysed_for_hopper: None) -> Callable[[torch.fx.Graph], list[set[str]]]:
    """Name what torch takes for written by each launch of a graph, and copies if anybody reads it later."""
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors

    def listed(graph: torch.fx.Graph) -> list[set[str]]:
        names = []
        for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_mutation):
            launch: dict[str, Any] = dict(node.kwargs)
            values = pytree.tree_map_only(torch.fx.Node, lambda n: n.meta["val"], launch["kwargs"])
            kernel = (launch["kernel_idx"], launch["constant_args_idx"])
            names.append(set(get_mutated_tensors(*kernel, values, launch["tma_descriptor_metadata"])))
        return names

    return listed
