"""Read a trace of torch's profiler: what ran inside what, under which name, and the kernels that it started.

A trace is the JSON that `trace` writes.  Per thread its events nest like calls; here every moment belongs to the
innermost event, and every event gets a label:

    where   the innermost range around it (`named`, `range`), or for backward work that of the forward operator that
            made the autograd node: the profiler's own links between the two
    what    the operator's kind (`kind_of`), for whatever runs inside an operator of ours or inside torch's attention
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_flex.checks import check
from hybrid_flex.profiling.names import kind_of

OTHERS = "others"
ACCUMULATION, OPTIMIZER, COMPILED = "accumulate_grad", "optimizer", "compiled_graph"
ENGINE = "autograd::engine::evaluate_function: "
_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ENDINGS = (".pt.trace.json", ".pt.trace.json.gz")
# Starts and ends are written with three digits of a microsecond.
_ROUNDING_US = 0.002


class Label(NamedTuple):
    """What an event is counted as."""

    path: str
    """Ranges from the outside in, ``block 3/mixer/kda_chunk``; "" outside of all."""
    backward: bool = False
    sealed: bool = False
    """Whether what runs inside it is counted as it, too."""


@dataclass(eq=False)
class Event:
    """One event of a host thread."""

    name: str
    category: str
    thread: tuple[Any, Any]
    start_us: float
    end_us: float
    arguments: dict[str, Any]
    parent: Event | None = None
    children: list[Event] = field(default_factory=list)
    label: Label = field(default_factory=lambda: Label(""))
    device_us: float = 0.0
    """Time of the kernels that it started itself."""

    @property
    def self_us(self) -> float:
        """Return its time without that of its children."""
        return max(0.0, self.end_us - self.start_us - sum(child.end_us - child.start_us for child in self.children))


@dataclass(frozen=True)
class Trace:
    """A trace that was read."""

    path: Path
    events: list[Event]
    """Events of all host threads, parents before children."""
    has_kernels: bool
    lost_kernels_us: float
    """Time of kernels whose launch is not in the trace."""
    peak_bytes: dict[str, int]
    """Per device, the most bytes allocated at once: beyond those at the start on a CPU, all of them on a GPU."""
    num_steps: int
    """Turns of a schedule, 0 without one."""

    def roots(self) -> Iterator[Event]:
        """Yield the events that nothing encloses."""
        return (event for event in self.events if event.parent is None)


def trace_file(source: str | os.PathLike[str]) -> Path:
    """Find the trace that a path names: a file, or the newest one of a folder and the folders in it.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    files = [file for ending in _ENDINGS for file in path.rglob(f"*{ending}")] if path.is_dir() else []
    check(len(files) > 0, "report", "source", "be a trace or a folder that holds one (*.pt.trace.json)", path)
    # The clock of a file system is coarse; `trace` writes its own into the name.
    return max(files, key=lambda file: (file.stat().st_mtime_ns, re.findall(r"\.(\d+)\.pt\.", file.name)))


def read_trace(path: Path) -> Trace:
    """Read a trace and label its events.

    Raises:
        ValueError: the file is no trace of torch's profiler.
    """
    # A hundred thousand small objects that all stay: looking for garbage among them is two thirds of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _read(path)
    finally:
        if collects:
            gc.enable()


def _read(path: Path) -> Trace:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", errors="replace") as file:
            raw = json.load(file)["traceEvents"]
    except (json.JSONDecodeError, KeyError, TypeError, gzip.BadGzipFile) as error:
        raise ValueError(f"report: source must be a trace of torch.profiler, got {path} ({error!r})") from error
    events = _nest([event for event in raw if event.get("ph") == "X" and event.get("cat") in _HOST])
    links = _links(raw, events)
    for event in events:
        _label(event, links)
    kernels = [event for event in raw if event.get("cat") in _DEVICE]
    lost = _give_kernels(kernels, events)
    num_steps = sum(event.name.startswith("ProfilerStep#") for event in events)
    return Trace(path, events, bool(kernels), lost, _peaks(raw), num_steps)


