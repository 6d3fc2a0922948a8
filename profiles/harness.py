"""What the profiles share: facts about a run, spreads, tables, report files, and turns on the clock of one device."""

from __future__ import annotations

import datetime
import fnmatch
import gc
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
MIN_ROUNDS = 3
"""Fewest rounds that are ever timed, however long they take: a spread needs some."""


def commit() -> str:
    """Name the commit of this checkout, with "+changes" where tracked files differ from it."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        run = subprocess.run(("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True)
        return run.stdout.strip()

    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+changes" if changed else "")


def versions(**packages: str) -> dict[str, str]:
    """Name the commit and the versions behind a run: Python, torch and ``packages``."""
    return {"python": platform.python_version(), "torch": torch.__version__, **packages, "commit": commit()}


def spread(seconds: list[float]) -> dict[str, float]:
    """Summarise repeated timings as median, 20th and 80th percentile, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median_ms": statistics.median(seconds) * 1e3, "p20_ms": cuts[0] * 1e3, "p80_ms": cuts[3] * 1e3}


def table(header: dict[str, str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lay out a Markdown table; ``header`` maps each title to its alignment, ``---`` or ``---:``."""
    lines = [list(header), list(header.values()), *map(list, rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def report_stem(folder: Path, theme: str, device: str) -> Path:
    """Return ``<folder>/<theme>_<device>_<yyyymmdd>``, the path of a report without its ending."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{theme}_{slug}_{datetime.date.today():%Y%m%d}"


def write_report(stem: Path, report: dict[str, Any], text: str) -> None:
    """Write everything measured to ``<stem>.json`` and the tables to ``<stem>.md``."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)


@dataclass(frozen=True)
class Plan:
    """How often contenders take turns: rounds until both lower ends are reached, or the time is used."""

    min_rounds: int = 20
    min_seconds: float = 0.5
    """Per contender, as is the next."""
    max_seconds: float = 2.0
    warm_up_rounds: int = 3


# NOTE [Cold cache]: before every timed call a buffer of four times the L2 is read, which evicts what the call before
# left there.  Reading, unlike writing, leaves no dirty lines for the timed call to write back.  The read also gives the
# host a head start, so that launches queue up and a long call shows the time of the device alone.  With
# ``from_idle`` the host waits for the read first: the call starts on an idle device and its launches count.


class Clock:
    """Seconds of calls on one device: CUDA events around each, the wall clock on a CPU."""

    def __init__(self, device: torch.device, from_idle: bool = False) -> None:
        self.is_cuda, self.from_idle = device.type == "cuda", from_idle
        if self.is_cuda:
            cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.scratch = torch.zeros(cache_bytes, dtype=torch.int32, device=device)
            self.sink = torch.zeros((), dtype=torch.int32, device=device)

    def start(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Start ``call`` with a cold cache; the function returned waits for its end and tells how long it took."""
        if not self.is_cuda:
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            return lambda: seconds
        torch.amax(self.scratch, 0, out=self.sink)
        if self.from_idle:
            torch.cuda.synchronize()
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        call()
        end_event.record()

        def wait() -> float:
            end_event.synchronize()
            return begin_event.elapsed_time(end_event) / 1e3

        return wait


def take_turns(calls: dict[str, Callable[[], Any]], clock: Clock, plan: Plan) -> dict[str, list[float]]:
    """Time every call once per round, a different one first each round; returns seconds per call."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    round_seconds = 0.0
    for done in range(plan.warm_up_rounds):
        if done and round_seconds > plan.max_seconds:
            break
        round_seconds = sum(clock.start(calls[name])() for name in names)
    # Short calls are waited for now and then only: the device never runs dry, and the host is never far ahead of it.
    wait_every = 1 if round_seconds > 0.05 else 5
    gc.collect()
    gc.disable()
    waiting: list[tuple[str, Callable[[], float]]] = []
    begin = time.perf_counter()
    done = 0
    try:
        while True:
            first = done % len(names)
            waiting += [(name, clock.start(calls[name])) for name in names[first:] + names[:first]]
            done += 1
            if done % wait_every:
                continue
            for name, wait in waiting:
                seconds[name].append(wait())
            waiting.clear()
            elapsed = (time.perf_counter() - begin) / len(names)
            enough = done >= plan.min_rounds and elapsed > plan.min_seconds
            if enough or (done >= MIN_ROUNDS and elapsed > plan.max_seconds):
                return seconds
    finally:
        gc.enable()


def describe_device(device: torch.device) -> dict[str, Any]:
    """Collect the facts about a device that timings depend on."""
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "capability": ".".join(map(str, (properties.major, properties.minor))),
        "cuda": torch.version.cuda,
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ``||found - exact|| / ||exact||``, computed in float64; where both are zero, zero."""
    exact = exact.double()
    difference = float((found.double() - exact).norm())
    return difference / max(float(exact.norm()), 1e-300) if difference else 0.0


def describe_error(error: Exception) -> str:
    """Say what went wrong in one cell of a Markdown table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}".replace("|", "/")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def total_memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chosen_rows(script: str, rows: Iterable[Any], patterns: str) -> list[Any]:
    """Return the rows whose names match one of the patterns, separated by commas; each must match some."""
    rows = list(rows)
    for pattern in patterns.split(","):
        if not any(fnmatch.fnmatch(row.name, pattern) for row in rows):
            raise SystemExit(f"{script}: --rows must name rows of --help, got {pattern}")
    return [row for row in rows if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns.split(","))]


def below_the_table(report: dict[str, Any]) -> list[str]:
    """Say which rows were left out, and which were measured at another commit."""
    lines = []
    if report["left_out"]:
        lines += ["", f"Left out ({report['why_left_out']}): {', '.join(report['left_out'])}."]
    here = report["versions"]["commit"]
    elsewhere = [f"{row['name']} ({row['commit']})" for row in report["rows"] if row["commit"] != here]
    if elsewhere:
        lines += ["", f"Measured at another commit: {', '.join(elsewhere)}."]
    return lines


def in_order(rows: list[dict[str, Any]], entry: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a report with an entry in its place, or instead of an earlier one of its name."""
    order = {name: i for i, name in enumerate(names)}
    others = [row for row in rows if row["name"] != entry["name"]]
    return sorted([*others, entry], key=lambda row: order.get(row["name"], len(order)))


def arguments_without_out() -> list[str]:
    """Return the arguments that decide what is measured; where it is written tells nobody anything."""
    arguments = sys.argv[1:]
    return [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if before != "--out" and not argument.startswith("--out")
    ]
