"""Argument checks: the only validators of the package.

Every message reads ``"{op}: {argument} must {rule}, got {value}"``.  Shapes, dtypes and devices are compared on the
host and cost nothing under ``torch.compile`` (they become guards); the contents of a tensor are never read on a GPU,
because that would wait for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)


def check(ok: bool, op: str, argument: str, rule: str, value: object) -> None:
    """Raise ValueError ``"{op}: {argument} must {rule}, got {value}"`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{op}: {argument} must {rule}, got {value}")


def check_rank(op: str, argument: str, tensor: Tensor, legend: str) -> None:
    """Raise ValueError unless ``tensor`` has as many dimensions as ``legend`` names, e.g. ``"[B, T, H, K]"``."""
    rank = legend.count(",") + 1
    if tensor.dim() != rank:
        raise ValueError(f"{op}: {argument} must be {legend}, a tensor of rank {rank}, got shape {tuple(tensor.shape)}")


def check_shape(op: str, argument: str, tensor: Tensor, shape: Sequence[int | None], legend: str) -> None:
    """Raise ValueError unless ``tensor`` has exactly ``shape`` (None: any size), whose sizes ``legend`` names."""
    check_rank(op, argument, tensor, legend)
    for size, want in zip(tensor.shape, shape, strict=True):
        if want is not None and size != want:
            wanted = ", ".join("*" if s is None else str(s) for s in shape)
            raise ValueError(f"{op}: {argument} must be {legend} = [{wanted}], got shape {tuple(tensor.shape)}")


def check_dtype(op: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype of ``tensor`` is among ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {argument} must have dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_device(op: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` lies on ``device``; nothing is moved silently."""
    if tensor.device != device:
        raise ValueError(f"{op}: {argument} must be on {device}, like the other tensors, got {tensor.device}")


def check_choice(op: str, argument: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {argument} must be one of {', '.join(repr(c) for c in choices)}, got {value!r}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, batch_size: int, num_tokens: int) -> None:
    """Check packed-sequence boundaries ``[N + 1]``: integers from 0 to T that never decrease, with B = 1.

    Shape, dtype and B are always checked.  The values are read only from a CPU tensor outside a compiled or exported
    graph: on a GPU the read would wait for the device, inside a graph there are no values yet.
    """
    check_rank(op, "cu_seqlens", cu_seqlens, "[N + 1]")
    check_dtype(op, "cu_seqlens", cu_seqlens, INTEGER)
    check(batch_size == 1, op, "cu_seqlens", "come with a batch size of 1 (sequences are packed along T)", batch_size)
    if cu_seqlens.shape[0] < 2:  # formatted only on failure: formatting a symbolic size fixes it in a compiled graph
        raise ValueError(f"{op}: cu_seqlens must name at least one sequence, got {cu_seqlens.shape[0]} entries")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = cu_seqlens.tolist()
    check(values[0] == 0, op, "cu_seqlens", "start at 0", values[0])
    check(all(a <= b for a, b in itertools.pairwise(values)), op, "cu_seqlens", "never decrease", values)
    check(values[-1] == num_tokens, op, "cu_seqlens", f"end at T = {num_tokens}", values[-1])


def is_exporting() -> bool:
    """Tell whether a program is being exported.

    `torch.compiler.is_exporting` says so of everything that is compiled, up to torch 2.12.
    """
    return torch.compiler._is_exporting_flag


def is_plain(tensor: Tensor) -> bool:
    """Tell whether ``tensor`` holds numbers, rather than standing for some while a graph is traced."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
