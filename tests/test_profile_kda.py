"""The KDA benchmark runs on every machine, and neither a wrong nor a failing contender gets a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_flex.ops import chunk_kda

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "profiles/kda.py", "--device", "cpu", "--quick", "--no-peer", *arguments]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def read(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("kda_quick_*.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())


@pytest.fixture
def kda(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "profiles"))
    import kda

    return kda


def test_contenders_are_judged_before_they_are_timed(kda: Any) -> None:
    def wrong(v: torch.Tensor, **others: Any) -> Any:
        return chunk_kda(v=v * 1.01, **others)

    def hole(**arguments: Any) -> Any:
        o, state = chunk_kda(**arguments)
        o[:, -1, 0] = float("nan")  # a head that is not compared
        return o, state

    def failing(**arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    row = kda.Row("fwd_tiny", 70, 3, HV=6, head_dim=16)
    operators = {"right": chunk_kda, "wrong": wrong, "hole": hole, "failing": failing}
    plan = kda.Plan(min_rounds=3, min_seconds=0.0, max_seconds=0.0)
    found = kda.measure(row, operators, CPU, plan, seed=0)["contenders"]
    assert 0 < found["right"]["p20_ms"] <= found["right"]["median_ms"] <= found["right"]["p80_ms"]
    assert found["wrong"]["errors"]["o"] > 0.005 and not found["wrong"]["passed"]
    assert found["hole"]["errors"]["o"] < 0.005 and not found["hole"]["passed"]
    assert all("median_ms" not in found[name] for name in ("wrong", "hole", "failing"))
    row_found = {"contenders": found}
    assert kda.cell(row_found, "wrong").startswith("FAIL o ")
    assert kda.cell(row_found, "hole") == "FAIL not finite everywhere"
    assert kda.cell(row_found, "failing") == "out of memory"


def test_a_peer_beyond_a_bound_is_timed_all_the_same(kda: Any) -> None:
    def wrong(v: torch.Tensor, **others: Any) -> Any:
        return chunk_kda(v=v * 1.01, **others)

    row = kda.Row("fwd_tiny", 70, 3, head_dim=16)
    plan = kda.Plan(min_rounds=3, min_seconds=0.0, max_seconds=0.0)
    found = kda.measure(row, {kda.OURS: chunk_kda, kda.PEER: wrong}, CPU, plan, seed=0)["contenders"]
    assert not found[kda.PEER]["passed"] and found[kda.PEER]["median_ms"] > 0
    text = kda.cell({"contenders": found}, kda.PEER)
    assert text.startswith(f"{found[kda.PEER]['median_ms']:.3f} (") and ") FAIL o " in text


def test_shares_of_a_search_make_up_the_whole(kda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.autotuner import Autotuner

    found: list[int] = []
    for share in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(Autotuner, "prune_configs", lambda self, kwargs: list(range(7)))
            kda.share_search(share, 3)
            found += Autotuner.prune_configs(None, {})
    assert sorted(found) == list(range(7))


OTHERS = ("q", "k", "v", "beta", "A_log", "dt_bias")  # go the way of g


@pytest.mark.parametrize(
    "lost", ["g", "initial_state", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_every_gradient_is_judged(kda: Any, lost: str) -> None:
    def forgetful(**arguments: Any) -> Any:
        x = arguments[lost]
        # The same value, 3% of its gradient missing.
        return chunk_kda(**arguments | {lost: x * 0.97 + (x * 0.03).detach()})

    row = kda.Row("train_tiny", 70, 3, head_dim=16, state=True, lengths=(40, 30))
    plan = kda.Plan(min_rounds=3, min_seconds=0.0, max_seconds=0.0)
    found = kda.measure(row, {"right": chunk_kda, "forgetful": forgetful}, CPU, plan, seed=0)["contenders"]
    assert found["right"]["passed"] and "median_ms" in found["right"]
    assert kda.cell({"contenders": found}, "forgetful").startswith("FAIL ")
    assert found["forgetful"]["errors"]["o"] <= 0.005


def test_budget_leaves_rows_out_and_says_so(tmp_path: Path) -> None:
    done = profile("--rows", "fwd_lb_t1024_h4,decode_b1_h32", "--budget-s", "0", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert read(tmp_path)["left_out"] == ["decode_b1_h32", "fwd_lb_t1024_h4"]
    assert "Left out (the budget of 0 s was used): decode_b1_h32, fwd_lb_t1024_h4." in done.stdout


def test_the_peer_stays_beside_a_row_measured_without_it(kda: Any) -> None:
    from kda_report import main_table

    def contender(milliseconds: float) -> dict[str, Any]:
        facts = {"median_ms": milliseconds, "p20_ms": milliseconds, "p80_ms": milliseconds}
        return facts | {"passed": True, "errors": {"o": 1e-3}}

    row = {"name": kda.ROWS[0].name, "target_ms": None, "target_gib": None, "state_bytes": 0, "interleaved": True}
    report: dict[str, Any] = {"rows": []}
    kda.add_row(report, row | {"contenders": {"hybrid_flex": contender(3), "fla": contender(8)}})
    assert "earlier process" not in main_table(report["rows"])[-1]
    kda.add_row(report, row | {"contenders": {"hybrid_flex": contender(2)}})
    line = main_table(report["rows"])[-1]
    assert len(report["rows"]) == 1 and "| 4.00 |" in line and "fla in an earlier process" in line
    kda.add_row(report, row | {"contenders": {"hybrid_flex": contender(2), "fla": contender(5)}})
    line = main_table(report["rows"])[-1]
    assert "| 2.50 |" in line and "earlier process" not in line


def test_unknown_row_is_named() -> None:
    done = profile("--rows", "fwd_lb_t1024_h4,nonsense")
    assert done.returncode != 0 and "--rows must name rows of --help, got nonsense" in done.stderr


@pytest.mark.slow
def test_every_row_passes_and_earlier_rows_stay(tmp_path: Path) -> None:
    done = profile("--rows", "decode_b1_h32", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    done = profile("--rows", "*4096*,*t1024*,*packed*,*softplus*,*_hv32,*d64*", "--first-call", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    report = read(tmp_path)
    assert "decode_b1_h32" in {row["name"] for row in report["rows"]}
    for row in report["rows"]:
        ours = row["contenders"]["hybrid_flex"]
        assert ours["passed"] and ours["median_ms"] > 0, row
        assert ("dt_bias" in str(ours["errors"])) == row["name"].startswith("train")
    assert 0 < report["first_call"]["hybrid_flex"]["until_imported_s"] < report["first_call"]["hybrid_flex"]["seconds"]
