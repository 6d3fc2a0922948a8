"""What kda.py and dsa.py share: options, the report that a run begins, and its rows, one after the other."""

from __future__ import annotations

import argparse
import datetime
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import (
    RESULTS,
    arguments_without_out,
    describe_device,
    describe_error,
    progress,
    synchronize,
    versions,
    write_report,
)

Entry = dict[str, Any]
Report = dict[str, Any]


def row_parser(
    description: str | None, rows: Sequence[Any], *, peer: str, or_none: str = ""
) -> argparse.ArgumentParser:
    """Make a parser of the options that both scripts have; the names of the rows stand at the end of its help."""
    names = "rows:\n  " + "\n  ".join(row.name for row in rows)
    parser = argparse.ArgumentParser(
        description=description, epilog=names, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="*", help=f"names or patterns, separated by commas{or_none}; default: all")
    parser.add_argument("--no-peer", action="store_true", help=f"leave {peer} out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three repeats: shows that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start no row after this many seconds")
    parser.add_argument("--commit", help="what to write down instead of what git says of this checkout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser


def begin_report(
    script: str, options: argparse.Namespace, bounds: dict[str, float], packages: dict[str, str], **more: Any
) -> Report:
    """Write down what a run depends on, with ``more`` of its own."""
    what = versions(**packages)
    what["commit"] = options.commit or what["commit"]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"profiles/{script}", *arguments_without_out()]),
        "device": describe_device(torch.device(options.device)),
        "versions": what,
        "bounds": bounds,
        "seed": options.seed,
        "rows": [],
        **more,
        "left_out": [],
        "why_left_out": "",
    }


def keep_earlier(report: Report, path: Path, packages: Sequence[str], parts: Sequence[str] = ("rows",)) -> None:
    """Take over what an earlier run on the same device with the same versions of ``packages`` has measured."""
    if not path.exists():
        return
    old = json.loads(path.read_text())
    alike = [old["versions"].get(name) == report["versions"].get(name) for name in packages]
    if old["device"]["name"] == report["device"]["name"] and all(alike):
        report.update({part: old[part] for part in parts})


def run_rows(
    rows: Sequence[Any],
    options: argparse.Namespace,
    report: Report,
    end: float,
    measure: Callable[[Any], Entry],
    failed: Callable[[Any, str], Entry],
    add: Callable[[Entry], str],
) -> None:
    """Measure row after row until the clock shows ``end``.

    Args:
        rows: what to measure.
        options: of the run.
        report: of the run.
        end: seconds of `time.perf_counter`.
        measure: measures a row.
        failed: what stands for that where it was not to be had, given the row and why.
        add: puts an entry into the report, writes it, and says what is to be shown of it.
    """
    device = torch.device(options.device)
    for i, row in enumerate(rows):
        begin = time.perf_counter()
        if begin > end:
            leave_out(report, rows[i:], f"the budget of {options.budget_s:.0f} s was used")
            return
        row = row.quick() if options.quick else row
        entry = asdict(row) | {key: report[key] for key in ("date", "command")}
        entry["commit"] = report["versions"]["commit"]
        try:
            entry |= measure(row)
        except Exception as error:  # the inputs or the reference do not fit, or the device is gone
            traceback.print_exc(limit=-2)
            entry |= failed(row, f"not measured: {describe_error(error)}") | {"interleaved": True}
        entry["seconds"] = time.perf_counter() - begin
        progress(f"[{i + 1}/{len(rows)}] {row.name}: {add(entry)}; {entry['seconds']:.0f} s")
        try:
            synchronize(device)
        except RuntimeError as error:
            leave_out(report, rows[i + 1 :], f"the device failed: {describe_error(error)}")
            return


def leave_out(report: Report, rows: Sequence[Any], why: str) -> None:
    report["left_out"], report["why_left_out"] = [row.name for row in rows], why


def end_report(
    report: Report, stem: Path, begin: float, markdown: Callable[[Report], str], table: Sequence[str]
) -> None:
    """Write the whole report, and print its table."""
    report["seconds"] = time.perf_counter() - begin
    write_report(stem, report, markdown(report))
    progress(f"written to {stem}.md and .json after {report['seconds']:.0f} s")
    print("\n".join(table))
    if report["left_out"]:
        print(f"\nLeft out ({report['why_left_out']}): {', '.join(report['left_out'])}.")
