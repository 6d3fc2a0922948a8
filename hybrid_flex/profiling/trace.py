"""Record what ran when, for TensorBoard's profiler tab and for https://ui.perfetto.dev."""

from __future__ import annotations

import os
import socket
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from hybrid_flex.checks import check
from hybrid_flex.profiling.names import models_of, named

FILES: weakref.WeakKeyDictionary[profile, Path] = weakref.WeakKeyDictionary()
"""Where the trace of a profiler lies: torch writes each one out once."""


@contextmanager
def trace(
    logdir: str | os.PathLike[str],
    *,
    skip: int = 0,
    warmup: int = 0,
    active: int | None = None,
    name: str | None = None,
    model: nn.Module | Iterable[nn.Module] | None = None,
    record_shapes: bool = True,
    profile_memory: bool = True,
    with_stack: bool = False,
) -> Iterator[profile]:
    """Profile the body and write one trace, ``<name>.<time>.pt.trace.json``, into a folder.

    Without ``active`` the whole body is recorded.  With it, the body is a loop that calls ``step()`` once per turn: the
    first ``skip`` turns run unobserved, the next ``warmup`` turns start the profiler (their cost is not recorded), and
    the ``active`` turns after them are.

    Show the trace with ``pip install -e '.[profile]'`` and ``tensorboard --logdir <logdir>``; writing it needs neither.
    Our operators are rows of its operator table, named ranges (`range`, and those of ``model``) are bars of its
    timeline.  `report` makes a table of it, with FLOP/s, bytes/s and the share of the roofline.

    Args:
        logdir: folder of the trace, made if absent.
        skip: turns before the profiler starts, >= 0; needs ``active``.
        warmup: turns in which it runs and throws away, >= 0; needs ``active``. At least 1 is wise.
        active: turns to record, positive; None to record everything.
        name: beginning of the file name; host and process number by default.
        model: modules whose parts get ranges of their own while the body runs, see `named`.
        record_shapes: keep the shapes of every operator's inputs, which `report` needs for FLOP and bytes.
        profile_memory: keep allocations and releases.
        with_stack: keep Python source lines; slower.

    Yields:
        The `torch.profiler.profile`: call ``step()`` after each turn, or ``key_averages()`` after the body.

    Raises:
        ValueError: a count is out of its range, or ``skip`` or ``warmup`` come without ``active``.
        TypeError: ``model`` holds something that is no module.
        RuntimeError: the loop ended before the active turns, so that nothing was recorded.

    Device:
        CPU, and CUDA when there is a GPU.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with trace(folder, warmup=1, active=2) as profiler:
        ...         for _ in (1, 2, 3):
        ...             with range("product"):
        ...                 product = torch.ones(4, 4) @ torch.ones(4, 4)
        ...             profiler.step()
        ...     len(list(pathlib.Path(folder).glob("*.pt.trace.json")))
        1
    """
    op = "trace"
    check(skip >= 0, op, "skip", "be 0 or more", skip)
    check(warmup >= 0, op, "warmup", "be 0 or more", warmup)
    check(active is None or active > 0, op, "active", "be positive", active)
    check(active is not None or skip == warmup == 0, op, "active", "be given with skip or warmup", active)
    models = models_of(model)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    folder, worker = Path(logdir), f"{socket.gethostname()}_{os.getpid()}" if name is None else name
    folder.mkdir(parents=True, exist_ok=True)
    written = False

    def on_trace_ready(profiler: profile) -> None:
        nonlocal written
        # The name that torch-tb-profiler looks for: worker, time, ending.
        path = folder / f"{worker}.{time.time_ns()}.pt.trace.json"
        profiler.export_chrome_trace(str(path))
        FILES[profiler] = path
        written = True

    turns = None if active is None else schedule(wait=skip, warmup=warmup, active=active, repeat=1)
    with (
        profile(
            activities=activities,
            schedule=turns,
            on_trace_ready=on_trace_ready,
            record_shapes=record_shapes,
            profile_memory=profile_memory,
            with_stack=with_stack,
        ) as profiler,
        named(*models),
    ):
        yield profiler
    if not written:
        raise RuntimeError(
            f"trace: the body must call step() more than {skip + warmup} times, and ended before: nothing was recorded"
        )


def range(name: str) -> AbstractContextManager[object]:
    """Name what the body runs: one bar of the timeline, on the CPU and over the kernels it starts on a GPU.

    Outside a trace it costs about a microsecond; inside a compiled graph it names nothing and breaks nothing.

    Args:
        name: a short name, ``/`` between levels by convention: ``"block 3/mixer"``.

    Returns:
        A context manager.

    Raises:
        ValueError: the name is empty.

    Device:
        CPU and CUDA.

    Example:
        >>> with range("forward"):
        ...     torch.ones(2).sum().shape
        torch.Size([])
    """
    check(len(name) > 0, "range", "name", "not be empty", repr(name))
    return record_function(name)
