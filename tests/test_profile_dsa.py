"""The sparse attention benchmark runs on every machine, and neither a wrong nor a failing contender gets a time."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_flex.ops import indexer_kl_loss, lightning_topk, sparse_attention

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MODULES = ("dsa", "dsa_rows", "dsa_work", "dsa_flex", "dsa_layers", "dsa_gates", "dsa_report")


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "profiles/dsa.py", "--device", "cpu", "--quick", *arguments]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def read(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("dsa_quick_*.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Give the benchmark's modules, which lie outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "profiles"))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def measure(bench: SimpleNamespace, row: Any) -> dict[str, Any]:
    plan = bench.dsa.Plan(min_rounds=3, min_seconds=0.0, max_seconds=0.0)
    return bench.dsa.measure(row, bench.dsa.Inputs(CPU, 0).of(row), plan, with_peers=True)


def ours(bench: SimpleNamespace, row: Any) -> dict[str, Any]:
    return measure(bench, row)["contenders"][bench.dsa_rows.OURS]


def select_row(bench: SimpleNamespace, **sizes: Any) -> Any:
    return bench.dsa_rows.SelectRow(name="tiny", **{"T": 96, "heads": 4, "width": 16, "topk": 12} | sizes)


def attend_row(bench: SimpleNamespace, **sizes: Any) -> Any:
    given = {"T": 12, "S": 40, "H": 4, "D": 16, "Dv": 8, "topk": 10, "latent": True} | sizes
    return bench.dsa_rows.AttendRow(name="tiny", **given)


def test_a_row_of_every_kind_runs_and_is_reported(tmp_path: Path) -> None:
    rows = "select_t8192*,select_packed*,attend_?wd_*_h64_d576*,dense_fwd_t32768*,block_flex_fwd*,density_t8192*"
    rows += ",loss_sparse_t8192*,loss_given_t8192*,decode_glm_s8192*,layer_glm_train_t8192"
    rows += ",layer_gqa_train_t8192_agree90,forms_fwd_t8192*agree90"
    done = profile("--rows", rows, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    report = read(tmp_path)
    assert len(report["rows"]) == 14 and report["left_out"] == []
    for row in report["rows"]:
        for name, own in row["contenders"].items():
            assert own.get("passed") and own["median_ms"] > 0, (row["name"], name, own)
    text = next(tmp_path.glob("*.md")).read_text()
    assert "100 other masks: 0 recompilations" in text and "## Density of exact masks" in text
    assert "| cuDNN SDPA " in text and "eager einsum + topk" in text


@pytest.mark.slow
def test_every_row_passes_and_earlier_rows_stay(tmp_path: Path) -> None:
    assert profile("--rows", "density_t8192*", "--out", str(tmp_path)).returncode == 0
    done = profile("--rows", "[!d]*,de[!n]*,dense*", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    report = read(tmp_path)
    assert "density_t8192_k2048" in {row["name"] for row in report["rows"]}
    for row in report["rows"]:
        assert all(own.get("passed") for own in row["contenders"].values()), row
        assert "error" not in row["extras"], row


@pytest.mark.parametrize(
    "sizes", [{}, {"kpool": 4}, {"T": 90, "lengths": (50, 1, 39)}], ids=["causal", "pooled", "packed"]
)
def test_a_right_selection_is_timed(bench: SimpleNamespace, sizes: dict[str, Any]) -> None:
    found = measure(bench, select_row(bench, **sizes))["contenders"]
    assert all(own["passed"] and own["median_ms"] > 0 for own in found.values()), found
    assert found[bench.dsa_rows.OURS]["errors"] == {"order": 0.0, "form": 0.0, "exact": 0.0}


def swapped(indices: torch.Tensor) -> torch.Tensor:
    """In the last row give up one selected key for one that was not."""
    row, num_keys = set(indices[0, -1].tolist()), int(indices.max()) + 1
    indices[0, -1] = torch.tensor(sorted({*list(row)[1:], min(set(range(num_keys)) - row)}), dtype=torch.int32)
    return indices


def repeated(indices: torch.Tensor) -> torch.Tensor:
    indices[0, 40, 1] = indices[0, 40, 0]
    return indices


def shifted(indices: torch.Tensor) -> torch.Tensor:
    return indices.roll(1, dims=-1)


@pytest.mark.parametrize(("spoil", "error"), [(swapped, "order"), (repeated, "form"), (shifted, "form")])
def test_a_wrong_selection_gets_no_time(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, spoil: Any, error: str
) -> None:
    monkeypatch.setattr(bench.dsa_work, "lightning_topk", lambda *x, **options: spoil(lightning_topk(*x, **options)))
    own = ours(bench, select_row(bench))
    assert own["errors"][error] > bench.dsa_gates.BOUNDS[error] and "median_ms" not in own
    assert bench.dsa_report.cell(own).startswith("FAIL ") and error in bench.dsa_report.cell(own)


def test_equal_scores_must_go_to_the_lower_key(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, topk: int, **options: Any) -> torch.Tensor:
        # Exact but for ties, of which the last key is kept.
        scores = (w[..., None] * torch.einsum("bthd,bsd->bths", q.double(), k.double()).relu()).sum(2)
        t = torch.arange(q.shape[1])[:, None] + options["query_start"]
        column = torch.arange(k.shape[1])
        order = scores.masked_fill(column > t, -torch.inf).flip(-1).sort(dim=-1, descending=True, stable=True).indices
        chosen = k.shape[1] - 1 - order[..., :topk]
        chosen = chosen.masked_fill(chosen > t, k.shape[1]).sort(dim=-1).values
        return chosen.masked_fill(chosen == k.shape[1], -1).int()

    monkeypatch.setattr(bench.dsa_work, "lightning_topk", late)
    own = ours(bench, select_row(bench))
    assert own["errors"]["order"] == 0.0 and own["errors"]["form"] == 0.0
    assert own["errors"]["exact"] > 0.0 and not own["passed"]


def test_right_attention_is_timed(bench: SimpleNamespace) -> None:
    for sizes in ({}, {"latent": False, "kv_heads": 2}):
        for backward in (False, True):
            own = ours(bench, attend_row(bench, backward=backward, **sizes))
            assert own["passed"] and own["median_ms"] > 0, own
            # Latent values have no gradient of their own.
            gradients = ({"dq", "dk"} if not sizes else {"dq", "dk", "dv"}) if backward else set()
            assert set(own["errors"]) == {"o", "lse"} | gradients


@pytest.mark.parametrize("name", ["o", "lse", "dq", "dk", "dv", "hole"])
def test_wrong_attention_gets_no_time(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, indices: torch.Tensor, **options: Any) -> Any:
        if name in ("dq", "dk", "dv"):  # the same values, 5% of one gradient missing
            tensors: dict[str, Any] = {"dq": q, "dk": k, "dv": v}
            tensors[name] = tensors[name] * 0.95 + (tensors[name] * 0.05).detach()
            q, k, v = tensors.values()
        o, lse = sparse_attention(q, k, v, indices, **options)
        if name == "o":
            o[:, -1, 0] *= 1.2
        if name == "hole":
            o[:, 0] = torch.nan
        return o, lse + 0.01 if name == "lse" else lse

    monkeypatch.setattr(bench.dsa_work, "sparse_attention", wrong)
    # The queries that are compared leave out the first: what is no number is found all the same.
    own = ours(bench, attend_row(bench, T=130, backward=name.startswith("d"), latent=name != "dv"))
    assert not own["passed"] and "median_ms" not in own, own
    text = bench.dsa_report.cell(own)
    assert text == "FAIL not finite everywhere" if name == "hole" else text.startswith(f"FAIL {name} ")


def test_a_wrong_loss_gets_no_time(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    row = bench.dsa_rows.LossRow(name="tiny", T=40, topk=8, H=4, D=16, heads=4, width=16)
    assert ours(bench, row)["passed"]

    def wrong(q_idx: torch.Tensor, k_idx: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        return indexer_kl_loss(q_idx, k_idx * 0.95 + (k_idx * 0.05).detach(), *others, **options)

    monkeypatch.setattr(bench.dsa_work, "indexer_kl_loss", wrong)
    assert bench.dsa_report.cell(ours(bench, row)).startswith("FAIL dk_idx ")


@pytest.mark.parametrize("shape", ["glm", "gqa"])
def test_a_wrong_layer_gets_no_time(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    row = bench.dsa_rows.LayerRow(name="tiny", shape=shape, T=70, backward=True, small=True)
    found = measure(bench, row)["contenders"]
    assert all(own["passed"] and own["median_ms"] > 0 for own in found.values()), found
    layer_class = type(bench.dsa.Inputs(CPU, 0).of(row).layer)
    forward = layer_class.forward
    monkeypatch.setattr(layer_class, "forward", lambda self, x: (forward(self, x)[0] * 1.05, None))
    assert bench.dsa_report.cell(ours(bench, row)).startswith("FAIL y ")


def test_density_falls_with_agreement(bench: SimpleNamespace) -> None:
    row = bench.dsa_rows.DensityRow(name="tiny", T=512, topk=32, runs=(1, 16), block_size=16)
    points = measure(bench, row)["extras"]["density"]
    assert all(point["right"] for point in points)
    density = {(point["agreement"], point["run"]): point["density"] for point in points}
    assert density[0.0, 16] > density[0.9, 16] > density[1.0, 16] and density[1.0, 1] > density[1.0, 16]


def test_a_row_that_fails_is_reported_and_the_next_one_runs(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*tensors: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    def no_inputs(*arguments: Any) -> Any:
        raise ValueError("no | inputs")

    monkeypatch.setattr(bench.dsa_work, "lightning_topk", failing)
    monkeypatch.setitem(bench.dsa.MAKERS, bench.dsa_rows.DensityRow, no_inputs)
    rows = "select_t8192*,attend_fwd*d128_v128,density_t8192*"
    monkeypatch.setattr(sys, "argv", ["dsa.py", "--quick", "--device", "cpu", "--rows", rows, "--out", str(tmp_path)])
    bench.dsa.main()
    select, first, _, density = read(tmp_path)["rows"]
    assert bench.dsa_report.cell(select["contenders"]["hybrid_flex"]) == "out of memory"
    assert select["contenders"]["eager einsum + topk"]["median_ms"] > 0
    assert first["contenders"]["hybrid_flex"]["median_ms"] > 0
    assert "| not measured: ValueError: no / inputs |" in next(tmp_path.glob("*.md")).read_text()
    assert density["contenders"]["hybrid_flex"]["role"] == "ours"


def test_cells_say_what_was_reached(bench: SimpleNamespace) -> None:
    def contender(role: str, milliseconds: float, flops: float = 0.0) -> dict[str, Any]:
        times = {"median_ms": milliseconds, "p20_ms": milliseconds, "p80_ms": milliseconds, "repeats": 9}
        facts = {"peak_bytes": 2**30, "workspace_bytes": 2**29, "errors": {"o": 1e-3, "lse": 1e-6}, "passed": True}
        return {"role": role, "flops": flops} | times | facts

    def line(**changes: Any) -> str:
        row = asdict(bench.dsa_rows.DecodeRow(name=bench.dsa_rows.ROWS[0].name, shape="glm", S=1))
        return bench.dsa_report.main_table([row | {"extras": {}, "interleaved": True} | changes])[-1]

    contenders = {
        "hybrid_flex": contender("ours", 4.0, 8e11),
        "mask": contender("part", 0.2),
        "x": contender("peer", 9),
    }
    text = line(contenders=contenders, target_ms=3.0, target_times=2.0, target_workspace_mib=512, target_tflops=150)
    assert "| 4.000 (4.000-4.000) | x 9.000 (9.000-9.000) | 2.25 |" in text
    assert "<= 3 ms MISSED, >= 150 TFLOP/s met, >= 2x met, workspace <= 512 MiB met" in text
    assert (
        "| 200 |" in text and "| 1.00 | 1.00 | o 1.0e-03 | mask alone 0.200 (0.200-0.200) ms; 5.0% of the time" in text
    )
    text = line(contenders={"hybrid_flex": contender("ours", 4.0)}, quoted=("FlashMLA", 2.0))
    assert "| FlashMLA 2.00 (quoted) | 0.50 (than quoted) |" in text
    text = line(contenders={"x": contender("peer", 9)})
    assert "|  | x 9.000 (9.000-9.000) |  |" in text


def test_peers_stay_beside_a_row_measured_without_them(bench: SimpleNamespace) -> None:
    row = {"name": bench.dsa_rows.ROWS[0].name}
    report: dict[str, Any] = {"rows": []}
    bench.dsa.add_row(report, row | {"contenders": {"a": {"role": "ours"}, "b": {"role": "peer"}}}, True)
    bench.dsa.add_row(report, row | {"contenders": {"a": {"role": "ours", "new": 1}}}, False)
    (kept,) = report["rows"]
    assert kept["contenders"] == {"a": {"role": "ours", "new": 1}, "b": {"role": "peer"}} and kept["peer_earlier"]


def test_rows_have_names_of_their_own(bench: SimpleNamespace) -> None:
    names = [row.name for row in bench.dsa_rows.ROWS]
    assert len(set(names)) == len(names)
    assert all(type(row) in bench.dsa.MAKERS and row.quick().name == row.name for row in bench.dsa_rows.ROWS)
    fwd, bwd = (
        next(row for row in bench.dsa_rows.ROWS if row.name.startswith(f"attend_{way}")) for way in ("fwd", "bwd")
    )
    assert fwd.inputs_key == bwd.inputs_key


def test_an_unknown_row_is_named(bench: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match=r"^dsa\.py: --rows must name rows of --help, got nonsense$"):
        bench.dsa.chosen_rows("dsa.py", bench.dsa.ROWS, "select_t8192*,nonsense")


def test_budget_leaves_rows_out_and_says_so(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rows", "density*", "--budget-s", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["dsa.py", "--quick", "--device", "cpu", *options])
    bench.dsa.main()
    text = "Left out (the budget of 0 s was used): density_t8192_k2048, density_t32768_k2048."
    assert text in capsys.readouterr().out


def test_a_layer_attends_to_the_selection_it_is_given(bench: SimpleNamespace) -> None:
    """It has made one of its own before, of the same shape."""
    row = bench.dsa_rows.LayerRow(name="tiny", shape="gqa", T=300, small=True, agreement=0.9)
    work = bench.dsa.Inputs(CPU, 0).of(row)
    given = work.layer.attend(work.x["x"])[2]
    del work.layer.indexer.select
    own = work.layer.attend(work.x["x"])[2]
    assert given.shape == own.shape == (1, 300, 16)

    def shared(indices: torch.Tensor) -> float:
        """Return the share of a query's keys that the query before it selects as well."""
        rows = [set(row) for row in indices[0, 200:].tolist()]
        return sum(len(a & b) for a, b in itertools.pairwise(rows)) / (16 * (len(rows) - 1))

    assert shared(given) > 0.5 > shared(own)
