"""What the whole suite shares: skipping without a GPU, fresh processes, fresh compiler state, poisoned memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

# Each worker has a core to itself, in the processes that it starts too; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Spare every later collection of garbage what has been imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _light_heap(request: pytest.FixtureRequest) -> Iterator[None]:
    """Spare profiles, which collect garbage before they time anything, what earlier tests have left."""
    if not request.module.__name__.rpartition(".")[2].startswith("test_profile"):
        yield
        return
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def fresh_process() -> Callable[..., str]:
    """Run Python source in a new process, where nothing is registered or compiled yet, and return what it prints."""

    def run(source: str, *arguments: object, timeout: float = 300.0) -> str:
        done = subprocess.run(
            [sys.executable, "-c", source, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert done.returncode == 0, f"the fresh process failed:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Forget every compiled graph before and after, so that graph counts start at zero and no limit is carried over."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an output which is not written everywhere shows it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill_before
