"""The kernel-by-kernel profile of chunk_kda runs on every machine and names times and errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_quick_profile_on_a_cpu() -> None:
    command = [sys.executable, "profiles/kda_kernels.py", "--device", "cpu", "--quick"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+): [\d.]+ ms a step$", done.stdout, re.M) == ["train_lower_bound", "train_softplus"]
    errors = [float(e) for e in re.findall(r"\w+ (\d\.\de-\d\d)", done.stdout)]
    assert len(errors) == 2 * 9 and max(errors) < 0.05, done.stdout
