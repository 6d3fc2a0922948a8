"""What every launcher needs: a kernel in the form its caller can run or trace."""

from __future__ import annotations

from typing import Any

import torch
import triton


def launchable(kernel: Any) -> Any:
    """Return ``kernel`` so that ``launchable(kernel)[grid](...)`` runs it, or becomes a graph node while tracing.

    Under Triton's interpreter (``TRITON_INTERPRET=1``, for tests without a GPU) a kernel is no `JITFunction` and cannot
    be traced; it is run as it is.
    """
    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel
