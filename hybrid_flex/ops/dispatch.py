"""How an operator is run: which form serves a tensor, in which precision, and what stands for it without this library.

NOTE [Plain forms]: a program that holds our operators as single nodes needs them registered where it is loaded.  Each
operator that layers call in a forward pass therefore has a plain form: a function with the operator's arguments and
results, of PyTorch's own operators only, that can be traced with open sizes.  For an operator whose body is traceable
this is the body itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Operator = TypeVar("Operator", bound=Callable[..., Any])

PLAIN_FORMS: dict[str, Callable[..., Any]] = {}
"""The plain form of each operator, by its name without the namespace."""

_kernels_wanted = True
_longest: int | None = None


def has_kernels(x: Tensor) -> bool:
    """Tell whether Triton kernels serve ``x``: on CUDA, in every dtype but float64."""
    return x.is_cuda and x.dtype != torch.float64 and _kernels_wanted


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let operators that are traced in the body take their plain forms on CUDA, too."""
    global _kernels_wanted
    before, _kernels_wanted = _kernels_wanted, False
    try:
        yield
    finally:
        _kernels_wanted = before


@contextmanager
def lengths_up_to(longest: int | None) -> Iterator[None]:
    """Tell operators that a program is exported in the body for sequences of at most ``longest`` tokens, or of any.

    While torch traces it, it does not know that bound itself.
    """
    global _longest
    before, _longest = _longest, longest
    try:
        yield
    finally:
        _longest = before


def longest(length: int) -> int:
    """Return what a length may be at most in the program that is being exported."""
    if isinstance(length, int):
        return length
    return sys.maxsize if _longest is None else _longest


def plain_form(*names: str) -> Callable[[Operator], Operator]:
    """Make a function the plain form of the operators ``names``: NOTE [Plain forms]."""

    def register(function: Operator) -> Operator:
        PLAIN_FORMS.update(dict.fromkeys(names, function))
        return function

    return register


def in_its_own_precision(operator: Operator) -> Operator:
    """Run the body of a registered operator without autocast.

    Autocast stays on inside an operator that is made of PyTorch's own, and would turn the products behind its float32
    sums and states into bfloat16.  An operator's dtypes follow from its arguments.
    """

    @functools.wraps(operator)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device.type
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return operator(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return operator(*args, **kwargs)

    return run  # type: ignore[return-value]
