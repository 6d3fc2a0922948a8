"""Measure the two limits of a machine: FLOP/s of large matrix products, bytes/s of large copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybrid_flex.checks import FLOATING, check, check_choice

_COPY_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Larger than any cache: 128 MiB, 512 MiB."""
_WIDEST = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Roofline:
    """What a device reaches at best: work that needs more of either cannot take less time.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the products, ``"bfloat16"``.
        flop_per_s: FLOP/s of a product of large square matrices.
        bytes_per_s: bytes/s of a large copy, read and written ones together.

    Device:
        any.

    Example:
        >>> Roofline("cpu", "float32", 1e11, 1e10).seconds(flop=2e9, num_bytes=1e9)
        0.1
    """

    device: str
    dtype: str
    flop_per_s: float
    bytes_per_s: float

    def seconds(self, flop: float, num_bytes: float) -> float:
        """Return the least time for work: ``max(flop / flop_per_s, num_bytes / bytes_per_s)``."""
        return max(flop / self.flop_per_s, num_bytes / self.bytes_per_s)


def measure_roofline(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, seconds: float = 0.4
) -> Roofline:
    """Measure what products and copies reach on a device, now and with the threads that torch has.

    Args:
        device: where.
        dtype: of the matrices.
        seconds: time to spend, about, half of it for each; more steadies the result.

    Returns:
        The best of all repetitions.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device, or ``seconds`` is not positive.
        TypeError: the dtype is not bfloat16, float16, float32 or float64.
        RuntimeError: there is no such device (torch says so).

    Device:
        CPU and CUDA.

    Example:
        >>> limits = measure_roofline("cpu", seconds=0.02)
        >>> limits.device, limits.dtype, limits.flop_per_s > 0, limits.bytes_per_s > 0
        ('cpu', 'float32', True, True)
    """
    op, device = "measure_roofline", torch.device(device)
    check_choice(op, "device", device.type, ("cpu", "cuda"))
    check(seconds > 0, op, "seconds", "be positive", seconds)
    if dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype}")
    with torch.no_grad():
        flop_per_s = _best_product(device, dtype, seconds / 2)
        bytes_per_s = _best_copy(device, seconds / 2)
    return Roofline(device.type, str(dtype).removeprefix("torch."), flop_per_s, bytes_per_s)


def _best_product(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the FLOP/s of the best product; matrices grow until one takes a tenth of the time."""
    best, n, begin = 0.0, 256, time.perf_counter()
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        product()  # the first of a size sets libraries up
        took = _time(product, device)
        best = max(best, 2 * n**3 / took)
        if took * 8 < seconds / 10 and n < _WIDEST[device.type]:
            n *= 2
            continue
        while time.perf_counter() - begin < seconds:
            best = max(best, 2 * n**3 / _time(product, device))
        return best


def _best_copy(device: torch.device, seconds: float) -> float:
    """Return the bytes/s of the best copy."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    best, begin = 0.0, time.perf_counter()
    _time(copy, device)  # the target's pages come to be
    while True:
        best = max(best, 2 * source.numel() / _time(copy, device))
        if time.perf_counter() - begin > seconds:
            return best


def _time(call: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one call, on the device's own clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    with torch.cuda.device(device):
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # the one that is timed finds the device at work, and no launch in the time
        begin_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return float(begin_event.elapsed_time(end_event)) / 1e3
