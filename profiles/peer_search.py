"""A shorter wait for the peer's tile search.

flash-linear-attention's kernels search for their best tile on first use, and compile one candidate after the other.
Processes that each compile a share of the candidates, into Triton's cache on disk, leave the search only the timing: it
takes less long and finds the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def share_search(share: int, num_shares: int) -> None:
    """From now on let every tile search of this process know only its share of the candidates."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def prune_to_share(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        return configs[share::num_shares] or configs[:1]

    Autotuner.prune_configs = prune_to_share


def fill_cache(script: str, arguments: list[str]) -> None:
    """Run ``script --search-share i n`` with the arguments in as many processes as there are cores, and wait for them.

    What a process fails at, the search meets again.
    """
    num = os.cpu_count() or 1
    begin = [sys.executable, script, *arguments, "--search-share"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for process in [subprocess.Popen([*begin, str(i), str(num)], **quiet) for i in range(num)]:  # type: ignore[call-overload]
        process.wait()
