"""Run the README: every Python snippet, in order, in one namespace; and what its text says about itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_flex

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_snippets_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    compile_with = torch.compile

    def compile_without_inductor(*arguments: Any, **options: Any) -> Any:
        # Seconds instead of a minute; what the default backend makes of our layers is tested beside the layers.
        return compile_with(*arguments, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_without_inductor)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    assert len(SNIPPETS) == README.count("```python") > 0
    for snippet in SNIPPETS:
        line = README[: README.index(snippet)].count("\n")
        # Line numbers of a traceback are then those of the README.
        exec(compile("\n" * line + snippet, str(ROOT / "README.md"), "exec"), names)

    assert names["text"].shape == (2, 73)
    assert names["logits_t"].shape == (2, 256)
    assert names["y"].shape == (2, 50, 64)
    assert names["loss"].isfinite() and names["indexer_loss"] > 0
    assert list(tmp_path.glob("runs/trace/*.pt.trace.json"))


def test_first_code_stands_early_and_the_page_is_short() -> None:
    lines = README.splitlines()
    assert lines.index("```python") < 20
    assert len(lines) <= 160


@pytest.mark.parametrize(
    "command", ["pip install -e . && python examples/train_text.py", "pip install -e '.[test]' && pytest"]
)
def test_command_stands_on_one_line(command: str) -> None:
    assert [line.strip() for line in README.splitlines()].count(command) == 1


def test_every_name_in_the_table_exists() -> None:
    rows = [line.split("|")[2] for line in README.splitlines() if line.startswith("| ")]
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) >= 20
    for name in names:
        value: object = hybrid_flex
        for part in name.split("."):
            value = getattr(value, part)
        assert callable(value)


def test_every_operator_is_in_the_table() -> None:
    left_out = {"RopeLayout", "apply_rope", "rope_cos_sin", "expand_pools", "pool_index_keys", "lightning_scores"}
    for name in set(hybrid_flex.ops.__all__) - left_out:
        assert f"`ops.{name}`" in README, name


def test_every_path_it_names_exists() -> None:
    names = set(re.findall(r"`?((?:hybrid_flex|examples|profiles|tests|\.github)/[\w./-]*)`?", README))
    for name in names - {"profiles/runs"}:  # which a command beside it makes
        assert (ROOT / name).exists(), name
