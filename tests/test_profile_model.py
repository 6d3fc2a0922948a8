"""The profile of a model writes traces, reports and results, replaces its own old files, and needs no TensorBoard."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--length", "24", "--hidden-size", "32", "--num-heads", "2", "--topk", "8"]
TINY += ["--vocab-size", "40", "--seconds", "0.001", "--threads", "1", "--pattern", "KS", "--decode-steps", "2"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Give the profile's modules, which lie outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "profiles"))
    return SimpleNamespace(model=importlib.import_module("model"))


@pytest.fixture(autouse=True)
def threads_stay() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def profile(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    paths = ["--out", str(folder / "results"), "--runs", str(folder / "runs")]
    monkeypatch.setattr(sys, "argv", ["model.py", *TINY, *arguments, *paths])
    bench.model.main()
    (path,) = (folder / "results").glob("model_*.json")
    return json.loads(path.read_text())


def test_all_phases(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = profile(bench, monkeypatch, tmp_path)
    assert list(result["phases"]) == ["prefill", "train", "decode"]
    names = {}
    for phase, own in result["phases"].items():
        assert 0 < own["p20_ms"] <= own["median_ms"] <= own["p80_ms"] and own["flop"] > 0
        names[phase] = {row["name"] for row in own["report"]["rows"]}
        (trace,) = (tmp_path / "runs" / phase).glob("*.pt.trace.json")
        assert trace.name.startswith(f"{phase}.") and own["report"]["title"] == phase
        assert {"projections", "mlp", "norm", "short_conv", "attention", "gated_norm", "logits"} <= names[phase]
    assert "kda_chunk" in names["prefill"] and "kda_recurrent" in names["decode"]
    assert {"indexer_loss", "optimizer", "cross_entropy"} <= names["train"] - names["prefill"]
    steps = {phase: own["report"]["num_steps"] for phase, own in result["phases"].items()}
    assert steps == {"prefill": 1, "train": 1, "decode": 2}
    # The trace counts what torch's counter counts without it.
    for phase, own in result["phases"].items():
        traced = sum(row["flop"] for row in own["report"]["rows"])
        assert traced == own["flop"] * steps[phase], phase
    (text,) = (tmp_path / "results").glob("*.md")
    assert text.read_text() in capsys.readouterr().out and "| decode | 1 |" in text.read_text()
    (picture,) = (tmp_path / "results").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stem == text.stem
    if importlib.util.find_spec("tensorboard") is not None:
        assert all(list((tmp_path / "runs" / phase).glob("events.out.tfevents.*")) for phase in names)


def test_a_second_run_replaces_its_own_files_only(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "decode"
    profile(bench, monkeypatch, tmp_path, "--phases", "decode")
    (first,) = folder.glob("*.pt.trace.json")
    (folder / "notes.txt").write_text("mine")
    profile(bench, monkeypatch, tmp_path, "--phases", "decode")
    (second,) = folder.glob("*.pt.trace.json")
    assert second != first and (folder / "notes.txt").read_text() == "mine"
    assert len(list(folder.glob("events.out.tfevents.*"))) <= 1


def test_without_tensorboard_the_traces_are_written(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*arguments: Any) -> Any:
        raise RuntimeError("write_tensorboard: tensorboard must be installed, got none: pip install -e '.[profile]'")

    monkeypatch.setattr("hybrid_flex.profiling.outputs.write_tensorboard", absent)
    profile(bench, monkeypatch, tmp_path, "--phases", "prefill")
    assert "pip install -e '.[profile]'; the trace is written" in capsys.readouterr().err
    assert list((tmp_path / "runs" / "prefill").glob("*.pt.trace.json"))


def test_decoding_begins_every_turn_at_the_same_token(bench: SimpleNamespace) -> None:
    torch.manual_seed(0)
    from hybrid_flex import HybridConfig, HybridLanguageModel

    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_heads": 2, "topk": 8}
    model = HybridLanguageModel(HybridConfig(pattern="KSD", **sizes))
    found = []
    step = model.step
    model.step = lambda *given: found.append(step(*given)[0])  # type: ignore[method-assign]
    turn, num_tokens = bench.model.make_phase(model, "decode", SimpleNamespace(batch_size=3, length=20))
    turn()
    turn()
    assert num_tokens == 3 and torch.equal(found[0], found[1])


def test_runs_are_not_kept_in_git() -> None:
    assert "/profiles/runs/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.gpu
def test_phases_on_a_gpu(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--device", "cuda", "--length", "512", "--hidden-size", "256", "--topk", "64"]
    result = profile(bench, monkeypatch, tmp_path, *arguments)
    for own in result["phases"].values():
        assert own["report"]["device"] == "cuda" and own["report"]["roofline"]["device"] == "cuda"
        assert {"projections", "mlp"} <= {row["name"] for row in own["report"]["rows"] if row["time_ms"] > 0}
