"""Traces that TensorBoard and Perfetto read: which turns, which names, which operators are in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_flex import profiling
from hybrid_flex.ops import short_conv

X, WEIGHT = torch.randn(2, 9, 4), torch.randn(4, 4)


def events(folder: Path) -> list[dict[str, Any]]:
    """Read the events of the only trace in ``folder``."""
    (path,) = folder.glob("*.pt.trace.json")
    return json.loads(path.read_text())["traceEvents"]


def count(found: list[dict[str, Any]], name: str, category: str | None = None) -> int:
    return sum(e.get("name") == name and category in (None, e.get("cat")) for e in found)


def test_whole_body_with_operators_and_ranges(tmp_path: Path) -> None:
    weight = WEIGHT.clone().requires_grad_()
    with profiling.trace(tmp_path / "run"):
        with profiling.range("forward"):
            y, _ = short_conv(X, weight)
        with profiling.range("backward"):
            y.sum().backward()
    found = events(tmp_path / "run")
    assert count(found, "forward", "user_annotation") == count(found, "backward", "user_annotation") == 1
    assert count(found, "hybrid_flex::short_conv", "cpu_op") == 1
    assert count(found, "hybrid_flex::short_conv_backward", "cpu_op") == 1
    (operator,) = [e for e in found if e.get("name") == "hybrid_flex::short_conv"]
    assert operator["args"]["Input Dims"][:2] == [[2, 9, 4], [4, 4]]


@pytest.mark.parametrize(("skip", "warmup", "active"), [(0, 1, 1), (2, 1, 3), (0, 0, 2)])
def test_only_the_active_turns_are_recorded(skip: int, warmup: int, active: int, tmp_path: Path) -> None:
    with profiling.trace(tmp_path, skip=skip, warmup=warmup, active=active) as profiler:
        for turn in range(skip + warmup + active + 2):
            with profiling.range(f"turn {turn}"):
                torch.ones(3).sum()
            profiler.step()
    found = events(tmp_path)
    recorded = [turn for turn in range(10) if count(found, f"turn {turn}", "user_annotation")]
    assert recorded == list(range(skip + warmup, skip + warmup + active))


def test_a_name_and_two_traces_in_one_folder(tmp_path: Path) -> None:
    for name in ("prefill", "decode"):
        with profiling.trace(tmp_path, name=name):
            torch.ones(3).sum()
    assert sorted(path.name.split(".")[0] for path in tmp_path.iterdir()) == ["decode", "prefill"]


def test_the_profiler_is_at_hand_after_the_body(tmp_path: Path) -> None:
    with profiling.trace(tmp_path) as profiler:
        short_conv(X, WEIGHT)
    assert "hybrid_flex::short_conv" in {row.key for row in profiler.key_averages()}


def test_an_error_in_the_body_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="lost"), profiling.trace(tmp_path):
        raise KeyError("lost")
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_range_breaks_no_graph(fresh_dynamo: None) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        with profiling.range("inside"):
            return short_conv(x, WEIGHT)[0]

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(X), run(X))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"active": 0}, "active must be positive, got 0"),
    ({"active": 1, "skip": -1}, "skip must be 0 or more, got -1"),
    ({"active": 1, "warmup": -1}, "warmup must be 0 or more, got -1"),
    ({"warmup": 1}, "active must be given with skip or warmup, got None"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD, ids=[m for _, m in BAD])
def test_messages(keywords: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught, profiling.trace(tmp_path, **keywords):
        pass
    assert str(caught.value) == f"trace: {message}"


def test_too_few_turns(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught, profiling.trace(tmp_path, skip=1, warmup=1, active=1) as profiler:
        profiler.step()
    assert str(caught.value) == (
        "trace: the body must call step() more than 2 times, and ended before: nothing was recorded"
    )


def test_empty_name() -> None:
    with pytest.raises(ValueError) as caught:
        profiling.range("")
    assert str(caught.value) == "range: name must not be empty, got ''"


def test_writing_needs_no_tensorboard(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    source = """
import sys
sys.modules["tensorboard"] = sys.modules["torch_tb_profiler"] = None
import torch
from hybrid_flex import profiling
with profiling.trace(sys.argv[1]):
    torch.ones(3).cos()
"""
    fresh_process(source, tmp_path)
    assert count(events(tmp_path), "aten::cos", "cpu_op") == 1


@pytest.mark.gpu
def test_kernels_are_in_the_trace(tmp_path: Path) -> None:
    x, weight = X.cuda(), WEIGHT.cuda()
    with profiling.trace(tmp_path):
        short_conv(x, weight)
        torch.cuda.synchronize()
    assert any(e.get("cat") == "kernel" for e in events(tmp_path))
