"""Kernels run on a CUDA device, or under Triton's interpreter in a process of its own (see test_interpreter.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


def pytest_configure() -> None:
    if INTERPRETED:
        interpret_faster()


def interpret_faster() -> None:
    """Spare Triton's interpreter a third of its time.

    It prepares the language for the functions of a module whenever one of them is called, where once a launch is
    enough.  Where its parts have other names it is left as it is.
    """
    from triton.runtime import interpreter

    needed = ("_patch_lang", "GridExecutor", "InterpretedFunction", "InterpreterError")
    if not all(hasattr(interpreter, name) for name in needed):
        return
    prepared: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_unprepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_unprepared
    interpreter.InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where there is neither a device nor the interpreter."""
    if torch.cuda.is_available() or INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device or TRITON_INTERPRET=1; test_interpreter.py runs it so")
    for item in items:
        if HERE in item.path.parents and item.path.name != "test_interpreter.py":
            item.add_marker(skip)


@pytest.fixture
def device() -> str:
    """Return the device that kernels run on here."""
    return "cpu" if INTERPRETED else "cuda"
