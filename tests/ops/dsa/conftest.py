"""What the tests of the DSA operators share: seeded inputs and small workspaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from hybrid_flex.ops.dsa import gather, indexer, indexer_loss


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shrink every workspace, so that small inputs are cut into many blocks, the last one ragged."""
    monkeypatch.setattr(indexer, "BLOCK_SIZE", 7)
    monkeypatch.setattr(indexer, "PRODUCT_BYTES", 1)
    monkeypatch.setattr(gather, "WORKSPACE_BYTES", 20_000)
    monkeypatch.setattr(indexer_loss, "WORKSPACE_BYTES", 20_000)
    yield


@pytest.fixture
def selection() -> Callable[..., Tensor]:
    """Draw a random selection: indices [B, T, J], ascending, causal, some slots unused, one row without any key."""

    def draw(batch_size: int, num_queries: int, num_keys: int, width: int, *, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        indices = torch.full((batch_size, num_queries, width), -1, dtype=torch.int32)
        for b in range(batch_size):
            for t in range(num_queries):
                visible = max(1, num_keys - num_queries + t + 1)
                number = int(torch.randint(0, min(visible, width) + 1, (), generator=generator))
                chosen = torch.randperm(visible, generator=generator)[:number].sort().values
                indices[b, t, :number] = chosen
        indices[-1, num_queries // 2] = -1
        return indices

    return draw


@pytest.fixture
def packaged(tmp_path: Path) -> Callable[[ExportedProgram], Any]:
    """Compile a program ahead of time, and load it."""
    from torch._inductor.package import load_package, package_aoti

    def load(program: ExportedProgram) -> Any:
        path = str(tmp_path / "program.pt2")
        assert program.example_inputs is not None
        with torch.no_grad():
            module, options = program.module(check_guards=False), {"aot_inductor.package": True}
            files = torch._inductor.aot_compile(module, program.example_inputs[0], options=options)
        package_aoti(path, files)
        return load_package(path)

    return load


@pytest.fixture
def called() -> list[str]:
    """List the attention operators of the graphs that `listing` has been given."""
    return []


@pytest.fixture
def listing(called: list[str]) -> Callable[..., Any]:
    """Return a backend of the compiler that lists attention operators, and runs graphs as they are."""

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "sparse_attention" in str(node.target))
        return graph

    return backend