def _nest(raw: list[dict[str, Any]]) -> list[Event]:
    """Make the tree of each thread; parents come before their children."""
    events = [
        Event(
            event["name"],
            event["cat"],
            (event.get("pid"), event.get("tid")),
            float(event["ts"]),
            float(event["ts"]) + float(event.get("dur", 0.0)),
            event.get("args", {}),
        )
        for event in raw
    ]
    # A range that an operator fills wholly was opened before it.
    events.sort(key=lambda e: (e.start_us, -e.end_us, e.category != "user_annotation"))
    stacks: dict[tuple[Any, Any], list[Event]] = {}
    for event in events:
        stack = stacks.setdefault(event.thread, [])
        while stack and (stack[-1].end_us <= event.start_us or stack[-1].end_us < event.end_us - _ROUNDING_US):
            stack.pop()
        if stack:
            event.parent = stack[-1]
            stack[-1].children.append(event)
        stack.append(event)
    return events


def _links(raw: list[dict[str, Any]], events: list[Event]) -> dict[int, Event]:
    """Map the id of an autograd node's event to the forward operator that made the node."""
    at = {(event.thread, event.start_us): event for event in events}
    sources: dict[Any, Event] = {}
    targets: dict[Any, Event] = {}
    for event in raw:
        if event.get("cat") == "fwdbwd":
            found = at.get(((event.get("pid"), event.get("tid")), float(event["ts"])))
            if found is not None:
                (sources if event.get("ph") == "s" else targets)[event["id"]] = found
    links: dict[int, Event] = {}
    for identity, target in targets.items():
        if identity in sources:
            # The engine's event around the node also holds the sums of gradients that meet there.
            engine = target.parent is not None and target.parent.name.startswith(ENGINE)
            links[id(target.parent if engine else target)] = sources[identity]
    return links


def _label(event: Event, links: dict[int, Event]) -> None:
    """Say what an event is counted as; its parent and whatever it is linked to have their labels already."""
    outer = event.parent.label if event.parent is not None else Label("")
    event.label = outer
    if outer.sealed:
        return
    name = event.name
    if event.category == "user_annotation":
        if name.startswith("Optimizer."):
            event.label = Label(OPTIMIZER)
        elif not name.startswith("ProfilerStep#"):
            event.label = Label(name, outer.backward)
        return
    if id(event) in links:
        event.label = outer = Label(links[id(event)].label.path, backward=True)
    elif name.startswith(ENGINE):
        event.label = outer = Label(ACCUMULATION if "AccumulateGrad" in name else OTHERS, backward=True)
    kind = kind_of(name)
    if kind is not None:
        path, _, last = outer.path.rpartition("/")
        inside = outer.path if last != kind else path
        event.label = Label(f"{inside}/{kind}" if inside else kind, outer.backward, sealed=True)
    elif name.startswith(("Torch-Compiled Region", "CompiledFunction")):
        event.label = Label(f"{outer.path}/{COMPILED}" if outer.path else COMPILED, outer.backward)


def _give_kernels(kernels: list[dict[str, Any]], events: list[Event]) -> float:
    """Add the time of every kernel to the host event that launched it; return the time of those without one."""
    launches: dict[Any, Event] = {}
    operators: dict[Any, Event] = {}
    for event in events:
        if event.category.startswith("cuda_"):
            launches[event.arguments.get("correlation")] = event
        elif "External id" in event.arguments:
            operators[event.arguments["External id"]] = event
    lost = 0.0
    for kernel in kernels:
        arguments = kernel.get("args", {})
        owner = launches.get(arguments.get("correlation")) or operators.get(arguments.get("External id"))
        if owner is None:
            lost += float(kernel["dur"])
        else:
            owner.device_us += float(kernel["dur"])
    return lost


def _peaks(raw: list[dict[str, Any]]) -> dict[str, int]:
    """Follow the allocations of every device."""
    held: dict[str, int] = {}
    peaks: dict[str, int] = {}
    memory = [event for event in raw if event.get("name") == "[memory]"]
    for event in sorted(memory, key=lambda e: float(e["ts"])):
        arguments = event["args"]
        on_cpu = arguments.get("Device Type") == 0
        device = "cpu" if on_cpu else f"cuda:{arguments.get('Device Id')}"
        # A CPU's total begins at zero with the trace, whatever is allocated by then.
        held[device] = held.get(device, 0) + arguments["Bytes"] if on_cpu else arguments["Total Allocated"]
        peaks[device] = max(peaks.get(device, 0), held[device])
    return peaks
