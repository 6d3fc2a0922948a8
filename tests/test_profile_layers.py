"""The profile of single layers runs on every machine, and what is wrong or fails gets no time."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--lengths", "24", "--hidden-size", "32", "--num-heads", "2", "--topk", "8"]
TINY += ["--seconds", "0.001", "--threads", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Give the profile's modules, which lie outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "profiles"))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in ("layers", "machine", "harness")})


@pytest.fixture(autouse=True)
def threads_stay(fresh_dynamo: None) -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def profile(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["layers.py", *TINY, *arguments, "--out", str(folder)])
    bench.layers.main()
    (path,) = folder.glob("layers_*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("chosen", [("causal", "gqa"), pytest.param((), marks=pytest.mark.slow)], ids=["two", "all"])
def test_layers_forward_and_train(
    chosen: tuple[str, ...],
    bench: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = profile(bench, monkeypatch, tmp_path, *(("--layers", *chosen) if chosen else ()))
    rows = {(row["layer"], row["pass"]): row["contenders"]["eager"] for row in report["rows"]}
    names = chosen or tuple(bench.layers.LAYERS)
    assert set(rows) == {(name, which) for name in names for which in bench.layers.PASSES}
    for (name, which), own in rows.items():
        assert own["passed"] and 0 < own["p20_ms"] <= own["median_ms"] <= own["p80_ms"], (name, own)
        assert set(own["errors"]) == ({"y"} if which == "forward" else {"y", "dx"})
        assert 0 < own["cpu_median_ms"] < 1.5 * own["median_ms"], "one thread"
        assert own["flop"] > 0 and own["flop_per_s"] == pytest.approx(own["flop"] / own["median_ms"] * 1e3)
        # A backward is about two forwards, of products.
        assert 1.5 < rows[name, "train"]["flop"] / rows[name, "forward"]["flop"] < 4.5
    # q, k, v, o and two products of all pairs; no more.
    assert rows["causal", "forward"]["flop"] == 2 * 24 * 32 * (32 + 16 + 16 + 32) + 2 * 2 * 24 * 24 * (16 + 16)
    printed = capsys.readouterr().out
    assert next(tmp_path.glob("*.md")).read_text() in printed
    assert "| CausalAttention | 24 | forward | eager |" in printed and "load of the machine" in printed
    assert report["machine"]["threads"] == 1 and report["command"].startswith("python profiles/layers.py --device cpu")


def test_compiled_layers_take_turns_with_eager_ones(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda layer, **options: compile_(layer, backend="aot_eager", **options))
    report = profile(bench, monkeypatch, tmp_path, "--compile", "--layers", "gqa", "--passes", "train")
    (row,) = report["rows"]
    assert set(row["contenders"]) == {"eager", "compiled"}
    assert all(own["passed"] and own["median_ms"] > 0 for own in row["contenders"].values())
    assert row["contenders"]["eager"]["repeats"] == row["contenders"]["compiled"]["repeats"]


@pytest.mark.parametrize("wrong", ["y", "dx", "nan"])
def test_a_wrong_layer_gets_no_time(bench: SimpleNamespace, wrong: str) -> None:
    layer = bench.layers.Sizes(32, 2, 8, 1).causal()

    def spoiled(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        if wrong == "dx":  # the same values, a part of the gradient missing
            x = x * 0.9 + (x * 0.1).detach()
        y = layer(x)[0]
        return {"y": y * 1.01, "dx": y, "nan": y * torch.nan}[wrong], None

    x = torch.randn(1, 9, 32)
    plan = bench.harness.Plan(min_rounds=3, min_seconds=0.0, max_seconds=0.0)
    contenders = {"eager": layer, "spoiled": spoiled}
    found = bench.layers.measure(layer, contenders, x, torch.randn_like(x), plan, bench.layers.BOUNDS["float32"])
    assert found["eager"]["passed"] and found["eager"]["median_ms"] > 0
    assert not found["spoiled"]["passed"] and "median_ms" not in found["spoiled"]
    row = {"layer": "causal", "T": 9, "batch_size": 1, "pass": "train"}
    assert bench.layers.cells(row, "spoiled", found["spoiled"], {})[4].startswith("FAIL y ")


def test_a_layer_that_fails_is_reported(bench: SimpleNamespace) -> None:
    layer = bench.layers.Sizes(32, 2, 8, 1).causal()

    def failing(x: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("no room")

    plan = bench.harness.Plan(min_rounds=3, min_seconds=0.0, max_seconds=0.0)
    found = bench.layers.measure(layer, {"eager": failing}, torch.randn(1, 9, 32), None, plan, 1e-3)
    row = {"layer": "causal", "T": 9, "batch_size": 1, "pass": "forward"}
    assert bench.layers.cells(row, "eager", found["eager"], {})[4] == "out of memory"


def test_peak_memory_sees_what_a_call_holds(bench: SimpleNamespace) -> None:
    def hold(mebibytes: int) -> None:
        torch.ones(mebibytes * 2**18).add_(1)

    small, large = (bench.machine.peak_bytes(lambda n=n: hold(n), torch.device("cpu")) for n in (8, 64))
    if small is None:
        pytest.skip("this kernel does not tell the most memory held")
    # The kernel counts resident pages in batches, so some are missing.
    assert 48 * 2**20 < large - small < 64 * 2**20
    assert 62 * 2**20 < large < 80 * 2**20


def test_facts_about_this_machine(bench: SimpleNamespace) -> None:
    facts = bench.machine.describe_machine(torch.device("cpu"))
    assert facts["name"] and facts["threads"] == torch.get_num_threads() and facts["load_at_start"] >= 0
    line = bench.machine.describe(facts, {"torch": "2.x", "commit": "abc"}, "2026-01-01")
    assert facts["name"] in line and "torch 2.x, commit abc, 2026-01-01." in line


@pytest.mark.gpu
def test_layers_on_a_gpu(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--device", "cuda", "--lengths", "512", "--hidden-size", "256", "--num-heads", "2", "--topk", "64"]
    report = profile(bench, monkeypatch, tmp_path, *arguments)
    assert report["dtype"] == "bfloat16" and report["roofline"]["device"] == "cuda"
    for row in report["rows"]:
        own = row["contenders"]["eager"]
        assert own.get("passed") and own["peak_bytes"] > 0, row
