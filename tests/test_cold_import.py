"""`import hybrid_flex` in a fresh process: without Triton, without heavy optional packages, with every operator."""

from __future__ import annotations

import json
from collections.abc import Callable

COLD_IMPORT = """
import json, sys, time
for name in sys.argv[1:]:
    sys.modules[name] = None          # `import name` now raises ModuleNotFoundError
start_s = time.perf_counter()
import torch
torch_s = time.perf_counter() - start_s
before = set(sys.modules)
import hybrid_flex
package_s = time.perf_counter() - start_s - torch_s
print(json.dumps({
    "torch_s": torch_s,
    "package_s": package_s,
    "loaded": sorted({name.split(".")[0] for name in set(sys.modules) - before if sys.modules[name] is not None}),
    "operators": sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hybrid_flex::")),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_is_light_and_registers_the_operators(fresh_process: Callable[..., str]) -> None:
    report = json.loads(fresh_process(COLD_IMPORT))
    heavy = {"transformers", "matplotlib", "tensorboard", "torch_tb_profiler", "tqdm", "fla", "pytest"}
    assert not heavy & set(report["loaded"])
    assert not report["cuda"], "importing the package must not touch the GPU"
    # Measured 2 s for torch and 2 s for torch's compiler parts, which registration pulls in, on two busy cores.
    assert report["package_s"] < 30
    forward = {name.removeprefix("hybrid_flex::") for name in report["operators"]}
    assert {"short_conv", "short_conv_backward", "gated_rms_norm", "gated_rms_norm_backward"} <= forward
    families = ("chunk_kda", "sparse_attention", "lightning_topk", "indexer_kl")
    for family in families:
        assert any(name.startswith(family) for name in forward), f"no operator {family} is registered"


def test_import_without_triton(fresh_process: Callable[..., str]) -> None:
    report = json.loads(fresh_process(COLD_IMPORT, "triton"))
    assert report["operators"]


def test_an_operator_runs_without_triton(fresh_process: Callable[..., str]) -> None:
    source = """
import sys
sys.modules["triton"] = None
import torch
from hybrid_flex.ops import short_conv
x = torch.ones(1, 3, 2, requires_grad=True)
y, _ = short_conv(x, torch.ones(2, 2))
y.sum().backward()
print(x.grad.isfinite().all().item())
"""
    assert fresh_process(source).strip() == "True"
