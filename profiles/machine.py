"""Facts about the machine that a profile ran on, and the memory that a call needs there."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import arguments_without_out, describe_device, versions

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Collect what timings depend on: the device, and on a CPU how busy it is with other things."""
    facts = describe_device(device)
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
        name = found[1] if found is not None else platform.processor() or platform.machine()
        facts |= {"name": name, "cores": os.cpu_count(), "load_at_start": os.getloadavg()[0]}
    return facts


def describe(machine: dict[str, Any], versions: dict[str, str], date: str) -> str:
    """Say in a line where and with what a report was made."""
    where = machine["name"]
    if "threads" in machine:
        where += f", {machine['threads']} threads, load of the machine at the start {machine['load_at_start']:.1f}"
    return f"{where}; torch {versions['torch']}, commit {versions['commit']}, {date}."


def facts_of_run(script: str, device: torch.device) -> dict[str, Any]:
    """Collect what stands in every report: date, command, machine and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"profiles/{script}", *arguments_without_out()]),
        "machine": describe_machine(device),
        "versions": versions(),
    }


def heading(title: str, report: dict[str, Any]) -> list[str]:
    """Begin a report: its title, where it was made, and by what in how many seconds."""
    return [
        f"# {title}",
        "",
        describe(report["machine"], report["versions"], report["date"]),
        f"Made by `{report['command']}` in {report['seconds']:.0f} s.",
        "",
    ]


# NOTE [Peak memory]: on a GPU torch counts what it allocates.  On a CPU: freed heap is given back to the kernel
# (malloc_trim), the kernel's high-water mark of the resident set is brought down to the present level (5 into
# /proc/self/clear_refs), and read again after the call (VmHWM).  It is everything the call needs beyond what lived
# before it: workspace, saved activations, output, gradients, fragmentation of the heap.


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call holds at most beyond those held before it; None where nothing tells."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def with_cpu_seconds(call: Callable[[], Any]) -> tuple[Callable[[], None], list[float]]:
    """Return the call, and a list to which each one adds the processor's seconds that it took.

    Where other programs use the cores too these say more than the wall clock: waiting for a core is not in them.
    """
    seconds: list[float] = []

    def counted() -> None:
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)

    return counted, seconds


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {key} in /proc/self/status")
    return int(found[1]) * 1024
