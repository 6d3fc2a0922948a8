"""What every launcher needs: a kernel in the form its caller can run or trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton

from hybrid_flex.checks import is_plain

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def launchable(kernel: Any) -> Any:
    """Return ``kernel`` so that ``launchable(kernel)[grid](...)`` runs it, or becomes a graph node while tracing.

    Under Triton's interpreter (``TRITON_INTERPRET=1``, for tests without a GPU) a kernel is no `JITFunction` and cannot
    be traced; it is run as it is.
    """
    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


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
