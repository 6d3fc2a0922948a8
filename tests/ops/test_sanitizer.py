"""Every kernel under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("every_kernel.py")


def run(*command: str) -> str:
    # The caching allocator would put tensors side by side, where an access beyond one's end goes unnoticed.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_calls_are_right() -> None:
    run(sys.executable, str(SCRIPT), "cpu")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels(tool: str, kernel_names: set[str]) -> None:
    """racecheck leaves out kernels of several partitions: it does not follow the barriers by which they meet.

    It reports the words by which Triton itself hands work to partitions; tests/ops/dsa/test_hopper_kernels.py looks for
    races in a model of these kernels, tests/ops/test_architectures.py in what is done before partitions begin.
    """
    options = ("--kernel-name-exclude", "kernel_substring=hopper") if tool == "racecheck" else ()
    text = run("compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9", sys.executable, str(SCRIPT))
    assert kernel_names <= set(text.split()), kernel_names - set(text.split())
