"""Turn a trace into a table: how long each part of a model took, and how near that is to what the machine can do."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from hybrid_flex.checks import check_choice
from hybrid_flex.profiling.events import OTHERS, Event, Trace, read_trace, trace_file
from hybrid_flex.profiling.roofline import Roofline, measure_roofline
from hybrid_flex.profiling.trace import FILES
from hybrid_flex.profiling.work import Work, work_of

GROUPINGS = ("name", "path", "operator")


@dataclass(frozen=True)
class Row:
    """One row of a report: everything of one name.

    ``calls`` counts how often the forward entered it (an operator: all calls; what runs backward only: those there).
    ``time_ms`` is forward and backward together: of the kernels that were launched on a GPU, else of the host, without
    what belongs to other rows.  ``roofline_share`` is the least time that its work needs on the measured roofline,
    divided by the time it took; None without a roofline or without work.
    """

    name: str
    calls: int
    time_ms: float
    backward_ms: float
    host_ms: float
    share: float
    flop: int
    bytes: int
    roofline_share: float | None

    @property
    def flop_per_s(self) -> float:
        """Return FLOP per second of its time; 0 without any."""
        return self.flop / self.time_ms * 1e3 if self.time_ms > 0 else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Return bytes per second of its time; 0 without any."""
        return self.bytes / self.time_ms * 1e3 if self.time_ms > 0 else 0.0


