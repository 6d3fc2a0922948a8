"""Write a report down: Markdown, a PNG chart, and TensorBoard's own tabs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid_flex.checks import check
from hybrid_flex.profiling.report import Report, Row

_SCALE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
FORWARD_COLOUR, BACKWARD_COLOUR, ROOFLINE_COLOUR = "#3b6ea8", "#e08a3c", "#4f9d69"


def si(value: float, unit: str = "") -> str:
    """Write a number with three digits and a prefix: ``"1.23 GFLOP"``.

    Args:
        value: not negative.
        unit: what follows the prefix.

    Returns:
        The text; "0" stands without a unit.

    Device:
        none.

    Example:
        >>> si(1234e6, "FLOP/s"), si(0), si(12.5, "B")
        ('1.23 GFLOP/s', '0', '12.5 B')
    """
    for scale, prefix in _SCALE:
        if value >= scale:
            return f"{value / scale:.{_decimals(value / scale)}f} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip() if value else "0"


def _decimals(value: float) -> int:
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def _summed(rows: list[Row], max_rows: int | None) -> list[Row]:
    """Keep the longest rows and sum the others up."""
    if max_rows is None or len(rows) <= max_rows:
        return rows
    check(max_rows > 0, "report", "max_rows", "be positive", max_rows)
    rest = rows[max_rows - 1 :]
    total = replace(
        rest[0],
        name=f"{len(rest)} shorter ones",
        calls=sum(row.calls for row in rest),
        time_ms=sum(row.time_ms for row in rest),
        backward_ms=sum(row.backward_ms for row in rest),
        host_ms=sum(row.host_ms for row in rest),
        share=sum(row.share for row in rest),
        flop=sum(row.flop for row in rest),
        bytes=sum(row.bytes for row in rest),
        roofline_share=None,
    )
    return [*rows[: max_rows - 1], total]


def markdown(report: Report, max_rows: int | None = None) -> str:
    """Write a report as a Markdown document: a headline, facts, and a table."""
    on_gpu = report.device == "cuda"
    header = ["part", "calls", "ms", "of it backward", "share", "FLOP", "FLOP/s", "bytes", "bytes/s", "of roofline"]
    header += ["host ms"] if on_gpu else []
    lines = [f"## {report.title}", "", *facts(report), ""]
    lines += ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for row in _summed(report.rows, max_rows):
        cells = [row.name.replace("|", "/"), str(row.calls), f"{row.time_ms:.3f}", f"{row.backward_ms:.3f}"]
        cells += [f"{row.share:.1%}", si(row.flop), si(row.flop_per_s), si(row.bytes), si(row.bytes_per_s)]
        cells += ["" if row.roofline_share is None else f"{row.roofline_share:.1%}"]
        lines.append("| " + " | ".join([*cells, *([f"{row.host_ms:.3f}"] if on_gpu else [])]) + " |")
    return "\n".join(lines) + "\n"


def facts(report: Report) -> Iterable[str]:
    """Say what was measured, in sentences."""
    whose = "kernels on the GPU" if report.device == "cuda" else "operators and Python on the CPU"
    steps = f" {report.num_steps} steps." if report.num_steps else ""
    yield f"Time of {whose}: {report.total_ms:.1f} ms, wall time {report.wall_ms:.1f} ms.{steps}"
    if report.roofline is not None:
        limits = report.roofline
        yield (
            f"Roofline, measured ({limits.device}, {limits.dtype}): {si(limits.flop_per_s, 'FLOP/s')}, "
            f"{si(limits.bytes_per_s, 'B/s')}."
        )
    if not report.has_shapes:
        yield "The trace has no shapes (record_shapes=False): neither FLOP nor bytes."
    for device, peak in sorted(report.peak_bytes.items()):
        beyond = "beyond those at the start" if device == "cpu" else "at once"
        yield f"Most bytes on {device}, {beyond}: {si(peak, 'B')}."


def figure(report: Report, max_rows: int = 12) -> Any:
    """Draw time per row, forward and backward, and the share of the roofline beside it: a matplotlib `Figure`."""
    from matplotlib.figure import Figure

    rows = _summed(report.rows, max_rows)[::-1]
    names = [row.name for row in rows]
    with_roofline = report.roofline is not None
    drawing = Figure(figsize=(9.0, 1.3 + 0.32 * max(3, len(rows))), dpi=100, layout="constrained")
    axes = drawing.subplots(
        1, 2 if with_roofline else 1, sharey=True, squeeze=False, width_ratios=[2, 1][: 1 + with_roofline]
    )[0]
    forward = [row.time_ms - row.backward_ms for row in rows]
    axes[0].barh(names, forward, color=FORWARD_COLOUR, label="forward")
    if any(row.backward_ms for row in rows):
        axes[0].barh(names, [row.backward_ms for row in rows], left=forward, color=BACKWARD_COLOUR, label="backward")
        axes[0].legend(loc="lower right", frameon=False)
    for place, row in enumerate(rows):
        axes[0].text(row.time_ms, place, f" {row.share:.1%}", va="center", fontsize=8)
    axes[0].margins(x=0.12)
    axes[0].set_xlabel("ms of the GPU" if report.device == "cuda" else "ms")
    axes[0].set_title(f"{report.title}: {report.total_ms:.1f} ms", loc="left", fontsize=10)
    if with_roofline:
        shares = [100 * (row.roofline_share or 0.0) for row in rows]
        axes[1].barh(names, shares, color=ROOFLINE_COLOUR)
        for place, share in enumerate(shares):
            if share:
                axes[1].text(share, place, f" {share:.0f}%", va="center", fontsize=8)
        axes[1].set_xlim(0, max(100.0, *shares) * 1.15)
        axes[1].set_title("share of the measured roofline, %", loc="left", fontsize=10)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return drawing


def write_markdown(report: Report, path: Path) -> Path:
    """Write the table to ``path``, whose folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(report))
    return path


def write_png(report: Report, path: Path, max_rows: int = 12) -> Path:
    """Write the chart to ``path``, whose folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(report, max_rows).savefig(path, format="png")
    return path


def write_tensorboard(report: Report, logdir: Path, step: int = 0) -> Path:
    """Write table, chart and numbers as events that TensorBoard's own tabs show."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            "write_tensorboard: tensorboard must be installed, got none: pip install -e '.[profile]'"
        ) from error
    title = report.title
    with SummaryWriter(str(logdir)) as writer:
        writer.add_text(f"{title}/table", markdown(report), step)
        writer.add_figure(f"{title}/chart", figure(report), step)
        writer.add_scalar(f"{title}/total_ms", report.total_ms, step)
        for device, peak in report.peak_bytes.items():
            writer.add_scalar(f"{title}/peak_bytes/{device.replace(':', '_')}", peak, step)
        for row in report.rows:
            name = row.name
            writer.add_scalar(f"{title}/time_ms/{name}", row.time_ms, step)
            if row.flop:
                writer.add_scalar(f"{title}/gflop_per_s/{name}", row.flop_per_s / 1e9, step)
            if row.bytes:
                writer.add_scalar(f"{title}/gbyte_per_s/{name}", row.bytes_per_s / 1e9, step)
            if row.roofline_share is not None:
                writer.add_scalar(f"{title}/roofline_share/{name}", row.roofline_share, step)
    return logdir
