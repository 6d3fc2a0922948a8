"""Run the tests of this folder under Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def release(package: str) -> tuple[int, int]:
    """Return the first two numbers of a package's version, zeros if it is not installed."""
    try:
        major, minor = importlib.metadata.version(package).split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


# Seen with Triton 3.6.0: NumPy 2.3.5 works, 2.4.6 refuses a conversion that it makes.
FAILS_ALONE = release("triton") < (3, 7) and release("numpy") >= (2, 4)
KERNEL_TESTS = sorted(set(Path(__file__).parent.rglob("test_*.py")) - {Path(__file__)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests run on the device itself")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process under the interpreter")
@pytest.mark.skipif(FAILS_ALONE, reason="Triton's interpreter before 3.7 needs numpy before 2.4")
@pytest.mark.parametrize("path", KERNEL_TESTS, ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout
