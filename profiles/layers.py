"""Time every layer of hybrid_flex alone, on a CPU or a GPU: KDA, DSA (GQA and MLA), dense attention, both hybrids.

    pip install -e . && python profiles/layers.py

For every layer and length, a forward without gradients and a forward with backward; with --compile also compiled:
  Correctness, before anything is timed: output and gradient of the input against the layer in float64 with the same
    weights (DSA layers also with the same selection).  Beyond the bound of NOTE [Bounds] there is no time, but FAIL.
  Time: the wall clock on a CPU, CUDA events on a GPU; eager and compiled take turns; median, 20th and 80th percentile.
  FLOP: torch.utils.flop_counter with hybrid_flex's formulas; the share of the roofline is that of the larger limit,
    products of matrices, measured at the start.
  Memory: what a call holds at most beyond weights and input, NOTE [Peak memory] in machine.py.

Tables go to profiles/results/layers_<device>_<yyyymmdd>.md, everything measured to the .json beside it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    RESULTS,
    Clock,
    Plan,
    describe_error,
    free_memory,
    relative_error,
    report_stem,
    spread,
    table,
    take_turns,
    write_report,
)
from machine import DTYPES, facts_of_run, heading, peak_bytes, with_cpu_seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hybrid_flex import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    KimiDeltaAttention,
    ParallelHybrid,
    SequentialHybrid,
    profiling,
)

PASSES = ("forward", "train")
# NOTE [Bounds]: relative L2 error of output and input gradient, about ten times the largest one of any layer with the
# default widths on a CPU: 5.6e-7 in float32, 8.1e-3 in bfloat16, 1.0e-3 in float16.  A hybrid selects for itself, in
# float64 too; no selection differed there.  In float64 a layer is compared with itself.
BOUNDS = {"float64": 1e-10, "float32": 6e-6, "bfloat16": 8e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Sizes:
    """Widths that all layers share."""

    hidden_size: int
    num_heads: int
    topk: int
    batch_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def kda(self) -> nn.Module:
        return KimiDeltaAttention(self.hidden_size, self.num_heads, self.head_dim)

    def gqa(self) -> nn.Module:
        kv_heads = max(1, self.num_heads // 4)
        options: dict[str, Any] = {"topk": self.topk, "index_heads": 4, "index_head_dim": 32}
        return DeepSeekSparseAttention(self.hidden_size, self.num_heads, num_kv_heads=kv_heads, **options)

    def mla(self) -> nn.Module:
        options: dict[str, Any] = {"topk": self.topk, "index_heads": 4, "index_head_dim": 32}
        widths = {"kv_lora_rank": 2 * self.head_dim, "qk_nope_head_dim": self.head_dim, "v_head_dim": self.head_dim}
        return DeepSeekSparseMLA(self.hidden_size, self.num_heads, **widths, **options)

    def causal(self) -> nn.Module:
        kv_heads = max(1, self.num_heads // 4)
        return CausalAttention(self.hidden_size, self.num_heads, num_kv_heads=kv_heads)

    def sequential(self) -> nn.Module:
        return SequentialHybrid(self.kda(), self.gqa())  # type: ignore[arg-type]

    def parallel(self) -> nn.Module:
        return ParallelHybrid(self.kda(), self.gqa())  # type: ignore[arg-type]


LAYERS = {
    "kda": "KimiDeltaAttention",
    "gqa": "DeepSeekSparseAttention (GQA)",
    "mla": "DeepSeekSparseMLA",
    "causal": "CausalAttention",
    "sequential": "SequentialHybrid (KDA, GQA)",
    "parallel": "ParallelHybrid (KDA, GQA)",
}


def run(layer: Callable[..., Any], x: Tensor, dy: Tensor | None, **options: Any) -> dict[str, Tensor]:
    """Run a layer: the output alone without ``dy``, else with the gradient of the input."""
    if dy is None:
        with torch.no_grad():
            return {"y": layer(x, **options)[0]}
    x = x.detach().requires_grad_()
    y = layer(x, **options)[0]
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad}


def errors_of(layer: nn.Module, call: Callable[..., Any], x: Tensor, dy: Tensor | None) -> dict[str, float]:
    """Compare a contender with its layer in float64."""
    options = {}
    if isinstance(layer, (DeepSeekSparseAttention, DeepSeekSparseMLA)):
        with torch.no_grad():
            options = {"indices": layer.attend(x)[2]}
    exact = run(copy.deepcopy(layer).double(), x.double(), None if dy is None else dy.double(), **options)
    found = run(call, x, dy)
    layer.zero_grad(set_to_none=True)
    return {name: relative_error(found[name], exact[name]) for name in exact}


def measure(
    layer: nn.Module, contenders: dict[str, Callable[..., Any]], x: Tensor, dy: Tensor | None, plan: Plan, bound: float
) -> dict[str, dict[str, Any]]:
    """Measure all contenders of one layer, length and pass."""
    with FlopCounterMode(display=False) as counter:
        run(layer, x, dy)
    layer.zero_grad(set_to_none=True)
    found: dict[str, dict[str, Any]] = {}
    calls, cpu_seconds = {}, {}
    for name, contender in contenders.items():

        def call(contender: Callable[..., Any] = contender) -> None:
            run(contender, x, dy)
            layer.zero_grad(set_to_none=True)

        try:
            begin = time.perf_counter()
            call()
            own: dict[str, Any] = {"flop": counter.get_total_flops(), "first_call_s": time.perf_counter() - begin}
            found[name] = own | {"errors": errors_of(layer, contender, x, dy)}
            # Written so that an error which is no number fails.
            found[name]["passed"] = all(error <= bound for error in found[name]["errors"].values())
            if found[name]["passed"]:
                found[name]["peak_bytes"] = peak_bytes(call, x.device)
                calls[name], cpu_seconds[name] = with_cpu_seconds(call)
        except Exception as error:  # a row that fails is reported, and the next one runs
            found[name] = {"failed": describe_error(error), "passed": False}
            layer.zero_grad(set_to_none=True)
            free_memory(x.device)
    if calls:
        for name, seconds in take_turns(calls, Clock(x.device), plan).items():
            found[name] |= spread(seconds) | {"repeats": len(seconds)}
            if x.device.type == "cpu":
                found[name]["cpu_median_ms"] = statistics.median(cpu_seconds[name][-len(seconds) :]) * 1e3
            found[name]["flop_per_s"] = found[name]["flop"] / found[name]["median_ms"] * 1e3
    return found


def cells(row: dict[str, Any], name: str, own: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """Lay out a contender of a row."""
    begin = [LAYERS[row["layer"]], str(row["T"]), row["pass"], name]
    if "failed" in own:
        return [*begin, own["failed"], *[""] * (len(HEADER) - 5)]
    error = ", ".join(f"{key} {value:.1e}" for key, value in own["errors"].items())
    if not own["passed"]:
        return [*begin, f"FAIL {error}", *[""] * (len(HEADER) - 5)]
    tokens = row["T"] * row["batch_size"]
    peak = own["peak_bytes"]
    return [
        *begin,
        f"{own['median_ms']:.2f} ({own['p20_ms']:.2f}-{own['p80_ms']:.2f})",
        f"{own['cpu_median_ms']:.2f}" if "cpu_median_ms" in own else "",
        f"{own['median_ms'] * 1e3 / tokens:.1f}",
        f"{own['flop'] / 1e9:.3f}",
        f"{own['flop_per_s'] / 1e9:.1f}",
        f"{own['flop_per_s'] / limits['flop_per_s']:.0%}",
        "" if peak is None else f"{peak / 2**20:.1f}",
        error,
    ]


HEADER = {"layer": "---", "T": "---:", "pass": "---", "mode": "---", "ms": "---:", "CPU ms": "---:"}
HEADER |= {
    "us per token": "---:",
    "GFLOP": "---:",
    "GFLOP/s": "---:",
    "of roofline": "---:",
    "peak MiB": "---:",
    "error": "---",
}


def markdown(report: dict[str, Any]) -> str:
    """Write the report as a Markdown document."""
    limits, sizes = report["roofline"], report["sizes"]
    lines = [
        *heading("Layers alone", report),
        ", ".join(f"{key} {value}" for key, value in sizes.items()) + f", {report['dtype']}.",
        "Time: median (20th to 80th percentile) of calls; CPU ms: median of the processor's time, without waiting for "
        "a core that another program has. `train` is a forward and its backward. FLOP of dense attention include "
        "masked pairs, as torch counts them. Peak: what a call holds beyond weights and input. "
        "Error: relative L2 against the layer in float64. The roofline of products is "
        f"{limits['flop_per_s'] / 1e9:.0f} GFLOP/s, measured at the start ({limits['device']}, {limits['dtype']}).",
        "",
    ]
    rows = [cells(row, name, own, limits) for row in report["rows"] for name, own in row["contenders"].items()]
    return "\n".join([*lines, *table(HEADER, rows)]) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=list(LAYERS), help="default: all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048], help="T (default: 512 1024 2048)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")
    parser.add_argument("--hidden-size", type=int, default=256, help="model width (default: %(default)s)")
    parser.add_argument("--num-heads", type=int, default=4, help="heads, of hidden-size / num-heads (default: 4)")
    parser.add_argument("--topk", type=int, default=128, help="keys that a query selects (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: float32, bfloat16 on a GPU")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch on a CPU; 1 where others use the cores too")
    parser.add_argument("--compile", action="store_true", help="measure compiled layers too (minutes on a CPU)")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend per time, at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to (default: profiles/results)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sizes = Sizes(options.hidden_size, options.num_heads, options.topk, options.batch_size)
    plan = Plan(min_rounds=5, min_seconds=options.seconds, max_seconds=4 * options.seconds, warm_up_rounds=1)
    facts = facts_of_run("layers.py", device)
    limits = profiling.measure_roofline(device, DTYPES[dtype])
    report: dict[str, Any] = {
        **facts,
        "sizes": vars(sizes),
        "dtype": dtype,
        "bound": BOUNDS[dtype],
        "roofline": vars(limits),
        "rows": [],
    }
    bar = tqdm(total=len(options.layers) * len(options.lengths) * len(options.passes), file=sys.stderr)
    for name in options.layers:
        layer = getattr(sizes, name)().to(device=device, dtype=DTYPES[dtype])
        contenders: dict[str, Callable[..., Any]] = {"eager": layer}
        if options.compile:
            contenders["compiled"] = torch.compile(layer, fullgraph=True, dynamic=True)
        for num_tokens in sorted(options.lengths):
            x = torch.randn(sizes.batch_size, num_tokens, sizes.hidden_size, device=device).to(DTYPES[dtype])
            for which in options.passes:
                bar.set_description(f"{name} T {num_tokens} {which}")
                dy = torch.randn_like(x) if which == "train" else None
                found = measure(layer, contenders, x, dy, plan, BOUNDS[dtype])
                row = {"layer": name, "T": num_tokens, "batch_size": sizes.batch_size, "pass": which}
                report["rows"].append(row | {"contenders": found})
                bar.update()
        torch._dynamo.reset()
        free_memory(device)
    bar.close()
    report["seconds"] = time.perf_counter() - begin
    stem = report_stem(options.out, "layers", report["machine"]["name"])
    write_report(stem, report, markdown(report))
    print(markdown(report))
    print(f"written to {stem}.md and .json", file=sys.stderr)


if __name__ == "__main__":
    main()
