"""The profile of a model's forms: a gate before the clock, every form timed, what each cost to make."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--length", "20", "--room", "10", "--hidden-size", "32", "--num-heads", "2", "--topk", "8"]
TINY += ["--num-layers", "2", "--pattern", "KS", "--vocab-size", "40", "--seconds", "0.001", "--threads", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Give the profile, which lies outside the package and has a name that others have too."""
    monkeypatch.syspath_prepend(str(ROOT / "profiles"))
    spec = importlib.util.spec_from_file_location("profile_export", ROOT / "profiles" / "export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = torch.get_num_threads()
    yield module
    torch.set_num_threads(before)


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["export.py", *TINY, *arguments, "--out", str(folder)])
    bench.main()
    (path,) = folder.glob("export_*.json")
    return json.loads(path.read_text())


def test_programs(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(bench, monkeypatch, tmp_path, "--forms", "opaque", "portable")
    assert {step: list(forms) for step, forms in result["steps"].items()} == {
        "prefill": ["eager", "opaque", "portable"],
        "decode": ["eager", "opaque", "portable"],
    }
    for forms in result["steps"].values():
        assert forms["eager"]["error"] == 0.0
        assert all(0 < own["p20_ms"] <= own["median_ms"] <= own["p80_ms"] for own in forms.values())
    parameters = result["model"]["parameter_bytes"]
    assert parameters == 4 * result["model"]["parameters"]
    assert all(result["made"][f"{form} prefill"]["bytes"] > parameters for form in ("opaque", "portable"))
    printed = capsys.readouterr().out
    assert printed == next(tmp_path.glob("export_*.md")).read_text() + "\n"
    assert printed.count("| portable |") == 2 and "--out" not in result["command"]


@pytest.mark.slow
def test_compiled_forms(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_dynamo: None) -> None:
    options = ["--package", str(tmp_path / "model.pt2"), "--forms"]
    result = run(bench, monkeypatch, tmp_path, *options, "compiled", "package")
    assert list(result["steps"]["decode"]) == ["eager", "compiled", "package"]
    made = result["made"]["package"]
    assert made["bytes"] > result["model"]["parameter_bytes"] and made["seconds"] > 0
    again = run(bench, monkeypatch, tmp_path, *options, "package")
    assert again["made"]["package"] == {"bytes": made["bytes"]}, "measured, not made anew"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_form_that_computes_something_else_is_not_timed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str
) -> None:
    def wrong(self: Any, step: str, portable: bool) -> Any:
        return lambda: self.eager(step)() * (1.05 if portable else 1.0)

    monkeypatch.setattr(bench.Forms, "program", wrong)
    with pytest.raises(SystemExit, match=r"more than rounding: prefill portable, decode portable"):
        run(bench, monkeypatch, tmp_path, "--forms", "opaque", "portable", "--dtype", dtype)
    (path,) = tmp_path.glob("export_*.json")
    for forms in json.loads(path.read_text())["steps"].values():
        assert forms["portable"].keys() == {"error"} and forms["opaque"]["median_ms"] > 0
        assert (forms["eager"]["error"] == 0.0) == (dtype == "float32")  # in 16 bits it has rounded, too
    assert next(tmp_path.glob("export_*.md")).read_text().count("| portable | FAIL |") == 2


@pytest.mark.gpu
def test_graphs_replay_the_step(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(bench, monkeypatch, tmp_path, "--device", "cuda", "--steps", "decode", "--forms", "graph")
    assert result["steps"]["decode"]["graph"]["error"] == result["steps"]["decode"]["eager"]["error"]
