"""Our layers compute what transformers' modules compute with the same weights, gradients and selected keys included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5")
ROOT = Path(__file__).parents[1]


# 300 tokens: more than the 256 selected keys, and no multiple of a chunk.
@pytest.mark.slow
@pytest.mark.parametrize("contest", ["kda", "dsa", "dsa_full"])
def test_same_results_as_transformers(contest):
    command = [sys.executable, "profiles/cpu_layers.py", "--gate-only", "--lengths", "300", "--contests", contest]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
