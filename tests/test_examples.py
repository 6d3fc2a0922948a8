"""Run every example; they print what they show and assert it."""

from __future__ import annotations

import importlib.util
import json
import runpy
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hybrid_flex import export

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHORT = {
    "compile_layer": ["aot_eager"],  # without the C++ compiler of the default backend: seconds instead of a minute
    "decode_from_pages": [],
    "dsa_layer": ["picture"],
    "export_and_run": [],
    "hybrid_model": [],
    "kda_layer": [],
    "packed_sequences": [],
    "profile_model": ["profile", "40"],
    "train_indexer": [],
}
TINY = [
    "--steps=6",
    "--hidden-size=64",
    "--seq-len=48",
    "--topk=16",
    "--batch-size=2",
    "--sample-bytes=8",
    "--device=cpu",
]


@pytest.fixture(autouse=True)
def leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    """Run in an empty folder: what an example writes by default goes below the current one."""
    monkeypatch.chdir(tmp_path)


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHORT, "train_text"}


@pytest.mark.parametrize("name", sorted(SHORT))
def test_short_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 80
    monkeypatch.setattr(sys, "argv", [str(path), *SHORT[name]])
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_the_picture_of_selected_keys_is_written_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dsa_layer.py", "elsewhere"])
    runpy.run_path(str(EXAMPLES / "dsa_layer.py"), run_name="__main__")
    assert Path("elsewhere/selected_keys.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def train_text() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_text", EXAMPLES / "train_text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    Path("some.txt").write_bytes(module.read_text(None)[:6000])
    monkeypatch.setattr(sys, "argv", ["train_text.py", "--text=some.txt", *TINY, *arguments])
    module.main()


def log_in(folder: Path) -> dict[str, Any]:
    (checkpoint,) = folder.glob("checkpoint-*")
    log: dict[str, Any] = torch.load(checkpoint / "training.pt", weights_only=True)["log"]
    return log


def test_training_interrupted_and_resumed_ends_like_training_in_one_go(
    train_text: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:  # once is enough for what takes long
        patch.setattr(train_text, "export_and_check", lambda *arguments: 0.0)
        patch.setattr(train_text, "write_trace", lambda *arguments: None)
        run_main(train_text, patch, "--out", "whole", "--eval-every", "0", "--save-every", "0")

    take_step, taken = train_text.train_step, []

    def press_ctrl_c_in_the_third_step(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        return take_step(*arguments)

    monkeypatch.setattr(train_text, "train_step", press_ctrl_c_in_the_third_step)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="--resume"):
        run_main(train_text, monkeypatch, "--out", "parts")
    assert signal.getsignal(signal.SIGINT) is handler
    assert log_in(Path("parts"))["step"] == 3
    monkeypatch.setattr(train_text, "train_step", take_step)
    run_main(train_text, monkeypatch, "--out", "parts", "--resume")

    whole, parts = log_in(Path("whole")), log_in(Path("parts"))
    assert whole["step"] == parts["step"] == len(whole["train"]) == 6
    assert parts["train"] == pytest.approx(whole["train"], rel=1e-5)
    assert whole["train"][-1] < whole["train"][0]
    assert any(loss > 0 for loss in whole["indexer"])
    assert len(whole["held_out"]) >= 6, "a look at the held-out text after every step"

    for name in ("loss.png", "samples.txt", "results.json", "model.pt2"):
        assert Path("parts", name).stat().st_size > 0
    assert json.loads(Path("parts/results.json").read_text())["steps"] == 6
    (trace,) = Path("parts/trace").glob("*.pt.trace.json")
    assert "hybrid_flex::chunk_kda" in trace.read_text()
    logits, _ = export.load("parts/model.pt2").module()(torch.zeros(1, 33, dtype=torch.int64))
    assert logits.shape == (1, 33, 256)
    out = capsys.readouterr().out
    assert "this model" in out and "gzip -9" in out and "entropy" in out


def test_own_text_and_a_resume_without_checkpoint(train_text: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no checkpoint"):
        run_main(train_text, monkeypatch, "--out", "empty", "--resume")
    Path("own.txt").write_text("one two three four five six seven eight nine ten " * 60)
    assert train_text.read_text(Path("own.txt")).startswith(b"one two")
    Path("short.txt").write_text("too short")
    with pytest.raises(SystemExit, match="too short"):
        run_main(train_text, monkeypatch, "--out", "short", "--text", "short.txt")


def test_held_out_text_shares_no_paragraph_with_the_training_text(train_text: ModuleType) -> None:
    text = train_text.read_text(None)
    split = int(len(text) * (1 - train_text.HELD_OUT))
    trained = {b" ".join(p.split()) for p in text[:split].split(b"\n\n")}
    held_out = [b" ".join(p.split()) for p in text[split:].split(b"\n\n")]
    assert len(held_out) > 50
    assert not [p for p in held_out[1:] if p and p in trained]  # the first one is cut by the split


def test_held_out_bits_count_every_byte_once(train_text: ModuleType) -> None:
    model = train_text.HybridLanguageModel(train_text.HybridConfig(hidden_size=32, pattern="K", num_heads=1))
    text = torch.randint(0, 256, (150,), dtype=torch.uint8)
    with torch.no_grad():
        logits, _ = model(text[None, :-1].long())
        loss = torch.nn.functional.cross_entropy(logits[0], text[1:].long()).item() / 0.6931471805599453
    # One window holds the whole text; windows of one new byte each see almost all of its past.
    assert train_text.held_out_bits(model, text, 200, 100) == pytest.approx(loss, rel=1e-4)
    assert train_text.held_out_bits(model, text, 149, 1) == pytest.approx(loss, rel=1e-3)
    assert train_text.held_out_bits(model, text, 64, 32) == pytest.approx(loss, rel=0.05)