@dataclass(frozen=True)
class Report:
    """What `report` found out: rows with the longest first, and facts about the whole trace."""

    title: str
    device: str
    """``"cpu"`` or ``"cuda"``: whose time it is."""
    rows: list[Row]
    total_ms: float
    """Sum of the rows."""
    wall_ms: float
    """From the first event to the end of the last one."""
    num_steps: int
    """Turns of a schedule that were recorded, 0 without one."""
    roofline: Roofline | None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Most bytes allocated at once per device; on a CPU beyond those at the start.  None without ``profile_memory``."""
    has_shapes: bool = True
    """Whether the trace holds shapes; without them there are neither FLOP nor bytes."""

    def row(self, name: str) -> Row:
        """Return the row of a name.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain JSON values."""
        rates = ({"flop_per_s": row.flop_per_s, "bytes_per_s": row.bytes_per_s} for row in self.rows)
        rows = [asdict(row) | rate for row, rate in zip(self.rows, rates, strict=True)]
        return asdict(self) | {"rows": rows}

    def markdown(self, *, max_rows: int | None = None) -> str:
        """Write the table as Markdown; ``max_rows`` sums the shorter rows up in one."""
        from hybrid_flex.profiling.outputs import markdown

        return markdown(self, max_rows)

    def figure(self, *, max_rows: int = 12) -> Any:
        """Draw time and share of the roofline per row: a `matplotlib.figure.Figure`."""
        from hybrid_flex.profiling.outputs import figure

        return figure(self, max_rows)

    def write_markdown(self, path: str | os.PathLike[str]) -> Path:
        """Write the table to a file."""
        from hybrid_flex.profiling.outputs import write_markdown

        return write_markdown(self, Path(path))

    def write_png(self, path: str | os.PathLike[str], *, max_rows: int = 12) -> Path:
        """Write the chart to a PNG file."""
        from hybrid_flex.profiling.outputs import write_png

        return write_png(self, Path(path), max_rows)

    def write_tensorboard(self, logdir: str | os.PathLike[str], *, step: int = 0) -> Path:
        """Write table, chart and numbers for TensorBoard's own text, images and scalars tabs, which need no internet.

        Args:
            logdir: a run's folder; that of the trace, so that both stand under one name.
            step: the step that the numbers are plotted at.

        Raises:
            RuntimeError: tensorboard is not installed.
        """
        from hybrid_flex.profiling.outputs import write_tensorboard

        return write_tensorboard(self, Path(logdir), step)


def report(
    source: str | os.PathLike[str] | profile,
    *,
    by: str = "name",
    roofline: Roofline | bool = True,
    title: str | None = None,
) -> Report:
    """Turn a trace into a table of times, shares, FLOP/s, bytes/s and shares of the measured roofline.

    On a CPU every moment of a thread belongs to the innermost operator or range, Python between two operators included.
    On CUDA a row's time is that of the kernels which its operators launched.  Backward work is counted with the part of
    the model whose forward made it; sums of leaf gradients are "accumulate_grad", optimizers "optimizer", what no range
    or operator of ours encloses is "others".  FLOP follow `torch.utils.flop_counter` with our formulas, bytes are those
    of every tensor that an operator reads or writes, once.

    Args:
        source: a trace file; a folder, of which the newest trace is taken; or the profiler that `trace` gave.
        by: "name" adds up equal parts of all blocks ("projections", "kda_chunk", "mlp"), "path" keeps them apart
            ("block 3/mlp"), "operator" has a row per operator ("aten::mm").
        roofline: limits to compare with; True measures this machine's (0.4 s), False leaves the column out.
        title: headline; the file's name by default.

    Returns:
        A `Report`: ``markdown()``, ``write_markdown``, ``write_png``, ``write_tensorboard``.

    Raises:
        ValueError: there is no trace, or it is none of torch's, or an unknown ``by``.
        RuntimeError: a profiler that has recorded nothing yet.

    Device:
        any; a trace of a GPU can be read without one (then without a measured roofline).

    Example:
        >>> import tempfile
        >>> from hybrid_flex import KimiDeltaAttention, profiling
        >>> layer = KimiDeltaAttention(16, num_heads=1, head_dim=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with profiling.trace(folder, model=layer):
        ...         y, _ = layer(torch.randn(1, 5, 16))
        ...     found = report(folder, roofline=False)
        >>> found.row("kda_chunk").calls, found.row("short_conv").calls, found.row("kda_chunk").flop
        (1, 3, 10880)
    """
    op = "report"
    check_choice(op, "by", by, GROUPINGS)
    if isinstance(source, profile):
        trace, name = _read_profiler(source)
    else:
        path = trace_file(source)
        trace, name = read_trace(path), path.name.split(".")[0]
    works = work_of(trace.events)
    limits = _limits(trace, works) if roofline is True else (roofline or None)
    rows = _rows(trace, works, by, limits)
    starts = [event.start_us for event in trace.events]
    return Report(
        title=name if title is None else title,
        device="cuda" if trace.has_kernels else "cpu",
        rows=rows,
        total_ms=sum(row.time_ms for row in rows),
        wall_ms=(max(event.end_us for event in trace.events) - min(starts)) / 1e3 if starts else 0.0,
        num_steps=trace.num_steps,
        roofline=limits,
        peak_bytes=trace.peak_bytes,
        has_shapes=any("Input Dims" in event.arguments for event in trace.events),
    )


def _read_profiler(profiler: profile) -> tuple[Trace, str]:
    path = FILES.get(profiler)
    if path is not None:
        return read_trace(path), path.name.split(".")[0]
    if profiler.profiler is None:
        raise RuntimeError("report: source must be a profiler that has recorded: call report after the body of trace")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.pt.trace.json"
        profiler.export_chrome_trace(str(file))
        return read_trace(file), "trace"


@functools.cache
def _measured(device: str, dtype: str, num_threads: int) -> Roofline:
    return measure_roofline(device, getattr(torch, dtype))


def _limits(trace: Trace, works: dict[Event, Work]) -> Roofline | None:
    """Measure the roofline of the trace's device, in the dtype that most of its FLOP have; None without the device."""
    device = "cuda" if trace.has_kernels else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return None
    flop: dict[str, int] = defaultdict(int)
    for work in works.values():
        flop[work.dtype] += work.flop
    dtype = max(flop, key=lambda name: flop[name], default="")
    return _measured(
        device, dtype if dtype in ("bfloat16", "float16", "float64") else "float32", torch.get_num_threads()
    )


def _group(event: Event, by: str) -> str:
    if by == "operator":
        # A kernel's launch belongs to the operator that made it.
        while event.category.startswith("cuda_") and event.parent is not None:
            event = event.parent
        return event.name
    path = event.label.path or OTHERS
    return path if by == "path" else re.sub(r" \d+$", "", path.rpartition("/")[2])


def _rows(trace: Trace, works: dict[Event, Work], by: str, limits: Roofline | None) -> list[Row]:
    forward_calls: dict[str, int] = defaultdict(int)
    backward_calls: dict[str, int] = defaultdict(int)
    time_us: dict[str, float] = defaultdict(float)
    backward_us: dict[str, float] = defaultdict(float)
    host_us: dict[str, float] = defaultdict(float)
    flop: dict[str, int] = defaultdict(int)
    num_bytes: dict[str, int] = defaultdict(int)
    least_s: dict[str, float] = defaultdict(float)
    groups: dict[Event, str] = {}
    for event in trace.events:
        name = groups[event] = _group(event, by)
        outer = event.parent
        if by == "operator" or outer is None or groups[outer] != name:
            (backward_calls if event.label.backward else forward_calls)[name] += 1
        took = event.device_us if trace.has_kernels else event.self_us
        time_us[name] += took
        backward_us[name] += took if event.label.backward else 0.0
        host_us[name] += event.self_us
        work = works.get(event)
        if work is not None:
            flop[name] += work.flop
            num_bytes[name] += work.bytes
            least_s[name] += limits.seconds(work.flop, work.bytes) if limits is not None else 0.0
    if trace.lost_kernels_us:
        time_us[OTHERS] += trace.lost_kernels_us
    total = sum(time_us.values()) or 1.0
    rows = [
        Row(
            name,
            backward_calls[name] + forward_calls[name]
            if by == "operator"
            else forward_calls[name] or backward_calls[name],
            time_us[name] / 1e3,
            backward_us[name] / 1e3,
            host_us[name] / 1e3,
            time_us[name] / total,
            flop[name],
            num_bytes[name],
            least_s[name] * 1e6 / time_us[name] if least_s[name] and time_us[name] else None,
        )
        for name in time_us
    ]
    return sorted(rows, key=lambda row: (-row.time_ms, row.name))
