"""What every launcher needs: a kernel in the form its caller can run or trace."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import triton
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hybrid_flex.checks import is_plain

Launcher = TypeVar("Launcher", bound=Callable[..., Any])
Compilation = functools.partial[Any]

_collected: ContextVar[list[Compilation] | None] = ContextVar("collected", default=None)


class _Collector:
    """A kernel whose launches are noted down as compilations, and not made."""

    def __init__(self, kernel: Any, found: list[Compilation]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            self.found.append(functools.partial(self.kernel.warmup, *args, grid=grid, **kwargs))

        return note


def launchable(kernel: Any, x: torch.Tensor | None = None) -> Any:
    """Return ``kernel`` so that ``launchable(kernel)[grid](...)`` runs it, or becomes a graph node while tracing.

    Under Triton's interpreter (``TRITON_INTERPRET=1``, for tests without a GPU) a kernel is no `JITFunction` and cannot
    be traced; it is run as it is.  So is a kernel for ``x``, one of its tensors, that holds numbers: inside of a
    ``triton_op`` torch sees to that itself, elsewhere its wrapper would take a millisecond for every launch, and note
    it down in a table that nobody empties.
    """
    if not isinstance(kernel, triton.JITFunction):
        return kernel
    found = _collected.get()
    if found is not None:
        return _Collector(kernel, found)
    return kernel if x is not None and is_plain(x) else torch.library.wrap_triton(kernel)


def computed_once(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, which several launches read, so that a compiled graph computes it once.

    Inductor would fuse what computes it into a copy for each launch: 32 of the rotated queries of an indexer, 34 GB at
    131072 tokens with 32 heads of 128.  It keeps what is read with other strides, even if they are the same.
    """
    if is_plain(x):
        return x
    # Only what is all of its memory: as_strided counts from the start of that, wherever a graph may lay it.
    with disable_proxy_modes_tracing():  # these sizes are no part of the graph
        from_start = statically_known_true(x.storage_offset() == 0)
        whole = from_start and statically_known_true(x.numel() * x.element_size() == x.untyped_storage().nbytes())
    return x.as_strided(x.shape, x.stride()) if whole else x


UNBOUNDED = 1 << 62


def upper_bound(size: Any, otherwise: int = UNBOUNDED) -> int:
    """Return the largest value that a size may have where a graph leaves it open, or ``otherwise`` without a bound."""
    if isinstance(size, int):
        return size
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else otherwise


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, which is at least 1; Triton's takes ten times as long."""
    return 1 << (n - 1).bit_length()


HOPPER_BYTES = 232448
"""Shared memory that a block of compute capability 9.0 may use."""


def device_limits(device: torch.device) -> tuple[int, int]:
    """Return how much shared memory one block may use, and the major number of the compute capability.

    A CPU, where kernels are interpreted or compiled only, stands for compute capability 9.0.
    """
    if device.type != "cuda":
        return HOPPER_BYTES, 9
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin), int(properties.major)


# NOTE [Narrow products]
# Triton 3.6 gave a product of [64, 64] and [64, 32] in bfloat16 a wrong address in shared memory
# (seen with compute-sanitizer on an H100).  Products of 64 rows are therefore at least 64 columns wide, and smaller
# heads are padded.
NARROWEST = 64


def product_precision(x: torch.Tensor) -> str:
    """Name the form of products: three parts of tf32 keep float32's digits, 16 bits are exact in one pass."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def two_widths(width: int) -> tuple[int, int]:
    """Split a width into powers of two of at least 16, the second 0 where one is not wider: 576 = 512 + 64."""
    whole = max(16, next_power_of_2(width))
    main, rest = whole // 2, max(16, next_power_of_2(max(width - whole // 2, 1)))
    return (main, rest) if main + rest < whole else (whole, 0)


def compilations(call: Callable[[], object]) -> list[Compilation]:
    """Return what compiles the kernels that ``call`` launches; nothing is launched, so what it computes is garbage."""
    found: list[Compilation] = []
    token = _collected.set(found)
    try:
        call()
    finally:
        _collected.reset(token)
    return found


def compile_ahead(call: Callable[[], object], device: torch.device) -> None:
    """Compile the kernels that ``call`` launches, side by side, and launch nothing.

    Triton compiles a kernel when it is first launched, one after the other.  What fails here will fail there again.
    """
    found = compilations(call)
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        for compilation in [pool.submit(compile_one) for compile_one in found]:
            compilation.exception()


def on_its_device(launcher: Launcher) -> Launcher:
    """Let a launcher run with the device of its first argument, a tensor or a tuple of them, as the current one.

    Triton launches on the current device, whatever the tensors say.
    """

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        if not (is_plain(x) and x.is_cuda and x.device.index != torch.cuda.current_device()):
            return launcher(*args, **kwargs)
        with torch.cuda.device(x.device):
            return launcher(*args, **kwargs)

    return launch  # type: ignore[return-value]
